"""k-NN accuracy against scikit-learn and against its definition in loops."""

import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from bingo.bags import neighbors
from bingo.bags.neighbors import top_k
from bingo.evals import knn
from bingo.evals.features import feature_blocks
from bingo.evals.knn import knn_accuracies, nearest_in_blocks
from bingo.images.images import MemoryImages
from bingo.params import ImageParams, load_params
from bingo.pipeline.judging import backbones as judged
from bingo.pipeline.judging.backbones import Networks
from bingo.runtime.errors import UserError


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    features = images + np.random.default_rng(0).random(images.shape)  # no exact ties between rows
    return features[:900].astype(np.float32), labels[:900], features[900:].astype(np.float32), labels[900:]


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_agrees_with_scikit_learn_unless_votes_are_tied(digits, k):
    train, train_labels, test, test_labels = digits
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train, train_labels)
    shares = np.sort(reference.predict_proba(test), axis=1)
    clear = shares[:, -1] > shares[:, -2] + 1e-9
    assert clear.sum() > 500
    found = knn_accuracies(train, train_labels, test[clear], test_labels[clear], [k], 0.07)
    assert found[f"knn_{k}"] == pytest.approx(100 * reference.score(test[clear], test_labels[clear]), abs=1e-6)


@pytest.mark.parametrize("k", [5, 20])
def test_weighted_votes_agree_with_scikit_learn(digits, k):
    train, train_labels, test, test_labels = digits
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)).fit(
        train, train_labels
    )
    found = knn_accuracies(train, train_labels, test, test_labels, [1, k], 0.07)
    assert list(found) == ["knn_1", "knn_1_weighted", f"knn_{k}", f"knn_{k}_weighted"]
    assert found[f"knn_{k}_weighted"] == pytest.approx(100 * reference.score(test, test_labels), abs=1e-6)


@pytest.mark.parametrize("queries_at_once", [4096, 50])
def test_the_definition_in_loops(digits, queries_at_once, monkeypatch):
    monkeypatch.setattr(knn, "_QUERIES_AT_ONCE", queries_at_once)
    train, train_labels, test, test_labels = (x[:120] for x in digits)
    found = knn_accuracies(train.astype(np.float16), train_labels, test.astype(np.float16), test_labels, [4], 0.1)
    hits = weighted_hits = 0
    for image, label in zip(test.astype(np.float16).astype(float), test_labels, strict=True):
        scored = []
        for row, other in enumerate(train.astype(np.float16).astype(float)):
            scored.append((-(image @ other) / np.linalg.norm(image) / np.linalg.norm(other), row))
        nearest = sorted(scored)[:4]
        plain, weighted = np.zeros(10), np.zeros(10)
        for score, row in nearest:
            plain[train_labels[row]] += 1
            weighted[train_labels[row]] += np.exp(-score / 0.1)
        hits += next(train_labels[row] for _, row in nearest if plain[train_labels[row]] == plain.max()) == label
        weighted_hits += weighted.argmax() == label
    assert found == {"knn_4": pytest.approx(hits / 1.2, abs=1e-5), "knn_4_weighted": pytest.approx(weighted_hits / 1.2, abs=1e-5)}


def test_mistakes_are_one_line(digits):
    train, train_labels, test, test_labels = digits
    with pytest.raises(UserError, match=r"knn_eval.k = 901: there are only 900 train rows"):
        knn_accuracies(train, train_labels, test, test_labels, [1, 901], 0.07)
    with pytest.raises(UserError, match="no test rows"):
        knn_accuracies(train, train_labels, test[:0], test_labels[:0], [1], 0.07)
    with pytest.raises(UserError, match="row 3 of the features is not finite"):
        knn_accuracies(train, train_labels, np.where(np.arange(897)[:, None] == 3, np.nan, test), test_labels, [1], 0.07)
    with pytest.raises(UserError, match="row 300: row 2 of the features is not finite"):  # the train row 302
        nearest_in_blocks(iter([test, train[:300], np.where(np.arange(300, 900)[:, None] == 302, np.inf, train[300:])]), 1)


