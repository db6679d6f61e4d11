"""Results of earlier scans for unchanged files, so that a killed scan resumes, and the scan of an unchanged folder reads no files.

As in Git, a file counts as unchanged if its path, size, both times of change in nanoseconds and inode are the same. Outputs do not depend
on this: files without a known, undamaged result are read. Shape letter: N files.
"""

import os
import time
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bingo.images.listing import Paths, path_column
from bingo.runtime.artefacts import fingerprint, write_bytes
from bingo.runtime.checksums import Damaged, seal, unseal
from bingo.runtime.workers import worker_pool

SAVED_FILES = 65536  # results are saved each time this many files have been checked
ALONE_UP_TO_FILES = 2**18  # a process looks at these many files in a second
_SETTLED_NS = 2 * 10**9  # a file that was changed just before may change again within the clock's resolution
_PATH, _IDENTITY = "path", "identity"
_SCHEMA = pa.schema(
    {
        _PATH: pa.string(), _IDENTITY: pa.binary(32), "size_bytes": pa.int64(), "sha256": pa.binary(32), "largest": pa.int32(),
        "deep_colours": pa.bool_(), "reason": pa.string(),
    }
)  # fmt: skip


class KnownFiles:
    """The results for files, kept in `folder`. `made_by` identifies the code that checks them; results of other code are discarded."""

    def __init__(self, folder: Path, made_by: str):
        self._folder, self._made_by = folder, made_by
        self._tables: dict[str, pa.Table] = {}  # by place: all that is known
        self._used: dict[str, list[pa.Table]] = {}  # and what this scan has asked for
        self._new: dict[str, int] = {}

    def read(self, place: str) -> pa.Table:
        """All that is known of the files of a place, read once."""
        if place not in self._tables:
            parts = [self._read(path) for path in sorted(self._folder.glob(f"{self._name(place)}-*"), reverse=True)]
            self._tables[place] = pa.concat_tables([_SCHEMA.empty_table(), *(part for part in parts if part is not None)])
        return self._tables[place]

    def find(self, place: str, paths: Sequence[str], identity_N4: np.ndarray) -> tuple[np.ndarray, pa.Table]:
        """Which of N files have not changed, bool (N,), and their results. `place` identifies the folder and the kind of check."""
        known = self.read(place)
        if not len(known):
            return np.zeros(len(paths), bool), known
        names = pa.chunked_array([path_column(paths)])
        in_order = len(known) == len(names) and known[_PATH].equals(names)
        place_N = np.arange(len(names)) if in_order else pc.index_in(names, known[_PATH].combine_chunks()).fill_null(-1).to_numpy()
        same_N = (identities(known)[place_N] == identity_N4).all(axis=1) & (place_N >= 0) & (identity_N4[:, 0] >= 0)
        found = known if in_order and same_N.all() else known.take(pa.array(place_N[same_N]))
        self._used.setdefault(place, []).append(found)
        return same_N, found

    def add(self, place: str, paths: Sequence[str], identity_N4: np.ndarray, columns: dict[str, pa.Array], begun_ns: int) -> None:
        """Save the results for some files, whose identities were read after `begun_ns` and before their contents."""
        settled_N = pa.array(identity_N4[:, 2] < begun_ns - _SETTLED_NS)
        identity = column_of_bytes(identity_N4.view(np.uint8))
        table = pa.table({_PATH: path_column(paths), _IDENTITY: identity, **columns}, schema=_SCHEMA).filter(settled_N)
        self._used.setdefault(place, []).append(table)
        self._new[place] = self._new.get(place, 0) + len(table)
        self._write(place, table)

    def keep(self) -> None:
        """Keep the results that this scan has asked for, merged into one part for each place, and discard the rest."""
        for place, tables in self._used.items():
            old = list(self._folder.glob(f"{fingerprint(place)}-*"))
            if self._new.get(place) or len(old) > 1:
                kept = self._write(place, pa.concat_tables(tables))
                for path in old:
                    path.unlink(missing_ok=True) if path != kept else None

    def _name(self, place: str) -> str:
        return f"{fingerprint(place)}-{self._made_by}"

    def _read(self, path: Path) -> pa.Table | None:
        try:
            table = pa.ipc.open_stream(pa.py_buffer(unseal(path.read_bytes()))).read_all()
            return table if table.schema.equals(_SCHEMA) else None
        except (OSError, Damaged, pa.ArrowException):
            return None

    def _write(self, place: str, table: pa.Table) -> Path:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        path = self._folder / f"{self._name(place)}-{time.time_ns():020d}"
        write_bytes(path, seal(sink.getvalue()))
        return path


def identities(known: pa.Table) -> np.ndarray:
    """The column of identities, int64 (N, 4)."""
    return fixed_bytes(known[_IDENTITY]).view(np.int64)


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
    numbers = array("q")
    for path in paths:
        try:
            found = os.stat(f"{root}/{path}")  # noqa: PTH116 (millions of times)
            numbers.extend((found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino))
        except OSError:
            numbers.extend((-1, -1, -1, -1))
    return np.frombuffer(numbers, np.int64).reshape(-1, 4)
