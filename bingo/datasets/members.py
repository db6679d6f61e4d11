"""Images inside large files under the names that a folder of them would have: what shards and saved datasets have in common."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from bingo.images.positions import Positions
from bingo.runtime.errors import UserError, printable

_MOST_LINES = 20


@dataclass(frozen=True)
class Members:
    """N images: their `paths` as a folder would have them, SPLIT/CLASS/NAME or less, and where they lie; `passed` counts by suffix what
    lies beside them."""

    paths: list[str]
    positions: Positions
    passed: Counter[str] = field(default_factory=Counter)


def refuse(shown: str, problems: list[str]) -> None:
    """Raises UserError with a line for each problem, up to 20; `shown` is the dataset as messages name it."""
    lines = [f"{shown}: {problem}" for problem in problems[:_MOST_LINES]]
    if len(problems) > _MOST_LINES:
        lines.append(f"{shown}: and {len(problems) - _MOST_LINES:,} more")
    if lines:
        raise UserError(lines)


def class_folders(labels: Iterable[int | str], names: list[str] | None, shown: str) -> dict[int | str, str]:
    """The name of each label's folder: its name in `names`; without these, the name that a label is, or integers, padded with zeros so
    that their order is that of the numbers. Labels less than zero are unknown, and have none.

    Raises UserError where an integer has no name, or two labels would have one folder.
    """
    known = sorted({label for label in labels if not (isinstance(label, int) and label < 0)}, key=lambda label: (str(type(label)), label))
    numbers = [label for label in known if isinstance(label, int)]
    if names is not None and numbers and numbers[-1] >= len(names):
        raise UserError(f"{shown}: label {numbers[-1]} has no name, as there are {len(names)} names of classes; name all of them")
    width = len(str(numbers[-1])) if numbers else 0
    named = {x: (f"{x:0{width}d}" if names is None else names[x]) if isinstance(x, int) else x for x in known}
    folders = {label: re.sub(r"^\.|[/\0]", "_", name) or "_" for label, name in named.items()}
    twice = [name for name, count in Counter(folders.values()).items() if count > 1]
    refuse(shown, [f"several labels have the name {printable(name)}; rename all but one" for name in twice])
    return folders


def refuse_twins(shown: str, paths: list[str], holders: list[str], way_out: str) -> None:
    """Raises UserError with a line for each path that is there more than once, and the names of the files that hold it."""
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
