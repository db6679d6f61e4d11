"""Exact cosine neighbours: FAISS proposes candidates, exact dot products decide, and more candidates are requested if the cut is in doubt.

FAISS resolves ties arbitrarily: the order, and at the cut the set, changes with the number of threads (facebookresearch/faiss issue 1201).
A block of queries (`_Search.block`) is therefore searched in three steps, in each block of the base:
  1. `candidates` of `_Cpu` or `_Gpus`: more rows than neighbours, by scores that approximate the cosines;
  2. `_rescore`: cosines of the candidates that may be neighbours, one dot product each, so that equal rows give equal numbers on any
     device; they are merged with the best so far by (cosine, row), independently of the blocks;
  3. `_attempt` again with more candidates or more exact scores, for queries for which a row that was not a candidate might still be a
     neighbour; where that leaves it open (copies of one image, for example), `_among_all` computes the cosines of all rows that may be.

Shape letters: Q queries, N rows of the base, D feature width, K neighbours, M candidates; q, n rows of a block.
"""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bingo.bags.rows import Rows, in_threads, inverse_norms, memory_budget, unit_rows
from bingo.runtime.gpus import faiss_gpus, faiss_resources
from bingo.runtime.progress import progress_bar

_MARGINS = (16, 256)
# Both rows are rounded by up to 2^-11 of each number, so a score by up to 2^-10 of the sum of |a_i b_i| <= 1; the rest is for the sums.
_FLOAT16_TOLERANCE, FLOAT32_TOLERANCE = 1.1e-3, 1e-5
_GPU_MOST_CANDIDATES = 2048  # faiss's limit on GPUs
_FAISS_LEAST_PRODUCTS = 1e8  # numpy searches a small cluster before FAISS's threads have started
_GPU_LEAST_PRODUCTS = 1e11  # less takes a second or two on the CPU; the probe of a training, whose GPU is full, is always below
_CPU_BUDGET_BYTES = 256 << 20  # rows are normalised again for each block of queries, which costs little
_GPU_BASE_BYTES, _GPU_QUERY_BYTES = 4 << 30, 1 << 30  # more is streamed from the host
_GRAPH_KEPT, _GRAPH_LEAST_KEPT = 4, 128  # CAGRA's itopk_size: for each neighbour, and at least
_THREADS_A_GPU = 2  # while one searches, the other computes its candidates' cosines
_RESCORED_BYTES, _SCREENED_BYTES = 16 << 20, 64 << 20
_SCREENED_FIRST = 64  # queries: if more than half of them have a row above their floor, all are searched
_TILE_ROWS = 4096  # of the base, which stay in a cache while many queries are compared with them
_RESCORED_ROWS = 256  # queries at once; the one with the most candidates sets the number

Found = tuple[np.ndarray, np.ndarray]


class Blocks:
    """A search of many queries in blocks, by the workers of one process in turn; `found` has the result, in memory."""

    def __init__(self, queries: int, k: int, block_rows: int | None = None):
        self.found, self._block_rows = nothing_found(queries, k), block_rows

    def blocks(self, most_rows: int) -> list[slice]:
        """All blocks, if device and memory allow `most_rows` queries at once."""
        return cut(slice(0, len(self.found[0])), self._block_rows or most_rows)

    def take(self, number: int, worker: int, workers: int) -> bool:
        """Whether this worker of this process searches block `number`."""
        return number % workers == worker

    def keep(self, block: slice, found: tuple[np.ndarray, ...]) -> None:
        """Store the results of a block."""
        self.found[0][block], self.found[1][block] = found


