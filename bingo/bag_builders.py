"""Building bags from the teacher's features of the train rows: nearest neighbours, K-means, or labels (the upper bound).

Shape letters: T train rows, D feature width, K members listed, C clusters or classes; n rows of a block. Every builder takes features
of any float type (T, D), not normalised, and measures by cosine. BINGO (Xu et al. 2022) describes all three; the released code has only
knn.

Features may be in a store (bingo.data.chunks.StoredRows) and larger than the memory. Where they and a normalised copy fit half of the
free memory they are read once; otherwise they are streamed, as `top_k` says, and the bags are the same to the bit. The memory for
members and cosines, 12 bytes x T x K, is needed in any case.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from bingo import seeds
from bingo.bags import Bags
from bingo.errors import UserError
from bingo.neighbors import top_k
from bingo.rows import Rows, blocks, held, inverse_norms, memory_budget, unit_rows

_SAME_COSINE = 1 - 1e-6
_CHECKED_ROWS = 4096
_TRAINED_NUMBERS = 2**32  # what K-means trains on at most, 16 GiB of float32: not what the machine has, as bags must not depend on it


def build_knn(features: Rows, k: int, mutual: bool = False) -> Bags:
    """The k rows with the highest cosine to each row, itself left out by its number; `mutual`: those of them that have the row among
    their own k (which reads members alone). Raises UserError where k is too large."""
    rows = len(features)
    _check_k(k, rows)
    features = held(features, memory_budget())
    _check_features(features)
    members_TK, cosines_TK = top_k(features, features, k, np.arange(rows))
    similarity_TK = cosines_TK.astype(np.float16)
    if mutual:
        members_TK, similarity_TK = _mutual(members_TK, similarity_TK)
    return Bags({**_settings("knn", k), "mutual": mutual}, members_TK, similarity_TK)


def _check_k(k: int, rows: int) -> None:
    if k >= rows:
        raise UserError(f"bagging.k = {k}: a bag of the {rows} train rows has at most {rows - 1} members; lower bagging.k")


def _mutual(members_TK: np.ndarray, similarity_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Only members whose own list has the anchor, moved to the front of each row."""
    rows_T1, kept_TK = np.arange(len(members_TK))[:, None], np.empty(members_TK.shape, bool)
    for place, members_T in enumerate(members_TK.T):  # a column at a time bounds the memory
        kept_TK[:, place] = (members_TK[members_T] == rows_T1).any(axis=1)
    order_TK = np.argsort(~kept_TK, axis=1, kind="stable")
    moved = (np.take_along_axis(x_TK, order_TK, axis=1) for x_TK in (kept_TK, members_TK, similarity_TK))
    kept_TK, members_TK, similarity_TK = moved
    return np.where(kept_TK, members_TK, -1).astype(np.int32), np.where(kept_TK, similarity_TK, -np.inf).astype(np.float16)


