"""Thumbnails of all train rows, or of a sample if there are many, in sheets of 8 x 8 tiles, so that a page opens few files.

Photos keep their aspect ratio in square, partly transparent WebP tiles, whose side is a multiple of 16, so that no tile bleeds into the
next; small stored images become PNG unchanged. Shape letters: T train rows, K members listed, S rows with a thumbnail.
"""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bingo.browse.listing_rows import ListingRows
from bingo.browse.pictures import Pictures, fitted
from bingo.runtime.artefacts import new_file
from bingo.runtime.progress import progress_bar

COLUMNS = 8
TILES = COLUMNS * COLUMNS
_LARGEST_PNG_PX = 48
_PHOTO_PX = 96
_MOST_FILES, _MOST_STORED = 20_000, 200_000  # thumbnails: a minute on two cores for photographs
_WEBP = {"quality": 82, "method": 2}  # method: 0 (fastest) to 6
_NO_IMAGE = "#8c959f"


@dataclass(frozen=True)
class SpriteFormat:
    """Side of a tile in pixels, numbers of tiles per line and per sheet, and the suffix of the files."""

    px: int
    suffix: str
    columns: int = COLUMNS
    tiles: int = TILES


def sprite_format(pictures: Pictures) -> SpriteFormat:
    """The format of the thumbnails of these pictures."""
    if not pictures.are_files and pictures.stored_px <= _LARGEST_PNG_PX:
        return SpriteFormat(pictures.stored_px, "png")
    return SpriteFormat(_PHOTO_PX, "webp")


def sampled_anchors(members_TK: np.ndarray, pictures: Pictures) -> np.ndarray | None:
    """The anchors, int64, evenly spread over the rows, that have thumbnails, as do their members; None if all rows have."""
    rows, most = len(members_TK), _MOST_FILES if pictures.are_files else _MOST_STORED
    count = max(1, most // (1 + members_TK.shape[1]))
    return np.arange(count) * rows // count if rows > most else None


def make_sprites(folder: Path, pictures: Pictures, listing: ListingRows, rows_S: np.ndarray, form: SpriteFormat) -> int:
    """Make the missing sheets of some rows, in that order, in `folder`, several at a time; return the number of images that could not be
    read.

    Sheets are renamed into place, so an interrupted call can be resumed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    have = {entry.name for entry in os.scandir(folder)}
    workers = os.cpu_count() or 1

    def one_sheet(first: int, images: list[tuple[int, str]]) -> int:
        path = folder / f"s{first // TILES:06d}.{form.suffix}"
        return 0 if path.name in have else _write_sheet(path, pictures, images, form)

    unreadable, batch = 0, 8 * workers * TILES  # a few sheets at a time: the paths of all rows need not be in memory
    with ThreadPoolExecutor(workers) as pool, progress_bar("thumbnails", len(rows_S), "images") as bar:
        for start in range(0, len(rows_S), batch):
            rows_n = rows_S[start : start + batch]
            images = list(zip(rows_n.tolist(), listing.rows(rows_n)[0], strict=True))
            firsts = range(0, len(images), TILES)
            unreadable += sum(pool.map(one_sheet, [start + first for first in firsts], [images[first:][:TILES] for first in firsts]))
            bar.advance(len(images))
    return unreadable


def _write_sheet(path: Path, pictures: Pictures, images: list[tuple[int, str]], form: SpriteFormat) -> int:
    lines = -(-len(images) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * form.px, lines * form.px))
    missing = 0
    for place, (row, image_path) in enumerate(images):
        left, top = place % COLUMNS * form.px, place // COLUMNS * form.px
        box = (left, top, left + form.px, top + form.px)
        picture = pictures.picture(row, image_path, form.px)
        if picture is None:
            missing += 1
            sheet.paste(_NO_IMAGE, box)
            continue
        tile, (right, down) = fitted(picture, form.px)
        beside = tile.resize((form.px, form.px), Image.Resampling.BOX)
        beside.putalpha(0)
        sheet.paste(beside, box)  # transparent in colours of its own: compression mixes them in at the rim
        sheet.paste(tile, (left + right, top + down))
    if missing == len(images):
        return missing  # nothing is kept, so that a later call tries again
    content = io.BytesIO()  # Pillow itself does not say why it could not write
    if form.suffix == "png":
        sheet.convert("RGB").save(content, "PNG")
    else:
        sheet.save(content, "WEBP", **_WEBP)
    with new_file(path, flush=False) as partial:
        partial.write_bytes(content.getvalue())
    return missing
