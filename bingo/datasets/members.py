"""Images inside large files, with the paths that they would have in a folder: common code of shards and saved datasets."""

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bingo.images.listing import STRINGS, Paths, joined_paths, path_column
from bingo.images.positions import Positions
from bingo.runtime.errors import UserError, printable

_MOST_LINES = 20
_BLOCK_ROWS = 65536  # whose folders are written out at once


@dataclass(frozen=True)
class Placed:
    """The split and the class of N images, either empty if unknown: the distinct `pairs`, and the number of each image's, int32 (N,)."""

    pairs: list[tuple[str, str]]
    number_N: np.ndarray


@dataclass(frozen=True)
class Members:
    """N images: their `paths` as in a folder, SPLIT/CLASS/NAME or less, `rows` by paths, and positions; `passed` counts other members by
    suffix. `placed`: split and class of each image as given by the data; None: they are given by the paths' folders."""

    paths: Paths
    rows: "PathRows"
    positions: Positions
    passed: Counter[str] = field(default_factory=Counter)
    placed: Placed | None = None


class PathRows:
    """The rows of N paths. 16 bytes a path are kept, its hash and its row; the paths themselves only if two have the same hash."""

    def __init__(self, paths: Paths):
        hash_N = _hashes(paths)
        self._row_N = np.argsort(hash_N, kind="stable")
        self._hash_N = hash_N[self._row_N]
        self._paths = paths if (self._hash_N[1:] == self._hash_N[:-1]).any() else None

    def of(self, paths: Sequence[str]) -> np.ndarray:
        """The first row of each of n paths, all of which are among the N, int64 (n,)."""
        if self._paths is not None:
            return pc.index_in(path_column(paths), path_column(self._paths)).to_numpy().astype(np.int64)
        return self._row_N[np.searchsorted(self._hash_N, _hashes(paths))]

    def twins(self) -> Iterator[tuple[str, int, int]]:
        """Each path that an earlier row has too, with the first such row and its own."""
        if self._paths is not None:
            first_N = self.of(self._paths)
            for row in np.flatnonzero(first_N != np.arange(len(first_N))).tolist():
                yield self._paths[row], int(first_N[row]), row


def _hashes(paths: Sequence[str]) -> np.ndarray:
    return np.fromiter(map(hash, paths), np.int64, len(paths))


def rows_of(number_N: np.ndarray, numbers: int) -> list[np.ndarray]:
    """For each number from 0 to before `numbers`, its rows in order, int64 (n,)."""
    ends = np.bincount(number_N, minlength=numbers).cumsum()
    return np.split(np.argsort(number_N, kind="stable"), ends)[:numbers]


class Strings:
    """Strings that are added one by one; they take the memory of an Arrow column, some 4 bytes each beside their text."""

    def __init__(self) -> None:
        self._text, self._ends = bytearray(), array("i", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, text: str) -> None:
        """Add a string."""
        self._text += text.encode(errors="surrogatepass")
        self._ends.append(len(self._text))

    def column(self) -> pa.Array:
        """All strings; none can be added from then on."""
        return pa.StringArray.from_buffers(len(self), pa.py_buffer(self._ends), pa.py_buffer(self._text))


def refuse(shown: str, problems: Iterable[str]) -> None:
    """Raise UserError with a line for each problem, at most 20; `shown` is the name of the dataset in messages."""
    left = iter(problems)
    lines = [f"{shown}: {problem}" for problem in islice(left, _MOST_LINES)]
    if more := sum(1 for _ in left):
        lines.append(f"{shown}: and {more:,} more")
    if lines:
        raise UserError(lines)


def class_names(labels: Iterable[int | str], names: list[str] | None, shown: str) -> dict[int | str, str]:
    """The name of each label: its name in `names`; without `names`, the label itself, where integers are padded with zeros so that they
    sort by number. Negative labels are unknown and have no name.

    Raises UserError if an integer has no name or an empty one, or two labels have the same name.
    """
    known = sorted({label for label in labels if not (isinstance(label, int) and label < 0)}, key=lambda label: (str(type(label)), label))
    numbers = [label for label in known if isinstance(label, int)]
    if names is not None and numbers and numbers[-1] >= len(names):
        raise UserError(f"{shown}: label {numbers[-1]} has no name, as there are {len(names)} names of classes; name all of them")
    bare = [number for number in numbers if names is not None and not names[number].strip()]
    refuse(shown, [f"label {number} has an empty name; name all classes" for number in bare])
    width = len(str(numbers[-1])) if numbers else 0
    named = {x: normalize("NFC", (f"{x:0{width}d}" if names is None else names[x]) if isinstance(x, int) else x) for x in known}
    twice = [name for name, count in Counter(named.values()).items() if count > 1]
    refuse(shown, [f"several labels have the name {printable(name)}; rename all but one" for name in twice])
    return named


def placed_path(split: str, of_class: str, name: str) -> str:
    """The path that an image would have in a folder; the name of the class is changed to one that a folder can have."""
    return "/".join(filter(None, (split, re.sub(r"^\.|[/\0]", "_", of_class), name)))


def paths_below(folders: list[str], number_n: np.ndarray, names: pa.Array | pa.ChunkedArray) -> Paths:
    """The paths of n names, each below the folder of its number; an empty folder is none."""
    above = pa.array([folder and f"{folder}/" for folder in folders], STRINGS)
    blocks = (slice(start, start + _BLOCK_ROWS) for start in range(0, len(names), _BLOCK_ROWS))
    parts = (
        pc.binary_join_element_wise(above.take(pa.array(number_n[rows])), names[rows].cast(STRINGS), pa.scalar("", STRINGS))
        for rows in blocks
    )
    return joined_paths(Paths(pa.chunked_array(pa.chunked_array(part).chunks, STRINGS)) for part in parts)


def positions_of(files: list[str], file_bytes: list[int], places: list[np.ndarray]) -> Positions:
    """Positions in several files, given the offset and length of each file's images, int64 (n, 2)."""
    positions_N3, start = np.empty((sum(map(len, places)), 3), np.int64), 0
    for number, place_n2 in enumerate(places):
        own_n3 = positions_N3[start : start + len(place_n2)]
        own_n3[:, 0], own_n3[:, 1:], start = number, place_n2, start + len(place_n2)
    return Positions(files, file_bytes, positions_N3)
