"""Make the listing of a dataset and, for small images, load their pixels: the single entry point for every source.

A new source is a new file and a call here. Digits and files do not import torch, so that a scan starts quickly.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from bingo.datasets import digits
from bingo.datasets.known import KnownFiles
from bingo.datasets.layout import Say, count_splits
from bingo.datasets.subset import Counts, check_subset, draw_subset
from bingo.images.listing import Listing, memory_listing
from bingo.images.positions import Positions
from bingo.params import DatasetParams
from bingo.params.data import FILE_SOURCES
from bingo.params.places import images_folder

_CIFAR = Counts(50_000, 10_000)


def scan(
    dataset: DatasetParams,
    seed: int,
    say: Say = lambda line: None,
    judge: Callable[[Counts], None] | None = None,
    known: KnownFiles | None = None,
) -> tuple[Listing, np.ndarray | Positions | None]:
    """The listing and the images, uint8 (N, S, S, 3) with S = store_px. If files are decoded on access, their positions in shards or in a
    saved dataset, or None for a folder, instead of the images.

    Train rows come first, each split in the order of its paths. `say` is called with a line for everything that is assumed or skipped.
    `judge` is called with the numbers of images found, before any is drawn or read, and raises UserError if they do not suffice; by
    default, if fewer were found than `dataset` asks for. Results that are `known` for unchanged files are reused. Raises UserError for all
    errors in the data.
    """
    judge = judge or partial(check_subset, dataset)
    if dataset.source == "digits":
        judge(_count_digits(dataset, seed))
        return _scan_digits(dataset, seed)
    if dataset.source in FILE_SOURCES:
        from bingo.datasets.folder import scan_files

        return scan_files(dataset, seed, say, judge, known)
    from bingo.datasets.cifar import scan_cifar

    judge(_CIFAR)
    return scan_cifar(dataset, seed)


def count_images(dataset: DatasetParams, seed: int) -> Counts | None:
    """The numbers of images that `scan` will find, before `train_images` and `test_images` leave any out; None if the folder of files does
    not exist.

    Raises UserError as `scan` does for errors in the layout of files.
    """
    if dataset.source == "digits":
        return _count_digits(dataset, seed)
    if dataset.source not in FILE_SOURCES:
        return _CIFAR
    if not Path(images_folder(str(dataset.root))).is_dir():
        return None
    from bingo.datasets.folder import find_files

    found = find_files(dataset, lambda line: None)
    return count_splits(found.train, found.test)


def _count_digits(dataset: DatasetParams, seed: int) -> Counts:
    _, labels_D = digits.read_digits()
    test = int(digits.is_test_digit(labels_D, seed).sum())
    return Counts((len(labels_D) - test) * dataset.placements, test * dataset.placements)


def _scan_digits(dataset: DatasetParams, seed: int) -> tuple[Listing, np.ndarray]:
    digits_D88, labels_D = digits.read_digits()
    is_test_D = digits.is_test_digit(labels_D, seed)
    split_rows, split_names = [], ("train", "test")
    for name, members_D in zip(split_names, (np.flatnonzero(~is_test_D), np.flatnonzero(is_test_D)), strict=True):
        rows = [(digit, placement) for digit in members_D.tolist() for placement in range(dataset.placements)]
        chosen = draw_subset(dataset, name, labels_D[[digit for digit, _ in rows]], seed)
        split_rows.append([rows[i] for i in chosen.tolist()])
    rows_N2 = np.array(split_rows[0] + split_rows[1])
    images_NSS3 = digits.draw_digits(digits_D88, rows_N2[:, 0], rows_N2[:, 1], dataset, seed)
    paths = [f"digit/{digit:04d}/p{placement}" for digit, placement in rows_N2.tolist()]
    classes = [str(label) for label in range(10)]
    return memory_listing(digits.DATASET, paths, labels_D[rows_N2[:, 0]], len(split_rows[0]), classes, images_NSS3), images_NSS3
