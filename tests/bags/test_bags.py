"""Bag indexes: built against brute force, drawn uniformly, read one chunk at a time, refused if damaged or from another listing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from sklearn.datasets import load_digits

from bingo import seeds
from bingo.bags import builders as bag_builders
from bingo.bags import kmeans as bag_clusters
from bingo.bags import neighbors
from bingo.bags.builders import build_kmeans, build_knn, build_label
from bingo.bags.index import Bags, read_bags, write_bags
from bingo.bags.ivf import InvertedFile
from bingo.bags.metrics import bag_metrics, view_overlap
from bingo.runtime.chunks import StoredRows, new_array
from bingo.runtime.errors import UserError

LISTING = SimpleNamespace(fingerprint="aa11", train_rows=400)


@pytest.fixture(scope="module")
def digits():
    """Features with 30 copies of one image and 5 pairs, and labels."""
    images, labels = load_digits(return_X_y=True)
    features = (images[:400] + np.random.default_rng(0).random((400, 64))).astype(np.float16)  # only duplicates are tied
    labels = labels[:400].copy()
    features[7:300:10], labels[7:300:10] = features[7], labels[7]
    features[390:395], labels[390:395] = features[395:400], labels[395:400]
    return features, labels


@pytest.fixture(scope="module")
def built(digits):
    features, labels = digits
    return {
        "knn": build_knn(features, 5),
        "kmeans": build_kmeans(features, 60, 10, 5, seed=0),
        "label": build_label(labels, features, 5),
    }


def cosine_matrix(features):
    """Cosines float64; equal rows have equal columns, because each column is one sum in the same order."""
    x = features.astype(np.float64)
    norms = np.sqrt((x * x).sum(axis=1))
    return np.stack([(x * row).sum(axis=1) / norms / norm for row, norm in zip(x, norms, strict=True)])


def nearest(cosines, anchor, allowed, k):
    """The k rows of `allowed` with the highest cosine, without the anchor; among equals the smaller row."""
    return sorted((row for row in allowed if row != anchor), key=lambda row: (-cosines[anchor, row], row))[:k]


def assert_nearest(found, cosines, anchor, allowed, k):
    """`found` is `nearest`, padded with -1; rows may be exchanged only if their cosines differ by less than float32's precision."""
    wanted = nearest(cosines, anchor, allowed, k)
    assert found[len(wanted) :].tolist() == [-1] * (k - len(wanted))
    assert len(set(found[: len(wanted)].tolist())) == len(wanted)
    for row, wanted_row in zip(found, wanted, strict=False):
        assert row == wanted_row or 0 < abs(cosines[anchor, row] - cosines[anchor, wanted_row]) < 1e-6


@pytest.mark.parametrize("k", [1, 5, 31, 399])
def test_knn_bags_follow_the_definition_with_exact_duplicates(digits, k):
    features, _ = digits
    bags, cosines = build_knn(features, k), cosine_matrix(features)
    for row in range(400):
        assert_nearest(bags.members_TK[row], cosines, row, range(400), k)
        assert row not in bags.members_TK[row]
    np.testing.assert_allclose(bags.similarity_TK, np.take_along_axis(cosines, bags.members_TK, axis=1), atol=1e-3)
    assert (bags.members_TK.dtype, bags.similarity_TK.dtype) == (np.int32, np.float16)


@pytest.mark.parametrize("method", ["kmeans", "label"])
def test_members_are_the_nearest_rows_of_the_anchors_cluster(digits, built, method):
    features, labels = digits
    bags, cosines = built[method], cosine_matrix(features)
    if method == "label":
        np.testing.assert_array_equal(bags.cluster_T, labels)
    for row in range(400):
        own = np.flatnonzero(bags.cluster_T == bags.cluster_T[row])
        assert_nearest(bags.members_TK[row], cosines, row, own, 5)
        assert np.isneginf(bags.similarity_TK[row]).sum() == (bags.members_TK[row] < 0).sum()


