"""Make a listing of image files, in a folder, in shards or in a saved dataset: find them, draw a subset, check each, and skip or reject
those that cannot be read.
"""

from collections.abc import Callable

import numpy as np

from bingo.datasets.filecheck import Checked, check_files, common_bits
from bingo.datasets.finding import Found, find
from bingo.datasets.layout import Say, Split, count_splits
from bingo.datasets.subset import Counts, Readable, draw_subset, readable_rows
from bingo.images.listing import Listing, listing_fingerprint
from bingo.images.positions import Positions
from bingo.params import DatasetParams
from bingo.runtime.errors import UserError, printable

BAD_LINES = 20
_DATASET = "folder"


def find_files(dataset: DatasetParams, say: Say) -> Found:
    """The images of `dataset.root`; `say` is given a line for each thing that is assumed or passed over. Raises UserError for every
    mistake in the layout."""
    columns = (dataset.image_column, dataset.label_column) if dataset.source == "huggingface" else (None, None)
    return find(dataset.source, str(dataset.root), dataset.follow_links, columns, say)


def scan_files(
    dataset: DatasetParams, seed: int, say: Say, judge: Callable[[Counts], None]
) -> tuple[Listing, np.ndarray | Positions | None]:
    """Listing and, with store_px, images of `dataset.root`, or the positions of those that are parts of large files; `say` is given a line
    for each thing that is assumed or passed over, `judge` how many images there are, before any is read.

    Raises UserError for every mistake in the layout or the files.
    """
    found = find_files(dataset, say)
    train, test = found.train, found.test
    judge(count_splits(train, test))
    classes, held_out = train.classes or test.classes, not test.paths and dataset.test_images is not None
    if held_out:
        train, test = _without_held_out(dataset, found, seed)
        say(f"dataset.root = {dataset.root}: has no test split: {len(test.paths):,} images are held out of the train images")
    passed_over: set[str] = set()
    chosen = [_choose(dataset, found, name, split, classes, seed, passed_over) for name, split in (("train", train), ("test", test))]
    paths = chosen[0][0] + chosen[1][0]
    labels_N = np.concatenate([labels for _, labels in chosen])
    files = found.files(paths)
    checked, images_NSS3 = check_files(files, dataset.check == "decode", dataset.store_px)
    gray_bits = common_bits(files, checked, images_NSS3)
    if gray_bits is not None:
        largest = [file.largest for file in checked if file.largest is not None]
        say(f"{len(largest):,} images are grey with 16 bits: {gray_bits} of them hold the picture, as the largest value is {max(largest)}")
    if deep := [path for path, file in zip(paths, checked, strict=True) if file.deep_colours]:
        said = f"{len(deep):,} images have 16 bits a colour ({printable(deep[0])}), of which the upper 8 are read"
        say(f"warning: {said}: where values fill fewer than 16 bits they come out dark; write them with 8 bits a colour")
    again = _copies_of_train(checked, len(chosen[0][0])) if held_out else set()
    if again:
        say(f"{len(again):,} of the images held out are byte-for-byte copies of train images, and are left out")
    keep = [row for row, file in enumerate(checked) if file.reason is None and row not in again]
    few = f"lower dataset.test_images ({dataset.test_images}; {len(keep)} can be read), or set it to null"
    way_out = few if held_out and keep else "name another folder in dataset.root"
    _judge_bad(dataset, paths, checked, any(row < len(chosen[0][0]) for row in keep), way_out)
    if images_NSS3 is not None and len(keep) < len(paths):
        for row, old_row in enumerate(keep):  # in place: there may not be enough memory for two copies
            images_NSS3[row] = images_NSS3[old_row]
        images_NSS3 = images_NSS3[: len(keep)]
    skipped = sorted(passed_over) + [path for path, file in zip(paths, checked, strict=True) if file.reason is not None]
    train_rows = sum(row < len(chosen[0][0]) for row in keep)
    kept_paths, kept_labels = [paths[row] for row in keep], labels_N[keep]
    _say_of_rows(kept_paths, [checked[row].content.sha256 for row in keep], kept_labels, train_rows, classes, say)
    header = {"dataset": _DATASET, "classes": classes, "store_px": dataset.store_px}
    header |= {"pack_px": dataset.pack_px} if dataset.pack_px else {}
    header |= {} if gray_bits in (None, 16) else {"gray_bits": gray_bits}
    header |= {} if dataset.jpeg_decoder == "cpu" or dataset.store_px else {"jpeg_decoder": dataset.jpeg_decoder}  # other pixels
    fingerprint = listing_fingerprint(header, kept_paths, (checked[row].content for row in keep), kept_labels, train_rows)
    drawn = len(test.paths) if held_out else None
    return Listing(_DATASET, kept_paths, kept_labels, train_rows, classes, skipped, fingerprint, gray_bits, drawn), (
        files.part(keep).positions if images_NSS3 is None else images_NSS3
    )