@pytest.mark.parametrize(("changes", "resize_px"), [({}, 17), ({"resize_px": 20, "interpolation": "bicubic"}, 20), ({"resize_px": 16}, 16)])
def test_a_network_is_measured_on_the_view_of_knn_eval(changes, resize_px):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 24, 24, 3), dtype=np.uint8)
    params = load_params(Path(__file__).parents[2] / "params.yaml").knn_eval.model_copy(update=changes)
    image = ImageParams(crop_px=16, resize_px=17, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
    run = SimpleNamespace(params=SimpleNamespace(image=image))
    networks = object.__new__(Networks)
    vars(networks).update(
        images=MemoryImages(pixels), backbones={"student": nn.Flatten()}, listing=range(5), run=run, names=["student"], _teacher=None
    )
    got = networks.features("student", params, torch.device("cpu"))
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    resized = tv.resize(x, [resize_px], tv.InterpolationMode(changes.get("interpolation", "bilinear")), antialias=True).clamp(0, 1)
    want = tv.normalize(tv.center_crop(resized, 16), image.mean, image.std).flatten(1)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("sizes", [[900], [1] * 9 + [891], [300, 300, 300], [899, 1]])
@pytest.mark.parametrize("k", [1, 20, 900])
def test_blocks_give_the_bits_of_the_whole(digits, sizes, k, monkeypatch):
    train, _, test, _ = digits
    whole = top_k(test, train, k)
    monkeypatch.setattr(knn, "_QUERIES_AT_ONCE", 100)
    monkeypatch.setattr(neighbors._Cpu, "query_rows", 256)
    found = nearest_in_blocks(iter([test, *np.split(train, np.cumsum(sizes)[:-1])]), k)
    for x, y in zip(found, whole, strict=True):
        np.testing.assert_array_equal(x, y)
    assert (found[0].dtype, found[1].dtype) == (np.int32, np.float32)


def test_one_block_is_held_at_a_time(digits):
    """Of those before, nothing is referenced any more when the next is asked for."""
    train, _, test, _ = digits
    alive = list[weakref.ref]()

    def blocks():
        yield test.copy()
        for block in np.split(train, 4):
            assert not [ref for ref in alive if ref() is not None]
            block = block.copy()
            alive.append(weakref.ref(block))
            blocks_left = [block]
            del block
            yield blocks_left.pop()

    nearest_in_blocks(blocks(), 3)
    assert len(alive) == 4

    pixels = np.zeros((40, 16, 16, 3), np.uint8)
    image = ImageParams(crop_px=16, resize_px=16, mean=[0.5] * 3, std=[0.5] * 3)
    found = feature_blocks(nn.Flatten(), MemoryImages(pixels), range(40), image, torch.device("cpu"), "fp32", 16, [9, 20, 11])
    for _ in range(3):
        block = next(found)
        ref = weakref.ref(block)
        del block
        assert ref() is None


@pytest.mark.parametrize("sizes", [[37], [5, 32], [1, 1, 35], [16, 16, 5], [36, 1]])
def test_blocks_of_features_are_consecutive(sizes):
    """Batches of 8 images begin and end within blocks."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    image, rows = ImageParams(crop_px=16, resize_px=16, mean=[0.5] * 3, std=[0.5] * 3), np.random.default_rng(1).permutation(40)[:37]
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
    found = list(feature_blocks(network, MemoryImages(pixels), rows, image, torch.device("cpu"), "fp32", 8, sizes))
    assert [len(block) for block in found] == sizes
    assert network.training
    np.testing.assert_allclose(np.concatenate(found), (pixels[rows] / 127.5 - 1).transpose(0, 3, 1, 2).reshape(37, -1), atol=1e-6)


@pytest.mark.parametrize("block_bytes", [1, 4000, 2**28])
def test_neighbours_of_networks_are_found_in_blocks(monkeypatch, digits, block_bytes):
    """Rows 0 to 49 are train images; the test images 50 and 53 are left out. The teacher's features are digits in float16."""
    monkeypatch.setattr(judged, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(judged, "_LEAST_BLOCK_ROWS", 1)
    pixels, stored = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8), digits[0][:60].astype(np.float16)
    test_rows = np.array([51, 52, *range(54, 60)])
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    networks = object.__new__(Networks)
    network = nn.Flatten()
    network.feature_width = 768
    vars(networks).update(
        images=MemoryImages(pixels), backbones={"student": network}, names=["student", "teacher", "pixels"],
        run=SimpleNamespace(params=SimpleNamespace(image=ImageParams(crop_px=16, resize_px=16, mean=[0.5] * 3, std=[0.5] * 3))),
        listing=SimpleNamespace(train_rows=50, test_rows_N=test_rows), _teacher=SimpleNamespace(features=stored),
    )  # fmt: skip
    seen = (pixels / 127.5 - 1).transpose(0, 3, 1, 2).reshape(60, -1)
    for name, x in (("student", seen), ("teacher", stored.astype(float)), ("pixels", pixels.reshape(60, -1).astype(float))):
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        cosines = unit[test_rows] @ unit[:50].T
        rows, found = nearest_in_blocks(networks.blocks(name, params.knn_eval, torch.device("cpu")), 7)
        np.testing.assert_array_equal(rows, np.argsort(-cosines, axis=1)[:, :7])
        np.testing.assert_allclose(found, -np.sort(-cosines, axis=1)[:, :7], atol=1e-5)
    assert networks.blocks("ema", params.knn_eval, torch.device("cpu")) is None