@pytest.mark.parametrize("method", ["kmeans", "label"])
def test_cluster_lists_contain_every_row_once_in_order(built, method):
    bags = built[method]
    assert sorted(bags.cluster_rows_T) == list(range(400))
    assert (bags.cluster_start[0], bags.cluster_start[-1]) == (0, 400)
    for cluster, (start, end) in enumerate(zip(bags.cluster_start[:-1], bags.cluster_start[1:], strict=True)):
        np.testing.assert_array_equal(bags.cluster_rows_T[start:end], np.flatnonzero(bags.cluster_T == cluster))


def test_kmeans_assigns_to_the_largest_dot_product_with_unit_centroids(digits, built):
    features, _ = digits
    bags = built["kmeans"]
    unit = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    dots = unit @ bags.centroids_CD.astype(np.float64).T
    np.testing.assert_allclose(np.linalg.norm(bags.centroids_CD, axis=1), 1, atol=1e-6)
    assert bags.centroids_CD.dtype == np.float32
    np.testing.assert_allclose(dots[np.arange(400), bags.cluster_T], dots.max(axis=1), atol=1e-6)
    again = build_kmeans(features, 60, 10, 5, seed=0)
    np.testing.assert_array_equal(again.cluster_T, bags.cluster_T)
    assert (build_kmeans(features, 60, 10, 5, seed=1).cluster_T != bags.cluster_T).any()


def test_kmeans_trains_on_all_rows_and_converges(digits):
    """At convergence each spherical centroid is the normalised mean of all its rows, which it would not be for a sample of rows."""
    features, _ = digits
    bags = build_kmeans(features, 4, 60, 5, seed=0)
    unit = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    means = np.stack([unit[bags.cluster_T == cluster].sum(axis=0) for cluster in range(4)])
    np.testing.assert_allclose(bags.centroids_CD, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-4)


def test_kmeans_with_as_many_clusters_as_rows_leaves_singletons_empty():
    x = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float16)
    bags = build_kmeans(x, 40, 5, 3, seed=0)
    assert (bags.members_TK == -1).all()
    np.testing.assert_array_equal(bags.draw(np.arange(40), np.full(40, 0.7)), np.arange(40))
    assert bag_metrics(bags, None)["cluster_size"]["singletons"] == 40
    assert bag_metrics(bags, None)["empty_bags"] == 40


@pytest.mark.slow
@pytest.mark.parametrize("budget_bytes", [20_000, 10**9])
def test_bags_of_a_store_larger_than_the_memory_are_the_same_bytes(digits, tmp_path, monkeypatch, budget_bytes):
    """With blocks whose best rows are merged; also K-means and its assignment. One class is larger than the smaller budget."""
    features, labels = digits
    array = new_array(zarr.create_group(tmp_path / "store", zarr_format=3), "features", features.shape, np.float16, 48)
    array[:] = features
    rows = StoredRows(array, len(features), "store", "dvc repro extract")
    in_memory = [build_knn(features, 5, mutual=True), build_kmeans(features, 60, 3, 5, seed=0), build_label(labels, features, 5)]
    for module in (neighbors, bag_builders, bag_clusters):
        monkeypatch.setattr(module, "memory_budget", lambda: budget_bytes)
    streamed = [build_knn(rows, 5, mutual=True), build_kmeans(rows, 60, 3, 5, seed=0), build_label(labels, rows, 5)]
    for one, other in zip(in_memory, streamed, strict=True):
        write_bags(tmp_path / "one.zarr", one, "aa11", "ee55")
        write_bags(tmp_path / "other.zarr", other, "aa11", "ee55")
        assert contents(tmp_path / "one.zarr") == contents(tmp_path / "other.zarr")


def test_kmeans_of_more_rows_than_it_trains_on_draws_them_from_the_seed(digits, monkeypatch):
    features, _ = digits
    monkeypatch.setattr(bag_clusters, "_TRAINED_NUMBERS", 100 * 64 + 63)
    bags = [build_kmeans(features, 4, 60, 5, seed) for seed in (0, 0, 1)]
    assert bags[0].settings["trained_rows"] == 100
    np.testing.assert_array_equal(bags[0].centroids_CD, bags[1].centroids_CD)
    assert (bags[0].centroids_CD != bags[2].centroids_CD).any()
    chosen = seeds.distinct(0, "kmeans", 0, len(features), 100)
    drawn = bag_clusters._chosen_rows(features, chosen)
    unit = features / np.linalg.norm(features.astype(np.float32), axis=1, keepdims=True)
    rows = [int((np.abs(unit - row).sum(axis=1)).argmin()) for row in drawn]
    np.testing.assert_allclose(drawn, unit[rows], atol=1e-3)
    assert max(rows) > 300 > 100 > min(rows)  # from everywhere


