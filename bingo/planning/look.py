"""What a folder of images holds, as far as its listing and a sample of its files say."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bingo.datasets.layout import find_splits
from bingo.images.decode import DRAFT_MARGIN, BadImage, decode_rgb, read_header
from bingo.runtime.progress import progress_bar

SAMPLED_IMAGES = 200


@dataclass(frozen=True)
class Look:
    """Number of images and labels of each split of a folder, and what was seen in a sample of `sampled` files.

    `short_px`: least, median and largest short side of the readable ones; `gray`: how many have three equal channels; `unreadable`: their
    paths; `decode_seconds`: for one image on one core, at the smallest size that a view of 224 px may be cut from; `remarks`: what the
    layout's reader assumes or passes over.
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


def look_at(root: Path, follow_links: bool) -> Look:
    """Look at a folder of images. Raises UserError for a layout that leaves open what is trained on, and where nothing is readable."""
    from bingo.runtime.errors import UserError

    remarks: list[str] = []
    train, test = find_splits(root, follow_links, remarks.append)
    paths = [*train.paths, *test.paths]
    sample = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(SAMPLED_IMAGES, len(paths))).astype(int)).tolist()]
    short_px, gray, unreadable, seconds = [], 0, [], 0.0
    with progress_bar("looking at the images", len(sample), "images") as bar:
        for path in sample:
            try:
                side, is_gray, taken = _look_at_one(root / path)
            except (BadImage, OSError):
                unreadable.append(path)
            else:
                short_px.append(side)
                gray, seconds = gray + is_gray, seconds + taken
            bar.advance()
    if not short_px:
        raise UserError(f"FOLDER = {root}: none of {len(sample)} files that were tried is a readable image; name another folder")
    sides = (min(short_px), int(np.median(short_px)), max(short_px))
    classes = tuple(train.classes or test.classes)
    return Look(
        len(train.paths), len(test.paths), classes, len(sample), sides, gray, tuple(unreadable), seconds / len(short_px), tuple(remarks)
    )


def _look_at_one(path: Path) -> tuple[int, bool, float]:
    """Short side in pixels, whether it is grey, and the seconds of decoding. Raises BadImage, and OSError for what cannot be opened."""
    file_bytes, begun = path.read_bytes(), time.perf_counter()
    header = read_header(file_bytes)
    image, _ = decode_rgb(file_bytes, lambda height, width: min(height, width) / (DRAFT_MARGIN * 224))
    taken, pixels_HW3 = time.perf_counter() - begun, np.asarray(image)
    return min(header.height, header.width), bool((pixels_HW3 == pixels_HW3[..., :1]).all()), taken