def top_k(
    queries: Rows,
    base: Rows,
    k: int,
    query_rows_Q: np.ndarray | None = None,
    block_rows: int | None = None,
    budget_bytes: int | None = None,
    floor_Q: np.ndarray | None = None,
    unit_queries: bool = False,
) -> Found:
    """The k rows of the base with the highest cosine to each query, exactly: (rows int32 (Q, k), cosines float32 (Q, k)).

    `query_rows_Q` gives, for each query, the row of the base that is the query itself (-1: none); this row is excluded. Rows with a cosine
    below `floor_Q` need not be found, which saves time. Ties go to the smaller row. If there are fewer than k rows, rows are padded with -1
    and cosines with -inf. A row of zeros has cosine 0 to everything. Features may have any float type and need not be normalised
    (`unit_queries`: the queries are already normalised by `unit_rows`).

    Memory in addition to arguments and results: a normalised copy of the base (float32; for GPUs float16, and blocks in float32), a
    block of `block_rows` queries (None: as many as suit device and memory), 16 MiB for each core, and the base itself if it is in a store.
    If this does not fit into `budget_bytes` (None: half of the free memory; on the CPU, at most 256 MiB for a base in memory, and for a
    store with few queries), the base is divided into blocks that do, and is read once for each block of queries, which are as large as
    possible for a store. Raises ValueError if a feature is not finite.

    >>> import numpy as np
    >>> from bingo import top_k
    >>> base = np.array([[1, 0], [0, 1], [2, 2]], np.float32)
    >>> rows, cosines = top_k(base[:1], base, 2, query_rows_Q=np.array([0]))
    >>> rows.tolist(), [round(cosine, 3) for cosine in cosines[0].tolist()]
    ([[2, 1]], [0.707, 0.0])
    """
    task = Blocks(len(queries), k, block_rows)
    search_blocks(task, queries, base, k, query_rows_Q, budget_bytes, floor_Q, unit_queries)
    return task.found


