"""Agreement with the teacher against its definition in loops."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from bingo.datasets.sources import memory_listing
from bingo.evals.agreement import agreed_hits, neighbor_agreement, neighbor_hits, neighbor_scores
from bingo.evals.finetune import task_of
from bingo.evals.knn import nearest_train
from bingo.params import load_params

KS = [1, 10, 100]
LISTING = memory_listing("digits", [str(row) for row in range(900)], np.full(900, -1), 600, [], np.zeros((900, 1, 1, 3), np.uint8))


@pytest.fixture(scope="module")
def features():
    """Pixels of digits as the teacher's features, and a coarse version of them as a network's; the first 600 rows are train images."""
    images = load_digits().images[:900] + np.random.default_rng(0).random((900, 8, 8))  # no exact ties between rows
    coarse = images.reshape(900, 4, 2, 4, 2).mean(axis=(2, 4))
    return images.reshape(900, -1).astype(np.float32), coarse.reshape(900, -1).astype(np.float32)


@pytest.mark.parametrize("k", KS)
def test_agreement_is_the_mean_share_of_common_neighbours(features, k):
    sets = []
    for rows in features:
        search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(rows[:600].astype(np.float64))
        sets.append([set(found) for found in search.kneighbors(rows[600:].astype(np.float64), return_distance=False)])
    expected = 100 * np.mean([len(a & b) / k for a, b in zip(*sets, strict=True)])
    assert 0 < expected < 100
    teacher, network = (nearest_train(rows[:600], rows[600:], 100)[0] for rows in features)
    common = agreed_hits(network, teacher, KS)
    assert common[f"agreement_{k}"].tolist() == [len(a & b) for a, b in zip(*sets, strict=True)]
    found = neighbor_scores(common)
    assert list(found) == [f"agreement_{k}" for k in KS]
    assert found[f"agreement_{k}"] == pytest.approx(expected, abs=1e-5)


def test_left_out_test_images_are_not_evaluated(features):
    teacher, network = features
    labels, left_out = load_digits().target[:900].astype(np.int64), (600, 607, 899)
    whole = replace(LISTING, labels_N=labels, classes=list("0123456789"), left_out_rows=left_out)
    kept = [row for row in range(900) if row not in left_out]
    part = replace(whole, paths=[LISTING.paths[row] for row in kept], labels_N=labels[kept], left_out_rows=())

    def scores(rows, listing):
        found = [nearest_train(x[rows][:600], x[rows][listing.test_rows_N], 100) for x in (network, teacher)]
        return neighbor_scores(neighbor_hits(found[0], found[1][0], listing, [1, 10], 0.07, KS))

    assert scores(slice(None), whole) == scores(kept, part) != scores(slice(None), replace(whole, left_out_rows=()))
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    assert task_of(whole, None, params.image, params.linear_eval.crops).test_rows_N.tolist() == kept[600:]


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
