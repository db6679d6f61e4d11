"""The mean key of a bag compared with the mean over a fine grid of draws of members, and over views."""

import numpy as np
import pytest
import torch

from bingo.bags.index import Bags
from bingo.training import bag_means as module
from bingo.training.bag_means import bag_means

ROWS, VIEWS, KEY, K = 24, 3, 5, 4


def drawn_mean(keys_TVP: torch.Tensor, bags: Bags, row: int) -> np.ndarray:
    """The mean over `Bags.draw` for 20,000 numbers spread evenly over [0, 1)."""
    u = (np.arange(20_000) + 0.5) / 20_000
    members = bags.draw(np.full(len(u), row), u)
    return keys_TVP.float().mean(dim=1).numpy()[members].mean(axis=0)


def bags_of(kind: str) -> Bags:
    rng = np.random.default_rng(0)
    members = np.stack([rng.permutation([r for r in range(ROWS) if r != row])[:K] for row in range(ROWS)]).astype(np.int32)
    similarity = np.sort(rng.uniform(-0.2, 1, (ROWS, K)))[:, ::-1].astype(np.float16)
    for row, listed in ((3, 2), (7, 0), (11, 1)):  # two short bags, and an empty one
        members[row, listed:], similarity[row, listed:] = -1, -np.inf
    settings = {"method": "knn", "draw_temperature": 0.1 if kind.endswith("weighted") else None}
    if kind == "knn" or kind == "knn, weighted":
        return Bags(settings, members, similarity)
    cluster = rng.integers(0, 4, ROWS).astype(np.int32)
    cluster[5] = 4  # alone in its cluster
    rows = np.argsort(cluster, kind="stable").astype(np.int32)
    start = np.searchsorted(cluster[rows], np.arange(6)).astype(np.int64)
    return Bags(settings | {"method": "label"}, members, similarity, cluster, rows, start)


@pytest.mark.parametrize("at_once", [1, 50, 2**24])
@pytest.mark.parametrize("kind", ["knn", "knn, weighted", "label", "label, weighted"])
def test_the_mean_key_equals_the_mean_over_draws(kind, at_once, monkeypatch):
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", at_once)
    torch.manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(ROWS, VIEWS, KEY), dim=2).half()
    bags = bags_of(kind)
    means = bag_means(keys, bags)
    assert means.dtype == torch.float16
    for row in range(ROWS):
        np.testing.assert_allclose(means[row].float().numpy(), drawn_mean(keys, bags, row), rtol=0, atol=1e-3)
