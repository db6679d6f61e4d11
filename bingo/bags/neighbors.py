"""Exact cosine neighbours through FAISS, on the CPU or on every GPU that is there, in bounded memory, and votes of neighbours.

Shape letters: Q queries, N rows of the base, D feature width, K neighbours, M candidates, C classes; q, n rows of a block.

FAISS decides ties by chance: its order, and at a cut its set, changes with the number of threads (facebookresearch/faiss issue
1201). So more candidates than neighbours are searched, and their cosines are computed again by one dot product each: equal rows
give equal numbers, on any device. Candidates are sorted by (cosine, row). Where the cut may still run through a tie, more are
searched. A base that does not fit the memory is a sequence of blocks, and the best of each are merged: (cosine, row) decides alike.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np

from bingo.bags.rows import Rows, in_threads, inverse_norms, memory_budget, unit_rows
from bingo.runtime.progress import progress_bar

_MARGINS = (16, 256)  # candidates beyond k and self: at first, and again for those queries whose cut may run through a tie
_CPU_TOLERANCE, _GPU_TOLERANCE = 1e-5, 2e-4  # by how much a found score may differ from the cosine: float32, and float16 rows
_GPU_MOST_CANDIDATES = 2048  # faiss's limit on GPUs
_FAISS_LEAST_PRODUCTS = 1e8  # a small cluster is searched by numpy before FAISS's threads are awake
_GPU_LEAST_PRODUCTS = 1e10  # a smaller search ends on the CPU before a copy to the GPU would
_GPU_BASE_BYTES, _GPU_QUERY_BYTES = 4 << 30, 1 << 30  # more is streamed from the host
_CPU_BLOCK_ROWS, _GPU_BLOCK_ROWS = 16384, 131072  # queries; a GPU gets the base anew with every block
_THREADS_A_GPU = 2  # while one searches, the other computes its candidates' cosines
_RESCORED_BYTES, _SCREENED_BYTES = 64 << 20, 64 << 20
_RESCORED_ROWS = 256  # queries at once, of which the one with most candidates sets the number

Found = tuple[np.ndarray, np.ndarray]


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

    `query_rows_Q` names, for each query, the row of the base that is the query itself (-1: none is); it is left out by its number,
    whatever its place. Rows with a cosine below `floor_Q` need not be found, which saves time. Ties go to the smaller row (of a
    tie of more than 256 rows, any). Where there are fewer rows than k, rows end with -1 and cosines with -inf. A row of zeros has
    cosine 0 to everything. Features are of any float type and need no normalisation (`unit_queries`: the queries have had it, by
    `unit_rows`).

    Memory beside what is given and returned: a normalised copy of the base (float32; float16 for GPUs), a block of `block_rows`
    queries (None: as suits device and memory), 64 MiB for each core, and the base itself where it is in a store. Where that does
    not fit `budget_bytes` (None: half of what is free), the base is cut into blocks that do, and read once for each block of
    queries, which are then as many as fit. Raises ValueError where a feature is not finite.
    """
    search = _Search(queries, base, k, memory_budget() if budget_bytes is None else budget_bytes)
    queries = search.base if queries is base else queries
    block_rows = block_rows or search.query_rows
    rows_QK = np.full((len(queries), k), -1, np.int32)
    cosines_QK = np.full((len(queries), k), -np.inf, np.float32)
    query_rows_Q = np.full(len(queries), -1) if query_rows_Q is None else query_rows_Q
    floor_Q = np.full(len(queries), -np.inf, np.float32) if floor_Q is None else floor_Q
    starts = range(0, len(queries), block_rows)

    def one_share(worker: int) -> None:  # each worker takes every workers-th block, from its own thread
        for start in starts[worker :: search.workers]:
            block = slice(start, start + block_rows)
            unit_qD = queries[block] if unit_queries else unit_rows(queries[block], threads=search.threads)
            rows_QK[block], cosines_QK[block] = search.block(unit_qD, query_rows_Q[block], floor_Q[block], worker)
            bar.advance()

    with progress_bar("neighbours", len(starts), "blocks") as bar:
        if search.workers == 1:  # in this thread: the number of OpenMP threads is a thread's own
            one_share(0)
        else:
            with ThreadPoolExecutor(search.workers) as pool:
                list(pool.map(one_share, range(search.workers)))
    return rows_QK, cosines_QK


