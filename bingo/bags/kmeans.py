"""Centroids by spherical K-means, and iteration over the rows of each cluster, in bounded memory.

Shape letters: T train rows, D feature width, C clusters; n rows of a choice. Features are as in bingo.bags.builders.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from bingo import seeds
from bingo.bags.neighbors import cut, gpus_for
from bingo.bags.rows import Chosen, Rows, blocks, in_single_threads, in_threads, memory_budget, unit_rows
from bingo.bags.sharing import ALONE, Sharing
from bingo.runtime.gpus import faiss_resources
from bingo.runtime.progress import Bar, progress_bar

_TRAINED_NUMBERS = 2**32  # K-means trains on at most 16 GiB of float32, on any machine, because bags must not depend on its memory
_FAISS_QUERIES = 4096  # searched at once by FAISS, whose last bits depend on their number
_COLUMNS = 128


def train_centroids(
    features: Rows, clusters: int, iterations: int, seed: int, rows_a_cluster: int | None = None, sharing: Sharing = ALONE
) -> tuple[np.ndarray, int]:
    """Unit centroids float32 (C, D), and the number of rows that they were trained on.

    These are all, but no more than `rows_a_cluster` for each cluster and than 2^32 numbers (16 GiB as float32, of which each process holds
    its span in memory); if there are more, that many are drawn by seed.
    """
    most_rows = max(clusters, _TRAINED_NUMBERS // features.shape[1])
    if rows_a_cluster is not None:
        most_rows = min(most_rows, clusters * rows_a_cluster)
    chosen_n = seeds.distinct(seed, "kmeans", 0, len(features), most_rows)
    with progress_bar(f"K-means of {clusters:,} clusters", iterations, "iterations") as bar:
        (centroids_CD,) = sharing.once("centroids", lambda: (_trained(features, chosen_n, clusters, iterations, seed, sharing, bar),))
    return unit_rows(centroids_CD), len(chosen_n)


def _trained(features: Rows, chosen_n: np.ndarray, clusters: int, iterations: int, seed: int, sharing: Sharing, bar: Bar) -> np.ndarray:
    """The centroids of faiss.Kmeans with spherical=True; each process assigns its span of the rows. Sums of float32 depend on their order:
    they go from process to process, so that each row is added in its turn."""
    import faiss

    first, end = sharing.span(len(chosen_n), _FAISS_QUERIES)
    own_nD = _chosen_rows(features, chosen_n[first:end])
    start_C = np.arange(clusters, dtype=np.int32)
    if len(chosen_n) > clusters:
        order_n = np.empty(len(chosen_n), np.int32)
        faiss.rand_perm(faiss.swig_ptr(order_n), len(order_n), seeds.torch_seed(seed, "kmeans") % 2**31 + 1)  # type: ignore[attr-defined]
        start_C = order_n[:clusters]

    def add_first(centroids_CD: np.ndarray) -> None:
        ours_C = (start_C >= first) & (start_C < end)
        centroids_CD[ours_C] = own_nD[start_C[ours_C] - first]

    centroids_CD = sharing.in_turn(np.zeros((clusters, features.shape[1]), np.float32), add_first)
    if len(chosen_n) == clusters:
        return centroids_CD
    index: Any = faiss.IndexFlatIP(features.shape[1])
    if gpus := gpus_for(float(iterations) * len(own_nD) * clusters * features.shape[1]):
        index = faiss.index_cpu_to_gpu_multiple_py([faiss_resources(gpu)[0] for gpu in gpus], index, gpus=gpus)
    last = None
    for _ in range(iterations):
        faiss.normalize_L2(centroids_CD)
        index.reset()
        index.add(centroids_CD)
        cosines_n, cluster_n = (x[:, 0] for x in (index.search(own_nD, 1) if gpus else _nearest(index, own_nD)))
        sums = np.zeros((clusters + 1, features.shape[1] + 1), np.float32)  # the last column: rows; the last number: the sum of all cosines
        sums = sharing.in_turn(sums, partial(_add, own_nD=own_nD, cluster_n=cluster_n, cosines_n=cosines_n))
        centroids_CD = _means(sums[:-1, :-1], sums[:-1, -1], len(chosen_n))
        bar.advance()
        if sums[-1, -1] == last != 0:
            break
        last = sums[-1, -1]
    faiss.normalize_L2(centroids_CD)
    return centroids_CD


def _nearest(index: Any, own_nD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`index.search(own_nD, 1)` on the CPU, as one thread computes it: the last bits of a product depend on the number of threads that
    share it, so each thread has blocks of its own."""
    cosines_n1, cluster_n1 = np.empty((len(own_nD), 1), np.float32), np.empty((len(own_nD), 1), np.int64)

    def one_block(block: slice) -> None:
        cosines_n1[block], cluster_n1[block] = index.search(own_nD[block], 1)

    in_single_threads(one_block, cut(slice(0, len(own_nD)), _FAISS_QUERIES))
    return cosines_n1, cluster_n1


