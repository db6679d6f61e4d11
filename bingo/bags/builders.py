"""Build bags from the teacher's features of the train rows: nearest neighbours, K-means, or labels (the upper bound).

Shape letters: T train rows, D feature width, K members listed, C clusters or classes; n rows of a block. Every builder takes features
of any float type (T, D), not normalised, and compares them by cosine. BINGO (Xu et al. 2022) describes all three; the released code has
only knn.

Features may be in a store (bingo.runtime.chunks.StoredRows) and larger than the memory. If they and a normalised copy fit into half of the
free memory they are read once; otherwise they are streamed, as described in `top_k` and `search_lists`, with bitwise equal bags.
The memory for members and cosines, 12 bytes x T x K, is needed in any case.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from bingo.bags.index import Bags
from bingo.bags.ivf import InvertedFile, recall_of, search_lists
from bingo.bags.kmeans import each_cluster, sorted_by_cluster, train_centroids
from bingo.bags.neighbors import Found, top_k
from bingo.bags.rows import Rows, held, inverse_norms, memory_budget
from bingo.bags.sharing import ALONE, Sharing, of_all
from bingo.params import BaggingParams
from bingo.runtime.errors import UserError
from bingo.runtime.progress import progress_bar


@dataclass(frozen=True)
class GraphSearch:
    """A search by cuVS's graph; the seed draws the rows for its recall."""

    seed: int


_SAME_COSINE = 1 - 1e-6
_MOST_ZEROS = 0.01  # of the rows
_CHECKED_ROWS = 4096


def build_bags(params: BaggingParams, features: Rows, labels_T: np.ndarray, seed: int, sharing: Sharing = ALONE) -> Bags | None:
    """The bags described by params.yaml, on the first of the processes that share the work; None on the others. Raises UserError if a
    number is larger than the number of train rows allows."""
    if params.method == "knn":
        approximate = {"exact": None, "ivf": InvertedFile(params.lists, params.probes, seed), "cuvs": GraphSearch(seed)}
        bags = build_knn(features, params.k, params.mutual, approximate[params.search], sharing)
    elif params.method == "kmeans":
        bags = build_kmeans(features, params.clusters, params.iterations, params.k, seed, sharing)
    else:
        bags = build_label(labels_T, features, params.k, sharing)
    if bags is None:
        return None
    return replace(bags, settings={**bags.settings, "relation": params.relation, "draw_temperature": params.draw_temperature})


def build_knn(
    features: Rows, k: int, mutual: bool = False, search: InvertedFile | GraphSearch | None = None, sharing: Sharing = ALONE
) -> Bags | None:
    """The k rows with the highest cosine to each row, excluding the row itself; `mutual`: only those of them that have the row among
    their own k. A row of zeros has an empty bag, and is in no bag.

    `search` (None: exact) finds most of them in less time; the share that it finds, before `mutual`, is stored in the settings as
    `recall`. Raises UserError if k or the number of lists is too large.
    """
    rows = len(features)
    _check_k(k, rows)
    if isinstance(search, InvertedFile) and search.list_count(rows) > rows:
        raise UserError(f"bagging.lists = {search.lists}: there are only {rows} train rows; lower bagging.lists, or set it to null")
    features = features[:] if isinstance(search, GraphSearch) else held(features, memory_budget())
    zeros_n = _rows_of_zeros(features)
    settings = {**_settings("knn", k, zeros_n), "mutual": mutual}
    if isinstance(search, InvertedFile):
        found = search_lists(features, k, search, sharing)
        lists = search.list_count(rows)
        settings |= {"search": "ivf", "seed": search.seed, "lists": lists, "probes": min(search.probes, lists)}
    else:
        found = sharing.all_nearest("members", features, k, by_graph=search is not None)
        settings |= {} if search is None else {"search": "cuvs", "seed": search.seed}
    if search is not None:
        settings["recall"] = recall_of(None if found is None else found[1], features, k, search.seed, sharing)
    if found is None:
        return None
    members_TK, cosines_TK = found
    similarity_TK = cosines_TK.astype(np.float16)
    if len(zeros_n):  # all their cosines are 0, so that their nearest rows, and rows to which they are near, are arbitrary
        zero_T = np.zeros(rows, bool)
        zero_T[zeros_n] = True
        members_TK, similarity_TK = _kept(members_TK, similarity_TK, ~(zero_T[members_TK] | zero_T[:, None]))
    if mutual:
        members_TK, similarity_TK = _kept(members_TK, similarity_TK, _listed_back(members_TK))
    return Bags(settings, members_TK, similarity_TK)


