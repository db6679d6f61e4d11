"""A listing that reads only the rows asked for, so that commands that show one bag start in well under a second.

`read_listing` reads and checks everything; this reads the footer and single row groups, and checks these.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bingo.images.listing import PARQUET_DAMAGE, STRINGS, column_digest, first_outside, metadata_of
from bingo.runtime.errors import UserError, reason_of

_COLUMNS = ["row", "path", "label", "split"]
_MOST_HINTS = 3


class ListingRows:
    """N images in order, the first `train_rows` of them for training; `dataset`, `classes`, `fingerprint`, `gray_bits` as in a Listing."""

    def __init__(self, source: Path | BinaryIO, name: str):
        """`source` is a parquet file or its path, called `name` in messages. Raises UserError if it is absent or damaged."""
        self.name = name
        with self._damage():
            self._file = pq.ParquetFile(source)
            if self._file.schema_arrow.names != _COLUMNS:
                raise UserError(f"{name}: is not a listing; delete it and run: dvc repro")
            metadata = metadata_of(self._file.schema_arrow)
        self.dataset: str = metadata["dataset"]
        self.classes: list[str] = json.loads(metadata["classes"])
        self.fingerprint: str = metadata["fingerprint"]
        self.train_rows = int(metadata["train_rows"])
        self.gray_bits: int | None = json.loads(metadata["gray_bits"])
        self._rows = int(metadata["rows"])
        self._digests: dict[str, list[str]] = json.loads(metadata["columns"])
        self._starts = range(0, self._rows, int(metadata["group_rows"]))  # of row groups

    def __len__(self) -> int:
        return self._rows

    @cached_property
    def labels_N(self) -> np.ndarray:
        """Labels of all rows, int64 (N,), -1 where unknown."""
        with self._damage():
            groups = [self._column(group, "label").to_numpy() for group in range(len(self._starts))]
        return np.concatenate([np.empty(0, np.int64), *groups])

    def columns(self) -> tuple[pa.Array, pa.Array]:
        """Paths and class names of all rows, as strings; null where the class is unknown."""
        paths = pa.chunked_array([column for _, columns in self._path_columns() for column in columns.cast(STRINGS).chunks], STRINGS)
        unknown_N = (self.labels_N < 0) | (self.labels_N >= len(self.classes))
        return paths.combine_chunks(), pa.array(self.classes, pa.string()).take(pa.array(self.labels_N, mask=unknown_N))

    def rows(self, rows_R: Sequence[int] | np.ndarray) -> tuple[list[str], np.ndarray]:
        """Paths and labels (int64) of rows in any order, read from their row groups. Raises UserError if a row does not exist."""
        rows_R = np.asarray(rows_R, np.int64)
        paths, labels_R = [""] * len(rows_R), np.full(len(rows_R), -1, np.int64)
        for row in rows_R[(rows_R < 0) | (rows_R >= len(self))].tolist():
            raise UserError(f"row {row}: {self.name} has rows 0 to {len(self) - 1}; give one of those")
        groups_R = rows_R // self._starts.step
        for group in np.unique(groups_R).tolist():
            places = np.flatnonzero(groups_R == group)
            inside = rows_R[places] - self._starts[group]
            with self._damage():
                column, labels_n = self._column(group, "path"), self._column(group, "label").to_numpy()
            labels_R[places] = labels_n[inside]
            for place, path in zip(places.tolist(), column.take(inside).to_pylist(), strict=True):
                paths[place] = path
        return paths, labels_R

    def row_of(self, path: str) -> int:
        """The row of a path, or of the only path that differs from it only in case or Unicode form.

        Raises UserError if there is none, and suggests paths that contain the last part.
        """
        import pyarrow.compute as pc

        for start, paths in self._path_columns(path):
            if (place := pc.index(paths, path).as_py()) >= 0:
                return start + place
        if len(similar := self._similar_rows(path)) == 1:
            return similar[0]
        hints: list[str] = []
        if last := path.replace("\\", "/").rstrip("/").rpartition("/")[2]:
            for _, paths in self._path_columns():
                hints += paths.filter(pc.match_substring(paths, last)).slice(0, _MOST_HINTS).to_pylist()
                if len(hints) >= _MOST_HINTS:
                    break
        near = f"; did you mean {', '.join(map(repr, hints[:_MOST_HINTS]))}?" if hints else ""
        raise UserError(f"{path!r}: no such path in {self.name} ({len(self)} rows){near}")

    def _similar_rows(self, path: str) -> list[int]:
        """The rows of paths that differ from this one only in case or Unicode form."""
        import pyarrow.compute as pc

        wanted, found = normalize("NFC", path).lower(), []
        for start, paths in self._path_columns():
            same = pc.equal(pc.utf8_lower(pc.utf8_normalize(paths, "NFC")), wanted)
            found += [start + place for place in pc.indices_nonzero(same).to_pylist()]
        return found

    def paths(self, rows: int) -> Iterator[tuple[int, list[str]]]:
        """(first row, paths) of every run of at most `rows` rows, in order; one row group is in memory at a time."""
        held: list[str] = []
        first = 0
        for _, column in self._path_columns():
            held += column.to_pylist()
            while len(held) >= rows:
                yield first, held[:rows]
                held, first = held[rows:], first + rows
        if held:
            yield first, held

    def _path_columns(self, holding: str | None = None) -> Iterator[tuple[int, pa.ChunkedArray]]:
        """First row and paths of each row group, or only of those whose range of paths includes `holding`."""
        for group, start in enumerate(self._starts):
            with self._damage():
                statistics = self._file.metadata.row_group(group).column(_COLUMNS.index("path")).statistics
                bounded = holding is not None and statistics is not None and statistics.has_min_max
                if bounded and not statistics.min <= holding <= statistics.max:
                    continue
                column = self._column(group, "path")
            yield start, column

    def _column(self, group: int, name: str) -> pa.ChunkedArray:
        column = self._file.read_row_group(group, columns=[name])[name]
        if column_digest(column) != self._digests[name][group]:
            raise ValueError(f"column {name} of row group {group} does not fit its checksum")
        if name == "path" and (outside := first_outside(column)):
            raise ValueError(f"{outside} leads out of the dataset's folder")
        return column

    @contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise UserError(f"{self.name}: the file does not exist; run: dvc repro scan") from None
        except (*PARQUET_DAMAGE, IndexError) as error:
            raise UserError(f"{self.name}: is damaged ({reason_of(error)}); delete it and run: dvc repro scan") from None