def _chosen_rows(features: Rows, chosen_n: np.ndarray) -> np.ndarray:
    """The given rows, in ascending order, normalised: float32 (n, D)."""
    unit_nD = np.empty((len(chosen_n), features.shape[1]), np.float32)
    if not len(chosen_n):
        return unit_nD
    for start, block_nD in blocks(features, first=int(chosen_n[0]), end=int(chosen_n[-1]) + 1):
        first, end = np.searchsorted(chosen_n, [start, start + len(block_nD)])
        unit_nD[first:end] = unit_rows(block_nD[chosen_n[first:end] - start])
    return unit_nD


def _add(sums: np.ndarray, own_nD: np.ndarray, cluster_n: np.ndarray, cosines_n: np.ndarray) -> None:
    """Add each row to the sum of its cluster, in the order of the rows, and its cosine to the total."""
    import faiss

    order_n = np.argsort(cluster_n, kind="stable")
    rows_C = np.bincount(cluster_n, minlength=len(sums) - 1)
    start_C = rows_C.cumsum() - rows_C

    def add_columns(start: int) -> None:
        columns = slice(start, start + _COLUMNS)
        sums_Cd, rows_nd = sums[:-1, :-1][:, columns], own_nD[:, columns]
        for place in range(rows_C.max(initial=0)):
            longer_c = np.flatnonzero(rows_C > place)
            sums_Cd[longer_c] += rows_nd[order_n[start_C[longer_c] + place]]

    in_threads(add_columns, range(0, own_nD.shape[1], _COLUMNS), faiss.omp_get_max_threads())
    sums[:-1, -1] += rows_C
    sums[-1, -1] = np.add.accumulate(np.concatenate([sums[-1:, -1], cosines_n]), dtype=np.float32)[-1]


def _means(sums_CD: np.ndarray, rows_C: np.ndarray, rows: int) -> np.ndarray:
    """The means of the clusters. As in FAISS, an empty cluster gets half of a larger one, drawn in proportion to its number of rows."""
    means_CD = sums_CD * np.where(rows_C > 0, np.float32(1) / np.maximum(rows_C, 1), np.float32(0))[:, None]
    rows_C, draws = rows_C.copy(), np.random.RandomState(1234)  # C++'s std::mt19937, which FAISS draws from
    up_D = np.where(np.arange(means_CD.shape[1]) % 2 == 0, 1 + 2**-10, 1 - 2**-10).astype(np.float32)
    left = np.empty(0, np.float32)
    for empty in np.flatnonzero(rows_C == 0):
        share_C = ((rows_C.astype(np.float64) - 1) / np.float32(rows - len(rows_C))).astype(np.float32)
        while True:
            missing = max(0, len(share_C) - len(left))
            drawn = draws.randint(0, 2**32, missing, np.uint32).astype(np.float32) / np.float32(2**32 - 1)
            left = np.concatenate([left, drawn])
            hits = left[: len(share_C)] < share_C
            if hits.any():
                break
            left = left[len(share_C) :]
        donor = int(hits.argmax())
        left = left[donor + 1 :]
        means_CD[empty] = means_CD[donor] * up_D
        means_CD[donor] *= 2 - up_D
        rows_C[empty] = rows_C[donor] / 2
        rows_C[donor] -= rows_C[empty]
    return means_CD


def sorted_by_cluster(cluster_T: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows sorted by cluster, then by row, int32 (T,), and the start of each cluster among them, int64 (C+1,)."""
    rows_T = np.argsort(cluster_T, kind="stable").astype(np.int32)
    return rows_T, np.concatenate([[0], np.bincount(cluster_T, minlength=clusters).cumsum()]).astype(np.int64)


def each_cluster(features: Rows, cluster_rows_T: np.ndarray, cluster_start: np.ndarray) -> Iterator[tuple[int, np.ndarray, Rows]]:
    """(cluster, its rows, their features) for each cluster that is not empty. A store is read once for as many clusters as fit into
    memory."""
    in_store = not isinstance(features, np.ndarray)
    most_rows = memory_budget() // (features.shape[1] * (features.dtype.itemsize + 4)) if in_store else 0
    first = 0
    while first < len(cluster_start) - 1:
        end = max(first + 1, int(np.searchsorted(cluster_start, cluster_start[first] + most_rows, "right")) - 1)
        rows_n = cluster_rows_T[cluster_start[first] : cluster_start[end]]
        if in_store and len(rows_n) > most_rows:
            yield first, rows_n, Chosen(features, rows_n)
        else:
            own_nD = features[rows_n]
            for cluster, (start, stop) in enumerate(pairwise(cluster_start[first : end + 1] - cluster_start[first]), first):
                if stop > start:
                    yield cluster, rows_n[start:stop], own_nD[start:stop]
        first = end
