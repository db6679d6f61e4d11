"""Select the labelled train images for training with few labels: SimCLR's published lists, or a seeded, class-balanced sample."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bingo.datasets.subset import balanced_rows
from bingo.evals.finetune import Protocol, task_of
from bingo.images.images import Images
from bingo.images.listing import STRINGS, Listing, path_column
from bingo.params import Params, SplitParams
from bingo.runtime.errors import UserError

_SHOWN = 3
_COLUMN = re.compile(r"[,;\t ]\s*")  # what ends the first column of a table


def labelled_rows(listing: Listing, split: SplitParams, name: str, seed: int) -> np.ndarray:
    """The labelled train rows of `semi_eval.splits.NAME`, int64, ascending. Raises UserError without labelled test images."""
    if not listing.can_judge:
        way_out = "sort the images into classes" if not listing.labelled else "add test images, or set dataset.test_images"
        raise UserError(f"semi_eval: {listing.unjudged}; {way_out}, or empty semi_eval.splits")
    if split.list_file is None:
        return drawn_rows(listing, split.percent, seed)
    return listed_rows(listing, split.list_file, f"semi_eval.splits.{name}.list_file")


def protocols(params: Params, listing: Listing, images: Images, rows_L: np.ndarray, split: SplitParams) -> dict[str, Protocol]:
    """A linear layer on the frozen network, and the whole network fine-tuned, both on the labels of `rows_L`."""
    semi = params.semi_eval
    task = task_of(listing, images, params.image, semi, rows_L)
    return {
        "linear": Protocol(task, semi.linear, split.linear_lr, None),
        "finetune": Protocol(task, semi.finetune, split.head_lr, split.trunk_lr),
    }


def drawn_rows(listing: Listing, percent: float, seed: int) -> np.ndarray:
    """A seeded sample of `percent` of the train rows, int64, ascending: class-balanced, with at least one row of each non-empty class.

    A smaller share is a subset of a larger one. SimCLR's lists are also balanced: 12.8 and 128 images per class on average.
    """
    labels_T = listing.labels_N[: listing.train_rows]
    count = max(len(np.unique(labels_T)), round(listing.train_rows * percent / 100))
    return balanced_rows(labels_T, count, seed, "few labels")


def listed_rows(listing: Listing, list_file: Path | str, name: str) -> np.ndarray:
    """The train rows given by a list, int64, ascending. A list is a text in UTF-8, with one image per line, given by its file name or by
    the end of its path.

    SimCLR's imagenet_subsets/1percent.txt and 10percent.txt have lines such as n01440764_10183.JPEG. If no image has the whole line as its
    name, the line is read as a row of a table whose first column is the name. Empty lines and lines that begin with # are skipped; an
    image listed twice counts once. Raises UserError, which calls the parameter `name`, if the file cannot be read or is empty, or lists
    images that are not in the train split or match several of its paths.
    """
    shown = f"{name} = {list_file}"
    lines = _lines(list_file, shown)
    if not lines:
        raise UserError(f"{shown}: lists no images; give one file name per line, or set null for a seeded draw")
    asked = pa.array({name.rpartition("/")[2] for line in lines for name in (line, _COLUMN.split(line, maxsplit=1)[0])}, STRINGS)
    file_names = pc.replace_substring_regex(path_column(listing.paths[: listing.train_rows]), r"(?s)^.*/", "")
    by_file_name: dict[str, list[int]] = defaultdict(list)
    for row in np.flatnonzero(pc.is_in(file_names, asked)).tolist():
        by_file_name[file_names[row].as_py()].append(row)

    def rows_of(name: str) -> list[int]:
        return [row for row in by_file_name.get(name.rpartition("/")[2], []) if f"/{listing.paths[row]}".endswith(f"/{name}")]

    found = [rows_of(line) or rows_of(_COLUMN.split(line, maxsplit=1)[0]) for line in lines]
    if unknown := [line for line, rows in zip(lines, found, strict=True) if not rows]:
        way_out = "give file names or ends of paths, one per line, and set dataset.train_images: null if it is the list of this dataset"
        raise UserError(f"{shown}: {_count(unknown, len(lines))} are not in the train split; {way_out}")
    if ambiguous := [line for line, rows in zip(lines, found, strict=True) if len(rows) > 1]:
        way_out = "give their paths, starting with the class folder"
        raise UserError(f"{shown}: {_count(ambiguous, len(lines))} match several train images; {way_out}")
    return np.unique(found)


def _lines(list_file: Path | str, shown: str) -> list[str]:
    """The lines that are neither empty nor remarks."""
    try:
        text = Path(list_file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror}); give a list of images, one per line, or set null") from None
    except UnicodeDecodeError:
        raise UserError(f"{shown}: is not text in UTF-8; save it as plain text in UTF-8, one image per line, or set null") from None
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def _count(images: list[str], of: int) -> str:
    """The number of lines, and the first of them."""
    rest = f" and {len(images) - _SHOWN} more" if len(images) > _SHOWN else ""
    return f"{len(images)} of {of} images ({', '.join(images[:_SHOWN])}{rest})"
