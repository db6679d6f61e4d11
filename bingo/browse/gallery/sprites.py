"""Thumbnails of all rows in sheets of 8 x 8 tiles, made once for each listing and kept, so that a page opens few files.

Photos keep their shape in square tiles of WebP, transparent beside them, whose side is a multiple of 16, so that no tile bleeds into the
next; small stored images become PNG as they are.
"""

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from bingo.browse.listing_rows import ListingRows
from bingo.browse.pictures import Pictures, fitted
from bingo.runtime.artefacts import new_file

COLUMNS = 8
TILES = COLUMNS * COLUMNS
_LARGEST_PNG_PX = 48
_PHOTO_PX, _SMALL_PHOTO_PX = 96, 64
_MANY_ROWS = 200_000  # from here on photos get small tiles: 2 KB each instead of 4
_WEBP = {"quality": 82, "method": 2}  # method: 0 (fastest) to 6
_NO_IMAGE = "#8c959f"


@dataclass(frozen=True)
class SpriteFormat:
    """Side of a tile in pixels, tiles of a line and of a sheet, and the suffix of the files."""

    px: int
    suffix: str
    columns: int = COLUMNS
    tiles: int = TILES

    def as_dict(self) -> dict:
        """For the page."""
        return asdict(self)


def sprite_format(pictures: Pictures, rows: int) -> SpriteFormat:
    """How thumbnails of these pictures are kept."""
    if not pictures.are_files and pictures.stored_px <= _LARGEST_PNG_PX:
        return SpriteFormat(pictures.stored_px, "png")
    return SpriteFormat(_PHOTO_PX if rows < _MANY_ROWS else _SMALL_PHOTO_PX, "webp")


def sprite_name(sheet: int, form: SpriteFormat) -> str:
    """File name of one sheet."""
    return f"s{sheet:06d}.{form.suffix}"


def make_sprites(
    folder: Path, pictures: Pictures, listing: ListingRows, rows: int, form: SpriteFormat, progress: Callable[[int], None]
) -> int:
    """Make the missing sheets of rows 0..rows-1 in `folder`, several at a time; return the number of images that could not be read.

    Sheets are renamed into place, so an interrupted call can be resumed. `progress` is called with the number of rows done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    have = {entry.name for entry in os.scandir(folder)}
    workers = os.cpu_count() or 1

    def one_sheet(sheet: tuple[int, list[str]]) -> int:
        first, paths = sheet
        path = folder / sprite_name(first // TILES, form)
        return 0 if path.name in have else _write_sheet(path, pictures, first, paths, form)

    unreadable = 0
    sheets = ((first, paths[: rows - first]) for first, paths in listing.paths(TILES) if first < rows)
    with ThreadPoolExecutor(workers) as pool:
        while batch := list(islice(sheets, 8 * workers)):  # a few at a time: the paths of all rows need not be in memory
            unreadable += sum(pool.map(one_sheet, batch))
            progress(batch[-1][0] + len(batch[-1][1]))
    return unreadable


def _write_sheet(path: Path, pictures: Pictures, first: int, paths: list[str], form: SpriteFormat) -> int:
    lines = -(-len(paths) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * form.px, lines * form.px))
    missing = 0
    for place, image_path in enumerate(paths):
        left, top = place % COLUMNS * form.px, place // COLUMNS * form.px
        box = (left, top, left + form.px, top + form.px)
        picture = pictures.picture(first + place, image_path, form.px)
        if picture is None:
            missing += 1
            sheet.paste(_NO_IMAGE, box)
            continue
        tile, (right, down) = fitted(picture, form.px)
        beside = tile.resize((form.px, form.px), Image.Resampling.BOX)
        beside.putalpha(0)
        sheet.paste(beside, box)  # transparent in colours of its own: compression mixes them in at the rim
        sheet.paste(tile, (left + right, top + down))
    if missing == len(paths):
        return missing  # nothing is kept, so that a later call tries again
    content = io.BytesIO()  # Pillow itself does not say why it could not write
    if form.suffix == "png":
        sheet.convert("RGB").save(content, "PNG")
    else:
        sheet.save(content, "WEBP", **_WEBP)
    with new_file(path, flush=False) as partial:
        partial.write_bytes(content.getvalue())
    return missing