def whole_bag(bags, row):
    """The definition of a bag: the listed members for knn, otherwise all others of the cluster."""
    if bags.cluster_T is None:
        return [int(member) for member in bags.members_TK[row] if member >= 0]
    return [other for other in range(len(bags.members_TK)) if other != row and bags.cluster_T[other] == bags.cluster_T[row]]


@pytest.mark.parametrize("method", ["knn", "kmeans", "label"])
def test_draws_are_uniform_over_the_bag(built, method):
    bags = built[method]
    sizes = [len(whole_bag(bags, row)) for row in range(400)]
    np.testing.assert_array_equal(bags.bag_sizes_T, sizes)
    draws = 4000
    for row in (0, 7, 17, int(np.argmin(sizes)), int(np.argmax(sizes)), 399):
        bag = whole_bag(bags, row)
        drawn = bags.draw(np.full(draws, row), seeds.uniforms(0, "test", 0, np.arange(draws))[:, 0])
        if not bag:
            assert (drawn == row).all()
            continue
        assert set(drawn) <= set(bag)
        expected = draws / len(bag)
        chi2 = sum(((drawn == member).sum() - expected) ** 2 / expected for member in bag)
        assert chi2 < len(bag) + 5 * np.sqrt(2 * len(bag))  # mean len - 1, variance 2 (len - 1)


@pytest.mark.parametrize("method", ["knn", "kmeans", "label"])
def test_equal_steps_of_u_draw_every_member_equally_often(built, method):
    bags = built[method]
    for row in range(400):
        bag = whole_bag(bags, row)
        u = (np.arange(3 * len(bag)) + 0.5) / max(1, 3 * len(bag))
        drawn = bags.draw(np.full(len(u), row), u)
        assert sorted(drawn) == sorted(bag * 3)
    assert bags.draw(np.arange(400), np.full(400, 1 - 2.0**-53)).max() < 400
    np.testing.assert_array_equal(bags.draw(np.arange(0), np.zeros(0)), [])


def test_short_knn_bags_draw_only_listed_members():
    members = np.array([[1, 2], [2, -1], [-1, -1]], np.int32)
    bags = Bags({"method": "knn"}, members, np.where(members < 0, -np.inf, 0.5).astype(np.float16))
    np.testing.assert_array_equal(bags.draw(np.array([0, 0, 1, 1, 2]), np.array([0.1, 0.9, 0.1, 0.9, 0.5])), [1, 2, 2, 2, 2])


@pytest.mark.parametrize("method", ["knn", "kmeans", "label"])
def test_an_index_is_read_as_it_was_written(built, tmp_path, method):
    bags = built[method]
    for name in ("bags.zarr", "again.zarr"):
        write_bags(tmp_path / name, bags, "aa11", "ee55")
    assert contents(tmp_path / "bags.zarr") == contents(tmp_path / "again.zarr")
    index = read_bags(tmp_path / "bags.zarr", LISTING, "ee55")
    assert index.table.settings == bags.settings
    for name in ("members_TK", "similarity_TK", "cluster_T", "cluster_rows_T", "cluster_start", "centroids_CD"):
        wanted, found = getattr(bags, name), getattr(index.table, name)
        assert (wanted is None) == (found is None)
        if wanted is not None:
            np.testing.assert_array_equal(found, wanted)
            assert found.dtype == wanted.dtype
    assert (index.method, index.train_rows, index.k) == (method, 400, 5)
    assert (index.attrs["listing"], index.attrs["embeddings"], len(index.fingerprint)) == ("aa11", "ee55", 32)
    for row in (0, 7, 399):
        np.testing.assert_array_equal(index.members(row), bags.members_TK[row][bags.members_TK[row] >= 0])
        np.testing.assert_array_equal(index.similarity(row), bags.similarity_TK[row][bags.members_TK[row] >= 0])
        np.testing.assert_array_equal(index.bag(row), whole_bag(bags, row))
        assert index.cluster(row) == (None if method == "knn" else bags.cluster_T[row])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_content_has_another_fingerprint(built, tmp_path):
    bags = built["knn"]
    changed = Bags(bags.settings, bags.members_TK[:, ::-1], bags.similarity_TK)
    found = []
    for content, listing in ((bags, "aa11"), (changed, "aa11"), (bags, "cc33")):
        write_bags(tmp_path / "bags.zarr", content, listing, "ee55")
        found.append(zarr.open_group(tmp_path / "bags.zarr", mode="r").attrs["fingerprint"])
    assert len(set(found)) == 3


