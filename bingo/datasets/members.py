"""Images inside large files under the names that a folder of them would have: what shards and saved datasets have in common."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bingo.images.positions import Positions
from bingo.runtime.errors import UserError, printable

_MOST_LINES = 20


@dataclass(frozen=True)
class Members:
    """N images: their `paths` as a folder would have them, SPLIT/CLASS/NAME or less, and where they lie; `passed` counts by suffix what
    lies beside them. `placed`: the split and the class of each, empty if unknown, as data give them; None: they are the paths' folders."""

    paths: list[str]
    positions: Positions
    passed: Counter[str] = field(default_factory=Counter)
    placed: list[tuple[str, str]] | None = None


def refuse(shown: str, problems: list[str]) -> None:
    """Raises UserError with a line for each problem, up to 20; `shown` is the dataset as messages name it."""
    lines = [f"{shown}: {problem}" for problem in problems[:_MOST_LINES]]
    if len(problems) > _MOST_LINES:
        lines.append(f"{shown}: and {len(problems) - _MOST_LINES:,} more")
    if lines:
        raise UserError(lines)


def class_names(labels: Iterable[int | str], names: list[str] | None, shown: str) -> dict[int | str, str]:
    """The name of each label: its name in `names`; without these, the name that a label is, or integers, padded with zeros so that their
    order is that of the numbers. Labels less than zero are unknown, and have none.

    Raises UserError where an integer has no name, or two labels have the same.
    """
    known = sorted({label for label in labels if not (isinstance(label, int) and label < 0)}, key=lambda label: (str(type(label)), label))
    numbers = [label for label in known if isinstance(label, int)]
    if names is not None and numbers and numbers[-1] >= len(names):
        raise UserError(f"{shown}: label {numbers[-1]} has no name, as there are {len(names)} names of classes; name all of them")
    width = len(str(numbers[-1])) if numbers else 0
    named = {x: normalize("NFC", (f"{x:0{width}d}" if names is None else names[x]) if isinstance(x, int) else x) for x in known}
    twice = [name for name, count in Counter(named.values()).items() if count > 1]
    refuse(shown, [f"several labels have the name {printable(name)}; rename all but one" for name in twice])
    return named


def placed_path(split: str, of_class: str, name: str) -> str:
    """The path that an image has in a folder of them; the class's name is made one that a folder can have."""
    return "/".join(filter(None, (split, re.sub(r"^\.|[/\0]", "_", of_class), name)))


def refuse_twins(shown: str, paths: list[str], holders: list[str], way_out: str) -> None:
    """Raises UserError with a line for each path that is there more than once, and the names of the files that hold it."""
    if pc.count_distinct(pa.array(paths, pa.string())).as_py() == len(paths):
        return  # without an object for each of millions
    rows: dict[str, int] = {}
    problems = []
    for row, path in enumerate(paths):
        if (first := rows.setdefault(path, row)) != row:
            problems.append(f"{printable(path)} is in {holders[first]} and in {holders[row]}; {way_out}")
    refuse(shown, problems)


def positions_of(files: list[str], file_bytes: list[int], places: list[np.ndarray]) -> Positions:
    """Positions in several files, given the offset and length of each file's images, int64 (n, 2)."""
    numbers = np.repeat(np.arange(len(files)), [len(place_n2) for place_n2 in places])
    return Positions(files, file_bytes, np.column_stack([numbers, np.concatenate([np.empty((0, 2), np.int64), *places])]))
