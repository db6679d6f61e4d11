"""The teacher's embeddings in a zarr store: features of the centre view of every row, keys of random views of the train rows.

Shape letters: N rows of the listing, T train rows (the first ones), V stored views, P key width, D feature width.

    features  float16 (N, D)      output of the backbone, not normalised; read by bags and probes
    keys      float16 (T, V, P)   rows of unit length; key v of row t belongs to the v-th view that the recipe draws for row t; V may be 0

Both have chunks of the same number of rows. A chunk is a file, written once by one process.
"""

import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from bingo.runtime.artefacts import fingerprint, link_or_copy, new_directory
from bingo.runtime.chunks import StoredRows, chunk_is_written, new_array, open_array, open_group, read_rows, seal
from bingo.runtime.errors import UserError

if TYPE_CHECKING:
    from bingo.browse.listing_rows import ListingRows
    from bingo.images.listing import Listing

_WAY_OUT = "dvc repro extract"
_MADE_FROM = ("listing", "teacher", "recipe")


class EmbeddingsWriter:
    """A store that is written chunk by chunk, by one or several processes."""

    def __init__(self, path: Path, group: zarr.Group):
        self.path = path
        name = str(path)
        self._features = open_array(group, "features", name, np.float16, 2, _WAY_OUT)
        self._keys = open_array(group, "keys", name, np.float16, 3, _WAY_OUT)
        self.feature_width: int = self._features.shape[1]
        self.chunk_rows: int = self._features.chunks[0]
        self.chunks: int = -(-self._features.shape[0] // self.chunk_rows)

    def rows(self, chunk: int) -> range:
        """The listing rows of a chunk."""
        return range(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self._features.shape[0]))

    def train_rows(self, chunk: int) -> range:
        """The rows of a chunk that have keys: a prefix of `rows(chunk)`, possibly empty."""
        rows, (train_rows, views, _) = self.rows(chunk), self._keys.shape
        return range(rows.start, max(rows.start, min(rows.stop, train_rows if views else 0)))

    def chunk_is_complete(self, chunk: int) -> bool:
        """Whether the files of a chunk exist: they are written atomically, so no list of finished chunks is needed."""
        arrays = [self._features, self._keys] if self.train_rows(chunk) else [self._features]
        return all(chunk_is_written(self.path, array, chunk) for array in arrays)

    def write_chunk(self, chunk: int, features_nD: np.ndarray, keys_tVP: np.ndarray) -> None:
        """Write the rows `rows(chunk)` of the features and `train_rows(chunk)` of the keys, of any float type.

        Raises UserError if a number is not finite or too large for float16, ValueError if a shape is wrong.
        """
        rows, train_rows = self.rows(chunk), self.train_rows(chunk)
        if train_rows:
            keys_shape = (len(train_rows), *self._keys.shape[1:])
            self._keys[train_rows.start : train_rows.stop] = _half(keys_tVP, keys_shape, "key", rows)
        self._features[rows.start : rows.stop] = _half(features_nD, (len(rows), self._features.shape[1]), "feature", rows)

    def finish(self, target: Path) -> None:
        """Check that all chunks exist and move the store to `target` in one rename, without leftovers of killed processes.

        The store also remains at its path (as hard links if both are on one disk); the caller removes it once `target` is safe.
        """
        missing = [chunk for chunk in range(self.chunks) if not self.chunk_is_complete(chunk)]
        if missing:
            raise UserError(f"{self.path}: {len(missing)} of {self.chunks} chunks are not written; run again: {_WAY_OUT}")
        with new_directory(target) as folder:
            leftovers = shutil.ignore_patterns("*.partial")  # zarr's temporary files
            shutil.copytree(self.path, folder, copy_function=link_or_copy, ignore=leftovers, dirs_exist_ok=True)


def create_embeddings(
    path: Path,
    rows: int,
    train_rows: int,
    feature_width: int,
    views: int,
    key_width: int,
    chunk_rows: int,
    attrs: Mapping[str, Any],
) -> EmbeddingsWriter:
    """Create an empty store at `path`, replacing anything there; one process calls this, the others wait.

    `attrs` holds the fingerprints `listing` and `teacher`, the dict `recipe`, and further attributes, all JSON-serialisable.
    """
    chunk_rows = min(chunk_rows, rows)  # a chunk is stored in full size: a small store is not padded to a large chunk
    attributes = {**attrs, "fingerprint": embeddings_fingerprint(attrs)}
    group = zarr.create_group(path, zarr_format=3, overwrite=True, attributes=attributes)
    new_array(group, "features", (rows, feature_width), np.float16, chunk_rows)
    new_array(group, "keys", (train_rows, views, key_width), np.float16, chunk_rows)
    seal(Path(path), group)
    return EmbeddingsWriter(Path(path), group)


