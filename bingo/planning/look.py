"""A summary of a folder of images, shards or a saved dataset, from its listing and a sample of its images."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bingo.datasets.finding import find, source_of
from bingo.images.decode import DRAFT_MARGIN, BadImage, decode_rgb, read_header
from bingo.runtime.errors import UserError, printable
from bingo.runtime.progress import progress_bar

SAMPLED_IMAGES = 200  # of each split
FEWEST_IMAGES = 3  # to train on: an anchor, its neighbour and a negative


@dataclass(frozen=True)
class Look:
    """Numbers of readable images and labels of each split, and statistics of a sample of `sampled` files, from which the numbers are
    estimated unless the sample has all files.

    `short_px`: smallest, median and largest short side of the readable images; `gray`: how many have three equal channels; `unreadable`:
    paths of unreadable images; `decode_seconds`: for one image on one core, at the smallest size from which a view of 224 px may be cut;
    `remarks`: what was assumed or skipped in reading the layout; `source`: the source that the folder is.
    """

    train: int
    test: int
    classes: tuple[str, ...]
    sampled: int
    short_px: tuple[int, int, int]
    gray: int
    unreadable: tuple[str, ...]
    decode_seconds: float
    remarks: tuple[str, ...]
    source: str


def look_at(root: str, follow_links: bool) -> Look:
    """Look at a folder of images, of shards or of a saved dataset, or at a pattern of shards.

    Raises UserError if it is not clear from the layout which images are for training, if most files are unreadable, and for fewer than
    three readable train images or a test split without readable images.
    """
    remarks: list[str] = []
    source = source_of(root)
    found = find(source, root, follow_links, (None, None), remarks.append, "FOLDER")
    train, test = found.train, found.test
    sample = [*_sample(train.paths), *_sample(test.paths)]
    files = found.files(sample)
    short_px, gray, unreadable, seconds = [], 0, [], 0.0
    with progress_bar("looking at the images", len(sample), "images") as bar:
        for row, path in enumerate(sample):
            try:
                side, is_gray, taken = _look_at_one(files.read(row))
            except (BadImage, OSError):
                unreadable.append(path)
            else:
                short_px.append(side)
                gray, seconds = gray + is_gray, seconds + taken
            bar.advance()
    if 2 * len(unreadable) > len(sample):
        problem = f"{len(unreadable)} of {len(sample)} files that were tried are not readable images ({printable(unreadable[0])}, ...)"
        raise UserError(f"FOLDER = {root}: {problem}; remove such files, or name another folder")
    of_train, of_test = (_readable(split.paths, unreadable) for split in (train, test))
    if of_train < FEWEST_IMAGES:
        raise UserError(f"FOLDER = {root}: readable train images: {of_train}, at least {FEWEST_IMAGES} are needed; add some")
    if test.paths and not of_test:
        raise UserError(f"FOLDER = {root}: no test image that was tried is readable ({test.paths[0]}); replace them, or move them out")
    sides = (min(short_px), int(np.median(short_px)), max(short_px))
    classes = tuple(train.classes or test.classes)
    return Look(of_train, of_test, classes, len(sample), sides, gray, tuple(unreadable), seconds / len(short_px), tuple(remarks), source)


def _sample(paths: Sequence[str]) -> list[str]:
    """Up to 200 files of a split, evenly spaced."""
    return [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(SAMPLED_IMAGES, len(paths))).astype(int)).tolist()]


def _readable(paths: Sequence[str], unreadable: list[str]) -> int:
    """Estimate how many images of a split can be read, from the files that were opened."""
    sample = _sample(paths)
    return len(paths) * len(set(sample).difference(unreadable)) // max(1, len(sample))


def _look_at_one(file_bytes: bytes) -> tuple[int, bool, float]:
    """Short side in pixels, whether the image is grey, and the seconds of decoding. Raises BadImage."""
    begun = time.perf_counter()
    header = read_header(file_bytes)
    image, _ = decode_rgb(file_bytes, lambda height, width: min(height, width) / (DRAFT_MARGIN * 224))
    taken, pixels_HW3 = time.perf_counter() - begun, np.asarray(image)
    return min(header.height, header.width), bool((pixels_HW3 == pixels_HW3[..., :1]).all()), taken