def large_index(path):
    """An index of 5,000 rows in 5 chunks."""
    rows = np.arange(5000, dtype=np.int32)
    members = np.stack([(rows + 1) % 5000, (rows + 2) % 5000], axis=1)
    write_bags(path, Bags({"method": "knn"}, members, np.full((5000, 2), 0.5, np.float16)), "aa11", "ee55")
    return SimpleNamespace(fingerprint="aa11", train_rows=5000)


def test_one_row_is_read_from_one_chunk(tmp_path):
    listing = large_index(tmp_path / "bags.zarr")
    for array in ("members", "similarity"):
        for chunk in (0, 1, 2, 4):
            (tmp_path / f"bags.zarr/{array}/c/{chunk}/0").unlink()
    index = read_bags(tmp_path / "bags.zarr", listing)
    assert index.members(3500).tolist() == [3501, 3502]
    assert index.similarity(3500).tolist() == [0.5, 0.5]
    with pytest.raises(UserError, match="array members has no value at row 100: chunk 0 is missing; run: dvc repro bag"):
        index.members(100)
    with pytest.raises(UserError, match="chunk 0 is missing"):
        _ = index.table


@pytest.mark.parametrize("array", ["members", "similarity", "cluster", "cluster_rows", "cluster_start", "centroids"])
def test_missing_and_damaged_chunks_are_refused(built, tmp_path, array):
    write_bags(tmp_path / "bags.zarr", built["kmeans"], "aa11", "ee55")
    file = next(path for path in (tmp_path / f"bags.zarr/{array}/c").rglob("*") if path.is_file())
    whole = bytearray(file.read_bytes())
    flipped = bytearray(whole)
    flipped[9] ^= 4
    for damaged in (flipped, whole[:-1], b"", whole[:4]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"array {array} has a damaged chunk") as error:
            _ = read_bags(tmp_path / "bags.zarr", LISTING).table
        assert len(str(error.value).splitlines()) == 1
    file.unlink()
    with pytest.raises(UserError, match=f"array {array} has no value at row 0: chunk 0 is missing"):
        _ = read_bags(tmp_path / "bags.zarr", LISTING).table


