"""The listing of all images and their order. Every later artefact refers to images by row number.

Train rows come first, so an array over the train rows is a prefix. The listing is stored as Parquet; equal listings have equal bytes.
The metadata contain a sha256 of every column of every row group and of the metadata, so that damage to any part that is read is detected.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bingo.runtime.artefacts import canonical_json, fingerprint, read_json, write_bytes, write_json
from bingo.runtime.errors import UserError
from bingo.runtime.workers import in_order

_SCHEMA = pa.schema([("row", pa.int64()), ("path", pa.string()), ("label", pa.int64()), ("split", pa.string())])
STRINGS = pa.large_string()  # of paths in memory, which may have 2^31 bytes and more together; in files each row group has less
_HELD_OUT = "held_out"  # in the metadata if test images were held out
_KEYS = ("dataset", "classes", "skipped", "fingerprint", "rows", "train_rows", "gray_bits", "group_rows", "columns", "checksum")
PARQUET_DAMAGE = (pa.ArrowException, ValueError, OSError, KeyError, TypeError, MemoryError)  # errors that pyarrow raises for damaged files
_PLAIN = r"^[ !#-\[\]-~]*$"  # strings in which JSON in ASCII escapes nothing
_GROUP_ROWS = 65536  # rows that `listing_rows` reads to get one
_GROUPS_AHEAD = 4  # of lines that wait for their hash, some 10 MB each


class Paths(Sequence[str]):
    """Strings in an Arrow column, since millions of Python strings take several times the memory. Equal to a list of the same strings."""

    def __init__(self, column: pa.ChunkedArray):
        self.column = column.cast(STRINGS)

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, rows: int) -> str: ...
    @overload
    def __getitem__(self, rows: slice) -> "Paths": ...
    def __getitem__(self, rows: int | slice) -> "str | Paths":
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            return Paths(
                self.column.slice(start, max(0, stop - start)) if step == 1 else self.column.take(pa.array(range(start, stop, step)))
            )
        return self.column[int(rows)].as_py()

    def take(self, rows_n: np.ndarray) -> "Paths":
        """The paths of some rows."""
        return self if np.array_equal(rows_n, np.arange(len(self))) else Paths(self.column.take(pa.array(rows_n, pa.int64())))

    def in_order(self) -> "Paths":
        """The paths sorted by their parts, so that the content of `folder` comes before that of `folder-2`."""
        return Paths(self.column.take(pc.sort_indices(pc.replace_substring(self.column, "/", "\0"))))

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _GROUP_ROWS):
            yield from self.column.slice(start, _GROUP_ROWS).to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def path_column(paths: Sequence[str]) -> pa.Array:
    """The paths as one Arrow array."""
    return paths.column.combine_chunks() if isinstance(paths, Paths) else pa.array(paths, STRINGS)


def _short(paths: Sequence[str]) -> pa.Array:
    """Some paths, less than 2^31 bytes, as in a file. They are copied, because offsets in a part of a column are those in the whole."""
    return path_column(paths).take(pa.array(np.arange(len(paths)))).cast(pa.string())


def joined_paths(parts: Iterable[Sequence[str]]) -> Paths:
    """The paths of all parts, concatenated."""
    return Paths(pa.chunked_array([pa.concat_arrays([pa.array([], STRINGS), *map(path_column, parts)])]))


def first_outside(paths: pa.ChunkedArray) -> str | None:
    """The first path that leads out of its folder, by the rule of `bingo.runtime.inside.leads_out`; None if none does."""
    found = pc.index(pc.match_substring_regex(paths, r"^/|(^|/)\.\.(/|$)"), True).as_py()
    return None if found < 0 else paths[found].as_py()


@dataclass(frozen=True)
class Listing:
    """N images in order: relative posix paths (or names such as digit/0012/p3), labels int64 (N,) with -1 where unknown.

    Rows 0..train_rows-1 are the train split, the others the test split. `skipped` names unreadable images that were left out.
    `gray_bits`: the number of bits of 16-bit grey images that contain the picture, the same for all images of the dataset; None if there
    are none. `held_out`: the number of train images that were held out as the test split, including copies of train images, which are then
    left out of the listing; None if the dataset has a test split. `left_out_rows`: test rows that are not evaluated, see
    `read_judged_listing`.
    """

    dataset: str
    paths: Sequence[str]
    labels_N: np.ndarray
    train_rows: int
    classes: list[str]
    skipped: list[str]
    fingerprint: str
    gray_bits: int | None = None
    held_out: int | None = None
    left_out_rows: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labelled(self) -> bool:
        """Whether every row has a label."""
        return len(self) > 0 and bool((self.labels_N >= 0).all())

    @property
    def can_judge(self) -> bool:
        """Whether there are test images to evaluate and every row has a label, as evaluations by labels need."""
        return not self.unjudged

    @property
    def unjudged(self) -> str:
        """Why evaluation by labels is impossible; empty if it is possible."""
        if not len(self.test_rows_N):
            return "all test images are near-duplicates of train images" if self.left_out_rows else "there are no test images"
        return "" if self.labelled else "the images have no labels"

    @property
    def test_rows_N(self) -> np.ndarray:
        """The test rows that are evaluated, int64, ascending."""
        return np.setdiff1d(np.arange(self.train_rows, len(self)), self.left_out_rows)

    def split(self, row: int) -> str:
        """`train` or `test`."""
        return "train" if row < self.train_rows else "test"


@dataclass(frozen=True, eq=False)
class Contents:
    """The identity of N images: their sizes in bytes, int64 (N,), and the sha256 of their bytes, uint8 (N, 32); None if only headers were
    read."""

    sizes_N: np.ndarray
    sha256_N: np.ndarray | None

    def part(self, rows_n: np.ndarray) -> "Contents":
        """The contents of some images."""
        return Contents(self.sizes_N[rows_n], None if self.sha256_N is None else self.sha256_N[rows_n])


def listing_fingerprint(header: dict, paths: Sequence[str], contents: Contents, labels_N: np.ndarray, train_rows: int) -> str:
    """32 hex digits over `header` (dataset, classes, stored size) and the ordered rows: path, bytes, content, label, split.

    Times, owners and locations are not included, so the same images in another folder have the same fingerprint. It is the hash of a JSON
    line [path, size_bytes, sha256, label, split] for each row.
    """
    hasher = hashlib.sha256(canonical_json(header).encode())
    splits = (("train", 0, train_rows), ("test", train_rows, len(paths)))
    groups = [(split, slice(row, min(row + _GROUP_ROWS, end))) for split, first, end in splits for row in range(first, end, _GROUP_ROWS)]

    def lines_of(group: tuple[str, slice]) -> memoryview:
        split, rows = group
        sizes, labels = (pc.cast(pa.array(x[rows]), pa.string()) for x in (contents.sizes_N, labels_N))
        hashes = pa.scalar("null") if contents.sha256_N is None else _quoted(_hex(contents.sha256_N[rows]))
        columns = [_json_strings(_short(paths[rows])), sizes, hashes, labels, pa.scalar(f'"{split}"]\n')]
        lines = pc.binary_join_element_wise(pa.scalar("["), pc.binary_join_element_wise(*columns, ", "), "")
        offsets = np.frombuffer(lines.buffers()[1], np.int32)
        return memoryview(lines.buffers()[2])[offsets[lines.offset] : offsets[lines.offset + len(lines)]]

    with ThreadPoolExecutor(2) as pool:  # Arrow and hashlib release Python's lock
        for lines in in_order(pool, lines_of, groups, _GROUPS_AHEAD):
            hasher.update(lines)
    return hasher.hexdigest()[:32]


def _quoted(text: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(pa.scalar('"'), text, pa.scalar('"'), "")


def _json_strings(text: pa.Array) -> pa.Array:
    """Strings as `json.dumps` writes them."""
    if pc.all(pc.match_substring_regex(text, _PLAIN)).as_py():
        return _quoted(text)
    return pa.array([json.dumps(one) for one in text.to_pylist()])


def _hex(hashes_n: np.ndarray) -> pa.Array:
    """Rows of bytes, uint8 (n, 32), as hex digits."""
    digits = 2 * hashes_n.shape[1]
    offsets = pa.py_buffer(np.arange(0, digits * len(hashes_n) + 1, digits, dtype=np.int32))
    return pa.StringArray.from_buffers(len(hashes_n), offsets, pa.py_buffer(hashes_n.tobytes().hex().encode()))


def memory_listing(
    name: str, paths: list[str], labels_N: np.ndarray, train_rows: int, classes: list[str], images_NSS3: np.ndarray
) -> Listing:
    """The listing of images without files, where the content of a row is its stored pixels."""
    hashes = [np.frombuffer(hashlib.sha256(image.tobytes()).digest(), np.uint8) for image in images_NSS3]
    contents = Contents(np.full(len(hashes), images_NSS3[:1].nbytes), np.array(hashes, np.uint8).reshape(-1, 32))
    header = {"dataset": name, "classes": classes, "store_px": images_NSS3.shape[1]}
    fingerprint = listing_fingerprint(header, paths, contents, labels_N, train_rows)
    return Listing(name, paths, labels_N, train_rows, classes, [], fingerprint)


def write_listing(path: Path | str, listing: Listing) -> None:
    """Write the listing as Parquet with columns row, path, label, split; everything else is in the schema's metadata."""
    n = len(listing)
    table = pa.concat_tables(
        [_SCHEMA.empty_table(), *(_group(listing, row, min(n, row + _GROUP_ROWS)) for row in range(0, n, _GROUP_ROWS))]
    )
    metadata = {
        "dataset": listing.dataset,
        "classes": json.dumps(listing.classes, ensure_ascii=False),
        "skipped": json.dumps(listing.skipped, ensure_ascii=False),
        "fingerprint": listing.fingerprint,
        "rows": str(n),
        "train_rows": str(listing.train_rows),
        "gray_bits": json.dumps(listing.gray_bits),
        "group_rows": str(_GROUP_ROWS),
        "columns": json.dumps(_column_digests(table, _GROUP_ROWS)),
    }
    metadata |= {} if listing.held_out is None else {_HELD_OUT: str(listing.held_out)}
    metadata["checksum"] = fingerprint(metadata)
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink, row_group_size=_GROUP_ROWS, compression="zstd")
    write_bytes(path, sink.getvalue())


