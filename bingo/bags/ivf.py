"""Approximate nearest neighbours for tens of millions of rows by an inverted file, i.e. lists of rows around K-means centroids.

Every row is in the list of its nearest centroid, and its neighbours are searched in the lists of the `probes` centroids nearest to
it. Within these the search is exact: with all lists probed the result equals that of `top_k`, except for ties that it leaves open. Its
recall is measured against an exact search for a sample (Sivic and Zisserman 2003; Jégou et al. 2011 for descriptors).

Shape letters: T train rows, D feature width, C lists, K members, P probes; q rows of a block, n of a choice.
"""

import math
from dataclasses import dataclass

import numpy as np

from bingo import seeds
from bingo.bags.kmeans import each_cluster, sorted_by_cluster, train_centroids
from bingo.bags.neighbors import Found, best_of, cut, nothing_found, top_k
from bingo.bags.rows import Rows, memory_budget, unit_rows
from bingo.bags.sharing import ALONE, Sharing, of_all
from bingo.runtime.progress import progress_bar

_ITERATIONS = 10  # of K-means: the lists need not be optimal
_TRAINED_ROWS_A_LIST = 64
_RECALL_ROWS = 1000
_PROBE_BYTES = 16  # of one probe of one row: list and cosine, then its place in the order by list


@dataclass(frozen=True)
class InvertedFile:
    """The number of lists (None: 4 sqrt(T)) and how many of them are searched for each row (at most all)."""

    lists: int | None
    probes: int
    seed: int

    def list_count(self, rows: int) -> int:
        """The number of lists for `rows` train rows."""
        return self.lists or min(rows, round(4 * math.sqrt(rows)))

    def cosines(self, rows: int) -> float:
        """Number of cosines computed by a search among that many rows: training, both assignments, lists (assuming equal sizes), recall."""
        lists = self.list_count(rows)
        trained = _ITERATIONS * min(rows, _TRAINED_ROWS_A_LIST * lists)
        return float((trained + 2 * rows) * lists + rows * rows * min(self.probes, lists) / lists + min(_RECALL_ROWS, rows) * rows)


def search_lists(features: Rows, k: int, ivf: InvertedFile, sharing: Sharing = ALONE) -> Found | None:
    """The k nearest rows to each row in the lists that it probes, excluding itself: (rows int32 (T, K), cosines float32 (T, K)), -1 and
    -inf if these lists hold fewer. None on all but the first process.

    Memory in addition to arguments and results: a block of normalised queries with the lists that they probe and, if features are in
    a store, a group of lists; the store is read once for each of both. Both are as large as `memory_budget` allows.
    """
    lists = ivf.list_count(len(features))
    centroids_CD, _ = train_centroids(features, lists, _ITERATIONS, ivf.seed, _TRAINED_ROWS_A_LIST, sharing)
    search = _Lists(features, k, min(ivf.probes, lists), centroids_CD, sharing.nearest_centroid("lists", features, centroids_CD))
    found = sharing.of_rows("members", sharing.parts(len(features)), search.rows)
    return None if found is None else (found[0], found[1])


class _Lists:
    """The rows of each list."""

    def __init__(self, features: Rows, k: int, probes: int, centroids_CD: np.ndarray, list_T: np.ndarray):
        self._features, self._k, self._probes, self._centroids_CD, self._list_T = features, k, probes, centroids_CD, list_T
        self._list_rows_T, self._list_start = sorted_by_cluster(list_T, len(centroids_CD))

    def rows(self, rows: slice) -> Found:
        """The nearest of these rows, in as many blocks as memory allows."""
        members_qK, cosines_qK = nothing_found(rows.stop - rows.start, self._k)
        row_bytes = _PROBE_BYTES * self._probes + self._features.shape[1] * (self._features.dtype.itemsize + 4)
        blocks, lists = cut(rows, max(1, memory_budget() // 2 // row_bytes)), len(self._centroids_CD)
        with progress_bar(f"neighbours{of_all(rows, self._list_T)}", lists * len(blocks), "lists") as bar:
            for turn, block in enumerate(blocks):
                own = slice(block.start - rows.start, block.stop - rows.start)
                unit_qD = unit_rows(self._features[block])
                queries = _ListQueries(unit_qD, self._list_T[block], block.start, members_qK[own], cosines_qK[own])
                probing, probing_start = _by_list(top_k(unit_qD, self._centroids_CD, self._probes, unit_queries=True)[0], lists)
                for number, rows_n, own_nD in each_cluster(self._features, self._list_rows_T, self._list_start):
                    queries.search(probing[probing_start[number] : probing_start[number + 1]], number, rows_n, own_nD)
                    bar.advance_to(turn * lists + number + 1)
        return members_qK, cosines_qK


def _by_list(probed_qP: np.ndarray, lists: int) -> tuple[np.ndarray, np.ndarray]:
    """The queries sorted by the lists that they probe, int64 (q * P,), and the start of each list among them (C+1,)."""
    probing = np.argsort(probed_qP, axis=None, kind="stable")
    probing //= probed_qP.shape[1]
    return probing, np.concatenate([[0], np.bincount(probed_qP.ravel(), minlength=lists).cumsum()])


@dataclass(frozen=True)
class _ListQueries:
    """A block of queries, the list that each is in, the number of the first, and the best neighbours found so far."""

    unit_qD: np.ndarray
    list_q: np.ndarray
    first_row: int
    members_qK: np.ndarray
    cosines_qK: np.ndarray

    def search(self, asking_n: np.ndarray, number: int, rows_n: np.ndarray, own_nD: Rows) -> None:
        """Merge what these queries find in one list, given by its rows and features, into their best neighbours."""
        if not len(asking_n):
            return
        k = self.members_qK.shape[1]
        # which row of the list is the query itself
        self_n = np.where(self.list_q[asking_n] == number, np.searchsorted(rows_n, asking_n + self.first_row), -1)
        floor_n = self.cosines_qK[asking_n, -1]
        base_nD = own_nD.astype(np.float32) if isinstance(own_nD, np.ndarray) else own_nD
        places_nK, cosines_nK = top_k(self.unit_qD[asking_n], base_nD, k, self_n, floor_Q=floor_n, unit_queries=True)
        better_n = cosines_nK[:, 0] >= floor_n
        asking_n, places_nK, cosines_nK = asking_n[better_n], places_nK[better_n], cosines_nK[better_n]
        both_rows = np.concatenate([self.members_qK[asking_n], np.where(places_nK >= 0, rows_n[places_nK], -1)], axis=1)
        both_cosines = np.concatenate([self.cosines_qK[asking_n], cosines_nK], axis=1)
        self.members_qK[asking_n], self.cosines_qK[asking_n] = best_of(both_rows, both_cosines, k)


def recall_of(cosines_TK: np.ndarray | None, features: Rows, k: int, seed: int, sharing: Sharing = ALONE) -> float:
    """The share of the k nearest rows, searched exactly, that were found for up to 1,000 rows drawn from the seed: of those that were
    found, the ones at least as near as the last exact one (cosines are the same bits in both searches). NaN on all but the first process,
    which has the cosines."""
    rows_n = seeds.distinct(seed, "recall", 0, len(features), _RECALL_ROWS)
    _, exact_nK = sharing.nearest("recall", features[rows_n], features, k, rows_n)
    return math.nan if cosines_TK is None else float((cosines_TK[rows_n] >= exact_nK[:, -1:]).mean())