def search_blocks(
    task: Blocks,
    queries: Rows,
    base: Rows,
    k: int,
    query_rows_Q: np.ndarray | None = None,
    budget_bytes: int | None = None,
    floor_Q: np.ndarray | None = None,
    unit_queries: bool = False,
    by_graph: bool = False,
) -> None:
    """`top_k` for those blocks of queries of the task that this process takes; the task stores the results. The base is prepared once.

    `by_graph`: approximate search by cuVS; the base is held in memory, twice as float16, and on the GPU.
    """
    import faiss

    device = _Cagra() if by_graph else _device(k, float(len(queries)) * len(base) * base.shape[1])
    budget_bytes = sys.maxsize if by_graph else memory_budget() if budget_bytes is None else budget_bytes
    searched = _Base(base, len(queries), device, budget_bytes, faiss.omp_get_max_threads())
    search = _Search(searched, device, k, max(1, faiss.omp_get_max_threads() // device.workers))
    queries = searched.rows if queries is base else queries
    query_rows_Q = np.full(len(queries), -1) if query_rows_Q is None else query_rows_Q
    floor_Q = np.full(len(queries), -np.inf, np.float32) if floor_Q is None else floor_Q
    blocks = task.blocks(searched.query_rows)

    def one_part(part: slice, worker: int) -> Found:
        unit_qD = queries[part] if unit_queries else unit_rows(queries[part], threads=search.threads)
        return search.block(_Queries(unit_qD, query_rows_Q[part], floor_Q[part]), worker)

    def one_share(worker: int) -> None:
        for number, block in enumerate(blocks):
            if task.take(number, worker, device.workers):
                task.keep(block, joined([one_part(part, worker) for part in cut(block, searched.query_rows)]))
            bar.advance_to(number + 1)

    with progress_bar("neighbours", len(blocks), "blocks") as bar:
        if device.workers == 1:  # in this thread: the number of OpenMP threads is a thread's own
            one_share(0)
        else:
            with ThreadPoolExecutor(device.workers) as pool:
                list(pool.map(one_share, range(device.workers)))


def cut(rows: slice, most_rows: int) -> list[slice]:
    """Consecutive slices of at most `most_rows` rows."""
    return [slice(start, min(start + most_rows, rows.stop)) for start in range(rows.start, rows.stop, most_rows)]


def joined(parts: Sequence[Found]) -> Found:
    """Join the results for consecutive queries."""
    return parts[0] if len(parts) == 1 else (np.concatenate([rows for rows, _ in parts]), np.concatenate([cosines for _, cosines in parts]))


def best_of(rows_QM: np.ndarray, cosines_QM: np.ndarray, k: int) -> Found:
    """The first k of each line by (cosine, row): (rows int32 (Q, k), cosines float32 (Q, k)), -1 where the cosine is -inf."""
    bits_QM = (cosines_QM + np.float32(0)).view(np.int32)  # -0.0 is 0.0
    keys_QM = (~_ordered(bits_QM)).astype(np.int64) << 32 | rows_QM.astype(np.uint32)
    keys_QM.sort(axis=1)
    keys_QK = keys_QM[:, :k]
    cosines_QK = _ordered(~(keys_QK >> 32).astype(np.int32)).view(np.float32)
    return np.where(np.isneginf(cosines_QK), -1, keys_QK.astype(np.uint32).view(np.int32)), cosines_QK


def _ordered(bits: np.ndarray) -> np.ndarray:
    """The bits of a float32 as an int32 with the same order, and the inverse."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def common_rows(a_QK: np.ndarray, b_QK: np.ndarray) -> np.ndarray:
    """How many rows each line of `a` shares with the same line of `b`, int32 (Q,); the rows of a line must be distinct."""
    both = np.sort(np.concatenate([a_QK, b_QK], axis=1), axis=1)
    return (both[:, 1:] == both[:, :-1]).sum(axis=1, dtype=np.int32)


def nothing_found(queries: int, k: int) -> Found:
    """A result of `top_k` that is only padding."""
    return np.full((queries, k), -1, np.int32), np.full((queries, k), -np.inf, np.float32)


class _Attempt(NamedTuple):
    """The dtype of the rows that are multiplied, the largest difference of their scores from the cosines, and the number of candidates
    in addition to k and the query itself."""

    dtype: type
    tolerance: float
    margin: int


class _Cpu:
    """FAISS on the CPU. `attempts`: the first is for all queries, each further one for those that the previous one could not decide;
    `query_rows`: queries in a block if memory allows; `workers`: blocks that are searched at once."""

    attempts = tuple(_Attempt(np.float32, FLOAT32_TOLERANCE, margin) for margin in _MARGINS)
    query_rows, workers = 16384, 1

    def candidates(self, unit_qD: np.ndarray, unit_nD: np.ndarray, wanted: int, worker: int) -> Found:
        """The highest scores (q, M) and their positions in the block of the base, highest first."""
        import faiss

        if len(unit_qD) * unit_nD.size >= _FAISS_LEAST_PRODUCTS:
            return faiss.knn(unit_qD, unit_nD, wanted, metric=faiss.METRIC_INNER_PRODUCT)
        scores_qn = unit_qD @ unit_nD.T
        places_qM = np.argpartition(-scores_qn, wanted - 1, axis=1)[:, :wanted]
        scores_qM = np.take_along_axis(scores_qn, places_qM, axis=1)
        order_qM = np.argsort(-scores_qM, axis=1)
        return np.take_along_axis(scores_qM, order_qM, axis=1), np.take_along_axis(places_qM, order_qM, axis=1)


class _Gpus:
    """FAISS on GPUs, like `_Cpu`, with rows in float16 as long as these suffice; a GPU receives the base again with every block of
    queries."""

    attempts = (*(_Attempt(np.float16, _FLOAT16_TOLERANCE, margin) for margin in _MARGINS), _Cpu.attempts[-1])
    query_rows = 131072

    def __init__(self, gpus: list[int]):
        self.workers, self._gpus = _THREADS_A_GPU * len(gpus), gpus

    def candidates(self, unit_qD: np.ndarray, unit_nD: np.ndarray, wanted: int, worker: int) -> Found:
        """See `_Cpu`."""
        import faiss

        gpu = self._gpus[worker % len(self._gpus)]
        resources, lock = faiss_resources(gpu)
        unit_qD = unit_qD.astype(unit_nD.dtype, copy=False)
        with lock:
            return faiss.knn_gpu(
                resources, unit_qD, unit_nD, wanted, metric=faiss.METRIC_INNER_PRODUCT, device=gpu,
                vectorsMemoryLimit=_GPU_BASE_BYTES, queriesMemoryLimit=_GPU_QUERY_BYTES,
            )  # fmt: skip


class _Cagra:
    """CAGRA of cuVS on one GPU, like `_Cpu`: a search follows a graph over all rows in float16 to nearer ones. It is approximate, so there
    is only one attempt."""

    attempts = (_Attempt(np.float16, _FLOAT16_TOLERANCE, _MARGINS[0]),)
    query_rows, workers = 131072, 1

    def __init__(self) -> None:
        self._index: Any = None

    def candidates(self, unit_qD: np.ndarray, unit_nD: np.ndarray, wanted: int, worker: int) -> Found:
        """See `_Cpu`; a score of -inf where fewer are found."""
        from cuvs.neighbors import cagra
        from pylibraft.common import device_ndarray

        if self._index is None:
            with progress_bar("graph of the features"):
                self._index = cagra.build(cagra.IndexParams(metric="sqeuclidean"), unit_nD)
        kept = cagra.SearchParams(itopk_size=max(_GRAPH_LEAST_KEPT, _GRAPH_KEPT * wanted))
        found = cagra.search(kept, self._index, device_ndarray(unit_qD.astype(unit_nD.dtype)), wanted)
        squares_qM, places_qM = (x.copy_to_host() for x in found)  # of distances, nearest first
        there_qM = places_qM < len(unit_nD)
        return np.where(there_qM, 1 - squares_qM / 2, -np.inf), np.where(there_qM, places_qM, 0).astype(np.int64)


def _device(k: int, products: float) -> _Cpu | _Gpus:
    """The GPUs, if there are any, the search is large enough, and they can hold its candidates."""
    gpus = gpus_for(products) if k + 1 + _MARGINS[-1] <= _GPU_MOST_CANDIDATES else []
    return _Gpus(gpus) if gpus else _Cpu()


def gpus_for(products: float) -> list[int]:
    """The GPUs of `faiss_gpus` if the number of products of two numbers is worth copying the data to them, otherwise none."""
    return faiss_gpus() if products >= _GPU_LEAST_PRODUCTS else []


class _Base:
    """The rows to find, in memory if they and a normalised copy fit the budget, otherwise in blocks that take half of it. The other
    half is then for `query_rows` queries (as stored, in float32, and for a GPU in float16). On the CPU, the budget is at most
    _CPU_BUDGET_BYTES if the rows are in memory already, or are read from the store only once because all queries fit into half of that.
    For GPUs the copy is float16, and half of the budget is kept for blocks in float32."""

    def __init__(self, rows: Rows, queries: int, device: _Cpu | _Gpus | _Cagra, budget_bytes: int, threads: int):
        width, in_store = rows.shape[1], not isinstance(rows, np.ndarray)
        read_once = queries * width * (rows.dtype.itemsize + 6) <= _CPU_BUDGET_BYTES // 2
        if isinstance(device, _Cpu) and (read_once or not in_store):
            budget_bytes = min(budget_bytes, _CPU_BUDGET_BYTES)
        row_bytes = width * (np.dtype(device.attempts[0].dtype).itemsize + in_store * rows.dtype.itemsize)
        whole = row_bytes * len(rows) <= budget_bytes // (2 if isinstance(device, _Gpus) else 1)
        worker_bytes = budget_bytes // 2 // device.workers
        fitting = max(1, worker_bytes // (width * (rows.dtype.itemsize + 6)))
        self.query_rows = device.query_rows if whole else fitting if in_store else min(fitting, device.query_rows)
        self.rows, self.in_store = rows[:] if whole and in_store else rows, in_store and not whole
        self.inverse_N = inverse_norms(self.rows, threads)
        self.unit_ND = unit_rows(self.rows[:], device.attempts[0].dtype, self.inverse_N, threads) if whole else None
        self._block_bytes, self._read_bytes = worker_bytes, width * in_store * rows.dtype.itemsize

    def blocks(self, dtype: type, threads: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first row, rows as given, normalised rows in this dtype) of each block."""
        if self.unit_ND is not None and self.unit_ND.dtype == dtype:
            yield 0, self.rows[:], self.unit_ND
            return
        block_rows = max(1, self._block_bytes // (self._read_bytes + self.rows.shape[1] * np.dtype(dtype).itemsize))
        for start in range(0, len(self.rows), block_rows):
            block = slice(start, start + block_rows)
            base_nD = self.rows[block]
            yield start, base_nD, unit_rows(base_nD, dtype, self.inverse_N[block], threads)


@dataclass(frozen=True)
class _Queries:
    """Normalised queries, the row of the base that is each query itself (-1: none), and the cosine below which it needs no neighbour."""

    unit_qD: np.ndarray
    self_rows_q: np.ndarray
    floor_q: np.ndarray

    def __getitem__(self, chosen: slice | np.ndarray) -> "_Queries":
        return _Queries(self.unit_qD[chosen], self.self_rows_q[chosen], self.floor_q[chosen])


@dataclass(frozen=True)
class _Search:
    """The search of one block of queries, with its own `threads`."""

    base: _Base
    device: _Cpu | _Gpus | _Cagra
    k: int
    threads: int

    def block(self, queries: _Queries, worker: int) -> Found:
        """`top_k` of these queries."""
        rows_qK, cosines_qK = nothing_found(len(queries.unit_qD), self.k)
        if not len(self.base.rows):
            return rows_qK, cosines_qK
        queries_q = np.arange(len(queries.unit_qD))
        asking = self._hopeful(queries)
        for attempt in self.device.attempts:
            if not len(queries_q[asking]):
                break
            rows_qK[asking], cosines_qK[asking], unsure_n = self._attempt(queries[asking], attempt, worker)
            asking = queries_q[asking][unsure_n]
        if len(queries_q[asking]) and not isinstance(self.device, _Cagra):
            rows_qK[asking], cosines_qK[asking] = self._among_all(queries[asking], cosines_qK[asking, -1])
        return rows_qK, cosines_qK

    def _hopeful(self, queries: _Queries) -> slice | np.ndarray:
        """The queries that have a row above their floor; all queries if checking would cost more than the search."""
        if isinstance(self.device, _Gpus) or self.base.in_store or np.isneginf(queries.floor_q).all():
            return slice(None)
        if len(queries.unit_qD) > 2 * _SCREENED_FIRST:
            sample = queries[:: len(queries.unit_qD) // _SCREENED_FIRST]
            if 2 * len(self._with_rows_above(sample)) > len(sample.unit_qD):
                return slice(None)
        return self._with_rows_above(queries)

    def _with_rows_above(self, queries: _Queries) -> np.ndarray:
        most_q, attempt = np.full(len(queries.unit_qD), -np.inf, np.float32), self.device.attempts[0]
        for _, _, unit_nD in self.base.blocks(attempt.dtype, self.threads):
            for part in cut(slice(0, len(most_q)), max(1, _SCREENED_BYTES // (4 * len(unit_nD)))):
                most_q[part] = np.maximum(most_q[part], (queries.unit_qD[part] @ unit_nD.T).max(axis=1))
        return np.flatnonzero(most_q >= queries.floor_q - attempt.tolerance)

    def _attempt(self, queries: _Queries, attempt: _Attempt, worker: int) -> tuple[np.ndarray, ...]:
        """The k nearest of the candidates of each block, and the queries that may have a neighbour outside the candidates."""
        rows_qK, cosines_qK = nothing_found(len(queries.unit_qD), self.k)
        passed_over_q = np.full(len(queries.unit_qD), -np.inf, np.float32)  # the highest score of a row that is not a candidate

        def least_q() -> np.ndarray:  # a lower score cannot enter
            return np.maximum(cosines_qK[:, -1], queries.floor_q) - attempt.tolerance

        for first_row, base_nD, unit_nD in self.base.blocks(attempt.dtype, self.threads):
            wanted = min(self.k + 1 + attempt.margin, len(base_nD))
            scores_qM, places_qM = self.device.candidates(queries.unit_qD, unit_nD, wanted, worker)
            if wanted < len(base_nD):
                passed_over_q = np.maximum(passed_over_q, scores_qM[:, -1])
            enter_q = least_q()
            if self.k < wanted:  # of these k + 1 rows one may be the query itself
                enter_q = np.maximum(enter_q, scores_qM[:, self.k] - 2 * attempt.tolerance)
            hopeful_q = (scores_qM >= enter_q[:, None]).sum(axis=1)
            self._rescore((rows_qK, cosines_qK), queries, base_nD, first_row, (scores_qM, places_qM), hopeful_q)
        return rows_qK, cosines_qK, passed_over_q > least_q()

    def _among_all(self, queries: _Queries, least_q: np.ndarray) -> Found:
        """`top_k` of these queries by the cosines of all rows whose scores may be `least_q`, the lowest cosine found so far, or more; equal
        queries are searched once."""
        _, first_u, distinct_q = np.unique(queries.unit_qD, axis=0, return_index=True, return_inverse=True)
        unit_uD, distinct_q = queries.unit_qD[first_u], distinct_q.ravel()
        best = rows_uK, cosines_uK = nothing_found(len(unit_uD), self.k + 1)  # one may be the query itself
        least_u = np.full(len(unit_uD), np.inf, np.float32)
        np.minimum.at(least_u, distinct_q, least_q)
        for first_row, base_nD, unit_nD in self.base.blocks(np.float32, self.threads):
            for tile in cut(slice(0, len(unit_nD)), _TILE_ROWS):
                rows_n = np.arange(first_row + tile.start, first_row + tile.stop, dtype=np.int32)
                self._merge_tile(best, unit_uD, least_u, rows_n, base_nD[tile].astype(np.float32, copy=False), unit_nD[tile])
        rows_qK, cosines_qK = rows_uK[distinct_q], cosines_uK[distinct_q]
        cosines_qK[rows_qK == queries.self_rows_q[:, None]] = -np.inf
        return best_of(rows_qK, cosines_qK, self.k)

    def _merge_tile(
        self, best: Found, unit_uD: np.ndarray, least_u: np.ndarray, rows_n: np.ndarray, base_nD: np.ndarray, unit_nD: np.ndarray
    ) -> None:
        """Merge those of some consecutive rows of the base whose cosines may be `least_u` or more into the best of each query."""
        (rows_uK, cosines_uK), inverse_n = best, self.base.inverse_N[rows_n]

        def one_part(start: int) -> None:
            for u, scores_n in enumerate(unit_uD[start : start + _RESCORED_ROWS] @ unit_nD.T, start):
                lowest = cosines_uK[u, -1]
                near_n = scores_n >= max(least_u[u], lowest) - FLOAT32_TOLERANCE
                few = 3 * np.count_nonzero(near_n) < len(rows_n)  # copying more takes longer than the cosines of all
                near_p = np.flatnonzero(near_n) if few else slice(None)
                cosines_p = np.vecdot(base_nD[near_p], unit_uD[u]) * inverse_n[near_p]
                enter_p = cosines_p > lowest  # in a tie, earlier rows win
                if enter_p.any():
                    all_rows = np.concatenate([rows_uK[u], rows_n[near_p][enter_p]])
                    all_cosines = np.concatenate([cosines_uK[u], cosines_p[enter_p]])
                    rows_uK[u : u + 1], cosines_uK[u : u + 1] = best_of(all_rows[None], all_cosines[None], self.k + 1)

        in_threads(one_part, range(0, len(unit_uD), _RESCORED_ROWS), self.threads)

    def _rescore(self, best: Found, queries: _Queries, base_nD: np.ndarray, first_row: int, found: Found, hopeful_q: np.ndarray) -> None:
        """Merge the first `hopeful_q` candidates of each query into its best, by cosines that do not depend on block, thread or
        device."""
        (rows_qK, cosines_qK), (scores_qM, places_qM) = best, found
        part_rows = max(1, min(_RESCORED_ROWS, _RESCORED_BYTES // (4 * places_qM.shape[1] * base_nD.shape[1])))
        asked_q = np.argsort(-hopeful_q, kind="stable")[: np.count_nonzero(hopeful_q)]  # queries with similar numbers are in one part

        def one_part(start: int) -> None:
            part = asked_q[start : start + part_rows]
            places_qm = places_qM[part, : hopeful_q[part[0]]]
            rows_qm = (places_qm + first_row).astype(np.int32)
            candidates_qmD = base_nD[places_qm].astype(np.float32, copy=False)
            cosines_qm = np.vecdot(candidates_qmD, queries.unit_qD[part][:, None, :]) * self.base.inverse_N[rows_qm]
            cosines_qm[(rows_qm == queries.self_rows_q[part, None]) | np.isneginf(scores_qM[part, : places_qm.shape[1]])] = -np.inf
            all_rows_q = np.concatenate([rows_qK[part], rows_qm], axis=1)
            all_cosines_q = np.concatenate([cosines_qK[part], cosines_qm], axis=1)
            rows_qK[part], cosines_qK[part] = best_of(all_rows_q, all_cosines_q, self.k)

        in_threads(one_part, range(0, len(asked_q), part_rows), self.threads)
