"""Select the train images that keep their labels in training with few labels: SimCLR's published lists, or a seeded, balanced draw."""

import codecs
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from bingo.datasets.split_names import role_of
from bingo.datasets.subset import balanced_rows
from bingo.evals.finetune import Protocol, task_of
from bingo.images.decode import SUFFIXES
from bingo.images.images import Images
from bingo.images.listing import Listing
from bingo.params import Params, SplitParams
from bingo.runtime.errors import UserError, short
from bingo.runtime.inside import folded

_SHOWN = 3
_HEADINGS = re.compile(r"(?:(?:image|img|file|sample)[ _]?)?(?:path|name|file|image|img|id|index|label|class|target|split)s?|filenames?|")
_SEPARATORS = "\t,;"
_NOTES = {
    "columns": "have more than a name, which is not read",
    "form": "name files of another case or Unicode form",
    "suffix": "name files of another suffix",
}


def labelled_rows(listing: Listing, split: SplitParams, name: str, seed: int, say: Callable[[str], None]) -> np.ndarray:
    """The train rows, int64, rising, that keep their labels in `semi_eval.splits.NAME`. Raises UserError without labelled test images."""
    if not listing.can_judge:
        raise UserError("semi_eval: the listing has no labelled test images; sort the images into classes, or empty semi_eval.splits")
    if split.list_file is None:
        return drawn_rows(listing, split.percent, seed)
    return listed_rows(listing, split.list_file, f"semi_eval.splits.{name}.list_file", say)


def protocols(params: Params, listing: Listing, images: Images, rows_L: np.ndarray, split: SplitParams) -> dict[str, Protocol]:
    """A linear layer on the frozen network, and the whole network fine-tuned, both on the labels of `rows_L`."""
    semi = params.semi_eval
    task = task_of(listing, images, params.image, semi, rows_L)
    return {
        "linear": Protocol(task, semi.linear, split.linear_lr, None),
        "finetune": Protocol(task, semi.finetune, split.head_lr, split.trunk_lr),
    }


def drawn_rows(listing: Listing, percent: float, seed: int) -> np.ndarray:
    """A seeded draw of `percent` of the train rows, int64, in increasing order: balanced over the classes, at least one of each non-empty
    class.

    A smaller share is a subset of a larger one. SimCLR's lists are balanced too: 12.8 and 128 images per class on average.
    """
    labels_T = listing.labels_N[: listing.train_rows]
    count = max(len(np.unique(labels_T)), round(listing.train_rows * percent / 100))
    return balanced_rows(labels_T, count, seed, "few labels")


def listed_rows(listing: Listing, list_file: Path | str, name: str, say: Callable[[str], None] = lambda line: None) -> np.ndarray:
    """The train rows given by a list, int64, in increasing order: one image per line, by file name or by the end of its path.

    SimCLR's imagenet_subsets/1percent.txt and 10percent.txt have lines such as n01440764_10183.JPEG. Empty lines and those that begin
    with # are skipped; an image listed twice counts once. Lists in other styles are accepted, and reported to `say`:
    further columns, a heading, absolute paths, names in another case or Unicode form or with another suffix than the file. An absolute
    path must not belong to another split. Raises UserError, which calls the parameter `name`, where the file cannot be read or
    is empty, or names images that the train split does not have, or that several of its paths end in.
    """
    shown = f"{name} = {list_file}"
    lines = _lines(list_file, shown)
    if not lines:
        raise UserError(f"{shown}: lists no images; give one file name per line, or set null for a seeded draw")
    index = _Index(listing)
    found = [(line, *index.rows(line)) for line in lines]
    if len(found) > 1 and not found[0][1] and found[1][1] and _is_heading(lines[0], "columns" in found[1][2]):
        say(f"{shown}: the first line, {short(found.pop(0)[0])}, is taken for a heading")
    unknown, ambiguous = [line for line, rows, _ in found if not rows], [line for line, rows, _ in found if len(rows) > 1]
    if unknown:
        way_out = "is the list of this dataset, and is dataset.train_images null?"
        raise UserError(f"{shown}: {_count(unknown, len(found))} are not in the train split; {way_out}")
    if ambiguous:
        way_out = "write their paths from the class folder on"
        raise UserError(f"{shown}: {_count(ambiguous, len(found))} stand for several train images; {way_out}")
    if notes := Counter(note for _, _, notes in found for note in notes):
        parts = ", ".join(f"{count:,} {_NOTES[note]}" for note, count in notes.items())
        say(f"{shown}: of {len(found):,} lines {parts}")
    return np.unique([rows[0] for _, rows, _ in found])


def _lines(list_file: Path | str, shown: str) -> list[str]:
    """The lines of a text in UTF-8 or UTF-16, each with its mark or without, that are neither empty nor remarks."""
    try:
        content = Path(list_file).read_bytes()
        text = content.decode(_encoding(content))
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror}); give a list of images, one per line, or set null") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{shown}: is not text in UTF-8 or UTF-16; save it as plain text in UTF-8, one image per line, or set null"
        ) from None
    lines = (line.strip() for line in re.split("\r\n|\n|\r", text))
    return [line for line in lines if line and not line.startswith("#")]