def _say_of_rows(paths: list[str], hashes: list[str | None], labels_N: np.ndarray, train_rows: int, classes: list[str], say: Say) -> None:
    """Report images that are in both splits, and classes without any remaining train image."""
    row_of = {sha256: row for row, sha256 in enumerate(hashes[:train_rows]) if sha256}
    if shared := [(row_of[sha256], row) for row, sha256 in enumerate(hashes[train_rows:], train_rows) if sha256 in row_of]:
        pair = " and ".join(printable(paths[row]) for row in shared[0])
        say(f"warning: {len(shared)} test images are train images too, byte for byte ({pair}): figures on them are too high")
    if absent := [classes[label] for label in np.flatnonzero(np.bincount(labels_N[:train_rows].clip(0), minlength=len(classes)) == 0)]:
        say(f"warning: no train image of {len(absent)} of {len(classes)} classes is left ({printable(absent[0])}, ...)")


def _without_held_out(dataset: DatasetParams, found: Found, seed: int) -> tuple[Split, Split]:
    """The train split without the rows that are held out, and these as the test split; where unreadable images are skipped, it has none."""
    train = found.train
    labels_N = np.unique(np.array(train.class_names or [""] * len(train.paths)), return_inverse=True)[1]
    rows = readable_rows(labels_N, dataset.test_images or 0, seed, "hold-out", _readable(dataset, found, train.paths, set()))
    is_test_N = np.isin(np.arange(len(labels_N)), rows)
    return _part_of(train, ~is_test_N), _part_of(train, is_test_N)


def _readable(dataset: DatasetParams, found: Found, paths: list[str], passed_over: set[str]) -> Readable:
    """Which of the rows of `paths` can be read; the paths of others are added to `passed_over`."""

    def readable(rows: np.ndarray) -> np.ndarray:
        if dataset.on_bad_image == "stop":  # the whole scan, where one is not
            return np.ones(len(rows), bool)
        asked = [paths[row] for row in rows.tolist()]
        checked = check_files(found.files(asked), dataset.check == "decode", dataset.store_px)[0]
        passed_over.update(path for path, file in zip(asked, checked, strict=True) if file.reason is not None)
        return np.array([file.reason is None for file in checked], bool)

    return readable


def _part_of(split: Split, chosen_N: np.ndarray) -> Split:
    def kept(values: list[str]) -> list[str]:
        return [value for value, chosen in zip(values, chosen_N.tolist(), strict=True) if chosen]

    return Split(kept(split.paths), split.classes, kept(split.class_names) if split.class_names else [])


def _copies_of_train(checked: list[Checked], train_rows: int) -> set[int]:
    """Rows from `train_rows` on whose file is, byte for byte, that of a row before; without hashes none is known."""
    of_train = {file.content.sha256 for file in checked[:train_rows]} - {None}
    return {row for row, file in enumerate(checked[train_rows:], train_rows) if file.content.sha256 in of_train}


def _choose(
    dataset: DatasetParams, found: Found, name: str, split: Split, classes: list[str], seed: int, passed_over: set[str]
) -> tuple[list[str], np.ndarray]:
    """Paths and labels of a split after drawing a seeded subset; unreadable images, where they are skipped, are added to `passed_over`."""
    number = {class_name: label for label, class_name in enumerate(classes)}
    labels_N = np.array([number[class_name] for class_name in split.class_names], np.int64)
    if not split.classes:
        labels_N = np.full(len(split.paths), -1)
    rows = draw_subset(dataset, name, labels_N, seed, _readable(dataset, found, split.paths, passed_over))
    if not len(rows):  # none can be read: why, is said of those that are drawn
        passed_over.difference_update(split.paths)
        rows = draw_subset(dataset, name, labels_N, seed)
    return [split.paths[row] for row in rows.tolist()], labels_N[rows]


def _judge_bad(dataset: DatasetParams, paths: list[str], checked: list[Checked], some_train: bool, way_out: str) -> None:
    """Raises UserError with a line for each unreadable file, unless such files are to be skipped and train images are left; if only those
    are not, with `way_out`."""
    bad = [(path, row, file.reason) for row, (path, file) in enumerate(zip(paths, checked, strict=True)) if file.reason]
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
