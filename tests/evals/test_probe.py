"""The probe of a training against scikit-learn, with and without labels, and with and without test images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import nn

from bingo.datasets.sources import memory_listing
from bingo.evals.probe import Probe
from bingo.images.images import MemoryImages
from bingo.params import ImageParams

SEED = 3
IMAGE = ImageParams(crop_px=8, resize_px=8, mean=[0.0] * 3, std=[1.0] * 3)
DIGITS = load_digits()
RANDOM = np.random.default_rng(0)
PIXELS = np.repeat((DIGITS.images * 15 + RANDOM.random((1797, 8, 8)) * 15)[..., None], 3, axis=3).astype(np.uint8)
TEACHER = (DIGITS.images.reshape(1797, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(1797, 16) + RANDOM.random((1797, 16))).astype(np.float16)


def probe(train_rows: int, rows: int, labelled: bool, teacher: bool = True) -> Probe:
    labels = DIGITS.target[:rows].astype(np.int64) if labelled else np.full(rows, -1)
    names = [str(row) for row in range(rows)]
    listing = memory_listing("digits", names, labels, train_rows, list("0123456789") if labelled else [], PIXELS[:rows])
    embeddings = SimpleNamespace(features=TEACHER[:rows]) if teacher else None
    return Probe(listing, MemoryImages(PIXELS[:rows]), IMAGE, SEED, torch.device("cpu"), "fp32", embeddings)


def pixel_features(rows: np.ndarray) -> np.ndarray:
    return PIXELS[rows].astype(float).reshape(len(rows), -1)


def ten_nearest(bank: np.ndarray, query: np.ndarray) -> list[set]:
    search = NearestNeighbors(n_neighbors=10, metric="cosine", algorithm="brute").fit(bank.astype(np.float64))
    return [set(found) for found in search.kneighbors(query.astype(np.float64), return_distance=False)]


@pytest.mark.parametrize("train_rows", [600, 800])
def test_without_labels_the_probe_is_the_agreement_with_the_teacher(train_rows):
    watching = probe(train_rows, 800, labelled=False)
    bank, query = watching.bank_rows, watching.query_rows
    assert len(bank) == (600 if train_rows == 600 else 640)
    assert not set(bank.tolist()) & set(query.tolist())
    assert query.min() >= (600 if train_rows == 600 else 0)
    ours, theirs = ten_nearest(pixel_features(bank), pixel_features(query)), ten_nearest(TEACHER[bank], TEACHER[query])
    expected = 10 * np.mean([len(a & b) for a, b in zip(ours, theirs, strict=True)])
    assert 20 < expected < 90
    assert watching(nn.Flatten()) == {"agreement_10": pytest.approx(expected, abs=1e-4)}


def test_with_labels_the_probe_is_k_nn_accuracy():
    watching = probe(600, 800, labelled=True)
    reference = KNeighborsClassifier(10, metric="cosine", algorithm="brute").fit(
        pixel_features(watching.bank_rows), DIGITS.target[watching.bank_rows]
    )
    expected = 100 * reference.score(pixel_features(watching.query_rows), DIGITS.target[watching.query_rows])
    assert watching(nn.Flatten()) == {"knn_10": pytest.approx(expected, abs=1.0)}  # ties of votes are resolved differently


def test_a_network_agrees_with_itself_and_with_random_features_by_chance():
    watching = probe(600, 800, labelled=False)
    watching.embeddings = SimpleNamespace(features=pixel_features(np.arange(800)))
    assert watching(nn.Flatten()) == {"agreement_10": 100.0}
    watching = probe(600, 800, labelled=False)
    watching.embeddings = SimpleNamespace(features=RANDOM.standard_normal((800, 32)))
    assert watching(nn.Flatten())["agreement_10"] == pytest.approx(100 * 10 / 600, abs=1)


@pytest.mark.parametrize(
    ("train_rows", "rows", "labelled", "teacher", "measures"),
    [
        (600, 800, False, False, False),  # no teacher to compare with: the teacher itself, and baselines
        (600, 800, True, False, True),
        (4, 4, True, True, False),  # a fifth of them is less than an image
        (10, 20, False, True, False),  # in any order, the ten nearest of ten are the same
        (11, 12, False, True, True),
        (3, 20, True, False, True),
    ],
)
def test_when_a_probe_is_possible(train_rows, rows, labelled, teacher, measures):
    watching = probe(train_rows, rows, labelled, teacher)
    assert watching.measures == measures
    if measures:
        (percent,) = watching(nn.Flatten()).values()
        assert 0 <= percent <= 100