def _check_k(k: int, rows: int) -> None:
    if k >= rows:
        raise UserError(f"bagging.k = {k}: a bag of the {rows} train rows has at most {rows - 1} members; lower bagging.k")


def _listed_back(members_TK: np.ndarray) -> np.ndarray:
    """Whether a member's own list contains the anchor, bool (T, K)."""
    rows_T1, back_TK = np.arange(len(members_TK))[:, None], np.empty(members_TK.shape, bool)
    for place, members_T in enumerate(members_TK.T):  # a column at a time bounds the memory
        back_TK[:, place] = (members_TK[members_T] == rows_T1).any(axis=1)
    return back_TK


def _kept(members_TK: np.ndarray, similarity_TK: np.ndarray, kept_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The members that are kept, moved to the front of each row."""
    kept_TK = kept_TK & (members_TK >= 0)
    order_TK = np.argsort(~kept_TK, axis=1, kind="stable")
    moved = (np.take_along_axis(x_TK, order_TK, axis=1) for x_TK in (kept_TK, members_TK, similarity_TK))
    kept_TK, members_TK, similarity_TK = moved
    return np.where(kept_TK, members_TK, -1).astype(np.int32), np.where(kept_TK, similarity_TK, -np.inf).astype(np.float16)


def build_kmeans(features: Rows, clusters: int, iterations: int, k: int, seed: int, sharing: Sharing = ALONE) -> Bags | None:
    """Spherical K-means: the bag is all other rows of the cluster.

    A row belongs to the centroid with the largest dot product (see `train_centroids`); rows of zeros are spread over the clusters. The k
    nearest rows of its cluster are listed; a row that is alone in its cluster has an empty bag. Raises UserError if clusters exceed rows.
    """
    rows = len(features)
    if clusters > rows:
        raise UserError(f"bagging.clusters = {clusters}: there are only {rows} train rows; lower bagging.clusters")
    _check_k(k, rows)
    features = held(features, memory_budget())
    zeros_n = _rows_of_zeros(features)
    centroids_CD, trained_rows = train_centroids(features, clusters, iterations, seed, sharing=sharing)
    cluster_T = sharing.nearest_centroid("clusters", features, centroids_CD)
    if len(zeros_n):  # not all in the first cluster
        cluster_T = cluster_T.copy()
        cluster_T[zeros_n] = zeros_n % clusters
    settings = {
        **_settings("kmeans", k, zeros_n),
        "clusters": clusters,
        "iterations": iterations,
        "seed": seed,
        "trained_rows": trained_rows,
    }
    return _grouped(settings, features, cluster_T, clusters, k, centroids_CD, sharing)


def build_label(labels_T: np.ndarray, features: Rows, k: int, sharing: Sharing = ALONE) -> Bags | None:
    """The bag is all other rows of the class; the k nearest are listed. Raises UserError if a label is unknown."""
    unknown = int((labels_T < 0).sum())
    if unknown:
        problem = f"bagging.method = label: {unknown} of {len(labels_T)} train rows have no label"
        raise UserError(f"{problem}; set bagging.method to knn or kmeans, or sort the images into class folders")
    _check_k(k, len(labels_T))
    features = held(features, memory_budget())
    settings = _settings("label", k, _rows_of_zeros(features))
    classes = int(labels_T.max()) + 1
    return _grouped(settings, features, labels_T.astype(np.int32), classes, k, None, sharing)


def _grouped(
    settings: dict, features: Rows, cluster_T: np.ndarray, clusters: int, k: int, centroids_CD: np.ndarray | None, sharing: Sharing
) -> Bags | None:
    """Bags that are clusters: the rows of each cluster, and the k of them that are nearest to each row."""
    cluster_rows_T, cluster_start = sorted_by_cluster(cluster_T, clusters)

    def members(places: slice) -> Found:
        """Of the rows at these places of `cluster_rows_T`, which are whole clusters: cosines as float16."""
        members_nK, cosines_nK = np.empty((places.stop - places.start, k), np.int32), np.empty((places.stop - places.start, k), np.float16)
        first, end = np.searchsorted(cluster_start, [places.start, places.stop])
        done = 0
        with progress_bar(f"neighbours{of_all(places, cluster_T)}", len(members_nK), "images") as bar:
            for _, rows, own_features in each_cluster(features, cluster_rows_T, cluster_start[first : end + 1]):
                nearest, cosines = top_k(own_features, own_features, k, np.arange(len(rows)))
                own = slice(done, done + len(rows))
                members_nK[own], cosines_nK[own] = np.where(nearest >= 0, rows[nearest], -1), cosines
                bar.advance(len(rows))
                done += len(rows)
        return members_nK, cosines_nK

    ends = np.unique(np.searchsorted(cluster_start, [part.stop for part in sharing.parts(len(cluster_T))]))
    parts = [slice(int(start), int(stop)) for start, stop in pairwise([0, *cluster_start[ends]])]
    found = sharing.of_rows("members", parts, members)
    if found is None:
        return None
    members_TK, similarity_TK = np.empty(found[0].shape, np.int32), np.empty(found[0].shape, np.float16)
    members_TK[cluster_rows_T], similarity_TK[cluster_rows_T] = found
    return Bags(settings, members_TK, similarity_TK, cluster_T, cluster_rows_T, cluster_start, centroids_CD)


def _settings(method: str, k: int, zeros_n: np.ndarray) -> dict:
    settings = {"method": method, "k": k, "metric": "cosine", "search": "exact"}
    return settings | ({"rows_of_zeros": len(zeros_n), "first_row_of_zeros": int(zeros_n[0])} if len(zeros_n) else {})


def _rows_of_zeros(features: Rows) -> np.ndarray:
    """The rows that are all zeros, int64 (n,). A network that ends in a ReLU may compute them for single small or uniform images. Raises
    UserError for features that no working teacher computes: not finite, all the same, or zeros for more than 1 % of the images."""
    import faiss

    way_out = "the teacher is broken: check teacher.checkpoint and teacher.image.mean/std, then run: dvc repro extract"
    try:
        inverse_T = inverse_norms(features, faiss.omp_get_max_threads())
    except ValueError as error:
        raise UserError(f"embeddings: {error}; {way_out}") from None
    zeros_n = np.flatnonzero(inverse_T == 0)
    if len(zeros_n) > max(1, _MOST_ZEROS * len(features)):
        raise UserError(f"embeddings: {len(zeros_n)} of {len(features)} train rows are all zeros, the first is row {zeros_n[0]}; {way_out}")
    rows_n = np.setdiff1d(np.arange(0, len(features), max(1, len(features) // _CHECKED_ROWS)), zeros_n)
    sample_nD = features[rows_n].astype(np.float32)
    cosines_n = sample_nD @ (sample_nD[0] * inverse_T[rows_n[0]]) * inverse_T[rows_n]
    if len(rows_n) > 1 and cosines_n.min() > _SAME_COSINE:
        raise UserError(f"embeddings: all train rows have the same features (least cosine {cosines_n.min():.7f}); {way_out}")
    return zeros_n