def build_kmeans(features: Rows, clusters: int, iterations: int, k: int, seed: int) -> Bags:
    """Spherical K-means: the bag is all others of the row's cluster.

    Centroids are trained on all rows, or where these are more than 2^32 numbers (16 GiB as float32, which this step holds in memory)
    on so many rows, drawn from the seed. A row belongs to the centroid with the largest dot product. The k nearest of its cluster are
    listed; a row alone there has an empty bag. Raises UserError where clusters exceed rows.
    """
    import faiss

    rows = len(features)
    if clusters > rows:
        raise UserError(f"bagging.clusters = {clusters}: there are only {rows} train rows; lower bagging.clusters")
    _check_k(k, rows)
    features = held(features, memory_budget())
    _check_features(features)
    trained_nD = _trained_rows(features, clusters, seed)
    kmeans = faiss.Kmeans(
        features.shape[1],
        clusters,
        niter=iterations,
        spherical=True,
        seed=seeds.torch_seed(seed, "kmeans") % 2**31,
        min_points_per_centroid=1,  # these two bound only the sample that FAISS trains on: all rows, whatever their number
        max_points_per_centroid=-(-len(trained_nD) // clusters),
        gpu=faiss.get_num_gpus() > 0,
    )
    kmeans.train(trained_nD)
    trained_rows = len(trained_nD)
    del trained_nD
    centroids_CD = unit_rows(np.asarray(kmeans.centroids))
    cluster_T = top_k(features, centroids_CD, 1)[0][:, 0]
    settings = {**_settings("kmeans", k), "clusters": clusters, "iterations": iterations, "seed": seed, "trained_rows": trained_rows}
    return _grouped(settings, features, cluster_T, clusters, k, centroids_CD)


def _trained_rows(features: Rows, clusters: int, seed: int) -> np.ndarray:
    """The rows that K-means is trained on, at length 1, float32 (n, D)."""
    rows, width = features.shape
    most_rows = max(clusters, _TRAINED_NUMBERS // width)
    if rows <= most_rows:
        chosen_n = np.arange(rows)
    else:
        chosen_n = np.sort(np.argsort(seeds.uniforms(seed, "kmeans", 0, np.arange(rows))[:, 0], kind="stable")[:most_rows])
    unit_nD = np.empty((len(chosen_n), width), np.float32)
    for start, block_nD in blocks(features):
        first, end = np.searchsorted(chosen_n, [start, start + len(block_nD)])
        unit_nD[first:end] = unit_rows(block_nD[chosen_n[first:end] - start])
    return unit_nD


def build_label(labels_T: np.ndarray, features: Rows, k: int) -> Bags:
    """The bag is all others of the row's class; the k nearest are listed. Raises UserError where a label is unknown."""
    unknown = int((labels_T < 0).sum())
    if unknown:
        problem = f"bagging.method = label: {unknown} of {len(labels_T)} train rows have no label"
        raise UserError(f"{problem}; set bagging.method to knn or kmeans, or sort the images into class folders")
    _check_k(k, len(labels_T))
    features = held(features, memory_budget())
    _check_features(features)
    classes = int(labels_T.max()) + 1
    return _grouped(_settings("label", k), features, labels_T.astype(np.int32), classes, k, None)


def _grouped(settings: dict, features: Rows, cluster_T: np.ndarray, clusters: int, k: int, centroids_CD: np.ndarray | None) -> Bags:
    """Bags that are clusters: the rows of each, and the k nearest of them for each row."""
    cluster_rows_T = np.argsort(cluster_T, kind="stable").astype(np.int32)
    cluster_start = np.concatenate([[0], np.bincount(cluster_T, minlength=clusters).cumsum()]).astype(np.int64)
    members_TK = np.full((len(cluster_T), k), -1, np.int32)
    similarity_TK = np.full((len(cluster_T), k), -np.inf, np.float16)
    for rows, own_features in _clusters(features, cluster_rows_T, cluster_start):
        nearest, cosines = top_k(own_features, own_features, k, np.arange(len(rows)))
        members_TK[rows] = np.where(nearest >= 0, rows[nearest], -1)
        similarity_TK[rows] = cosines
    return Bags(settings, members_TK, similarity_TK, cluster_T, cluster_rows_T, cluster_start, centroids_CD)


def _clusters(features: Rows, cluster_rows_T: np.ndarray, cluster_start: np.ndarray) -> Iterator[tuple[np.ndarray, Rows]]:
    """(rows, their features) of each cluster of two rows or more. A store is read once for as many clusters as fit the memory."""
    in_store = not isinstance(features, np.ndarray)
    most_rows = memory_budget() // (features.shape[1] * (features.dtype.itemsize + 4)) if in_store else 0
    first = 0
    while first < len(cluster_start) - 1:
        end = max(first + 1, int(np.searchsorted(cluster_start, cluster_start[first] + most_rows, "right")) - 1)
        rows_n = cluster_rows_T[cluster_start[first] : cluster_start[end]]
        if in_store and len(rows_n) > most_rows:
            yield rows_n, _Chosen(features, rows_n)
        else:
            own_nD = features[rows_n]
            for start, stop in pairwise(cluster_start[first : end + 1] - cluster_start[first]):
                if stop - start > 1:
                    yield rows_n[start:stop], own_nD[start:stop]
        first = end


class _Chosen:
    """Some rows of a matrix, read when they are asked for."""

    def __init__(self, features: Rows, rows_n: np.ndarray):
        self._features, self._rows_n = features, rows_n
        self.shape, self.dtype = (len(rows_n), features.shape[1]), features.dtype

    def __len__(self) -> int:
        return len(self._rows_n)

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray:
        return self._features[self._rows_n[rows]]


def _settings(method: str, k: int) -> dict:
    return {"method": method, "k": k, "metric": "cosine", "search": "exact"}


def _check_features(features: Rows) -> None:
    """Refuse features that no working teacher gives, before they become bags."""
    import faiss

    way_out = "the teacher is broken: check teacher.checkpoint and image.mean/std, then run: dvc repro extract"
    try:
        inverse_T = inverse_norms(features, faiss.omp_get_max_threads())
    except ValueError as error:
        raise UserError(f"embeddings: {error}; {way_out}") from None
    if not inverse_T.all():
        row = int((inverse_T == 0).argmax())
        raise UserError(f"embeddings: {int((inverse_T == 0).sum())} train rows are all zeros, the first is row {row}; {way_out}")
    rows_n = np.arange(0, len(features), max(1, len(features) // _CHECKED_ROWS))
    sample_nD = features[rows_n].astype(np.float32)
    cosines_n = sample_nD @ (sample_nD[0] * inverse_T[0]) * inverse_T[rows_n]
    if len(rows_n) > 1 and cosines_n.min() > _SAME_COSINE:
        raise UserError(f"embeddings: all train rows have the same features (least cosine {cosines_n.min():.7f}); {way_out}")
