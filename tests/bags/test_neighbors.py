"""Exact neighbours against numpy, with duplicates and ties; votes against their definition."""

import math
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import zarr

import bingo.bags.neighbors as neighbors
import bingo.bags.rows as rows_module
from bingo.bags.neighbors import best_of, top_k
from bingo.bags.rows import held, inverse_norms, memory_budget, unit_rows
from bingo.evals.knn import votes
from bingo.runtime.chunks import StoredRows, new_array
from bingo.runtime.errors import UserError
from tests.pretended_gpu.fake_faiss import fake_faiss_gpus


def brute_force(queries, base, k, self_rows=None):
    """The definition: sort all rows by (cosine, row). Equal rows get equal cosines, so ties are exact."""
    rows_out, cosines_out = [], []
    for q, query in enumerate(queries.astype(np.float64)):
        scored = []
        for row, other in enumerate(base.astype(np.float64)):
            if self_rows is None or row != self_rows[q]:
                norms = math.sqrt((query * query).sum()) * math.sqrt((other * other).sum())
                scored.append((-float((query * other).sum()) / norms if norms else 0.0, row))
        scored.sort()
        rows_out.append([row for _, row in scored[:k]] + [-1] * (k - len(scored)))
        cosines_out.append([-score for score, _ in scored[:k]] + [-np.inf] * (k - len(scored)))
    return np.array(rows_out), np.array(cosines_out)


def assert_same(found, wanted):
    """Rows may be exchanged only if their cosines differ by less than the precision of float32; equal rows may not."""
    (rows, cosines), (wanted_rows, wanted_cosines) = found, wanted
    np.testing.assert_allclose(cosines, wanted_cosines, atol=1e-6)
    for q, j in zip(*np.nonzero(rows != wanted_rows), strict=True):
        place = list(wanted_rows[q]).index(rows[q, j])
        assert 0 < abs(wanted_cosines[q, place] - wanted_cosines[q, j]) < 1e-6


def data(rows=150, width=24, seed=0, dtype=np.float16):
    return (np.random.default_rng(seed).standard_normal((rows, width)) * 3).astype(dtype)


def with_duplicates():
    """30 copies of one image, and 10 pairs."""
    x = data()
    x[np.arange(3, 123, 4)] = x[3]
    x[130:140] = x[140:150]
    return x


@contextmanager
def omp_threads(threads):
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@pytest.fixture(params=["numpy", "faiss"], autouse=True)
def search(request, monkeypatch):
    """Runs every test with both searches for candidates: numpy's for small searches, and FAISS's."""
    if request.param == "faiss":
        monkeypatch.setattr(neighbors, "_FAISS_LEAST_PRODUCTS", 0)
    else:
        monkeypatch.setattr(neighbors, "_FAISS_LEAST_PRODUCTS", 1e10)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 5, 40, 149])
def test_all_against_all_follows_the_definition(dtype, k):
    x = data(dtype=dtype)
    rows, cosines = top_k(x, x, k, np.arange(len(x)))
    assert_same((rows, cosines), brute_force(x, x, k, np.arange(len(x))))
    assert rows.dtype == np.int32
    assert cosines.dtype == np.float32


@pytest.mark.parametrize("k", [1, 5, 29, 33])
def test_the_row_itself_is_left_out_among_thirty_copies(k):
    x = with_duplicates()
    rows, cosines = top_k(x, x, k, np.arange(len(x)))
    assert not (rows == np.arange(len(x))[:, None]).any()
    assert_same((rows, cosines), brute_force(x, x, k, np.arange(len(x))))


def test_other_queries_and_blocks():
    base, queries = with_duplicates(), np.concatenate([data(30, seed=1), with_duplicates()[:20]])
    wanted = brute_force(queries, base, 7)
    for block_rows in (1, 13, 10_000):
        assert_same(top_k(queries, base, 7, block_rows=block_rows), wanted)


def test_in_a_tie_of_more_rows_than_the_margin_the_smallest_rows_win():
    x = data(600)
    x[100:300] = x[100]
    rows, _ = top_k(x[100:103], x, 4, np.array([100, 101, 102]))
    np.testing.assert_array_equal(rows, [[101, 102, 103, 104], [100, 102, 103, 104], [100, 101, 103, 104]])


def test_padding_if_the_base_is_small():
    x = data(3)
    rows, cosines = top_k(x, x, 5, np.arange(3))
    np.testing.assert_array_equal(rows[:, 2:], -1)
    assert np.isneginf(cosines[:, 2:]).all()
    np.testing.assert_array_equal(rows, brute_force(x, x, 5, np.arange(3))[0])