def _encoding(content: bytes) -> str:
    """UTF-16 by its mark, or by the zeros that letters of most names have there; otherwise UTF-8, with a mark or without."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    zeros = [content[start::2].count(0) for start in (0, 1)]
    if max(zeros) * 4 <= len(content):
        return "utf-8-sig"
    return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"


def _is_heading(line: str, of_columns: bool) -> bool:
    """Whether a first line that names no train image may be a heading, whose words are usual ones where there are no columns."""
    words = [column.strip().strip("\"'") for column in re.split(f"[{_SEPARATORS}]", line)]
    return not any(word.lower().endswith(SUFFIXES) for word in [*words, *line.split()]) and (
        of_columns or all(_HEADINGS.fullmatch(folded(word)) for word in words)
    )


class _Index:
    """The train images of a listing by file name: unchanged, ignoring case and Unicode form, and also without the suffix."""

    def __init__(self, listing: Listing):
        self._paths = listing.paths[: listing.train_rows]
        self._exact: dict[str, list[int]] = defaultdict(list)
        for row, path in enumerate(self._paths):
            self._exact[path.rpartition("/")[2]].append(row)

    @cached_property
    def _folded(self) -> dict[str, list[int]]:
        return self._by(folded)

    @cached_property
    def _stems(self) -> dict[str, list[int]]:
        return self._by(_stem)

    def _by(self, key: Callable[[str], str]) -> dict[str, list[int]]:
        by_key: dict[str, list[int]] = defaultdict(list)
        for file_name, rows in self._exact.items():
            by_key[key(file_name)] += rows
        return by_key

    def rows(self, line: str) -> tuple[list[int], list[str]]:
        """The rows that a line may refer to, and the differences that had to be ignored."""
        readings = [(line, []), *((column, ["columns"]) for column in _columns(line))]
        for named, notes in readings:
            if rows := self._ending(named, self._exact, str):
                return rows, notes
        for named, notes in readings:
            if rows := self._ending(named, self._folded, folded):
                return rows, [*notes, "form"]
            if rows := self._ending(named, self._stems, _stem):
                return rows, [*notes, "suffix"]
        return [], []

    def _ending(self, named: str, by_file_name: dict[str, list[int]], key: Callable[[str], str]) -> list[int]:
        """Rows whose path ends in the given name; for an absolute path those that also share its folder, but not under another split."""
        parts = [part for part in named.replace("\\", "/").split("/") if part != "."]
        is_absolute = named.startswith(("/", "\\")) or named[1:3] in (":\\", ":/")
        wanted = [folded(part) if key is not str else part for part in parts[:-1]]
        found = []
        for row in by_file_name.get(key(parts[-1]), []):
            folders = self._paths[row].split("/")[:-1]
            own = [folded(part) for part in folders] if key is not str else folders
            shared = next((i for i, (x, y) in enumerate(zip(own[::-1], wanted[::-1], strict=False)) if x != y), min(len(own), len(wanted)))
            if shared == len(wanted) or (is_absolute and _is_of_split(own, wanted, shared)):
                found.append(row)
        return found


def _is_of_split(own: list[str], wanted: list[str], shared: int) -> bool:
    """Whether a path in a listing and an absolute path that ends in the same folders may be of one image."""
    if shared == len(own):
        return True
    return shared >= len(own) - 1 and shared > 0 and role_of(own[0]) == "train" and role_of(wanted[len(wanted) - shared - 1]) is None


def _columns(line: str) -> list[str]:
    """What stands before the last or first tab, comma, semicolon or white space, a line without its quotation marks, then each column
    with a suffix of an image."""
    columns = [
        part for separator in _SEPARATORS if separator in line for part in (line.rpartition(separator)[0], line.partition(separator)[0])
    ]
    columns += [line.rsplit(None, 1)[0], line.split(None, 1)[0]] if len(line.split()) > 1 else []
    later = [part for separator in (*_SEPARATORS, None) for part in line.split(separator)]
    columns += [line, *(part for part in later if part.strip(" \"'").lower().endswith(SUFFIXES))]
    stripped = (column.strip().strip("\"'") for column in columns)
    return [column for column in dict.fromkeys(stripped) if column and column != line]


def _stem(file_name: str) -> str:
    """A file name without case, Unicode form and image suffix."""
    name = folded(file_name)
    return name.rpartition(".")[0] if name.endswith(SUFFIXES) else name


def _count(images: list[str], of: int) -> str:
    """The number of lines, and the first of them."""
    rest = f" and {len(images) - _SHOWN} more" if len(images) > _SHOWN else ""
    return f"{len(images)} of {of} images ({', '.join(images[:_SHOWN])}{rest})"