def _group(listing: Listing, first: int, end: int) -> pa.Table:
    """A row group of a listing's file."""
    row_n = np.arange(first, end)
    splits = pa.array(["train", "test"]).take(pa.array((row_n >= listing.train_rows).astype(np.int8)))
    return pa.table([pa.array(row_n), _short(listing.paths[first:end]), pa.array(listing.labels_N[first:end]), splits], schema=_SCHEMA)


def _column_digests(table: pa.Table, group_rows: int) -> dict[str, list[str]]:
    """The sha256 of the values of each column of a listing, one for every row group."""
    starts = range(0, len(table), group_rows)
    return {name: [column_digest(table[name].slice(start, group_rows)) for start in starts] for name in table.column_names}


def column_digest(column: pa.ChunkedArray) -> str:
    """The sha256 of one column of one row group: of its int64 numbers, or of its strings' lengths and bytes. ValueError for nulls."""
    if column.null_count:
        raise ValueError("it has empty fields")
    if not len(column) or not pa.types.is_string(column.type):
        return hashlib.sha256(column.to_numpy().astype("<i8").tobytes() if len(column) else b"").hexdigest()
    array = column.combine_chunks()
    _, offsets, text = array.buffers()
    offsets_n = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
    hasher = hashlib.sha256(np.diff(offsets_n).astype("<i4").tobytes())
    hasher.update(memoryview(text)[offsets_n[0] : offsets_n[-1]] if text is not None else b"")
    return hasher.hexdigest()


