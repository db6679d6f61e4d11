"""Images inside large files, with the paths that they would have in a folder: common code of shards and saved datasets."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from unicodedata import normalize

import numpy as np
import pyarrow.compute as pc

from bingo.images.listing import Paths
from bingo.images.positions import Positions
from bingo.runtime.errors import UserError, printable

_MOST_LINES = 20


@dataclass(frozen=True)
class Members:
    """N images: their `paths` as in a folder, SPLIT/CLASS/NAME or less, and their positions; `passed` counts other members by suffix.
    `placed`: split and class of each image, empty if unknown, as given by the data; None: they are given by the paths' folders."""

    paths: Sequence[str]
    positions: Positions
    passed: Counter[str] = field(default_factory=Counter)
    placed: list[tuple[str, str]] | None = None


def refuse(shown: str, problems: list[str]) -> None:
    """Raise UserError with a line for each problem, at most 20; `shown` is the name of the dataset in messages."""
    lines = [f"{shown}: {problem}" for problem in problems[:_MOST_LINES]]
    if len(problems) > _MOST_LINES:
        lines.append(f"{shown}: and {len(problems) - _MOST_LINES:,} more")
    if lines:
        raise UserError(lines)


def class_names(labels: Iterable[int | str], names: list[str] | None, shown: str) -> dict[int | str, str]:
    """The name of each label: its name in `names`; without `names`, the label itself, where integers are padded with zeros so that they
    sort by number. Negative labels are unknown and have no name.

    Raises UserError if an integer has no name, or two labels have the same name.
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
    """The path that an image would have in a folder; the name of the class is changed to one that a folder can have."""
    return "/".join(filter(None, (split, re.sub(r"^\.|[/\0]", "_", of_class), name)))


def refuse_twins(shown: str, paths: Paths, positions: Positions, way_out: str) -> None:
    """Raise UserError with a line for each path that occurs more than once, with the names of the files that contain it."""
    if pc.count_distinct(paths.column).as_py() == len(paths):
        return  # without creating an object for each of millions of paths
    rows: dict[str, int] = {}
    problems = []
    for row, path in enumerate(paths):
        if (first := rows.setdefault(path, row)) != row:
            holders = [positions.files[file] for file in positions.positions_N3[[first, row], 0]]
            problems.append(f"{printable(path)} is in {' and in '.join(holders)}; {way_out}")
    refuse(shown, problems)


def positions_of(files: list[str], file_bytes: list[int], places: list[np.ndarray]) -> Positions:
    """Positions in several files, given the offset and length of each file's images, int64 (n, 2)."""
    numbers = np.repeat(np.arange(len(files)), [len(place_n2) for place_n2 in places])
    return Positions(files, file_bytes, np.column_stack([numbers, np.concatenate([np.empty((0, 2), np.int64), *places])]))
