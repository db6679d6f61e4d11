"""Bags by an inverted file: brute force within the probed lists, the exact search if all are probed, always the same bits."""

import faiss
import numpy as np
import pytest
import zarr
from sklearn.datasets import load_digits

from bingo import seeds
from bingo.bags import ivf as bag_ivf
from bingo.bags import kmeans as bag_clusters
from bingo.bags import neighbors
from bingo.bags.builders import build_knn
from bingo.bags.ivf import InvertedFile, nearest_in_lists, search_lists
from bingo.bags.kmeans import train_centroids
from bingo.bags.metrics import bag_metrics
from bingo.bags.neighbors import top_k
from bingo.bags.sharing import Sharing
from bingo.runtime.chunks import StoredRows, new_array
from bingo.runtime.errors import UserError


@pytest.fixture(scope="module")
def features():
    """600 digits, 30 of which are copies of one image."""
    images, _ = load_digits(return_X_y=True)
    x = (images[:600] + np.random.default_rng(0).random((600, 64))).astype(np.float16)
    x[7:300:10] = x[7]
    return x


def by_loops(features, k, lists, probes, seed):
    """The definition in float64: members and cosines of the k nearest rows in the lists whose centroids are nearest to each row."""
    unit = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    centroids, _ = train_centroids(features, lists, 10, seed, 64)
    dots = unit @ centroids.astype(np.float64).T
    list_of = dots.argmax(axis=1)
    members, cosines = np.full((len(unit), k), -1), np.full((len(unit), k), -np.inf)
    for row in range(len(unit)):
        probed = sorted(range(lists), key=lambda number, row=row: -dots[row, number])[:probes]
        scored = [(-round(float((unit[row] * unit[other]).sum()), 9), other) for other in np.flatnonzero(np.isin(list_of, probed))]
        for place, (cosine, other) in enumerate(sorted(pair for pair in scored if pair[1] != row)[:k]):
            members[row, place], cosines[row, place] = other, -cosine
    return members, cosines


