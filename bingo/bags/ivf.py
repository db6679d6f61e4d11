"""Approximate nearest neighbours for tens of millions of rows by an inverted file, i.e. lists of rows around K-means centroids.

Every row is in the list of its nearest centroid, and its neighbours are searched in the lists of the `probes` centroids nearest to
it. Within these the search is exact: with all lists probed the result equals that of `top_k`. The recall is measured on a sample with an
exact search (Sivic and Zisserman 2003; Jégou et al. 2011 for descriptors).

Shape letters: T train rows, D feature width, C lists, K members, P probes; q rows of a block, n of a choice.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bingo import seeds
from bingo.bags.kmeans import each_cluster, sorted_by_cluster, train_centroids
from bingo.bags.neighbors import FLOAT32_TOLERANCE, Found, best_of, cut, nothing_found, top_k
from bingo.bags.rows import Rows, in_single_threads, inverse_norms, memory_budget, unit_rows
from bingo.bags.sharing import ALONE, Sharing
from bingo.runtime.progress import Bar, progress_bar

_ITERATIONS = 10  # of K-means: the lists need not be optimal
_TRAINED_ROWS_A_LIST = 64
_RECALL_ROWS = 1000
_PART_ROWS, _PARTS = 131072, 64  # least number of queries in a part, which is searched or stored as a whole; largest number of parts
_BLOCK_BYTES = 512 << 20  # of a block of queries and their probes
_SCORED_NUMBERS = 2**20  # scores, or numbers of rows, at once: 4 MiB, to stay in a cache
_CROWDED = 256  # most rows of a list, beyond k, that may be nearer to a query than its k nearest so far, before `top_k` searches the list
_PROBE_BYTES = 18  # of one probe of one row: its list, and its place in the order by list, twice while it is sorted


@dataclass(frozen=True)
class InvertedFile:
    """The number of lists (None: 4 sqrt(T)) and how many of them are searched for each row."""

    lists: int | None
    probes: int
    seed: int

    def list_count(self, rows: int) -> int:
        """The number of lists for `rows` train rows."""
        return self.lists or min(rows, round(4 * math.sqrt(rows)))

    def cosines(self, rows: int) -> float:
        """Number of cosines that a search among this many rows computes: training, assignments, lists (assuming equal sizes), recall."""
        lists = self.list_count(rows)
        trained = _ITERATIONS * min(rows, _TRAINED_ROWS_A_LIST * lists)
        return float((trained + 2 * rows) * lists + rows * rows * min(self.probes, lists) / lists + min(_RECALL_ROWS, rows) * rows)


def search_lists(features: Rows, k: int, ivf: InvertedFile, sharing: Sharing = ALONE) -> Found | None:
    """The k nearest rows to each row in the lists that it probes, excluding itself: (rows int32 (T, K), cosines float32 (T, K)), -1 and
    -inf if these lists contain fewer rows. None on all but the first process.

    Memory in addition to arguments and results: a block of normalised queries with the lists that they probe, at most 512 MiB, and for
    each thread one list. If features are in a store, blocks and groups of lists are as large as `memory_budget` allows, because the store
    is read once for each block and each group.
    """
    parts = sharing.parts(len(features), most_rows=max(_PART_ROWS, len(features) // _PARTS))
    lists = _Lists.of(features, ivf, sharing)
    with progress_bar("neighbours", len(features), "images") as bar:
        found = sharing.of_rows("members", parts, lambda places: lists.nearest(places, k, bar))
    if found is None:
        return None
    for x_TK in found:
        for x_T in x_TK.T:  # a column at a time bounds the memory
            x_T[lists.rows_T] = x_T.copy()
    return found[0], found[1]


def nearest_in_lists(queries_QD: np.ndarray, features: Rows, floor: float, ivf: InvertedFile) -> np.ndarray:
    """The largest cosine of each query to the rows in the lists that it probes, float32 (Q,); `floor` if none is larger."""
    lists = _Lists.of(features, ivf)
    best_Q = np.full(len(queries_QD), floor, np.float32)
    with progress_bar("near-duplicates of test images", len(best_Q), "images") as bar:

        def one_part(part: slice) -> None:
            queries = _PendingQueries(unit_rows(queries_QD[part]), np.full((part.stop - part.start, 1), -1, np.int32), best_Q[part, None])
            lists.search(queries, np.full(len(queries.unit_qD), -1), bar)

        lists.share_out(one_part, slice(0, len(best_Q)))
    return best_Q


@dataclass(frozen=True)
class _Lists:
    """The rows in the order of their lists, and where each list starts among them. A place is a position in this order."""

    features: Rows
    inverse_T: np.ndarray
    probes: int
    centroids_CD: np.ndarray
    rows_T: np.ndarray
    start: np.ndarray

    @classmethod
    def of(cls, features: Rows, ivf: InvertedFile, sharing: Sharing = ALONE) -> "_Lists":
        """The lists of these rows."""
        lists = ivf.list_count(len(features))
        centroids_CD, _ = train_centroids(features, lists, _ITERATIONS, ivf.seed, _TRAINED_ROWS_A_LIST, sharing)
        rows_T, start = sorted_by_cluster(sharing.nearest_centroid("lists", features, centroids_CD), lists)
        return cls(features, inverse_norms(features), min(ivf.probes, lists), centroids_CD, rows_T, start)

    def share_out(self, work: Callable[[slice], None], rows: slice) -> None:
        """Call `work` for parts of the rows, each in a thread of its own; for all at once if the features are in a store, which every
        thread would read."""
        import faiss

        if isinstance(self.features, np.ndarray):
            in_single_threads(work, cut(rows, max(1, -(-(rows.stop - rows.start) // faiss.omp_get_max_threads()))))
        else:
            work(rows)

    def nearest(self, places: slice, k: int, bar: Bar) -> Found:
        """The k nearest of the rows at these places, in as many blocks as memory allows."""
        members_qK, cosines_qK = nothing_found(places.stop - places.start, k)
        row_bytes = _PROBE_BYTES * self.probes + self.features.shape[1] * (self.features.dtype.itemsize + 4)
        budget_bytes = memory_budget() // 2
        if isinstance(self.features, np.ndarray):
            budget_bytes = min(budget_bytes, _BLOCK_BYTES)

        def one_part(part: slice) -> None:
            own, rows_m = slice(part.start - places.start, part.stop - places.start), self.rows_T[part]
            queries = _PendingQueries(unit_rows(self.features[rows_m], inverse_N=self.inverse_T[rows_m]), members_qK[own], cosines_qK[own])
            list_q = np.searchsorted(self.start, np.arange(part.start, part.stop), "right") - 1
            # each query's own list first: the neighbours found there exclude most rows of the other lists
            own_start = self.start[list_q[0] : list_q[-1] + 2]
            for number, rows_n, own_nD in each_cluster(self.features, self.rows_T, own_start):
                places_n = np.arange(max(own_start[number], part.start), min(own_start[number + 1], part.stop))
                queries.search(places_n - part.start, places_n - own_start[number], rows_n, own_nD, self.inverse_T[rows_n])
            self.search(queries, list_q, bar)

        for block in cut(places, max(1, budget_bytes // row_bytes)):
            bar.advance_to(block.start)
            self.share_out(one_part, block)
        return members_qK, cosines_qK

    def search(self, queries: "_PendingQueries", list_q: np.ndarray, bar: Bar) -> None:
        """Search the lists that each query probes, except for `list_q`, which has been searched for it."""
        probing, probing_start = self.probing(queries.unit_qD)
        begun = 0
        for number, rows_n, own_nD in each_cluster(self.features, self.rows_T, self.start):
            asking_n = probing[probing_start[number] : probing_start[number + 1]]
            asking_n = asking_n[list_q[asking_n] != number]
            queries.search(asking_n, np.full(len(asking_n), -1), rows_n, own_nD, self.inverse_T[rows_n])
            done = (number + 1) * len(list_q) // len(self.centroids_CD)
            bar.advance(done - begun)
            begun = done

    def probing(self, unit_qD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The queries sorted by the lists that they probe, int64 (q * P,), and the start of each list among them (C+1,)."""
        lists = len(self.centroids_CD)
        probed_qP = np.empty((len(unit_qD), self.probes), np.min_scalar_type(lists))  # numpy sorts 16 bits by their digits
        for part in cut(slice(0, len(unit_qD)), max(1, _SCORED_NUMBERS // lists)):
            scores_mC = unit_qD[part] @ self.centroids_CD.T
            least_m = np.partition(scores_mC, -self.probes, axis=1)[:, -self.probes] - 2 * FLOAT32_TOLERANCE
            near_mC = scores_mC >= least_m[:, None]
            unsure_m = np.count_nonzero(near_mC, axis=1) > self.probes  # rounding may decide
            near_mC[unsure_m, self.probes :], near_mC[unsure_m, : self.probes] = False, True
            probed_qP[part] = (np.flatnonzero(near_mC) % lists).reshape(-1, self.probes)
            if unsure_m.any():
                unsure_mD = unit_qD[part][unsure_m]
                probed_qP[part][unsure_m] = top_k(unsure_mD, self.centroids_CD, self.probes, unit_queries=True)[0]
        probing = np.argsort(probed_qP, axis=None, kind="stable")
        probing //= self.probes
        return probing, np.concatenate([[0], np.bincount(probed_qP.ravel(), minlength=lists).cumsum()])


@dataclass(frozen=True)
class _PendingQueries:
    """Normalised queries, and their best neighbours so far."""

    unit_qD: np.ndarray
    members_qK: np.ndarray
    cosines_qK: np.ndarray

    def search(self, asking_n: np.ndarray, self_n: np.ndarray, rows_n: np.ndarray, own_nD: Rows, inverse_n: np.ndarray) -> None:
        """Merge what these queries find in one list, given by its rows and features, into their best neighbours; `self_n`: the place in
        the list that is the query itself (-1: none)."""
        if not len(asking_n):
            return
        if not isinstance(own_nD, np.ndarray):  # larger than the memory
            self._search_all(asking_n, self_n, rows_n, own_nD)
            return
        base_nD = own_nD.astype(np.float32)
        unit_nD = base_nD * inverse_n[:, None]
        for part in cut(slice(0, len(asking_n)), max(1, _SCORED_NUMBERS // len(rows_n))):
            asking_m, self_m = asking_n[part], self_n[part]
            query_p, place_p, crowded_m = self._near(asking_m, unit_nD)
            if crowded_m.any():
                self._search_all(asking_m[crowded_m], self_m[crowded_m], rows_n, base_nD)
            cosines_p = np.empty(len(query_p), np.float32)
            for some in cut(slice(0, len(query_p)), max(1, _SCORED_NUMBERS // base_nD.shape[1])):
                dots_p = np.vecdot(base_nD[place_p[some]], self.unit_qD[asking_m[query_p[some]]])
                cosines_p[some] = dots_p * inverse_n[place_p[some]]
            cosines_p[place_p == self_m[query_p]] = -np.inf
            self._merge(asking_m, query_p, rows_n[place_p], cosines_p)

    def _near(self, asking_m: np.ndarray, unit_nD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs of a query (ascending) and a place in the list that may be among its k nearest, except for queries with more than k + 256
        of them, which are returned separately."""
        k, scores_mn, least_m = (
            self.members_qK.shape[1],
            self.unit_qD[asking_m] @ unit_nD.T,
            self.cosines_qK[asking_m, -1] - FLOAT32_TOLERANCE,
        )
        open_m = np.isneginf(least_m)
        if len(unit_nD) > k + 1 and open_m.any():  # the k + 1 nearest, as one is the query itself
            least_m[open_m] = np.partition(scores_mn[open_m], -k - 1, axis=1)[:, -k - 1] - 2 * FLOAT32_TOLERANCE
        query_p, place_p = np.divmod(np.flatnonzero(scores_mn >= least_m[:, None]), len(unit_nD))
        crowded_m = np.bincount(query_p, minlength=len(asking_m)) > k + _CROWDED
        kept_p = ~crowded_m[query_p]
        return query_p[kept_p], place_p[kept_p], crowded_m

    def _merge(self, asking_m: np.ndarray, query_p: np.ndarray, rows_p: np.ndarray, cosines_p: np.ndarray) -> None:
        """Merge pairs of a query (ascending) and a row, with their cosines, into the best neighbours."""
        if not len(query_p):
            return
        pairs_m = np.bincount(query_p, minlength=len(asking_m))
        line_p, place_p = (np.cumsum(pairs_m > 0) - 1)[query_p], np.arange(len(query_p)) - (np.cumsum(pairs_m) - pairs_m)[query_p]
        rows_qM, cosines_qM = nothing_found(line_p[-1] + 1, pairs_m.max())
        rows_qM[line_p, place_p], cosines_qM[line_p, place_p] = rows_p, cosines_p
        self._keep_best(asking_m[pairs_m > 0], rows_qM, cosines_qM)

    def _search_all(self, asking_n: np.ndarray, self_n: np.ndarray, rows_n: np.ndarray, base_nD: Rows) -> None:
        """Search for the queries for which the list is too large, or has too many nearly equal rows."""
        floor_n = self.cosines_qK[asking_n, -1]
        places_nK, cosines_nK = top_k(self.unit_qD[asking_n], base_nD, self.members_qK.shape[1], self_n, floor_Q=floor_n, unit_queries=True)
        self._keep_best(asking_n, np.where(places_nK >= 0, rows_n[places_nK], -1), cosines_nK)

    def _keep_best(self, asking_n: np.ndarray, rows_nM: np.ndarray, cosines_nM: np.ndarray) -> None:
        rows_nM = np.concatenate([self.members_qK[asking_n], rows_nM], axis=1)
        cosines_nM = np.concatenate([self.cosines_qK[asking_n], cosines_nM], axis=1)
        self.members_qK[asking_n], self.cosines_qK[asking_n] = best_of(rows_nM, cosines_nM, self.members_qK.shape[1])


def recall_of(cosines_TK: np.ndarray | None, features: Rows, k: int, seed: int, sharing: Sharing = ALONE) -> float:
    """The share of the k nearest rows by an exact search that were found, for up to 1,000 rows drawn with the seed. A row counts as found
    if it is at least as near as the last exact one (both searches compute bitwise equal cosines). NaN on all but the first process, which
    has the cosines."""
    rows_n = seeds.distinct(seed, "recall", 0, len(features), _RECALL_ROWS)
    _, exact_nK = sharing.nearest("recall", features[rows_n], features, k, rows_n)
    return math.nan if cosines_TK is None else float((cosines_TK[rows_n] >= exact_nK[:, -1:]).mean())