@pytest.mark.parametrize("file", ["zarr.json", "members/zarr.json", "cluster_start/zarr.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"{}", b'{"zarr_format": 3, "node_type": "group"}'])
def test_damaged_metadata_are_refused(built, tmp_path, file, content):
    write_bags(tmp_path / "bags.zarr", built["kmeans"], "aa11", "ee55")
    path = tmp_path / "bags.zarr" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match="dvc repro bag") as error:
        read_bags(tmp_path / "bags.zarr", LISTING)
    assert len(str(error.value).splitlines()) == 1


def test_foreign_indexes_and_rows_are_refused(built, tmp_path):
    write_bags(tmp_path / "bags.zarr", built["knn"], "aa11", "ee55")
    with pytest.raises(UserError, match="from listing aa11, this run reads listing cc33; run: dvc repro bag"):
        read_bags(tmp_path / "bags.zarr", SimpleNamespace(fingerprint="cc33", train_rows=400))
    with pytest.raises(UserError, match="from embeddings ee55, this run reads embeddings ff66; run: dvc repro bag"):
        read_bags(tmp_path / "bags.zarr", LISTING, "ff66")
    with pytest.raises(UserError, match="the store does not exist"):
        read_bags(tmp_path / "nothing.zarr", LISTING)
    index = read_bags(tmp_path / "bags.zarr", LISTING)
    for row in (-1, 400):
        with pytest.raises(UserError, match=f"row {row}: .* train rows 0 to 399"):
            index.members(row)


def test_reading_imports_no_heavy_package():
    heavy = ["torch", "timm", "sklearn", "faiss", "pyarrow"]
    code = f"import sys, bingo.bags.index; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout.strip() == "[]"


def test_mistakes_are_one_line(digits):
    features, labels = digits
    cases = [
        (lambda: build_knn(features[:5], 5), r"bagging.k = 5: a bag of the 5 train rows has at most 4 members"),
        (lambda: build_kmeans(features[:5], 6, 3, 2, 0), r"bagging.clusters = 6: there are only 5 train rows"),
        (lambda: build_label(np.where(labels == 3, -1, labels), features, 2), r"bagging.method = label: \d+ of 400 train rows"),
        (lambda: build_knn(np.full((9, 4), np.nan, np.float16), 2), "row 0 of the features is not finite"),
        (lambda: build_knn(np.zeros((9, 4), np.float16), 2), "9 of 9 train rows are all zeros"),
        (lambda: build_label(labels, features * (np.arange(400) > 4)[:, None], 2), "5 of 400 train rows are all zeros"),
        (lambda: build_knn(np.full((9, 4), 0.3, np.float16), 2), "all train rows have the same features"),
    ]
    for build, message in cases:
        with pytest.raises(UserError, match=message) as error:
            build()
        assert len(error.value.lines) == 1


@pytest.mark.parametrize("k", [5, 100, 395])
@pytest.mark.parametrize("search", [None, InvertedFile(lists=8, probes=8, seed=0), InvertedFile(lists=40, probes=3, seed=0)])
@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_rows_of_zeros_have_empty_bags_and_are_in_no_other(digits, search, mutual, k, centred):
    """With centred features, a row of zeros is nearer than rows with negative cosines."""
    features = digits[0] - digits[0].mean(0) * centred
    zeros = [7, 120, 399]
    features[zeros] = 0
    bags = build_knn(features, k, mutual, search)
    others = np.setdiff1d(np.arange(400), zeros)
    assert (bags.members_TK[zeros] == -1).all()
    assert not np.isin(bags.members_TK, zeros).any()
    assert (np.diff((bags.members_TK >= 0).astype(int), axis=1) <= 0).all(), "padding is at the end"
    assert np.array_equal(bags.members_TK >= 0, np.isfinite(bags.similarity_TK))
    if search is None or search.probes == search.list_count(400):
        alone = build_knn(features[others], min(k, 396), mutual=False)
        rows = bags if not mutual else build_knn(features, k)
        full = min(k - 3, 396 - 3)  # the lists of the 400 may have lost three members to rows of zeros
        assert np.array_equal(rows.members_TK[others, :full], others[alone.members_TK[:, :full]])
    if mutual:
        pairs = {(anchor, int(member)) for anchor in range(400) for member in bags.members_TK[anchor] if member >= 0}
        assert all((member, anchor) in pairs for anchor, member in pairs)
    drawn = bags.draw(np.array(zeros), np.array([0.1, 0.5, 0.9]))
    assert drawn.tolist() == zeros, "an empty bag gives the anchor"
    assert "3 of 400" in bags.zeros_warning()
    assert "row 7," in bags.zeros_warning()
    assert build_knn(features[others], 5).zeros_warning() is None
    metrics = bag_metrics(bags, digits[1])
    assert (metrics["empty_bags"], metrics["rows_of_zeros"]) == (int((bags.members_TK[:, 0] < 0).sum()), 3)


def test_rows_too_short_for_float32_count_as_zeros(digits):
    features = digits[0].astype(np.float32)
    features[7] *= 1e-42
    features[8] *= 1e-36  # still has a direction
    bags = build_knn(features, 5)
    assert (bags.members_TK[7] == -1).all()
    without_7 = build_knn(np.delete(digits[0], 7, axis=0), 5).members_TK[7]
    assert np.array_equal(bags.members_TK[8], without_7 + (without_7 >= 7))


def test_keys_of_zeros_do_not_count_as_overlap_of_two_views(digits):
    one, other = digits[0].copy(), digits[0][np.random.default_rng(0).permutation(400)]
    seen = np.ones(400, bool)
    seen[[3, 50]] = False
    one[~seen] = other[~seen] = 0
    rows, near = np.flatnonzero(seen), []
    for keys in (one.astype(float), other.astype(float)):
        unit = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-9)
        cosines = unit[rows] @ unit.T - 9 * (rows[:, None] == np.arange(400))  # not the anchor itself
        near.append(np.argsort(-cosines, axis=1, kind="stable")[:, :5])
    shared = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(*near, strict=True)])
    assert view_overlap(one, other, 5, 0) == pytest.approx(shared, abs=2e-3)