@pytest.mark.parametrize(("lists", "probes", "k"), [(30, 1, 40), (30, 4, 5), (200, 6, 5), (7, 3, 20)])
def test_members_are_the_nearest_within_the_probed_lists(features, lists, probes, k):
    found, found_cosines = search_lists(features, k, InvertedFile(lists, probes, 3))
    members, cosines = by_loops(features, k, lists, probes, 3)
    np.testing.assert_allclose(found_cosines, cosines, atol=1e-6)
    for row, place in zip(*np.nonzero(found != members), strict=True):  # only if float32 cannot distinguish two cosines
        other = list(members[row]).index(found[row, place])
        assert 0 < abs(cosines[row, other] - cosines[row, place]) < 1e-6
    assert (members < 0).any() == (k == 40)
    assert (found.dtype, found_cosines.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize(("lists", "k"), [(1, 5), (23, 1), (23, 35), (23, 200), (600, 5)])
def test_probing_all_lists_gives_the_bits_of_the_exact_search(features, lists, k):
    exact, found = build_knn(features, k, mutual=True), build_knn(features, k, True, InvertedFile(lists, 10**9, 0))
    np.testing.assert_array_equal(found.members_TK, exact.members_TK)
    np.testing.assert_array_equal(found.similarity_TK, exact.similarity_TK)
    assert (found.settings["recall"], found.settings["probes"]) == (1, lists)


@pytest.mark.parametrize(("crowded", "scored"), [(0, 2**20), (3, 500), (256, 700), (256, 1)])
def test_lists_are_searched_in_parts_of_any_number_of_queries(features, monkeypatch, crowded, scored):
    """Queries with many rows near their k nearest are handled differently; here most of the copies are."""
    wanted = search_lists(features, 5, InvertedFile(30, 4, 3))
    monkeypatch.setattr(bag_ivf, "_CROWDED", crowded)
    monkeypatch.setattr(bag_ivf, "_SCORED_NUMBERS", scored)
    for found, bits in zip(search_lists(features, 5, InvertedFile(30, 4, 3)), wanted, strict=True):
        np.testing.assert_array_equal(found, bits)


def test_parts_that_are_missing_are_searched_again(features, tmp_path, monkeypatch):
    monkeypatch.setattr(bag_ivf, "_PART_ROWS", 70)
    monkeypatch.setattr(bag_ivf, "_PARTS", 60)
    wanted = search_lists(features, 5, InvertedFile(30, 4, 3))
    first = search_lists(features, 5, InvertedFile(30, 4, 3), Sharing(tmp_path))
    files = sorted((tmp_path / "members").iterdir())
    assert len(files) == 9
    for file in files[::3]:
        file.unlink()
    for found in (first, search_lists(features, 5, InvertedFile(30, 4, 3), Sharing(tmp_path))):
        for x, bits in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(x, bits)


@pytest.mark.slow
@pytest.mark.parametrize("lists", [5, 60])
def test_a_store_larger_than_the_memory_gives_the_same_bits(features, tmp_path, monkeypatch, lists):
    """In blocks of queries and groups of lists; some of the five lists are larger than the budget."""
    array = new_array(zarr.create_group(tmp_path / "store", zarr_format=3), "features", features.shape, np.float16, 48)
    array[:] = features
    wanted = search_lists(features, 5, InvertedFile(lists, 4, 0))
    for module in (neighbors, bag_clusters, bag_ivf):
        monkeypatch.setattr(module, "memory_budget", lambda: 40_000)
    for x in (features, StoredRows(array, len(features), "store", "dvc repro extract")):
        for found, bits in zip(search_lists(x, 5, InvertedFile(lists, 4, 0)), wanted, strict=True):
            np.testing.assert_array_equal(found, bits)


def test_centroids_do_not_depend_on_the_number_of_threads():
    random = np.random.default_rng(0)  # blocks of cosines near 1, so that last bits decide which centroid is nearest
    rows = (20 + random.normal(size=(20_000, 12)) @ random.normal(size=(12, 128)) / 5).astype(np.float16)
    threads, found = faiss.omp_get_max_threads(), []
    try:
        for count in (1, 2, 3):
            faiss.omp_set_num_threads(count)
            found.append(train_centroids(rows, 100, 3, 0)[0].tobytes())
            assert faiss.omp_get_max_threads() == count
    finally:
        faiss.omp_set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_probes_are_the_nearest_lists_and_of_equally_near_ones_the_first(monkeypatch):
    random = np.random.default_rng(0)  # 16 different vectors, whose products are exact
    centroids, queries = (random.choice([-0.5, 0.5], (rows, 4)).astype(np.float32) for rows in (40, 100))
    nearest = [sorted(range(40), key=lambda number, query=query: (-(query @ centroids[number]), number))[:7] for query in queries]
    monkeypatch.setattr(bag_ivf, "_SCORED_NUMBERS", 500)
    asking, start = bag_ivf._Lists(queries, np.ones(100), 7, centroids, np.arange(100), np.arange(41)).probing(queries)
    for number in range(40):
        assert asking[start[number] : start[number + 1]].tolist() == [row for row in range(100) if number in nearest[row]]


def test_any_number_of_threads_gives_the_same_bits(features):
    threads, found, nearest = faiss.omp_get_max_threads(), [], []
    try:
        for count in (1, 2, 3):
            faiss.omp_set_num_threads(count)
            found.append(search_lists(features, 5, InvertedFile(None, 8, 0)))
            nearest.append(nearest_in_lists(features[:50], features[50:], 0.9, InvertedFile(None, 2, 0)).tobytes())
            assert faiss.omp_get_max_threads() == count
    finally:
        faiss.omp_set_num_threads(threads)
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    assert len(set(nearest)) == 1


def test_recall_follows_its_definition(features, monkeypatch):
    exact, _ = top_k(features, features, 5, np.arange(600))
    monkeypatch.setattr(bag_ivf, "_RECALL_ROWS", 100)
    bags = build_knn(features, 5, False, InvertedFile(None, 4, 1))
    sample = seeds.distinct(1, "recall", 0, 600, 100)
    share = np.mean([len(set(exact[row]) & set(bags.members_TK[row])) / 5 for row in sample])
    assert 0.5 < share < 1
    assert bags.settings["recall"] == pytest.approx(share)
    assert (bags.settings["search"], bags.settings["lists"], bags.settings["probes"]) == ("ivf", 98, 4)
    assert bags.settings["recall"] == build_knn(features, 5, True, InvertedFile(None, 4, 1)).settings["recall"]
    metrics = bag_metrics(bags, None)
    assert (metrics["recall"], metrics["lists"], metrics["probes"]) == (pytest.approx(share, abs=1e-6), 98, 4)
    assert not {"recall", "lists", "probes"} & set(bag_metrics(build_knn(features, 5), None))


def test_recall_is_1_if_only_ties_are_broken_differently():
    """Any 5 of 400 equal rows are the nearest, so nothing is missed if all lists are searched."""
    rng = np.random.default_rng(0)
    features = np.concatenate([np.repeat(rng.standard_normal((2, 8)), 400, axis=0), rng.standard_normal((50, 8))]).astype(np.float32)
    assert build_knn(features, 5, False, InvertedFile(8, 8, 0)).settings["recall"] == 1


def test_the_number_of_lists():
    assert [InvertedFile(None, 64, 0).list_count(rows) for rows in (2, 9, 16, 10_000, 10**7)] == [2, 9, 16, 400, 12_649]
    assert InvertedFile(7, 64, 0).list_count(100) == 7


def test_more_lists_than_rows_are_a_mistake(features):
    with pytest.raises(UserError, match=r"^bagging\.lists = 601: there are only 600 train rows; lower bagging\.lists, or set it to null$"):
        build_knn(features, 5, False, InvertedFile(601, 4, 0))
