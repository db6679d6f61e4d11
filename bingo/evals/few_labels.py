"""Which train images keep their label where only a share of them may: SimCLR's published lists, or a seeded draw over the classes."""

from collections import defaultdict
from pathlib import Path

import numpy as np

from bingo.data.listing import Listing
from bingo.data.subset import balanced_rows
from bingo.errors import UserError

_SHOWN = 3


def drawn_rows(listing: Listing, percent: float, seed: int) -> np.ndarray:
    """A seeded draw of `percent` of the train rows, int64, rising: balanced over the classes, at least one of each that has any.

    A smaller share is part of a larger one. SimCLR's lists are balanced as well: 12.8 and 128 images a class on average.
    """
    labels_T = listing.labels_N[: listing.train_rows]
    count = max(len(np.unique(labels_T)), round(listing.train_rows * percent / 100))
    return balanced_rows(labels_T, count, seed, "few labels")


def listed_rows(listing: Listing, list_file: Path | str, name: str) -> np.ndarray:
    """The train rows that a list names, int64, rising: one image a line, by file name or by the end of its path.

    SimCLR's imagenet_subsets/1percent.txt and 10percent.txt have lines such as n01440764_10183.JPEG. Empty lines are passed over, an
    image named twice counts once. Raises UserError, which calls the parameter `name`, where the file cannot be read or is empty, or
    names images that the train split does not have, or that several of its paths end in.
    """
    try:
        lines = Path(list_file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise UserError(f"{name} = {list_file}: cannot be read ({reason}); name a list of images, one a line, or set null") from None
    names = [line.strip() for line in lines if line.strip()]
    by_file_name = defaultdict(list)
    for row, path in enumerate(listing.paths[: listing.train_rows]):
        by_file_name[path.rpartition("/")[2]].append(row)
    matches = {image: _matches(listing, by_file_name, image) for image in names}
    unknown, ambiguous = [image for image in names if not matches[image]], [image for image in names if len(matches[image]) > 1]
    if not names:
        raise UserError(f"{name} = {list_file}: names no image; give one file name a line, or set null for a seeded draw")
    if unknown:
        way_out = "is the list of this dataset, and is dataset.train_images null?"
        raise UserError(f"{name} = {list_file}: {_count(unknown, len(names))} are not in the train split; {way_out}")
    if ambiguous:
        way_out = "write their paths from the class folder on"
        raise UserError(f"{name} = {list_file}: {_count(ambiguous, len(names))} stand for several train images; {way_out}")
    return np.unique([rows[0] for rows in matches.values()])


def _matches(listing: Listing, by_file_name: dict[str, list[int]], image: str) -> list[int]:
    """The train rows whose path is, or ends in, what a line names."""
    candidates = by_file_name.get(image.rpartition("/")[2], [])
    return [row for row in candidates if f"/{listing.paths[row]}".endswith(f"/{image}")]


def _count(images: list[str], of: int) -> str:
    """How many of the lines, and the first of them by name."""
    rest = f" and {len(images) - _SHOWN} more" if len(images) > _SHOWN else ""
    return f"{len(images)} of {of} images ({', '.join(images[:_SHOWN])}{rest})"
