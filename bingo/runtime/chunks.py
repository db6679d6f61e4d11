"""Arrays of rows in zarr v3: unsharded, uncompressed, one file per chunk, each with a CRC-32C.

zarr returns the fill value for a missing chunk, without an error. The fill value is therefore one that no row contains (NaN, or -2 for
integers), and reading a row with it fails. A damaged file fails its CRC. Metadata have no CRC, so the group's attributes hold digests:
`checksums` of each array's zarr.json, and `checksum` of the attributes themselves.
"""

import hashlib
import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from bingo.runtime.artefacts import fingerprint
from bingo.runtime.errors import UserError, reason_of

INTEGER_FILL = -2
_CRC_BYTES = 4
_READ_BYTES = 2**23  # read and checked at once, to limit the temporary arrays
# errors that zarr raises for damaged files
_DAMAGE = (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError, OverflowError)


def new_array(group: zarr.Group, name: str, shape: tuple[int, ...], dtype: Any, chunk_rows: int) -> zarr.Array:
    """Create array `name` in chunks of `chunk_rows` rows. A chunk must have a single writer, since two writers of one file would lose
    rows."""
    fill = np.nan if np.issubdtype(dtype, np.floating) else INTEGER_FILL
    chunks = (chunk_rows, *(max(1, width) for width in shape[1:]))
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=fill,
        filters=None,
        compressors=[Crc32cCodec()],
    )


def seal(folder: Path, group: zarr.Group) -> None:
    """Write the checksums of the metadata into the attributes of the group in `folder`, once all its arrays are created."""
    digests = {name: _digest(folder, name) for name in sorted(group.array_keys())}
    attributes = {**group.attrs, "checksums": digests}
    group.update_attributes({**attributes, "checksum": fingerprint(attributes)})


def _digest(store: Any, array: str) -> str:
    """sha256 of an array's zarr.json in a folder or a mapping of bytes."""
    key = f"{array}/zarr.json"
    content = (Path(store) / key).read_bytes() if isinstance(store, (str, Path)) else store[key]
    return hashlib.sha256(content).hexdigest()


def _check_metadata(store: Any, attributes: dict[str, Any]) -> None:
    """Raise ValueError or KeyError if the metadata have changed since `seal`."""
    checksum = attributes.pop("checksum", None)
    if checksum is None or checksum != fingerprint(attributes):
        raise ValueError("the attributes do not fit their checksum")
    for name, digest in attributes["checksums"].items():
        if _digest(store, name) != digest:
            raise ValueError(f"{name}/zarr.json does not fit its checksum")


def chunk_is_written(path: Path, array: zarr.Array, chunk: int) -> bool:
    """Whether the file of a chunk of an array in the store at `path` exists in full size (zarr writes atomically)."""
    file = path / array.name.strip("/") / "c" / "/".join([str(chunk)] + ["0"] * (array.ndim - 1))
    return file.is_file() and file.stat().st_size == int(np.prod(array.chunks)) * array.dtype.itemsize + _CRC_BYTES


def open_group(store: Any, name: str, way_out: str, mode: Literal["r", "r+"] = "r") -> zarr.Group:
    """The group in `store` (a folder, or a mapping from keys to bytes), called `name` in messages, its metadata checked.

    Later reads do not depend on the current folder. Raises UserError, which ends with the command `way_out`, if the group does not exist or
    its metadata are damaged.
    """
    store = Path(store).absolute() if isinstance(store, (str, Path)) else store
    try:
        group = zarr.open_group(store, mode=mode, zarr_format=3)
        _check_metadata(store, dict(group.attrs))
        return group
    except FileNotFoundError:
        raise UserError(f"{name}: the store does not exist or is incomplete; run: {way_out}") from None
    except _DAMAGE as error:
        raise UserError(f"{name}: its metadata are damaged ({_line(error)}); delete it and run: {way_out}") from None


