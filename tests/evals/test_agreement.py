"""Agreement with the teacher against its definition in loops."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from bingo.evals.agreement import TeacherAgreement, neighbor_agreement
from bingo.evals.knn import nearest_train

KS = [1, 10, 100]


@pytest.fixture(scope="module")
def features():
    """Pixels of digits as the teacher's features, and a coarse version of them as a network's; the first 600 rows are train images."""
    images = load_digits().images[:900] + np.random.default_rng(0).random((900, 8, 8))  # no exact ties between rows
    coarse = images.reshape(900, 4, 2, 4, 2).mean(axis=(2, 4))
    return images.reshape(900, -1).astype(np.float32), coarse.reshape(900, -1).astype(np.float32)


@pytest.mark.parametrize("k", KS)
def test_it_is_the_mean_share_of_common_neighbours(features, k):
    sets = []
    for rows in features:
        search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(rows[:600].astype(np.float64))
        sets.append([set(found) for found in search.kneighbors(rows[600:].astype(np.float64), return_distance=False)])
    expected = 100 * np.mean([len(a & b) / k for a, b in zip(*sets, strict=True)])
    assert 0 < expected < 100
    teacher, network = features
    found = TeacherAgreement(SimpleNamespace(features_ND=teacher), 600, KS).of(nearest_train(network[:600], network[600:], 100)[0])
    assert list(found) == [f"agreement_{k}" for k in KS]
    assert found[f"agreement_{k}"] == pytest.approx(expected, abs=1e-5)


def test_the_teacher_agrees_with_itself_and_a_random_order_by_chance(features):
    rows = nearest_train(features[0][:600], features[0][600:], 100)[0]
    assert set(neighbor_agreement(rows, rows, KS).values()) == {100.0}
    random = np.random.default_rng(1)
    shuffled = np.stack([random.permutation(600)[:100] for _ in rows]).astype(np.int32)
    assert neighbor_agreement(shuffled, rows, [100])["agreement_100"] == pytest.approx(100 * 100 / 600, abs=1)


def test_order_within_the_k_nearest_does_not_count():
    assert neighbor_agreement(np.array([[3, 5, 7]]), np.array([[7, 3, 9]]), [1, 2, 3]) == {
        "agreement_1": 0.0,
        "agreement_2": 50.0,
        "agreement_3": pytest.approx(66.666667),
    }
