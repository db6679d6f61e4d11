"""Bags: for every train row, the rows that the teacher finds similar. Read an index, draw members, mask them.

Shape letters: T train rows, K members listed, C clusters (or classes), D feature width, B anchors, J other rows, M pairs.

    members        int32 (T, K)     nearest first, padded with -1
    similarity     float16 (T, K)   cosine of each to the anchor, padded with -inf
    cluster        int32 (T,)       kmeans, label: the cluster or class of a row
    cluster_rows   int32 (T,)       kmeans, label: rows sorted by cluster, then by row
    cluster_start  int64 (C+1,)     kmeans, label: where each cluster starts in cluster_rows
    centroids      float32 (C, D)   kmeans: unit rows

The bag of a row is its members under knn, and all other rows of its cluster under kmeans and label, where `members` are only the
nearest of them. This module needs only numpy and zarr, and a row is read from one chunk of each array.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr

from bingo.runtime.artefacts import fingerprint, new_directory
from bingo.runtime.chunks import new_array, open_array, open_group, read_rows, seal
from bingo.runtime.errors import UserError

_WAY_OUT = "dvc repro bag"
_LOW_RECALL = 0.95
_CHUNK_ROWS = 1024
_FLAT_CHUNK_ROWS = 65536  # for arrays with one number per row: 256 KiB
_Kinds = dict[str, tuple[type, int]]  # dtype and rank of each array
_TABLE: _Kinds = {"members": (np.int32, 2), "similarity": (np.float16, 2)}
_CLUSTERS: _Kinds = {"cluster": (np.int32, 1), "cluster_rows": (np.int32, 1), "cluster_start": (np.int64, 1)}
_CENTROIDS: _Kinds = {"centroids": (np.float32, 2)}
_NO_SETTINGS = ("listing", "embeddings", "fingerprint", "checksums", "checksum")  # among the attributes
_ARRAYS = {"knn": _TABLE, "label": _TABLE | _CLUSTERS, "kmeans": _TABLE | _CLUSTERS | _CENTROIDS}


@dataclass(frozen=True)
class Bags:
    """A whole index in memory; its arrays are described above. `settings` records how it was made: method, k, metric, search, ..."""

    settings: dict[str, Any]
    members_TK: np.ndarray
    similarity_TK: np.ndarray
    cluster_T: np.ndarray | None = None
    cluster_rows_T: np.ndarray | None = None
    cluster_start: np.ndarray | None = None
    centroids_CD: np.ndarray | None = None

    @cached_property
    def bag_sizes_T(self) -> np.ndarray:
        """Number of rows that can be drawn for each anchor, int64 (T,)."""
        if self.cluster_T is None or self.cluster_start is None:
            return (self.members_TK >= 0).sum(axis=1)
        return np.diff(self.cluster_start)[self.cluster_T] - 1

    @cached_property
    def _place_T(self) -> np.ndarray:
        """Position of each row in `cluster_rows`."""
        assert self.cluster_rows_T is not None
        place_T = np.empty(len(self.cluster_rows_T), np.int64)
        place_T[self.cluster_rows_T] = np.arange(len(place_T))
        return place_T

    def draw(self, rows_B: np.ndarray, u_B: np.ndarray) -> np.ndarray:
        """One member of each anchor's bag, int64 (B,), for `u_B` uniform in [0, 1); the anchor if its bag is empty.

        All members of the bag have equal probability, or, if the index has a draw_temperature, the listed members have probabilities
        proportional to exp(cosine / draw_temperature).
        """
        if self.settings.get("draw_temperature"):
            return self._draw_by_similarity(rows_B, u_B)
        sizes_B = self.bag_sizes_T[rows_B]
        turn_B = np.minimum((u_B * sizes_B).astype(np.int64), sizes_B - 1)  # u just below 1 may round up
        if self.cluster_T is None or self.cluster_start is None or self.cluster_rows_T is None:
            drawn_B = self.members_TK[rows_B, np.maximum(turn_B, 0)]
        else:
            place_B = self.cluster_start[self.cluster_T[rows_B]] + turn_B
            place_B += place_B >= self._place_T[rows_B]  # the anchor is skipped
            drawn_B = self.cluster_rows_T[np.minimum(place_B, len(self.cluster_rows_T) - 1)]
        return np.where(sizes_B > 0, drawn_B, rows_B).astype(np.int64)

    def _draw_by_similarity(self, rows_B: np.ndarray, u_B: np.ndarray) -> np.ndarray:
        similarity_BK = self.similarity_TK[rows_B].astype(np.float64)
        nearest_B1 = similarity_BK.max(axis=1, keepdims=True, initial=-1)
        reach_BK = np.exp((similarity_BK - nearest_B1) / self.settings["draw_temperature"]).cumsum(axis=1)
        turn_B = (reach_BK <= u_B[:, None] * reach_BK[:, -1:]).sum(axis=1)
        drawn_B = self.members_TK[rows_B, np.minimum(turn_B, reach_BK.shape[1] - 1)]
        return np.where(drawn_B >= 0, drawn_B, rows_B).astype(np.int64)

    def draw_listed(self, rows_B: np.ndarray, u_BK: np.ndarray, count: int) -> np.ndarray:
        """`count` distinct listed members of each anchor's bag in random order, int64 (B, count), for `u_BK` uniform in [0, 1).

        The members of a shorter bag are repeated; an empty bag gives the anchor.
        """
        members_BK = self.members_TK[rows_B]
        lengths_B1 = (members_BK >= 0).sum(axis=1, keepdims=True)
        order_BK = np.argsort(np.where(members_BK >= 0, u_BK, 2.0), axis=1, kind="stable")  # padding comes last
        turn_BM = np.arange(count) % np.maximum(lengths_B1, 1)
        drawn_BM = np.take_along_axis(members_BK, np.take_along_axis(order_BK, turn_BM, axis=1), axis=1)
        return np.where(lengths_B1 > 0, drawn_BM, np.asarray(rows_B)[:, None]).astype(np.int64)

    def empty_warning(self) -> str | None:
        """A warning if at least half of the bags are empty. Raises UserError if all are, since training cannot use them."""
        empty, rows = int((self.bag_sizes_T == 0).sum()), len(self.members_TK)
        if 2 * empty < rows:
            return None
        problem = f"{'all' if empty == rows else f'{empty:,} of'} {rows:,} bags are empty: {_why_empty(self.settings)}"
        if empty == rows:
            raise UserError(f"bagging.method = {self.settings['method']}: {problem}")
        return f"{problem}; these images are trained without similar images"

    def zeros_warning(self) -> str | None:
        """A warning if the features of some images are all zeros."""
        if not (zeros := self.settings.get("rows_of_zeros", 0)):
            return None
        effects = {
            "knn": "these images are trained without similar images",
            "kmeans": "their bags are arbitrary",
            "label": "the members of their bags are in no order",
        }
        of = f"{zeros:,} of {len(self.members_TK):,} train images, the first in row {self.settings['first_row_of_zeros']}"
        return f"the features of {of}, are all zeros; {effects[self.settings['method']]}"

    def recall_warning(self) -> str | None:
        """A warning if the search has missed more than 5 % of the members."""
        recall = self.settings.get("recall", 1)
        if recall >= _LOW_RECALL:
            return None
        way_out = (
            "raise bagging.probes" if "probes" in self.settings else "set bagging.search to ivf, with more bagging.probes, or to exact"
        )
        return f"recall {recall:.6g}: the search misses many of the nearest images; {way_out}"


def _why_empty(settings: Mapping[str, Any]) -> str:
    """Why bags are empty, which depends on how the index was made, and how to fix it."""
    if settings["method"] == "kmeans":
        return f"images are alone in the {settings['clusters']} clusters; lower bagging.clusters"
    if settings["method"] == "label":
        return "images are alone in their classes; set bagging.method: knn"
    ways = [f"raise bagging.probes ({settings['probes']}) or lower bagging.lists ({settings['lists']})"] if "lists" in settings else []
    ways += [f"raise bagging.k ({settings['k']}) or set bagging.mutual: false"] if settings.get("mutual") else []
    return f"no other image was found for the anchor; {', or '.join(ways) or 'run: dvc repro bag'}"


class BagIndex:
    """An index on the disk. Single rows are read from one chunk when asked for; `table` reads the whole index."""

    def __init__(self, name: str, group: zarr.Group):
        self.name = name
        self.attrs: dict[str, Any] = dict(group.attrs)
        self.method: str = self.attrs.get("method", "")
        self.fingerprint: str = self.attrs.get("fingerprint", "")
        if self.method not in _ARRAYS:
            raise UserError(f"{name}: method {self.method!r}, allowed are {', '.join(_ARRAYS)}; delete it and run: {_WAY_OUT}")
        wanted = _ARRAYS[self.method]
        self._arrays = {key: open_array(group, key, name, dtype, ndim, _WAY_OUT) for key, (dtype, ndim) in wanted.items()}
        self.train_rows, self.k = self._arrays["members"].shape

    def members(self, row: int) -> np.ndarray:
        """The listed members of one bag, int32 (at most K,), nearest first. Raises UserError if the row does not exist."""
        members_K = self._read("members", self._checked(row))
        return members_K[members_K >= 0]

    def similarity(self, row: int) -> np.ndarray:
        """The cosines of `members(row)` to the row, float32 (at most K,)."""
        similarity_K = self._read("similarity", self._checked(row))
        return similarity_K[~np.isneginf(similarity_K)].astype(np.float32)

    def cluster(self, row: int) -> int | None:
        """The cluster (kmeans) or class (label) of a row; None under knn."""
        return int(self._read("cluster", self._checked(row))) if "cluster" in self._arrays else None

    def bag(self, row: int) -> np.ndarray:
        """All rows that can be drawn for this anchor, int32: the members (knn), or all other rows of its cluster in increasing order."""
        cluster = self.cluster(row)
        if cluster is None:
            return self.members(row)
        start, end = self._read("cluster_start", slice(cluster, cluster + 2))
        rows = self._read("cluster_rows", slice(int(start), int(end)))
        return rows[rows != row]

    def blocks(self, members: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first row, members, similarity) of successive rows, with some `members` entries in each block: int32 and float16 (n, K)."""
        rows = max(1, members // max(1, self.k) // _CHUNK_ROWS) * _CHUNK_ROWS
        for first in range(0, self.train_rows, rows):
            yield first, self._read("members", slice(first, first + rows)), self._read("similarity", slice(first, first + rows))

    @cached_property
    def table(self) -> Bags:
        """All arrays in memory. Raises UserError if a chunk is damaged or missing."""
        x = {key: self._read(key, slice(None)) for key in self._arrays}
        settings = {key: value for key, value in self.attrs.items() if key not in _NO_SETTINGS}
        clusters = (x.get(key) for key in ("cluster", "cluster_rows", "cluster_start", "centroids"))
        return Bags(settings, x["members"], x["similarity"], *clusters)

    def _read(self, key: str, rows: int | slice) -> np.ndarray:
        return read_rows(self._arrays[key], rows, self.name, _WAY_OUT)

    def _checked(self, row: int) -> int:
        if not 0 <= row < self.train_rows:
            raise UserError(f"row {row}: {self.name} has bags for train rows 0 to {self.train_rows - 1}; give one of those")
        return row


def write_bags(path: Path | str, bags: Bags, listing: str, embeddings: str) -> None:
    """Write an index atomically; `listing` and `embeddings` are the fingerprints of its inputs."""
    arrays = {
        "members": bags.members_TK,
        "similarity": bags.similarity_TK,
        "cluster": bags.cluster_T,
        "cluster_rows": bags.cluster_rows_T,
        "cluster_start": bags.cluster_start,
        "centroids": bags.centroids_CD,
    }
    wanted = _ARRAYS[bags.settings["method"]]
    attrs = {**bags.settings, "listing": listing, "embeddings": embeddings}
    # including the content: FAISS's K-means on a GPU is not deterministic
    digests = {key: hashlib.sha256(np.ascontiguousarray(arrays[key]).data).hexdigest() for key in wanted}
    with new_directory(path) as partial:
        attributes = {**attrs, "fingerprint": fingerprint({**attrs, "content": digests})}
        group = zarr.create_group(partial, zarr_format=3, overwrite=True, attributes=attributes)
        for key, (dtype, ndim) in wanted.items():
            x = arrays[key]
            assert x is not None
            new_array(group, key, x.shape, dtype, _CHUNK_ROWS if ndim > 1 else _FLAT_CHUNK_ROWS)[:] = x
        seal(partial, group)


class OfListing(Protocol):
    """The listing of an index, either complete or read row by row."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def train_rows(self) -> int: ...


def read_bags(
    store: Path | str | Mapping[str, bytes], listing: OfListing, embeddings: str | None = None, name: str | None = None
) -> BagIndex:
    """Open an index of a listing, reading only metadata. `store` is a folder, or a mapping from fsspec, called `name` in messages.

    Raises UserError if there is none, its metadata are damaged, or it was made from another listing or (if their
    fingerprint is given and the bags are made from the teacher's features) from other embeddings.
    """
    name = name or (str(store) if isinstance(store, (str, Path)) else "the bag index")
    index = BagIndex(name, open_group(store, name, _WAY_OUT))
    for kind, wanted in (("listing", listing.fingerprint), ("embeddings", embeddings)):
        made_from = index.attrs.get(kind)
        if wanted not in (None, made_from) and (kind == "listing" or index.attrs.get("relation", "teacher") == "teacher"):
            raise UserError(f"{name}: was made from {kind} {made_from}, this run reads {kind} {wanted}; run: {_WAY_OUT}")
    return index