def test_a_base_without_rows_gives_only_padding():
    x = data(3)
    for floor_Q in (None, np.zeros(3, np.float32)):
        rows, cosines = top_k(x, x[:0], 2, floor_Q=floor_Q)
        np.testing.assert_array_equal(rows, np.full((3, 2), -1))
        assert np.isneginf(cosines).all()


def test_more_copies_than_candidates_are_resolved_by_their_rows():
    """1,000 copies of one image and 300 of another, which are nearest to each other and to no others, and rows of zeros."""
    x = data(3000, seed=4)
    first, second, zeros = np.split(np.random.default_rng(4).permutation(3000)[:1700], [1000, 1300])
    x[first], x[second], x[zeros] = x[0], x[1], 0
    queries = np.concatenate([first[:40], second[:40], zeros[:10], np.arange(30)])
    wanted = brute_force(x[queries], x, 7, queries)
    for threads, block_rows, budget_bytes in ((1, None, None), (2, 50, None), (2, None, 60_000)):
        with omp_threads(threads):
            found = top_k(x[queries], x, 7, queries, block_rows, budget_bytes)
        assert_same(found, wanted)


@pytest.mark.parametrize("tile_rows", [90, 4096])
def test_collapsed_features_are_ordered_by_their_last_bits(monkeypatch, tile_rows):
    """Rows that differ in the last bits, a third of them in none, so that all cosines have to be compared."""
    monkeypatch.setattr(neighbors, "_TILE_ROWS", tile_rows)
    rng = np.random.default_rng(5)
    x = np.repeat(rng.standard_normal((1, 24)).astype(np.float32), 700, axis=0)
    changed = (rng.random(x.shape) < 0.1) & (np.arange(700) % 3 > 0)[:, None]
    x[changed] = np.nextafter(x[changed], np.float32(9))
    unit_x, inverse = unit_rows(x), inverse_norms(x)
    cosines = np.stack([np.vecdot(x, query) * inverse for query in unit_x])
    np.fill_diagonal(cosines, -np.inf)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :9]
    for threads in (1, 3):
        with omp_threads(threads):
            rows, found = top_k(x, x, 9, np.arange(700))
        np.testing.assert_array_equal(rows, order)
        np.testing.assert_array_equal(found, np.take_along_axis(cosines, order, axis=1))


def test_threads_and_blocks_do_not_change_the_result_with_duplicates():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4000, 64)).astype(np.float16)
    copies = rng.choice(4000, 800, replace=False)
    x[copies[:400]] = x[copies[400:]]
    x[rng.choice(4000, 40, replace=False)] = x[7]
    found = []
    for threads, block_rows in ((1, 4000), (2, 4000), (2, 999)):
        with omp_threads(threads):
            found.append(top_k(x, x, 5, np.arange(4000), block_rows))
    for rows, cosines in found[1:]:
        np.testing.assert_array_equal(rows, found[0][0])
        np.testing.assert_array_equal(cosines, found[0][1])


@pytest.mark.parametrize("budget_bytes", [6_000, 10**9])
def test_rows_above_the_floor_are_found_as_without_a_floor(budget_bytes):
    """The floor is an existing cosine, one above all cosines, or none."""
    base, queries = with_duplicates(), data(60, seed=1)
    queries[:10] = base[3:13]
    rows, cosines = top_k(queries, base, 6, np.where(np.arange(60) < 10, np.arange(60) + 3, -1))
    floor = np.where(np.arange(60) % 3 == 0, cosines[:, 2], np.where(np.arange(60) % 3 == 1, 1.1, -np.inf)).astype(np.float32)
    own = np.where(np.arange(60) < 10, np.arange(60) + 3, -1)
    found = top_k(unit_rows(queries), base, 6, own, budget_bytes=budget_bytes, floor_Q=floor, unit_queries=True)
    wanted = cosines >= floor[:, None]
    np.testing.assert_array_equal(found[0][wanted], rows[wanted])
    np.testing.assert_array_equal(found[1][wanted], cosines[wanted])
    assert wanted[floor < 1].any(axis=1).all()
    assert (found[0][:10] != own[:10, None]).all()


