"""Draw a seeded, class-balanced subset of a split."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from bingo import seeds
from bingo.params import DatasetParams
from bingo.params.data import FILE_SOURCES
from bingo.runtime.errors import UserError

Readable = Callable[[np.ndarray], np.ndarray]  # rows (n,) to whether their files can be read, bool (n,)


@dataclass(frozen=True)
class Counts:
    """The numbers of images of a dataset, and whether all of them have labels."""

    train: int
    test: int
    labelled: bool = True

    def with_test(self, dataset: DatasetParams) -> "Counts":
        """The numbers after test images are held out from the train images, if files have no test split and train images are left."""
        if dataset.source not in FILE_SOURCES or self.test or not dataset.test_images or dataset.test_images >= self.train:
            return self
        return replace(self, train=self.train - dataset.test_images, test=dataset.test_images)

    def drawn(self, dataset: DatasetParams) -> "Counts":
        """The numbers that `dataset` asks for, or all if there are fewer."""
        found = self.with_test(dataset)
        train, test = dataset.train_images or found.train, dataset.test_images or found.test
        return replace(found, train=min(found.train, train), test=min(found.test, test))


def draw_subset(dataset: DatasetParams, split: str, labels_N: np.ndarray, seed: int, readable: Readable | None = None) -> np.ndarray:
    """Rows of one split selected by `dataset.train_images` or `test_images`: int64, ascending, class-balanced.

    Every class contributes the same number of rows, or all it has. The rows are drawn by seed; with `readable`, by `readable_rows`.
    """
    count = dataset.train_images if split == "train" else dataset.test_images
    if count is None:
        return np.arange(len(labels_N))
    return readable_rows(labels_N, count, seed, f"subset/{split}", readable or (lambda rows: np.ones(len(rows), bool)))


def readable_rows(labels_N: np.ndarray, count: int, seed: int, purpose: str, readable: Readable) -> np.ndarray:
    """As `balanced_rows`, drawn among the rows for which `readable` is true; it is called with rows (n,), with no row twice."""
    allowed_N, asked_N = np.ones(len(labels_N), bool), np.zeros(len(labels_N), bool)
    while True:
        rows = balanced_rows(labels_N, count, seed, purpose, allowed_N)
        fresh = rows[~asked_N[rows]]
        asked_N[fresh], allowed_N[fresh] = True, readable(fresh)
        if allowed_N[rows].all():
            return rows


def subset_mistakes(dataset: DatasetParams, found: Counts) -> list[str]:
    """A line for each split for which `dataset` requests more images than were found."""
    found = found.with_test(dataset)
    if dataset.source in FILE_SOURCES and dataset.test_images and not found.test:
        problem = f"dataset.test_images = {dataset.test_images}: without a test split they are taken from the train images"
        return [f"{problem}, of which there are {found.train}; lower it, or set dataset.test_images: null for no test images"]
    splits = {"train": (dataset.train_images, found.train), "test": (dataset.test_images, found.test)}
    return [
        f"dataset.{split}_images = {asked}: the {split} split has {images} images; set dataset.{split}_images: null for all, or lower it"
        for split, (asked, images) in splits.items()
        if (asked or 0) > images
    ]


def check_subset(dataset: DatasetParams, found: Counts) -> None:
    """Raise UserError if more images are requested than were found."""
    if lines := subset_mistakes(dataset, found):
        raise UserError(lines)


def balanced_rows(labels_N: np.ndarray, count: int, seed: int, purpose: str, allowed_N: np.ndarray | None = None) -> np.ndarray:
    """`count` of the rows of `labels_N`, drawn by seed and balanced over the classes: int64, ascending.

    Every class contributes the same number (one more for some if the count is not divisible), or all it has. A smaller sample with the same
    seed and purpose is a subset of a larger one. Rows that are not `allowed_N` are skipped for the next row of their class.
    """
    order_N = seeds.permutation(seed, purpose, 0, len(labels_N))
    drawn_n = order_N if allowed_N is None else order_N[allowed_N[order_N]]
    place_n = np.argsort(labels_N[drawn_n], kind="stable")  # by class; which classes contribute one more if the count is not divisible
    by_class_n = drawn_n[place_n]
    _, starts, sizes = np.unique(labels_N[by_class_n], return_index=True, return_counts=True)
    turn_n = np.arange(len(by_class_n)) - np.repeat(starts, sizes)  # how many rows of its class were drawn before
    return np.sort(by_class_n[np.lexsort((place_n, turn_n))[:count]])
