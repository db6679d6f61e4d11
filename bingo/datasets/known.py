"""Results of earlier scans for unchanged files, so that a killed scan resumes, and the scan of an unchanged folder reads no files.

As in Git, a file counts as unchanged if its path, size, both times of change in nanoseconds and inode are the same. Outputs do not depend
on this: files without a known, undamaged result are read. Shape letters: N files, K of which results are known.
"""

import os
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bingo.images.listing import STRINGS, Paths, path_column
from bingo.runtime.artefacts import errors_named, fingerprint
from bingo.runtime.checksums import Damaged, seal, unseal
from bingo.runtime.workers import worker_pool

SAVED_FILES = 65536  # results are saved each time this many files have been checked
ALONE_UP_TO_FILES = 2**18  # a process looks at these many files in a second
_SETTLED_NS = 2 * 10**9  # a file that was changed just before may change again within the clock's resolution
_PATH, _IDENTITY = "path", "identity"
_SCHEMA = pa.schema(
    {
        _PATH: STRINGS, _IDENTITY: pa.binary(32), "size_bytes": pa.int64(), "sha256": pa.binary(32), "largest": pa.int32(),
        "deep_colours": pa.bool_(), "reason": pa.string(),
    }
)  # fmt: skip


class ScannedRoot(NamedTuple):
    """A folder, and whether its files are decoded or only their headers are read."""

    root: str
    decode: bool

    @property
    def name(self) -> str:
        """A name that later scans of the folder give it too."""
        return fingerprint([os.path.realpath(self.root), self.decode])


@dataclass(eq=False)
class _Known:
    """The results for K files of a place as they are now, and which of them this scan has used, bool (K,)."""

    table: pa.Table
    used_K: np.ndarray
    has_new: bool = False


class KnownFiles:
    """The results for files, kept in `folder`. `made_by` identifies the code that checks them; results of other code are discarded."""

    def __init__(self, folder: Path, made_by: str):
        self._folder, self._made_by = folder, made_by
        self._beside = ThreadPoolExecutor(1)
        self._known: dict[ScannedRoot, Future[_Known]] = {}

    def begin(self, place: ScannedRoot) -> None:
        """Begin, in a thread, to read what is known of the files of a place, and to look which of them have changed."""
        if place not in self._known:
            self._known[place] = self._beside.submit(self._look, place)

    def find(self, place: ScannedRoot, paths: Sequence[str]) -> tuple[np.ndarray, pa.Table]:
        """Which of N files have not changed, bool (N,), and their results."""
        known = self._of(place)
        if not len(known.table):
            return np.zeros(len(paths), bool), known.table
        names, column = pa.chunked_array([path_column(paths)]), known.table[_PATH]
        if column.equals(names):
            known.used_K[:] = True
            return np.ones(len(paths), bool), known.table
        place_N = pc.index_in(names, column.combine_chunks()).fill_null(-1).to_numpy()
        same_N = place_N >= 0
        known.used_K[place_N[same_N]] = True
        return same_N, known.table.take(pa.array(place_N[same_N]))

    def add(self, place: ScannedRoot, paths: Sequence[str], identity_N4: np.ndarray, columns: dict[str, pa.Array], begun_ns: int) -> None:
        """Save the results for some files, whose identities were read after `begun_ns` and before their contents."""
        settled_N = pa.array(identity_N4[:, 2] < begun_ns - _SETTLED_NS)
        identity = column_of_bytes(identity_N4.view(np.uint8))
        table = pa.table({_PATH: path_column(paths), _IDENTITY: identity, **columns}, schema=_SCHEMA).filter(settled_N)
        if len(table):
            known = self._of(place)
            known.table, known.has_new = pa.concat_tables([known.table, table]), True
            known.used_K = np.concatenate([known.used_K, np.ones(len(table), bool)])
            self._write(place, table)

    def keep(self) -> None:
        """Keep the results that this scan has used, merged into one part for each place, and discard the rest."""
        for place, known in ((place, found.result()) for place, found in self._known.items()):
            old = list(self._folder.glob(f"{place.name}-*"))
            if known.has_new or len(old) > 1:
                kept = self._write(place, known.table if known.used_K.all() else known.table.filter(pa.array(known.used_K)))
                for path in old:
                    path.unlink(missing_ok=True) if path != kept else None

    def _of(self, place: ScannedRoot) -> _Known:
        self.begin(place)
        return self._known[place].result()

    def _look(self, place: ScannedRoot) -> _Known:
        """What is known of the files of a place that have not changed."""
        parts = [self._read(path) for path in sorted(self._folder.glob(f"{place.name}-{self._made_by}-*"))]
        table = pa.concat_tables([_SCHEMA.empty_table(), *(part for part in parts if part is not None)])
        identity_K4 = identity_of(place.root, Paths(table[_PATH]))
        same_K = (fixed_bytes(table[_IDENTITY]).view(np.int64) == identity_K4).all(axis=1) & (identity_K4[:, 0] >= 0)
        table = table if same_K.all() else table.filter(pa.array(same_K))
        return _Known(table, np.zeros(len(table), bool))

    def _read(self, path: Path) -> pa.Table | None:
        try:
            table = pa.ipc.open_stream(pa.py_buffer(unseal(path.read_bytes()))).read_all()
            return table if table.schema.equals(_SCHEMA) else None
        except (OSError, Damaged, pa.ArrowException):
            return None

    def _write(self, place: ScannedRoot, table: pa.Table) -> Path:
        """Write a part. A kill leaves it cut off, which `_read` notices, and the next scan discards it."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        path = self._folder / f"{place.name}-{self._made_by}-{time.time_ns():020d}"
        with errors_named(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(seal(sink.getvalue()))
        return path


def column_of_bytes(x_n32: np.ndarray) -> pa.Array:
    """uint8 (n, 32) as a column of 32 bytes per row."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(x_n32), [None, pa.py_buffer(np.ascontiguousarray(x_n32))])


def fixed_bytes(column: pa.ChunkedArray) -> np.ndarray:
    """A column of 32 bytes per row as uint8 (N, 32)."""
    parts = [np.frombuffer(part.buffers()[1], np.uint8).reshape(-1, 32)[part.offset :][: len(part)] for part in column.chunks if len(part)]
    return np.concatenate([np.empty((0, 32), np.uint8), *parts])


def identity_of(root: str, paths: Sequence[str]) -> np.ndarray:
    """Size, times of change of content and of inode in ns, and inode of each file, int64 (N, 4); -1 if it cannot be found."""
    if len(paths) <= ALONE_UP_TO_FILES:
        return _identity_of(root, paths)
    column = Paths(pa.chunked_array([path_column(paths)]))
    rows = np.array_split(np.arange(len(paths)), -(-len(paths) // SAVED_FILES))
    with worker_pool(len(paths)) as pool:
        return np.concatenate(list(pool.map(partial(_identity_of, root), map(column.take, rows))))


def _identity_of(root: str, paths: Sequence[str]) -> np.ndarray:
    try:
        folder = os.open(root, getattr(os, "O_PATH", os.O_RDONLY))  # paths from an open folder are found faster
    except OSError:
        return np.full((len(paths), 4), -1)
    numbers = array("q")
    try:
        for path in paths:
            try:
                found = os.stat(path, dir_fd=folder)
                numbers.extend((found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino))
            except OSError:
                numbers.extend((-1, -1, -1, -1))
    finally:
        os.close(folder)
    return np.frombuffer(numbers, np.int64).reshape(-1, 4)
