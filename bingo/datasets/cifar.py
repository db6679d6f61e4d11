"""CIFAR-10 and CIFAR-100 through torchvision, which downloads them if necessary and verifies their MD5 sums."""

import contextlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from bingo.datasets.subset import draw_subset
from bingo.images.listing import Listing, memory_listing
from bingo.params import DatasetParams
from bingo.runtime.errors import UserError
from bingo.runtime.progress import progress_bar

SIDE_PX = 32


@progress_bar("reading CIFAR")
def scan_cifar(dataset: DatasetParams, seed: int) -> tuple[Listing, np.ndarray]:
    """Listing and images, resized if store_px is not 32. Raises UserError if the data neither exist nor can be downloaded."""
    assert dataset.store_px is not None
    paths, labels, images = [], [], []
    classes: list[str] = []
    for split in ("train", "test"):
        images_NHW3, labels_N, classes = _read(dataset, split == "train")
        rows = draw_subset(dataset, split, labels_N, seed)
        paths.append([f"{split}/{row:05d}" for row in rows.tolist()])
        labels.append(labels_N[rows])
        images.append(_resize(images_NHW3[rows], dataset.store_px))
    images_NSS3 = np.concatenate(images)
    listing = memory_listing(dataset.source, paths[0] + paths[1], np.concatenate(labels), len(paths[0]), classes, images_NSS3)
    return listing, images_NSS3


def _read(dataset: DatasetParams, train: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """One split from torchvision: uint8 (N, 32, 32, 3), labels int64 (N,), class names."""
    from torchvision import datasets

    kind = datasets.CIFAR10 if dataset.source == "cifar10" else datasets.CIFAR100
    root = str(dataset.root)
    try:
        whole = kind(root, train=train)
    except (RuntimeError, OSError):
        try:
            Path(root).mkdir(parents=True, exist_ok=True)
            with contextlib.redirect_stdout(sys.stderr):
                whole = kind(root, train=train, download=True)
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            way_out = f"put the archive {kind.filename} there, or run with a network connection"
            raise UserError(
                f"dataset.root = {root}: {dataset.source} is not in this folder and cannot be downloaded ({reason}); {way_out}"
            ) from None
    return whole.data, np.asarray(whole.targets, np.int64), list(whole.classes)


def _resize(images_NHW3: np.ndarray, store_px: int) -> np.ndarray:
    if store_px == SIDE_PX:
        return images_NHW3
    size = (store_px, store_px)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in images_NHW3])