def open_for_writing(path: Path) -> EmbeddingsWriter:
    """Open a store that `create_embeddings` made, in the other processes or to resume after an interruption. Raises UserError if it
    is absent or its metadata are damaged.
    """
    return EmbeddingsWriter(Path(path), open_group(path, str(path), _WAY_OUT, "r+"))


def embeddings_fingerprint(attrs: Mapping[str, Any]) -> str:
    """32 hex digits that identify the inputs of embeddings: listing, teacher and recipe."""
    return fingerprint({key: attrs[key] for key in _MADE_FROM})


class Embeddings:
    """A finished store. `features_ND` and `keys_TVP` are read on first access and kept in memory."""

    def __init__(self, name: str, group: zarr.Group):
        self.name = name
        self.attrs: dict[str, Any] = dict(group.attrs)
        self.fingerprint: str = self.attrs.get("fingerprint", "")
        self._features = open_array(group, "features", name, np.float16, 2, _WAY_OUT)
        self._keys = open_array(group, "keys", name, np.float16, 3, _WAY_OUT)
        self.rows, self.feature_width = self._features.shape
        self.train_rows, self.views, self.key_width = self._keys.shape

    @cached_property
    def features_ND(self) -> np.ndarray:
        """Features of all rows, float16 (N, D). Raises UserError if a chunk is damaged or missing."""
        return read_rows(self._features, slice(None), self.name, _WAY_OUT)

    @cached_property
    def keys_TVP(self) -> np.ndarray:
        """Keys of the train rows (the first T of N), float16 (T, V, P). Raises UserError if a chunk is damaged or missing."""
        return read_rows(self._keys, slice(None), self.name, _WAY_OUT)

    @cached_property
    def train_features_TD(self) -> np.ndarray:
        """Features of the train rows, float16 (T, D), read only from their chunks unless `features_ND` is already in memory."""
        if "features_ND" in self.__dict__:
            return self.features_ND[: self.train_rows]
        return read_rows(self._features, slice(0, self.train_rows), self.name, _WAY_OUT)

    @property
    def features(self) -> StoredRows:
        """Features of all rows, float16 (N, D), left in the store until rows are accessed."""
        return StoredRows(self._features, self.rows, self.name, _WAY_OUT)

    def view_keys(self, view: int) -> StoredRows:
        """Keys of one stored view of the train rows, float16 (T, P), left in the store until rows are accessed."""
        return StoredRows(self._keys, self.train_rows, self.name, _WAY_OUT, view)

    @property
    def train_features(self) -> StoredRows:
        """Features of the train rows, float16 (T, D), left in the store until rows are accessed."""
        return StoredRows(self._features, self.train_rows, self.name, _WAY_OUT)


def read_embeddings(store: Path | str | Mapping[str, bytes], listing: "Listing | ListingRows", name: str = "") -> Embeddings:
    """The teacher's outputs: `features_ND` of all images, `train_features_TD`, and `keys_TVP` of the train images, of unit length, all
    float16. Only metadata are read until one of them is used. `store` is a folder, or a mapping from fsspec, called `name` in messages.

    Raises UserError if there is none, its metadata are damaged, or it was made from another listing.

    >>> from bingo import read_embeddings, read_listing
    >>> embeddings = read_embeddings("data/embeddings.zarr", read_listing("data/listing.parquet"))
    >>> embeddings.features_ND.shape, embeddings.keys_TVP.shape
    ((500, 64), (400, 4, 16))
    """
    name = name or str(store)
    embeddings = Embeddings(name, open_group(store, name, _WAY_OUT))
    made_from, wanted = embeddings.attrs.get("listing"), listing.fingerprint
    if made_from != wanted:
        raise UserError(f"{name}: was made from listing {made_from}, this run reads listing {wanted}; run: {_WAY_OUT}")
    return embeddings


def _half(x: np.ndarray, shape: tuple[int, ...], name: str, rows: range) -> np.ndarray:
    """`x` in float16. Raises UserError if a number is out of range."""
    if x.shape != shape:
        raise ValueError(f"{name}s of rows {rows.start}..{rows.stop - 1} have shape {x.shape}, wanted {shape}")
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    if not np.isfinite(half).all():
        bad = int((~np.isfinite(half)).reshape(len(x), -1).any(axis=1).argmax())
        largest = np.abs(x[bad].astype(np.float64)).max()
        raise UserError(
            f"the teacher's {name} at row {rows.start + bad} reaches {largest}, allowed are finite numbers up to 65504 "
            f"(float16); check teacher.checkpoint and teacher.image.mean/std, or set extract.precision: fp32"
        )
    return half