def test_gpus_share_the_blocks_and_float16_search_gives_the_same_answer(monkeypatch):
    x = with_duplicates()
    wanted_rows, wanted_cosines = top_k(x, x, 6, np.arange(len(x)))
    monkeypatch.setattr(neighbors, "_GPU_LEAST_PRODUCTS", 0)
    with fake_faiss_gpus(2) as calls:
        rows, cosines = top_k(x, x, 6, np.arange(len(x)), block_rows=20)
    assert calls.devices() == {0, 1}
    np.testing.assert_array_equal(rows, wanted_rows)
    np.testing.assert_array_equal(cosines, wanted_cosines)


def stored(folder, x, chunk_rows=16):
    """The rows in a store, followed by 3 rows that are not used."""
    array = new_array(zarr.create_group(folder, zarr_format=3), "features", (len(x) + 3, x.shape[1]), x.dtype, chunk_rows)
    array[:] = np.concatenate([x, x[:3]])
    return StoredRows(array, len(x), "the store", "dvc repro extract")


@pytest.mark.parametrize("budget_bytes", [pytest.param(6_000, marks=pytest.mark.slow), 40_000, 10**9])
@pytest.mark.parametrize("gpus", [0, 2])
def test_blocks_from_a_store_in_any_memory_give_the_same_bits(tmp_path, monkeypatch, budget_bytes, gpus):
    """With ties across blocks, one of them of more rows than the margin; the smallest budget makes 11 blocks."""
    x = np.concatenate([with_duplicates(), data(60, seed=2)])
    x[160:200:2] = x[5]
    x[np.arange(3, 210, 7)] = x[3]
    wanted = top_k(x, x, 6, np.arange(len(x)))
    monkeypatch.setattr(neighbors, "_GPU_LEAST_PRODUCTS", 0)
    features = stored(tmp_path, x)
    with fake_faiss_gpus(gpus):
        for found in (
            top_k(features, features, 6, np.arange(len(x)), budget_bytes=budget_bytes),
            top_k(x, features, 6, np.arange(len(x)), block_rows=50, budget_bytes=budget_bytes),
            top_k(x, x, 6, np.arange(len(x)), budget_bytes=budget_bytes),
        ):
            np.testing.assert_array_equal(found[0], wanted[0])
            np.testing.assert_array_equal(found[1], wanted[1])


def test_a_streamed_search_stays_within_its_budget(tmp_path, monkeypatch):
    """Checks the largest blocks read and multiplied: half of the budget is for the base, half for the queries."""
    features, seen = stored(tmp_path, data(300)), []
    whole_search = neighbors._Cpu.candidates

    def candidates(cpu, unit_qD, unit_nD, *others):
        seen.append((len(unit_qD), len(unit_nD)))
        return whole_search(cpu, unit_qD, unit_nD, *others)

    monkeypatch.setattr(neighbors._Cpu, "candidates", candidates)
    top_k(features, features, 4, budget_bytes=20_000)
    query_rows, base_rows = np.max(seen, axis=0)
    assert base_rows * 24 * (2 + 4) <= 10_000 < (base_rows + 1) * 24 * (2 + 4)  # float16 as stored, and float32 when normalised
    assert query_rows * 24 * (2 + 4) <= 10_000
    monkeypatch.setattr(neighbors, "_CPU_BUDGET_BYTES", 20_000)
    seen.clear()
    top_k(features[:50], features, 4)  # so few queries are searched in one block
    assert np.max(seen, axis=0).tolist() == [50, base_rows]
    assert isinstance(held(features, 300 * 24 * 6), np.ndarray)
    assert held(features, 300 * 24 * 6 - 1) is features


def test_stored_rows_are_a_matrix(tmp_path):
    x, rng = data(50), np.random.default_rng(0)
    features = stored(tmp_path, x)
    assert (len(features), features.shape, features.dtype) == (50, (50, 24), np.float16)
    for rows in (slice(None), slice(3, 40), slice(45, 90), slice(60, 70), np.arange(0), rng.permutation(50), rng.integers(0, 50, 99)):
        np.testing.assert_array_equal(features[rows], x[rows])
    with pytest.raises(ValueError, match="not consecutive"):
        features[::2]
    (tmp_path / "features/c/1/0").unlink()
    np.testing.assert_array_equal(features[np.array([40, 3])], x[[40, 3]])
    with pytest.raises(UserError, match="the store: array features has no value at row 16: chunk 1 is missing; run: dvc repro extract"):
        top_k(x[:3], features, 2)


