"""Make a listing of image files, in a folder, in shards or in a saved dataset: find them, draw a subset, check each, and skip or reject
those that cannot be read.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bingo.datasets.filecheck import Checks, check_files, common_bits
from bingo.datasets.finding import Found, find
from bingo.datasets.known import KnownFiles, ScannedRoot, column_of_bytes
from bingo.datasets.layout import Say, Split, count_splits
from bingo.datasets.subset import Counts, Readable, draw_subset, readable_rows
from bingo.images.listing import Listing, Paths, joined_paths, listing_fingerprint
from bingo.images.positions import Positions
from bingo.params import DatasetParams
from bingo.runtime.errors import UserError, printable

BAD_LINES = 20
_DATASET = "folder"


def find_files(dataset: DatasetParams, say: Say) -> Found:
    """The images of `dataset.root`; `say` is called with a line for everything that is assumed or skipped. Raises UserError for all errors
    in the layout."""
    columns = (dataset.image_column, dataset.label_column) if dataset.source == "huggingface" else (None, None)
    return find(dataset.source, str(dataset.root), dataset.follow_links, columns, say)


def scan_files(
    dataset: DatasetParams, seed: int, say: Say, judge: Callable[[Counts], None], known: KnownFiles | None = None
) -> tuple[Listing, np.ndarray | Positions | None]:
    """Listing and, with store_px, images of `dataset.root`, or the positions of images that are parts of large files. `say` is called with
    a line for everything that is assumed or skipped, and `judge` with the numbers of images before any is read. Results that are `known`
    for unchanged files are reused.

    Raises UserError for all errors in the layout or the files.
    """
    if known is not None and dataset.source == "folder" and dataset.store_px is None:
        known.begin(ScannedRoot(str(dataset.root), dataset.check == "decode"))
    found = find_files(dataset, say)
    train, test = found.train, found.test
    judge(count_splits(train, test))
    classes, held_out = train.classes or test.classes, not test.paths and dataset.test_images is not None
    if held_out:
        train, test = _without_held_out(dataset, found, seed, known)
        say(f"dataset.root = {dataset.root}: has no test split: {len(test.paths):,} images are held out from the train images")
    passed_over: set[str] = set()
    readable = partial(_readable, dataset, found, known)
    chosen = [_choose(dataset, readable, name, split, classes, seed, passed_over) for name, split in (("train", train), ("test", test))]
    paths = joined_paths(split_paths for split_paths, _ in chosen)
    labels_N = np.concatenate([labels for _, labels in chosen])
    files = found.files(paths)
    checks, images_NSS3 = check_files(files, dataset.check == "decode", dataset.store_px, known=known)
    gray_bits = common_bits(files, checks, images_NSS3)
    if gray_bits is not None:
        gray = int((checks.largest_N >= 0).sum())
        say(f"{gray:,} images are 16-bit greyscale: {gray_bits} bits hold the picture, as the largest value is {checks.largest_N.max()}")
    if len(deep := np.flatnonzero(checks.deep_colours_N)):
        said = f"{len(deep):,} images have 16 bits per colour ({printable(paths[deep[0]])}), of which only the upper 8 are read"
        say(f"warning: {said}: images whose values use fewer than 16 bits are dark; save them with 8 bits per colour")
    is_train_N, keep_N = np.arange(len(paths)) < len(chosen[0][0]), checks.readable_N
    if held_out and (copies := int((again_N := _copies_of_train(checks, len(chosen[0][0]))).sum())):
        say(f"{copies:,} of the held-out images are byte-for-byte copies of train images and are left out")
        keep_N &= ~again_N
    keep = np.flatnonzero(keep_N)
    few = f"lower dataset.test_images ({dataset.test_images}; {len(keep)} can be read), or set it to null"
    way_out = few if held_out and len(keep) else "set dataset.root to another folder"
    _judge_bad(dataset, paths, checks, bool((keep_N & is_train_N).any()), way_out)
    if images_NSS3 is not None and len(keep) < len(paths):
        for row, old_row in enumerate(keep.tolist()):  # in place: there may not be enough memory for two copies
            images_NSS3[row] = images_NSS3[old_row]
        images_NSS3 = images_NSS3[: len(keep)]
    skipped = sorted(passed_over) + [paths[row] for row in sorted(checks.reasons)]
    train_rows = int((keep_N & is_train_N).sum())
    kept_paths = paths.take(keep)
    kept_labels, contents = labels_N[keep], checks.contents.part(keep)
    _say_of_rows(kept_paths, contents.sha256_N, kept_labels, train_rows, classes, say)
    header = {"dataset": _DATASET, "classes": classes, "store_px": dataset.store_px}
    header |= {"pack_px": dataset.pack_px} if dataset.pack_px else {}
    header |= {} if gray_bits in (None, 16) else {"gray_bits": gray_bits}
    header |= {} if dataset.jpeg_decoder == "cpu" or dataset.store_px else {"jpeg_decoder": dataset.jpeg_decoder}  # other pixels
    fingerprint = listing_fingerprint(header, kept_paths, contents, kept_labels, train_rows)
    drawn = len(test.paths) if held_out else None
    return Listing(_DATASET, kept_paths, kept_labels, train_rows, classes, skipped, fingerprint, gray_bits, drawn), (
        (files.positions and files.positions.part(keep)) if images_NSS3 is None else images_NSS3
    )


def _say_of_rows(paths: Paths, sha256_N: np.ndarray | None, labels_N: np.ndarray, train_rows: int, classes: list[str], say: Say) -> None:
    """Report images that are in both splits, and classes without any remaining train image."""
    if sha256_N is not None:
        of_train_Q = _row_of_train(sha256_N, train_rows)
        if shared := int((of_train_Q >= 0).sum()):
            row = int((of_train_Q >= 0).argmax())
            pair = " and ".join(printable(paths[row]) for row in (of_train_Q[row], train_rows + row))
            say(f"warning: {shared} test images are byte-for-byte copies of train images ({pair}), so figures are too high")
    if absent := [classes[label] for label in np.flatnonzero(np.bincount(labels_N[:train_rows].clip(0), minlength=len(classes)) == 0)]:
        say(f"warning: no train image of {len(absent)} of {len(classes)} classes is left ({printable(absent[0])}, ...)")


def _without_held_out(dataset: DatasetParams, found: Found, seed: int, known: KnownFiles | None) -> tuple[Split, Split]:
    """The train split without the rows that are held out, and the latter as the test split, without unreadable images if these are
    skipped."""
    train = found.train
    rows = readable_rows(train.labels_N, dataset.test_images or 0, seed, "hold-out", _readable(dataset, found, known, train.paths, set()))
    is_test_N = np.zeros(len(train.paths), bool)
    is_test_N[rows] = True
    return _part_of(train, ~is_test_N), _part_of(train, is_test_N)


def _readable(dataset: DatasetParams, found: Found, known: KnownFiles | None, paths: Paths, passed_over: set[str]) -> Readable:
    """Which of the rows of `paths` can be read; the paths of unreadable images are added to `passed_over`."""

    def readable(rows: np.ndarray) -> np.ndarray:
        if dataset.on_bad_image == "stop":  # the whole scan, where one is not
            return np.ones(len(rows), bool)
        asked = paths.take(rows)
        checks = check_files(found.files(asked), dataset.check == "decode", dataset.store_px, known=known)[0]
        passed_over.update(asked[row] for row in checks.reasons)
        return checks.readable_N

    return readable


def _part_of(split: Split, chosen_N: np.ndarray) -> Split:
    return Split(split.paths.take(np.flatnonzero(chosen_N)), split.classes, split.labels_N[chosen_N])


def _copies_of_train(checks: Checks, train_rows: int) -> np.ndarray:
    """Whether the file of a row from `train_rows` on is a byte-for-byte copy of that of an earlier row, bool (N,); all false without
    hashes."""
    copies_N = np.zeros(len(checks), bool)
    if checks.contents.sha256_N is not None:
        copies_N[train_rows:] = _row_of_train(checks.contents.sha256_N, train_rows) >= 0
    return copies_N


def _row_of_train(sha256_N: np.ndarray, train_rows: int) -> np.ndarray:
    """For each row from `train_rows` on, the last row before `train_rows` with the same hash, int64 (Q,); -1 if there is none or no
    hash."""
    train_T, test_Q = column_of_bytes(sha256_N[:train_rows]), column_of_bytes(sha256_N[train_rows:])
    shared = np.flatnonzero(pc.is_in(train_T, test_Q))[::-1]  # few
    place_Q = pc.index_in(test_Q, train_T.take(pa.array(shared))).fill_null(-1).to_numpy()
    return np.where((place_Q >= 0) & sha256_N[train_rows:].any(axis=1), np.append(shared, -1)[place_Q], -1)


def _choose(
    dataset: DatasetParams,
    readable: Callable[[Paths, set[str]], Readable],
    name: str,
    split: Split,
    classes: list[str],
    seed: int,
    passed_over: set[str],
) -> tuple[Paths, np.ndarray]:
    """Paths and labels of a split after drawing a seeded subset; unreadable images, if they are skipped, are added to `passed_over`."""
    number = {class_name: label for label, class_name in enumerate(classes)}
    labels_N = np.array([*(number[name] for name in split.classes), -1])[split.labels_N]
    rows = draw_subset(dataset, name, labels_N, seed, readable(split.paths, passed_over))
    if not len(rows):  # none can be read: why, is said of those that are drawn
        passed_over.difference_update(split.paths)
        rows = draw_subset(dataset, name, labels_N, seed)
    return split.paths.take(rows), labels_N[rows]


def _judge_bad(dataset: DatasetParams, paths: Paths, checks: Checks, some_train: bool, way_out: str) -> None:
    """Raise UserError with a line for each unreadable file, unless these are to be skipped and train images are left; if no train images
    are left, with `way_out`."""
    bad = [(paths[row], row, reason) for row, reason in sorted(checks.reasons.items())]
    if not bad:
        return
    lines = [f"dataset.root = {dataset.root}: {path} (row {row}) cannot be read: {reason}" for path, row, reason in bad[:BAD_LINES]]
    if len(bad) > BAD_LINES:
        lines.append(f"dataset.root = {dataset.root}: and {len(bad) - BAD_LINES} more")
    count = f"{len(bad)} of {len(paths)} images are unreadable"
    if dataset.on_bad_image == "stop":
        raise UserError([*lines, f"{count}; repair or delete them, or set dataset.on_bad_image: skip"])
    if not some_train:
        raise UserError([*lines, f"{count}, and no train image is left; {way_out}"])
