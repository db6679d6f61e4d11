"""The seeded draw of fewer images than a split has, balanced over its classes."""

from collections.abc import Mapping

import numpy as np

from bingo import seeds
from bingo.params import DatasetParams
from bingo.runtime.errors import UserError


def draw_subset(dataset: DatasetParams, split: str, labels_N: np.ndarray, seed: int) -> np.ndarray:
    """Rows of one split that `dataset.train_images` or `test_images` keeps: int64, rising, balanced over the classes.

    Every class gives as many rows as the others, or all it has; which rows is drawn with the seed.
    Raises UserError where more are asked for than there are.
    """
    count = dataset.train_images if split == "train" else dataset.test_images
    if count is None:
        return np.arange(len(labels_N))
    if lines := subset_mistakes(dataset, {split: len(labels_N)}):
        raise UserError(lines)
    return balanced_rows(labels_N, count, seed, f"subset/{split}")


def held_out_rows(dataset: DatasetParams, labels_N: np.ndarray, seed: int) -> np.ndarray:
    """Of a dataset without a test split, the rows that `dataset.test_images` takes from the train images for one: int64, rising, balanced
    over the classes. Raises UserError where no train image would be left.
    """
    if not dataset.test_images:
        return np.arange(0)
    if dataset.test_images >= len(labels_N):
        problem = f"dataset.test_images = {dataset.test_images}: without a test split they are taken from the train images"
        raise UserError(f"{problem}, of which there are {len(labels_N)}; lower it, or set null for no test images")
    return balanced_rows(labels_N, dataset.test_images, seed, "hold-out")


def subset_mistakes(dataset: DatasetParams, found: Mapping[str, int]) -> list[str]:
    """A line for each split of which `dataset` asks for more images than were found. Without a test split its images are taken from
    the train images.
    """
    if dataset.test_images and found.get("test") == 0 and dataset.test_images < found["train"]:
        found = {"train": found["train"] - dataset.test_images, "test": dataset.test_images}
    asked = {"train": dataset.train_images, "test": dataset.test_images}
    return [
        f"dataset.{split}_images = {asked[split]}: the {split} split has {images} images; lower it, or set null for all"
        for split, images in found.items()
        if (asked[split] or 0) > images
    ]


def balanced_rows(labels_N: np.ndarray, count: int, seed: int, purpose: str) -> np.ndarray:
    """`count` of the rows of `labels_N`, drawn with the seed and balanced over the classes: int64, rising.

    Of every class as many as of the others (one more where the count does not divide), or all it has. A smaller draw with the same
    seed and purpose is part of a larger one.
    """
    order_N = seeds.permutation(seed, purpose, 0, len(labels_N))
    by_class_N = order_N[np.argsort(labels_N[order_N], kind="stable")]
    _, starts, sizes = np.unique(labels_N[by_class_N], return_index=True, return_counts=True)
    turn_N = np.arange(len(labels_N)) - np.repeat(starts, sizes)  # how many of its class were drawn before
    shuffle_N = np.argsort(order_N)[by_class_N]  # which classes give one more where the count does not divide
    return np.sort(by_class_N[np.lexsort((shuffle_N, turn_N))[:count]])