def test_the_memory_budget_respects_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(rows_module, "_CGROUPS", tmp_path)
    monkeypatch.setattr(rows_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000_000_000))
    assert memory_budget() == 5_000_000_000  # a system without control groups
    (tmp_path / "own").write_text("9:memory:/job\n0::/slurm/job/step\n")
    step, job, old = tmp_path / "slurm/job/step", tmp_path / "slurm/job", tmp_path / "memory/job"
    for folder, limit, used, limit_bytes in (
        (step, "memory.max", "memory.current", "max"),
        (job, "memory.max", "memory.current", "800000000"),
        (old, "memory.limit_in_bytes", "memory.usage_in_bytes", "2000000000"),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{limit_bytes}\n")
        (folder / used).write_text("300000000\n")
        (folder / "memory.stat").write_text("anon 200000000\ninactive_file 100000000\ntotal_inactive_file 100000000\n")
    assert memory_budget() == 300_000_000  # the job's: 800 - 300 + 100 MB of page cache, half of it
    (job / "memory.max").write_text("max\n")
    assert memory_budget() == 900_000_000  # control groups version 1
    (old / "memory.limit_in_bytes").write_text("300000001\n")
    assert memory_budget() == 256 << 20


def test_norms_zero_rows_and_numbers_that_are_not_finite():
    x = data(20, dtype=np.float32)
    x[4] = 0
    np.testing.assert_allclose(np.linalg.norm(unit_rows(x, threads=2), axis=1), np.arange(20) != 4, atol=1e-6)
    assert inverse_norms(x)[4] == 0
    np.testing.assert_allclose(inverse_norms(np.full((2, 4), 60000, np.float16)), 1 / 120000, rtol=1e-3)
    assert (top_k(x[4:5], x, 3)[1] == 0).all()
    for value in (np.nan, np.inf):
        x[13, 2] = value
        with pytest.raises(ValueError, match="row 13 of the features is not finite"):
            top_k(x[:2], x, 3)


def test_votes_follow_their_definition():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 40)
    rows, cosines = top_k(data(60, seed=1), data(40), 12)
    rows[5, 8:], cosines[5, 8:] = -1, -np.inf
    for k, (plain, weighted) in votes(labels, rows, cosines, [1, 2, 7, 12], 0.07).items():
        for q in range(60):
            assert plain[q] == by_loops(labels, rows[q, :k], np.ones(k))
            assert weighted[q] == by_loops(labels, rows[q, :k], np.exp(cosines[q, :k].astype(np.float64) / 0.07))


def by_loops(labels, rows, weights):
    """The class with the largest weight; among equals the one of the nearer neighbour."""
    total = defaultdict(float)
    for row, weight in zip(rows, weights, strict=True):
        if row >= 0:
            total[labels[row]] += weight
    return next(labels[row] for row in rows if math.isclose(total[labels[row]], max(total.values()), rel_tol=1e-12))


def test_ties_of_plain_votes_go_to_the_nearest_and_small_temperatures_do_not_overflow():
    labels, rows = np.array([2, 1, 1, 2, 0]), np.array([[4, 1, 0, 3, 2]])
    cosines = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]], np.float32)
    found = votes(labels, rows, cosines, [1, 2, 3, 4, 5], 1e-5)
    assert [int(found[k][0][0]) for k in (1, 2, 3, 4, 5)] == [0, 0, 0, 2, 1]
    assert [int(found[k][1][0]) for k in (1, 2, 3, 4, 5)] == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("k", [1, 4, 9])
def test_the_best_rows_are_those_of_a_sort_by_cosine_then_row(k):
    rng = np.random.default_rng(k)
    rows_QM = rng.permuted(np.tile(np.array([*range(8), 2**31 - 1], np.int32), (500, 1)), axis=1)
    cosines_QM = rng.choice(np.float32([-1, -0.5, -1e-30, 0, 1e-30, 0.25, np.float32(0.1), 1, -np.inf]), (500, 9))
    rows_QK, cosines_QK = best_of(rows_QM, cosines_QM, k)
    assert (rows_QK.dtype, cosines_QK.dtype) == (np.int32, np.float32)
    for rows, cosines, found, values in zip(rows_QM.tolist(), cosines_QM.tolist(), rows_QK.tolist(), cosines_QK.tolist(), strict=True):
        best = sorted(zip(cosines, rows, strict=True), key=lambda pair: (-pair[0], pair[1]))[:k]
        assert values == [cosine for cosine, _ in best]
        assert found == [-1 if np.isneginf(cosine) else row for cosine, row in best]
