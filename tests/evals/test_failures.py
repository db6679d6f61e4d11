"""Images with neighbours that differ most from the teacher's, compared with a full sort for one image at a time."""

import numpy as np
import pytest

from bingo.evals.failures import least_agreement
from bingo.evals.knn import nearest_train


def compared(features_ND, teacher_ND, train_rows, test_rows):
    """`least_agreement` with the 9 nearest, or all train rows."""
    k = min(9, train_rows)
    rows = (
        nearest_train(x[:train_rows], x[test_rows], k)[0] if len(test_rows) else np.empty((0, k), int) for x in (features_ND, teacher_ND)
    )
    return least_agreement(*rows, teacher_ND, test_rows)


def by_hand(features_ND, teacher_ND, train_rows, test_rows):
    """[(row, common, teacher's rows, network's rows, the teacher's cosines to each)], in the documented order."""

    def cosine(x, a, b):
        return float(x[a] @ x[b] / (np.linalg.norm(x[a]) * np.linalg.norm(x[b])))

    k, found = min(5, train_rows), []
    for row in test_rows:
        ours, theirs = ([*sorted(range(train_rows), key=lambda t, x=x: -cosine(x, row, t))][:k] for x in (features_ND, teacher_ND))
        cosines = [[cosine(teacher_ND, row, t) for t in rows] for rows in (theirs, ours)]
        found.append((row, len(set(ours) & set(theirs)), theirs, ours, cosines))
    worst = sorted(found, key=lambda x: (x[1], np.mean(x[4][1]) - np.mean(x[4][0])))
    return [x for x in worst if x[1] < k][:10]


@pytest.mark.parametrize(("train_rows", "rows"), [(40, 70), (3, 9), (200, 203)])
def test_failures_have_the_fewest_common_neighbours_and_then_the_least_similar(train_rows, rows):
    rng = np.random.default_rng(train_rows)
    teacher_ND = rng.standard_normal((rows, 4)) * rng.uniform(0.1, 9, (rows, 1))
    features_ND = teacher_ND[:, :2] + rng.standard_normal((rows, 2))
    found = compared(features_ND, teacher_ND.astype(np.float32), train_rows, np.arange(train_rows, rows))
    wanted = by_hand(features_ND, teacher_ND, train_rows, range(train_rows, rows))
    assert (found["k"], found["queries"]) == (min(5, train_rows), rows - train_rows)
    assert [(image["row"], image["common"]) for image in found["images"]] == [image[:2] for image in wanted]
    for image, (_, _, theirs, ours, cosines) in zip(found["images"], wanted, strict=True):
        assert [[row for row, _ in image[name]] for name in ("teacher", "network")] == [theirs, ours]
        assert np.allclose([[cosine for _, cosine in image[name]] for name in ("teacher", "network")], cosines, atol=1e-4)


def test_only_test_rows_are_compared_and_images_that_agree_are_not_listed():
    x_ND = np.random.default_rng(0).standard_normal((30, 3)).astype(np.float16)
    assert compared(x_ND, x_ND, 20, np.arange(20, 30))["images"] == []
    other_ND = x_ND.copy()
    other_ND[25] *= -1  # its nearest are now its farthest
    found = compared(other_ND, x_ND, 20, np.arange(20, 30))
    assert [(image["row"], image["common"]) for image in found["images"]] == [(25, 0)]
    assert compared(other_ND, x_ND, 20, np.array([22, 28]))["images"] == []
    assert compared(x_ND, x_ND, 20, np.array([], int)) == {}


def test_of_many_test_images_2000_evenly_spread_ones_are_compared():
    rng = np.random.default_rng(0)
    teacher_ND, features_ND = rng.standard_normal((4050, 3)), rng.standard_normal((4050, 3))
    found = compared(features_ND, teacher_ND, 50, np.arange(50, 4050))
    assert found["queries"] == 2000
    assert all(image["row"] % 2 == 0 for image in found["images"]), "every second one"
