"""Centroids by spherical K-means, and iteration over the rows of each cluster, in bounded memory.

Shape letters: T train rows, D feature width, C clusters; n rows of a choice. Features are as in bingo.bags.builders.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from bingo import seeds
from bingo.bags.neighbors import gpus_for
from bingo.bags.rows import Rows, blocks, memory_budget, unit_rows
from bingo.runtime.gpus import faiss_resources
from bingo.runtime.progress import progress_bar

_TRAINED_NUMBERS = 2**32  # K-means trains on at most 16 GiB of float32, whatever the machine's memory, as bags must not depend on it


def train_centroids(features: Rows, clusters: int, iterations: int, seed: int, rows_a_cluster: int | None = None) -> tuple[np.ndarray, int]:
    """Unit centroids float32 (C, D), and the number of rows that they were trained on.

    These are all, but no more than `rows_a_cluster` for each cluster and than 2^32 numbers (16 GiB as float32, which this step holds
    in memory); if there are more, that many are drawn by seed.
    """
    import faiss

    most_rows = max(clusters, _TRAINED_NUMBERS // features.shape[1])
    if rows_a_cluster is not None:
        most_rows = min(most_rows, clusters * rows_a_cluster)
    with progress_bar(f"K-means of {clusters:,} clusters"):
        trained_nD = _trained_rows(features, most_rows, seed)
        kmeans = faiss.Kmeans(
            features.shape[1],
            clusters,
            niter=iterations,
            spherical=True,
            seed=seeds.torch_seed(seed, "kmeans") % 2**31,
            min_points_per_centroid=1,  # these two only limit the sample that FAISS trains on: it gets all rows
            max_points_per_centroid=-(-len(trained_nD) // clusters),
        )
        if gpus := gpus_for(float(iterations) * len(trained_nD) * clusters * features.shape[1]):
            kmeans.index = faiss.index_cpu_to_gpu_multiple_py([faiss_resources(gpu)[0] for gpu in gpus], kmeans.index, gpus=gpus)
        kmeans.train(trained_nD)
    return unit_rows(np.asarray(kmeans.centroids)), len(trained_nD)


def _trained_rows(features: Rows, most_rows: int, seed: int) -> np.ndarray:
    """At most `most_rows` rows, drawn by seed and normalised, float32 (n, D)."""
    chosen_n = seeds.distinct(seed, "kmeans", 0, len(features), most_rows)
    unit_nD = np.empty((len(chosen_n), features.shape[1]), np.float32)
    for start, block_nD in blocks(features):
        first, end = np.searchsorted(chosen_n, [start, start + len(block_nD)])
        unit_nD[first:end] = unit_rows(block_nD[chosen_n[first:end] - start])
    return unit_nD


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
            yield first, rows_n, _Chosen(features, rows_n)
        else:
            own_nD = features[rows_n]
            for cluster, (start, stop) in enumerate(pairwise(cluster_start[first : end + 1] - cluster_start[first]), first):
                if stop > start:
                    yield cluster, rows_n[start:stop], own_nD[start:stop]
        first = end


class _Chosen:
    """Selected rows of a matrix, read on access."""

    def __init__(self, features: Rows, rows_n: np.ndarray):
        self._features, self._rows_n = features, rows_n
        self.shape, self.dtype = (len(rows_n), features.shape[1]), features.dtype

    def __len__(self) -> int:
        return len(self._rows_n)

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray:
        return self._features[self._rows_n[rows]]