@pytest.mark.parametrize("method", ["kmeans", "label"])
def test_rows_of_zeros_are_spread_over_the_clusters(digits, method):
    features, labels = digits[0].copy(), digits[1]
    features[[7, 120, 399]] = 0
    bags = build_kmeans(features, 6, 5, 3, 0) if method == "kmeans" else build_label(labels, features, 3)
    expected = [row % 6 for row in (7, 120, 399)] if method == "kmeans" else labels[[7, 120, 399]].tolist()
    assert bags.cluster_T[[7, 120, 399]].tolist() == expected, "not all in one cluster"
    assert np.isfinite(bags.similarity_TK[bags.members_TK >= 0]).all()
    assert "3 of 400" in bags.zeros_warning()


@pytest.mark.parametrize("method", ["knn", "kmeans", "label"])
def test_metrics_follow_their_definitions(digits, built, method):
    bags, labels = built[method], np.where(np.arange(400) % 11 == 0, -1, digits[1])
    found = bag_metrics(bags, labels, 0.9999)
    listed = [[int(member) for member in row if member >= 0] for row in bags.members_TK]
    degrees = [sum(row in members for members in listed) for row in range(400)]
    assert found["in_degree"]["max"] == max(degrees)
    assert found["in_degree"]["median"] == np.median(degrees)
    assert found["in_degree"]["p99"] == pytest.approx(np.quantile(degrees, 0.99), abs=1e-6)
    assert found["hubs"][0] == {"row": int(np.argmax(degrees)), "count": max(degrees)}
    assert found["orphan_share"] == pytest.approx(sum(degree == 0 for degree in degrees) / 400, abs=1e-6)
    pairs = [(row, member) for row, members in enumerate(listed) for member in members]
    cosine = {tuple(sorted((row, member))): float(bags.similarity_TK[row][listed[row].index(member)]) for row, member in pairs}
    assert [pair["cosine"] for pair in found["closest_pairs"]] == pytest.approx(sorted(cosine.values())[:-11:-1], abs=1e-6)
    assert [cosine[tuple(pair["rows"])] for pair in found["closest_pairs"]] == [pair["cosine"] for pair in found["closest_pairs"]]
    assert len({tuple(pair["rows"]) for pair in found["closest_pairs"]}) == 10
    assert found["mutual_share"] == pytest.approx(np.mean([row in listed[member] for row, member in pairs]), abs=1e-6)
    assert found["empty_bags"] == sum(not members for members in listed)
    assert found["short_bags"] == sum(0 < len(members) < 5 for members in listed)
    assert found["purity"] == pytest.approx(purity(listed, labels), abs=1e-6)
    nearest = np.where(bags.members_TK[:, 0] >= 0, bags.similarity_TK[:, 0].astype(float), -1)
    assert found["near_duplicates"] == (nearest > 0.9999).sum() >= 40  # 30 copies and 5 pairs
    assert bag_metrics(bags, labels, 0.9)["near_duplicates"] == (nearest > 0.9).sum() > 100
    assert found["chance_share"] == pytest.approx(5 / 399, abs=1e-6)
    assert found["similarity"]["p50"] == pytest.approx(np.median(bags.similarity_TK[bags.members_TK >= 0]), abs=1e-3)
    assert found["bag_size"]["max"] == max(len(whole_bag(bags, row)) for row in range(400))
    if method != "knn":
        sizes = np.bincount(bags.cluster_T, minlength=len(bags.cluster_start) - 1)
        wanted = {"min": sizes.min(), "median": np.median(sizes), "mean": sizes.mean(), "max": sizes.max()}
        wanted |= {"max_over_mean": sizes.max() / sizes.mean(), "singletons": (sizes == 1).sum(), "unused": (sizes == 0).sum()}
        assert found["cluster_size"] == pytest.approx(wanted, abs=1e-6)
        wholes = [whole_bag(bags, row) for row in range(400)]
        assert found["whole_bag_purity"] == pytest.approx(purity(wholes, labels), abs=1e-6)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "purity" not in bag_metrics(bags, None)
    assert "purity" not in bag_metrics(bags, np.full(400, -1))


