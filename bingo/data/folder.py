"""A folder of image files as a listing: find them, draw a subset, check each, leave out or refuse what cannot be read."""

from pathlib import Path

import numpy as np

from bingo.data.filecheck import Checked, check_files
from bingo.data.layout import Split, find_splits
from bingo.data.listing import Listing, listing_fingerprint
from bingo.data.subset import draw_subset
from bingo.errors import UserError
from bingo.params import DatasetParams

BAD_LINES = 20
_DATASET = "folder"


def scan_folder(dataset: DatasetParams, seed: int) -> tuple[Listing, np.ndarray | None]:
    """Listing and, with store_px, images of `dataset.root`. Raises UserError for every mistake in the folder or its files."""
    root = Path(str(dataset.root))
    train, test = find_splits(root)
    classes = train.classes or test.classes
    chosen = [_choose(dataset, name, split, classes, seed) for name, split in (("train", train), ("test", test))]
    paths = chosen[0][0] + chosen[1][0]
    labels_N = np.concatenate([labels for _, labels in chosen])
    checked, images_NSS3 = check_files(root, paths, dataset.check == "decode", dataset.store_px)
    keep = [row for row, file in enumerate(checked) if file.reason is None]
    if len(keep) < len(paths):
        _judge_bad(dataset, paths, checked, any(row < len(chosen[0][0]) for row in keep))
        if images_NSS3 is not None:
            for row, old_row in enumerate(keep):  # in place: there may be no room for two copies
                images_NSS3[row] = images_NSS3[old_row]
            images_NSS3 = images_NSS3[: len(keep)]
    skipped = [path for path, file in zip(paths, checked, strict=True) if file.reason is not None]
    train_rows = sum(row < len(chosen[0][0]) for row in keep)
    kept_paths, kept_labels = [paths[row] for row in keep], labels_N[keep]
    header = {"dataset": _DATASET, "classes": classes, "store_px": dataset.store_px}
    fingerprint = listing_fingerprint(header, kept_paths, (checked[row].content for row in keep), kept_labels, train_rows)
    return Listing(_DATASET, kept_paths, kept_labels, train_rows, classes, skipped, fingerprint), images_NSS3


def _choose(dataset: DatasetParams, name: str, split: Split, classes: list[str], seed: int) -> tuple[list[str], np.ndarray]:
    """Paths and labels of a split after the seeded draw of a subset."""
    number = {class_name: label for label, class_name in enumerate(classes)}
    labels_N = np.array([number[class_name] for class_name in split.class_names], np.int64)
    if not split.classes:
        labels_N = np.full(len(split.paths), -1)
    rows = draw_subset(dataset, name, labels_N, seed)
    return [split.paths[row] for row in rows.tolist()], labels_N[rows]


def _judge_bad(dataset: DatasetParams, paths: list[str], checked: list[Checked], some_train: bool) -> None:
    """Raises UserError with a line for each unreadable file, unless such files are to be skipped and train images are left."""
    bad = [(path, row, file.reason) for row, (path, file) in enumerate(zip(paths, checked, strict=True)) if file.reason]
    lines = [f"dataset.root = {dataset.root}: {path} (row {row}) cannot be read: {reason}" for path, row, reason in bad[:BAD_LINES]]
    if len(bad) > BAD_LINES:
        lines.append(f"dataset.root = {dataset.root}: and {len(bad) - BAD_LINES} more")
    count = f"{len(bad)} of {len(paths)} images are unreadable"
    if dataset.on_bad_image == "stop":
        raise UserError([*lines, f"{count}; mend or delete them, or set dataset.on_bad_image: skip"])
    if not some_train:
        raise UserError([*lines, f"{count}, and no train image is left; name another folder in dataset.root"])