def best_of(rows_QM: np.ndarray, cosines_QM: np.ndarray, k: int) -> Found:
    """The first k of each line by (cosine, row): (rows int32 (Q, k), cosines float32 (Q, k)), -1 where the cosine is -inf."""
    order_QK = np.lexsort((rows_QM, -cosines_QM), axis=1)[:, :k]
    cosines_QK = np.take_along_axis(cosines_QM, order_QK, axis=1)
    return np.where(np.isneginf(cosines_QK), -1, np.take_along_axis(rows_QM, order_QK, axis=1)), cosines_QK


def votes(
    labels_N: np.ndarray, rows_QK: np.ndarray, cosines_QK: np.ndarray, ks: Sequence[int], temperature: float
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """For each k of `ks`, the classes int64 (Q,) that the first k neighbours of a `top_k` vote for: (one vote each, weighted).

    The weight is exp(cosine / temperature) (Wu et al. 2018, arXiv:1805.01978, section 3.4). Of classes with equally many votes
    the one with the nearest member wins. `labels_N` are the classes of the base, none negative.
    """
    classes = int(labels_N.max()) + 1
    labels_QK = np.where(rows_QK >= 0, labels_N[rows_QK], 0)
    plain_QK = (rows_QK >= 0).astype(np.float64)
    # relative to the nearest neighbour: the winner is the same and no exponential overflows; exp(-inf) = 0 for what is padded
    weight_QK = np.exp((cosines_QK.astype(np.float64) - cosines_QK[:, :1]) / temperature)

    def both(k: int) -> Found:
        nearest_QK = labels_QK[:, :k]
        return _winners(nearest_QK, plain_QK[:, :k], classes), _winners(nearest_QK, weight_QK[:, :k], classes)

    return {k: both(k) for k in ks}


def _winners(labels_QK: np.ndarray, weight_QK: np.ndarray, classes: int, block_rows: int = 4096) -> np.ndarray:
    """The class with the largest sum of weights for each query, the nearest neighbour's among equals."""
    winners_Q = np.empty(len(labels_QK), np.int64)
    for start in range(0, len(labels_QK), block_rows):
        labels_qK, weight_qK = labels_QK[start : start + block_rows], weight_QK[start : start + block_rows]
        queries_q1 = np.arange(len(labels_qK))[:, None]
        flat = np.bincount((queries_q1 * classes + labels_qK).ravel(), weight_qK.ravel(), minlength=len(labels_qK) * classes)
        sums_qC = flat.reshape(len(labels_qK), classes)
        first_q = (sums_qC[queries_q1, labels_qK] == sums_qC.max(axis=1, keepdims=True)).argmax(axis=1)
        winners_Q[start : start + block_rows] = labels_qK[queries_q1[:, 0], first_q]
    return winners_Q


class _Search:
    """One base, whole in memory or in blocks, and the search of one block of queries in it."""

    def __init__(self, queries: Rows, base: Rows, k: int, budget_bytes: int):
        import faiss

        self.k, self.base = k, base
        products = float(len(queries)) * len(base) * base.shape[1]
        fits_gpu = k + 1 + _MARGINS[-1] <= _GPU_MOST_CANDIDATES and products >= _GPU_LEAST_PRODUCTS
        gpus = faiss.get_num_gpus() if fits_gpu else 0
        self.resources = [faiss.StandardGpuResources() for _ in range(gpus)]
        self.locks = [Lock() for _ in range(gpus)]
        self.tolerance = _GPU_TOLERANCE if gpus else _CPU_TOLERANCE
        self.workers = max(1, _THREADS_A_GPU * gpus)
        self.threads = max(1, faiss.omp_get_max_threads() // self.workers)
        self.unit_dtype: type = np.float16 if gpus else np.float32
        self._plan(budget_bytes)
        self.inverse_N = inverse_norms(self.base, faiss.omp_get_max_threads())
        whole = self.base_rows >= len(base)
        self.whole_ND = unit_rows(self.base[:], self.unit_dtype, self.inverse_N, faiss.omp_get_max_threads()) if whole else None

    def _plan(self, budget_bytes: int) -> None:
        """How many rows of the base are in memory at once, all of them if they fit, and how many queries."""
        in_store = not isinstance(self.base, np.ndarray)
        row_bytes = self.base.shape[1] * (np.dtype(self.unit_dtype).itemsize + in_store * self.base.dtype.itemsize)
        self.base_rows, self.query_rows = len(self.base), _GPU_BLOCK_ROWS if self.resources else _CPU_BLOCK_ROWS
        if row_bytes * len(self.base) <= budget_bytes:
            self.base = self.base[:] if in_store else self.base
            return
        worker_bytes = budget_bytes // 2 // self.workers  # half for the base, half for queries: as found, float32, and a GPU's float16
        self.base_rows = max(1, worker_bytes // row_bytes)
        self.query_rows = max(1, worker_bytes // (self.base.shape[1] * (self.base.dtype.itemsize + 6)))

    def block(self, unit_qD: np.ndarray, self_rows_q: np.ndarray, floor_q: np.ndarray, worker: int) -> Found:
        """`top_k` of one block of queries at length 1."""
        rows_qK = np.full((len(unit_qD), self.k), -1, np.int32)
        cosines_qK = np.full((len(unit_qD), self.k), -np.inf, np.float32)
        queries_q = np.arange(len(unit_qD))
        asking = self._hopeful(unit_qD, floor_q)
        for margin in _MARGINS:
            if not len(queries_q[asking]):
                break
            found = self._attempt(unit_qD[asking], self_rows_q[asking], floor_q[asking], margin, worker)
            rows_qK[asking], cosines_qK[asking], unsure_n = found
            asking = queries_q[asking][unsure_n]
        return rows_qK, cosines_qK

    def _hopeful(self, unit_qD: np.ndarray, floor_q: np.ndarray) -> slice | np.ndarray:
        """The queries that have a row above their floor; where finding out would cost more than the search does, all."""
        if self.resources or self.whole_ND is None or np.isneginf(floor_q).all():
            return slice(None)
        part_rows = max(1, _SCREENED_BYTES // (4 * len(self.base)))
        most = [(unit_qD[start : start + part_rows] @ self.whole_ND.T).max(axis=1) for start in range(0, len(unit_qD), part_rows)]
        return np.flatnonzero(np.concatenate(most) >= floor_q - self.tolerance)

    def _base_blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first row, rows as given, rows at length 1) of each block of the base."""
        for start in range(0, len(self.base), self.base_rows):
            block = slice(start, start + self.base_rows)
            base_nD = self.base[block]
            if self.whole_ND is None:
                yield start, base_nD, unit_rows(base_nD, self.unit_dtype, self.inverse_N[block], self.threads)
            else:
                yield start, base_nD, self.whole_ND

    def _attempt(
        self, unit_qD: np.ndarray, self_rows_q: np.ndarray, floor_q: np.ndarray, margin: int, worker: int
    ) -> tuple[np.ndarray, ...]:
        """The k nearest of k + 1 + margin candidates of each block, and for which queries a row that is no candidate might be one."""
        rows_qK = np.full((len(unit_qD), self.k), -1, np.int32)
        cosines_qK = np.full((len(unit_qD), self.k), -np.inf, np.float32)
        passed_over_q = np.full(len(unit_qD), -np.inf, np.float32)  # the most that a row which is no candidate scores
        for first_row, base_nD, unit_nD in self._base_blocks():
            wanted = min(self.k + 1 + margin, len(base_nD))
            scores_qM, places_qM = self._candidates(unit_qD, unit_nD, wanted, worker)
            if wanted < len(base_nD):
                passed_over_q = np.maximum(passed_over_q, scores_qM[:, -1])
            # those that cannot enter need no second computation: they come last
            least_q = np.maximum(cosines_qK[:, -1], floor_q) - self.tolerance
            hopeful_q = (scores_qM >= least_q[:, None]).sum(axis=1)
            self._merge((rows_qK, cosines_qK), base_nD, first_row, unit_qD, places_qM, hopeful_q, self_rows_q)
        return rows_qK, cosines_qK, passed_over_q > np.maximum(cosines_qK[:, -1], floor_q) - self.tolerance

    def _candidates(self, unit_qD: np.ndarray, unit_nD: np.ndarray, wanted: int, worker: int) -> Found:
        """The highest scores (q, M) and their places in the block of the base, highest first."""
        import faiss

        if not self.resources and len(unit_qD) * unit_nD.size < _FAISS_LEAST_PRODUCTS:
            scores_qn = unit_qD @ unit_nD.T
            places_qM = np.argpartition(-scores_qn, wanted - 1, axis=1)[:, :wanted]
            scores_qM = np.take_along_axis(scores_qn, places_qM, axis=1)
            order_qM = np.argsort(-scores_qM, axis=1)
            return np.take_along_axis(scores_qM, order_qM, axis=1), np.take_along_axis(places_qM, order_qM, axis=1)
        metric = faiss.METRIC_INNER_PRODUCT
        if not self.resources:
            return faiss.knn(unit_qD, unit_nD, wanted, metric=metric)
        gpu = worker % len(self.resources)
        half_qD: np.ndarray = unit_qD.astype(np.float16)
        with self.locks[gpu]:
            return faiss.knn_gpu(
                self.resources[gpu],
                half_qD,
                unit_nD,
                wanted,
                metric=metric,
                device=gpu,
                vectorsMemoryLimit=_GPU_BASE_BYTES,
                queriesMemoryLimit=_GPU_QUERY_BYTES,
            )

    def _merge(
        self,
        best: Found,
        base_nD: np.ndarray,
        first_row: int,
        unit_qD: np.ndarray,
        places_qM: np.ndarray,
        hopeful_q: np.ndarray,
        self_rows_q: np.ndarray,
    ) -> None:
        """Put the first `hopeful_q` candidates of each query among its best, by cosines that are the same whatever block, thread or
        device found them."""
        rows_qK, cosines_qK = best
        part_rows = max(1, min(_RESCORED_ROWS, _RESCORED_BYTES // (4 * places_qM.shape[1] * unit_qD.shape[1])))
        asked_q = np.argsort(-hopeful_q, kind="stable")[: np.count_nonzero(hopeful_q)]  # those with equally many are in one part

        def one_part(start: int) -> None:
            part = asked_q[start : start + part_rows]
            places_qm = places_qM[part, : hopeful_q[part[0]]]
            rows_qm = (places_qm + first_row).astype(np.int32)
            candidates_qmD = base_nD[places_qm].astype(np.float32, copy=False)
            cosines_qm = np.vecdot(candidates_qmD, unit_qD[part][:, None, :]) * self.inverse_N[rows_qm]
            cosines_qm[rows_qm == self_rows_q[part, None]] = -np.inf
            all_rows_q = np.concatenate([rows_qK[part], rows_qm], axis=1)
            all_cosines_q = np.concatenate([cosines_qK[part], cosines_qm], axis=1)
            rows_qK[part], cosines_qK[part] = best_of(all_rows_q, all_cosines_q, self.k)

        in_threads(one_part, range(0, len(asked_q), part_rows), self.threads)