def metadata_of(schema: pa.Schema) -> dict[str, str]:
    """A listing's metadata; raises ValueError if they do not fit their checksum or some are missing."""
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items() if key.decode() in (*_KEYS, _HELD_OUT)}
    missing = [key for key in _KEYS if key not in metadata]
    checksum = metadata.pop("checksum", None)
    if missing or checksum != fingerprint(metadata):
        raise ValueError("its metadata do not fit their checksum")
    return metadata


def read_listing(path: Path | str) -> Listing:
    """Read all images of a run in their order: `paths`, `labels_N` (int64, -1 where unknown), `classes`, and `train_rows`, the number of
    train images, which come first. Raises UserError if the file is absent, damaged or not a listing.

    >>> from bingo import read_listing
    >>> listing = read_listing("data/listing.parquet")
    >>> len(listing), listing.train_rows, len(listing.classes)
    (500, 400, 10)
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run the stage that writes it: dvc repro") from None
    try:
        table = pq.read_table(io.BytesIO(content))
        if not table.schema.equals(_SCHEMA):
            raise UserError(f"{path}: is not a listing (columns {', '.join(table.schema.names)}); delete it and run: dvc repro")
        metadata = metadata_of(table.schema)
        if json.loads(metadata["columns"]) != _column_digests(table, int(metadata["group_rows"])):
            raise ValueError("its rows do not fit their checksums")
    except PARQUET_DAMAGE as error:
        raise _damaged(path, str(error)) from None
    listing = _from_table(path, table, metadata)
    del table
    pa.default_memory_pool().release_unused()  # as much as the listing holds
    return listing


def _from_table(path: Path | str, table: pa.Table, metadata: dict[str, str]) -> Listing:
    paths = Paths(table["path"])
    labels_N = table["label"].to_numpy().copy()
    is_train_N = pc.equal(table["split"], "train").to_numpy()
    train_rows, classes = int(is_train_N.sum()), json.loads(metadata["classes"])
    is_whole = (str(len(paths)), str(train_rows)) == (metadata["rows"], metadata["train_rows"])
    in_order = np.array_equal(table["row"].to_numpy(), np.arange(len(paths))) and bool(is_train_N[:train_rows].all())
    if not is_whole or not in_order:
        raise _damaged(path, "its rows are not in order, train rows first")
    if len(paths) and (labels_N.min() < -1 or labels_N.max() >= len(classes)):
        raise _damaged(path, f"labels from {labels_N.min()} to {labels_N.max()} for {len(classes)} classes")
    if outside := first_outside(paths.column):
        raise _damaged(path, f"{outside} leads out of the dataset's folder")
    skipped = json.loads(metadata["skipped"])
    gray_bits, held_out = json.loads(metadata["gray_bits"]), int(metadata[_HELD_OUT]) if _HELD_OUT in metadata else None
    return Listing(metadata["dataset"], paths, labels_N, train_rows, classes, skipped, metadata["fingerprint"], gray_bits, held_out)


def write_left_out(path: Path | str, listing: Listing, rows: Iterable[int]) -> None:
    """Write the test rows of a listing that are left out of every evaluation."""
    content = {"listing": listing.fingerprint, "rows": [int(row) for row in rows]}
    write_json(path, {**content, "checksum": fingerprint(content)})


def read_judged_listing(path: Path | str, left_out: Path | str) -> Listing:
    """`read_listing`, with the rows in the file `left_out` marked as not evaluated if test images were held out. Raises UserError as
    `read_listing` does, and if that file is then absent, damaged or of another listing."""
    listing = read_listing(path)
    if listing.held_out is None:
        return listing
    content = read_json(left_out)
    if not isinstance(content, dict) or content.pop("checksum", None) != fingerprint(content):
        raise _damaged(left_out, "it does not fit its checksum")
    if content["listing"] != listing.fingerprint:
        problem = f"was made from listing {content['listing']}, this run reads listing {listing.fingerprint}"
        raise UserError(f"{left_out}: {problem}; run: dvc repro bag")
    return replace(listing, left_out_rows=tuple(content["rows"]))


def _damaged(path: Path | str, reason: str) -> UserError:
    return UserError(f"{path}: is damaged ({' '.join(reason.split())}); delete it and run: dvc repro")
