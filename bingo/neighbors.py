"""Exact cosine neighbours through FAISS, on the CPU or on every GPU that is there, and votes of neighbours.

Shape letters: Q queries, N rows of the base, D feature width, K neighbours, M candidates, C classes.

FAISS decides ties by chance: its order, and at a cut its set, changes with the number of threads (facebookresearch/faiss issue
1201). So more candidates than neighbours are searched, and their cosines are computed again by one dot product each: equal rows
give equal numbers, on any device. Candidates are sorted by (cosine, row). Where the cut may still run through a tie, more are
searched.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bingo.progress import progress_bar

_MARGINS = (16, 256)  # candidates beyond k and self: at first, and again for those queries whose cut may run through a tie
_CPU_TOLERANCE, _GPU_TOLERANCE = 1e-5, 2e-4  # by how much a found score may differ from the cosine: float32, and float16 rows
_GPU_MOST_CANDIDATES = 2048  # faiss's limit on GPUs
_FAISS_LEAST_PRODUCTS = 1e8  # a small cluster is searched by numpy before FAISS's threads are awake
_GPU_LEAST_PRODUCTS = 1e10  # a smaller search ends on the CPU before a copy to the GPU would
_GPU_BASE_BYTES, _GPU_QUERY_BYTES = 4 << 30, 1 << 30  # more is streamed from the host
_CPU_BLOCK_ROWS, _GPU_BLOCK_ROWS = 16384, 131072  # queries; a GPU gets the base anew with every block
_RESCORED_BYTES = 64 << 20

Found = tuple[np.ndarray, np.ndarray]


def top_k(
    queries_QD: np.ndarray, base_ND: np.ndarray, k: int, query_rows_Q: np.ndarray | None = None, block_rows: int | None = None
) -> Found:
    """The k rows of the base with the highest cosine to each query, exactly: (rows int32 (Q, k), cosines float32 (Q, k)).

    `query_rows_Q` names, for each query, the row of the base that is the query itself; it is left out by its number, whatever its
    place. Ties go to the smaller row (of a tie of more than 256 rows, any). Where the base has fewer rows than k, rows end with
    -1 and cosines with -inf. A row of zeros has cosine 0 to everything. Features are of any float type and need no normalisation;
    memory beside them is one normalised copy of the base (float32; float16 for GPUs) and what a block of `block_rows` queries
    needs (None: as suits the device). Raises ValueError where a feature is not finite.
    """
    search = _Search(base_ND, k, queries_QD)
    block_rows = block_rows or (_GPU_BLOCK_ROWS if search.gpus else _CPU_BLOCK_ROWS)
    rows_QK = np.full((len(queries_QD), k), -1, np.int32)
    cosines_QK = np.full((len(queries_QD), k), -np.inf, np.float32)

    def one_block(start: int, gpu: int) -> None:
        block = slice(start, start + block_rows)
        self_rows = None if query_rows_Q is None else query_rows_Q[block]
        rows_QK[block], cosines_QK[block] = search.block(queries_QD[block], self_rows, gpu)

    starts = range(0, len(queries_QD), block_rows)
    workers = max(1, search.gpus)

    def one_share(worker: int) -> None:  # each GPU takes every gpus-th block, from its own thread
        for start in starts[worker::workers]:
            one_block(start, worker)
            bar.advance()

    with progress_bar("neighbours", len(starts), "blocks") as bar:
        if workers == 1:  # in this thread: the number of OpenMP threads is a thread's own
            one_share(0)
        else:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(one_share, range(workers)))
    return rows_QK, cosines_QK


def inverse_norms(x_ND: np.ndarray, block_rows: int = 4096) -> np.ndarray:
    """1 / length of each row, float32 (N,), and 0 for a row of zeros. Raises ValueError where a number is not finite."""
    inverse_N = np.empty(len(x_ND), np.float32)
    for start in range(0, len(x_ND), block_rows):
        x_nD = x_ND[start : start + block_rows].astype(np.float64)
        squares_n = np.vecdot(x_nD, x_nD)  # a dot product for each row: equal rows have equal lengths, wherever they stand
        if not np.isfinite(squares_n).all():
            raise ValueError(f"row {start + int((~np.isfinite(squares_n)).argmax())} of the features is not finite")
        inverse_N[start : start + block_rows] = np.where(squares_n > 0, 1 / np.sqrt(np.where(squares_n > 0, squares_n, 1)), 0)
    return inverse_N


def unit_rows(x_ND: np.ndarray, dtype: type = np.float32, block_rows: int = 4096) -> np.ndarray:
    """A contiguous copy of the rows at length 1; rows of zeros stay zeros. Raises ValueError where a number is not finite."""
    inverse_N = inverse_norms(x_ND, block_rows)
    unit_ND: np.ndarray = np.empty(x_ND.shape, dtype)
    for start in range(0, len(x_ND), block_rows):
        block = slice(start, start + block_rows)
        unit_ND[block] = x_ND[block].astype(np.float32) * inverse_N[block, None]
    return unit_ND


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
    """One base, normalised once, and the search of one block of queries in it."""

    def __init__(self, base_ND: np.ndarray, k: int, queries_QD: np.ndarray):
        import faiss

        self.k = k
        self.base_ND = base_ND
        self.inverse_N = inverse_norms(base_ND)
        products = float(len(queries_QD)) * base_ND.size
        fits_gpu = k + 1 + _MARGINS[-1] <= _GPU_MOST_CANDIDATES and products >= _GPU_LEAST_PRODUCTS
        self.gpus: int = faiss.get_num_gpus() if fits_gpu else 0
        self.unit_ND = unit_rows(base_ND, np.float16 if self.gpus else np.float32)
        self.resources = [faiss.StandardGpuResources() for _ in range(self.gpus)]

    def block(self, queries_QD: np.ndarray, self_rows_Q: np.ndarray | None, gpu: int) -> Found:
        """`top_k` of one block of queries."""
        unit_QD = unit_rows(queries_QD)
        rows_QK, cosines_QK, unsure_Q = self._attempt(unit_QD, self_rows_Q, _MARGINS[0], gpu)
        if unsure_Q.any():
            self_rows = None if self_rows_Q is None else self_rows_Q[unsure_Q]
            rows_QK[unsure_Q], cosines_QK[unsure_Q], _ = self._attempt(unit_QD[unsure_Q], self_rows, _MARGINS[1], gpu)
        return rows_QK, cosines_QK

    def _attempt(self, unit_QD: np.ndarray, self_rows_Q: np.ndarray | None, margin: int, gpu: int) -> tuple[np.ndarray, ...]:
        """The k nearest of k + 1 + margin candidates, and for which queries a row that is no candidate might be among them."""
        wanted = min(self.k + 1 + margin, len(self.base_ND))
        scores_QM, rows_QM = self._candidates(unit_QD, wanted, gpu)
        cosines_QM = self._cosines(unit_QD, rows_QM)
        if self_rows_Q is not None:
            cosines_QM[rows_QM == self_rows_Q[:, None]] = -np.inf
        order_QK = np.lexsort((rows_QM, -cosines_QM), axis=1)[:, : self.k]
        rows_QK = np.full((len(unit_QD), self.k), -1, np.int32)
        cosines_QK = np.full((len(unit_QD), self.k), -np.inf, np.float32)
        found = order_QK.shape[1]
        cosines_QK[:, :found] = np.take_along_axis(cosines_QM, order_QK, axis=1)
        rows_QK[:, :found] = np.where(np.isneginf(cosines_QK[:, :found]), -1, np.take_along_axis(rows_QM, order_QK, axis=1))
        tolerance = _GPU_TOLERANCE if self.gpus else _CPU_TOLERANCE
        unsure_Q = (scores_QM.min(axis=1) > cosines_QK[:, -1] - tolerance) & (wanted < len(self.base_ND))
        return rows_QK, cosines_QK, unsure_Q

    def _candidates(self, unit_QD: np.ndarray, wanted: int, gpu: int) -> Found:
        import faiss

        if not self.gpus and len(unit_QD) * self.unit_ND.size < _FAISS_LEAST_PRODUCTS:
            scores_QN = unit_QD @ self.unit_ND.T
            rows_QM = np.argpartition(-scores_QN, wanted - 1, axis=1)[:, :wanted]
            return np.take_along_axis(scores_QN, rows_QM, axis=1), rows_QM
        metric = faiss.METRIC_INNER_PRODUCT
        if not self.gpus:
            return faiss.knn(unit_QD, self.unit_ND, wanted, metric=metric)
        return faiss.knn_gpu(
            self.resources[gpu],
            unit_QD.astype(np.float16),
            self.unit_ND,
            wanted,
            metric=metric,
            device=gpu,
            vectorsMemoryLimit=_GPU_BASE_BYTES,
            queriesMemoryLimit=_GPU_QUERY_BYTES,
        )

    def _cosines(self, unit_QD: np.ndarray, rows_QM: np.ndarray) -> np.ndarray:
        """Cosines float32 (Q, M) of candidates, each the same whatever block, thread or device found it."""
        import faiss

        cosines_QM = np.empty(rows_QM.shape, np.float32)
        block_rows = max(1, _RESCORED_BYTES // (4 * rows_QM.shape[1] * unit_QD.shape[1]))

        def one_block(start: int) -> None:
            block = slice(start, start + block_rows)
            candidates_qMD = self.base_ND[rows_QM[block]].astype(np.float32, copy=False)
            dots_qM = np.vecdot(candidates_qMD, unit_QD[block][:, None, :])
            cosines_QM[block] = dots_qM * self.inverse_N[rows_QM[block]]

        starts = range(0, len(unit_QD), block_rows)
        if len(starts) == 1:
            one_block(0)
        else:
            with ThreadPoolExecutor(faiss.omp_get_max_threads()) as pool:
                list(pool.map(one_block, starts))
        return cosines_QM
