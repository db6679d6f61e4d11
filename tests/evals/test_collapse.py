"""Collapse: the figures against closed forms, and warnings about the right networks."""

import numpy as np
import pytest
import torch
from torch import nn

from bingo.evals.collapse import collapse_warning, feature_spread, spread
from bingo.images.images import MemoryImages
from bingo.images.listing import Listing
from bingo.nets.backbones import build_backbone
from bingo.params import ImageParams
from bingo.runtime.errors import UserError

IMAGE = ImageParams(crop_px=12, resize_px=12, mean=[0.5] * 3, std=[0.25] * 3)


@pytest.mark.parametrize("length", [1e-3, 1.0, 500.0])
def test_evenly_spread_features_have_every_direction(length):
    assert spread(length * np.concatenate([np.eye(6), -np.eye(6)])) == {"feature_std": 1.0, "effective_rank": 6.0}


def test_the_rank_is_the_exponential_of_an_entropy():
    x = np.random.default_rng(0).standard_normal((200, 5)) * [4, 2, 1, 0.5, 0.1] + 1
    unit = x / np.linalg.norm(x, axis=1)[:, None]
    eigenvalues = np.linalg.eigvalsh(np.cov(unit.T, bias=True))
    shares = np.sqrt(eigenvalues) / np.sqrt(eigenvalues).sum()
    found = spread(x.astype(np.float32))
    assert found["effective_rank"] == pytest.approx(np.prod(shares**-shares), abs=1e-3)
    assert found["feature_std"] == pytest.approx(np.sqrt(unit.var(axis=0).sum()), abs=1e-4)
    assert found["feature_std"] ** 2 == pytest.approx(1 - (unit.mean(axis=0) ** 2).sum(), abs=1e-3)


@pytest.mark.parametrize(
    ("features", "rank"),
    [
        (np.ones((9, 4)), 0),
        (np.zeros((9, 4)), 0),
        (np.arange(8)[:, None] % 2 * 2 - np.ones((8, 4)), 1),  # two opposite points: spread out, but on one line
        (np.ones((1, 4)), 0),
    ],
)
def test_collapsed_features_are_reported(features, rank):
    figures = spread(features)
    assert figures["effective_rank"] == rank
    line = collapse_warning(figures)
    assert line.startswith("the network has collapsed, its features hardly differ (feature_std ")
    assert "\n" not in line


def test_nearly_equal_features_are_reported_but_not_an_untrained_network():
    noise = np.random.default_rng(0).standard_normal((50, 32))
    assert collapse_warning(spread(1 + 1e-4 * noise))
    rows = 40
    images = MemoryImages(np.random.default_rng(0).integers(0, 256, (rows, 12, 12, 3), dtype=np.uint8))
    listing = Listing("made", [str(row) for row in range(rows)], np.full(rows, -1), rows, [], [], "aa")
    backbone = build_backbone("resnet10t", 0.125, "small", 0)
    healthy = feature_spread(backbone.train(), listing, images, IMAGE, 0, torch.device("cpu"), "fp32")
    assert backbone.training
    assert collapse_warning(healthy) is None, healthy
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    assert collapse_warning(feature_spread(backbone, listing, images, IMAGE, 0, torch.device("cpu"), "fp32"))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e38])
def test_features_that_are_not_finite_are_a_mistake(weight):
    images = MemoryImages(np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), dtype=np.uint8))
    listing = Listing("made", [str(row) for row in range(8)], np.full(8, -1), 8, [], [], "aa")
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    nn.init.constant_(backbone[0].weight, weight)
    with pytest.raises(UserError, match="lower lr"):
        feature_spread(backbone, listing, images, IMAGE, 0, torch.device("cpu"), "fp32")
