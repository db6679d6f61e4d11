"""Images whose bytes are parts of a few large files: their positions, and reading them.

No torch: scans import this file. Shape letters: N images, n requested images.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from bingo.runtime.chunks import new_array, open_array, read_rows
from bingo.runtime.inside import path_inside

_ARRAY, _CHUNK_ROWS = "positions", 65536
_MOST_OPEN = 256  # files of a process: systems allow 1,024 or fewer


@dataclass(frozen=True)
class Positions:
    """The positions of N images: the number of the file, the offset and the length in bytes, int64 (N, 3).

    `files`: posix paths relative to dataset.root's folder or, if `in_store`, to the zarr group that contains the positions; `file_bytes`:
    their sizes, by which changed files are detected.
    """

    files: list[str]
    file_bytes: list[int]
    positions_N3: np.ndarray
    in_store: bool = False

    def __len__(self) -> int:
        return len(self.positions_N3)

    def part(self, rows_n: Sequence[int] | np.ndarray) -> "Positions":
        """The positions of some images, with only their files."""
        positions_n3 = self.positions_N3[np.asarray(rows_n, np.int64)]
        is_used = np.bincount(positions_n3[:, 0]) > 0
        files, positions_n3[:, 0] = np.flatnonzero(is_used), (np.cumsum(is_used) - 1)[positions_n3[:, 0]]
        return Positions([self.files[file] for file in files], [self.file_bytes[file] for file in files], positions_n3, self.in_store)

    def read(self, folder: str, row: int, follow_links: bool, at_most: int | None = None) -> bytes:
        """The bytes of an image, at most the first `at_most`; `folder` is that of the files. Raises OSError with the reason in one line."""
        file, offset, length = self.positions_N3[row].tolist()
        whole = _open_file(folder, self.files[file], follow_links, self.file_bytes[file])
        return os.pread(whole.descriptor, length if at_most is None else min(length, at_most), offset)


class _OpenFile:
    """A file that is closed when nothing refers to it; several threads may read it at the same time."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(_MOST_OPEN)
def _open_file(folder: str, name: str, follow_links: bool, file_bytes: int) -> _OpenFile:
    """Open a file once per process. Raises OSError if it is absent or does not have `file_bytes` bytes."""
    file = _OpenFile(path_inside(folder, name, follow_links))
    if (found := os.fstat(file.descriptor).st_size) != file_bytes:
        raise OSError(errno.EIO, f"{name} has {found:,} bytes, {file_bytes:,} when it was scanned")
    return file


def create_positions(group: zarr.Group, positions: Positions) -> zarr.Array:
    """Create the array of positions in a group, with attributes for their files; `positions_N3` are then to be written to it."""
    attributes = {"files": positions.files, "file_bytes": positions.file_bytes, "in_store": positions.in_store}
    group.update_attributes({**group.attrs, **attributes})
    return new_array(group, _ARRAY, (len(positions), 3), np.int64, _CHUNK_ROWS)


def read_positions(group: zarr.Group, name: str, way_out: str) -> Positions | None:
    """The positions in a group called `name` in messages, None if it has none. Raises UserError if they are damaged."""
    if _ARRAY not in group:
        return None
    array = open_array(group, _ARRAY, name, np.int64, 2, way_out)
    attributes: dict[str, Any] = group.attrs.asdict()
    return Positions(attributes["files"], attributes["file_bytes"], read_rows(array, slice(None), name, way_out), attributes["in_store"])