@pytest.mark.parametrize("k", [1, 5, 20])
def test_overlap_of_bags_by_two_views_follows_its_definition(digits, k, tmp_path):
    other = digits[0] + np.random.default_rng(1).normal(0, 2, (400, 64))
    sets = [[set(nearest(cosines, row, range(400), k)) for row in range(400)] for cosines in map(cosine_matrix, (digits[0], other))]
    expected = np.mean([len(a & b) / k for a, b in zip(*sets, strict=True)])
    assert 0.05 < expected < 0.9
    array = new_array(zarr.create_group(tmp_path / "keys.zarr"), "keys", (400, 3, 64), np.float32, 50)
    array[:] = np.stack([np.zeros((400, 64)), digits[0], other], axis=1)
    keys = [StoredRows(array, 400, "keys", "", view) for view in (1, 2)]
    assert keys[0].shape == (400, 64)
    assert view_overlap(*keys, k, 0) == pytest.approx(expected, abs=0.01)  # near-ties: float32 and float64 differ
    assert view_overlap(keys[0], keys[0], k, 0) == 1
    random = np.random.default_rng(2).standard_normal((400, 64))
    assert view_overlap(keys[0], random, k, 0) == pytest.approx(k / 399, abs=0.02)


def purity(bags, labels):
    shares = []
    for row, members in enumerate(bags):
        known = [labels[member] == labels[row] for member in members if labels[member] >= 0]
        if known and labels[row] >= 0:
            shares.append(np.mean(known))
    return np.mean(shares)


def test_label_bags_are_pure(digits, built):
    found = bag_metrics(built["label"], digits[1])
    assert found["purity"] == found["whole_bag_purity"] == 1


# --- empty bags


def all_empty(digits, kind: str, helped: bool) -> Bags:
    """Bags that are all empty, and bags of the same rows after following the advice in the message."""
    features = digits[0][:40]
    if kind == "kmeans":
        return build_kmeans(features[::3], 7 if helped else 14, 5, 3, seed=0)
    if kind == "label":
        return build_knn(features, 3) if helped else build_label(np.arange(40), features, 3)
    return build_knn(features[30:], 3, kind == "mutual", InvertedFile(10, 5 if helped else 1, 0))


@pytest.mark.parametrize("kind", ["kmeans", "label", "ivf", "mutual"])
def test_bags_that_are_all_empty_are_refused_and_the_way_out_helps(digits, kind):
    with pytest.raises(UserError) as caught:
        all_empty(digits, kind, helped=False).empty_warning()
    (line,) = caught.value.lines
    way_out = {
        "kmeans": "lower bagging.clusters",
        "label": "bagging.method: knn",
        "ivf": "raise bagging.probes",
        "mutual": "raise bagging.k",
    }
    assert way_out[kind] in line
    helped = all_empty(digits, kind, helped=True)
    assert (helped.bag_sizes_T > 0).sum() > 2
    helped.empty_warning()


@pytest.mark.parametrize(("empty", "warned"), [(0, False), (199, False), (200, True), (399, True)])
def test_many_empty_bags_are_a_warning(built, empty, warned):
    members = built["knn"].members_TK.copy()
    members[:empty] = -1
    warning = Bags(built["knn"].settings, members, built["knn"].similarity_TK).empty_warning()
    assert (warning is not None) == warned
    assert warning is None or warning.startswith(f"{empty} of 400 bags are empty")