def open_array(group: zarr.Group, name: str, store_name: str, dtype: Any, ndim: int, way_out: str) -> zarr.Array:
    """Array `name` of a group, without reading its data. Raises UserError if it is absent, damaged or of another type or rank."""
    try:
        array = group[name]
        if isinstance(array, zarr.Array) and array.dtype == np.dtype(dtype) and array.ndim == ndim:
            return array
        problem = f"not {np.dtype(dtype)} with {ndim} dimensions"
    except _DAMAGE as error:
        problem = f"missing or damaged ({_line(error)})"
    raise UserError(f"{store_name}: array {name} is {problem}; delete the store and run: {way_out}") from None


def read_rows(array: zarr.Array, rows: int | slice, store_name: str, way_out: str) -> np.ndarray:
    """`array[rows]` of one row or of consecutive rows, read only from their chunks. Raises UserError if one of these is damaged or missing,
    IndexError for rows that do not exist, and ValueError for a slice with a step."""
    if not isinstance(rows, slice):
        row = range(array.shape[0])[rows]
        return read_rows(array, slice(row, row + 1), store_name, way_out)[0]
    label = f"{store_name}: array {array.name.strip('/')}"
    first, end, step = rows.indices(array.shape[0])
    if step != 1:
        raise ValueError(f"rows {first}:{end}:{step} of {label} are not consecutive")
    x = np.empty((max(0, end - first), *array.shape[1:]), array.dtype)
    chunk_rows = array.chunks[0]
    block_rows = chunk_rows * max(1, _READ_BYTES // (chunk_rows * max(1, x[:1].nbytes)))
    for start in range(first // block_rows * block_rows, end, block_rows):
        begin = max(start, first)
        part = x[begin - first : start + block_rows - first]
        try:
            part[:] = array[begin : begin + len(part)]
        except _DAMAGE as error:
            forget_other_reads()
            raise UserError(f"{label} has a damaged chunk ({_line(error)}); delete the store and run: {way_out}") from None
        unwritten = (np.isnan(part) if part.dtype.kind == "f" else part == INTEGER_FILL).any(axis=tuple(range(1, part.ndim)))
        if unwritten.any():
            row = begin + int(unwritten.argmax())
            raise UserError(f"{label} has no value at row {row}: chunk {row // array.chunks[0]} is missing; run: {way_out}")
    return x


class StoredRows:
    """The first rows of an array of floats (N, D) in a store, read on access, since the whole array may be larger than the memory. For an
    array (N, V, D), the vectors `view` of each row.

    It is indexed like a numpy array: by a slice, or by row numbers int (n,), for which each chunk with some of these rows is read once.
    Reading raises UserError if a chunk is damaged or missing.
    """

    def __init__(self, array: zarr.Array, rows: int, store_name: str, way_out: str, view: int | None = None):
        self._array, self._store_name, self._way_out, self._view = array, store_name, way_out, view
        self.shape: tuple[int, ...] = (rows, *array.shape[1 if view is None else 2 :])
        self.dtype = np.dtype(array.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray:
        if isinstance(rows, slice):
            x = read_rows(self._array, slice(*rows.indices(len(self))), self._store_name, self._way_out)
            return x if self._view is None else x[:, self._view]
        x = np.empty((len(rows), *self.shape[1:]), self.dtype)
        chunk_rows = self._array.chunks[0]
        chunks_n = rows // chunk_rows
        for chunk in np.unique(chunks_n):
            wanted = np.flatnonzero(chunks_n == chunk)
            start = int(chunk) * chunk_rows
            x[wanted] = self[start : start + chunk_rows][rows[wanted] - start]
        return x


def forget_other_reads() -> None:
    """Clean up after a failed read: zarr leaves reads of other chunks unfinished, for which asyncio and Python print messages at exit."""
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _line(error: Exception) -> str:
    return reason_of(f"{type(error).__name__}: {error}")
