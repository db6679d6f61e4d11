"""Single images of a listing for display: from the packed store without reading the whole chunk, or from their files.

Does not import torch. Only the bytes of the row are read, so the chunk's checksum is not verified; training reads and verifies whole
chunks.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from bingo.images.decode import BadImage, decode_rgb
from bingo.images.positions import Positions, read_positions
from bingo.runtime.chunks import open_array, open_group
from bingo.runtime.errors import UserError

Opener = Callable[[str], BinaryIO]
_WAY_OUT = "dvc repro scan"


class Pictures:
    """The images of one listing, opened by row."""

    def __init__(self, store: Any, name: str, listing: str, open_chunk: Opener, open_path: Opener, gray_bits: int | None = None):
        """`store` is images.zarr as zarr takes it, made from the listing with fingerprint `listing`.

        `open_chunk` opens a file of the store by its key, `open_path` an image file by its path in the listing;
        `gray_bits` is as in a Listing.
        Raises UserError if the store is absent, damaged or another listing's.
        """
        group = open_group(store, name, _WAY_OUT)
        if (owner := group.attrs.get("listing")) != listing:
            raise UserError(f"{name}: was made from listing {owner}, the bags from listing {listing}; run: {_WAY_OUT}")
        array = open_array(group, "images", name, np.uint8, 4, _WAY_OUT)
        self.stored_rows, self.stored_px = array.shape[:2]
        self._chunk_rows: int = array.chunks[0]
        self._open_chunk, self._open_path, self._gray_bits, self._group, self._name = open_chunk, open_path, gray_bits, group, name

    @property
    def are_files(self) -> bool:
        """Whether images are decoded from their files."""
        return self.stored_rows == 0

    def picture(self, row: int, path: str, side_px: int) -> Image.Image | None:
        """The RGB image of a row: as stored, or decoded with a longer side of at least `side_px` if the file has it; None if it cannot be
        read."""
        try:
            if not self.are_files:
                return self._stored(row)
            return decode_rgb(self._read(row, path), lambda height, width: max(height, width) / side_px, self._gray_bits)[0]
        except (OSError, BadImage):
            return None

    @cached_property
    def _positions(self) -> Positions | None:
        return read_positions(self._group, self._name, _WAY_OUT)

    def _read(self, row: int, path: str) -> bytes:
        if self._positions is None:
            with self._open_path(path) as file:
                return file.read()
        number, offset, length = self._positions.positions_N3[row].tolist()
        with (self._open_chunk if self._positions.in_store else self._open_path)(self._positions.files[number]) as file:
            file.seek(offset)
            return file.read(length)

    def _stored(self, row: int) -> Image.Image | None:
        side, row_bytes = self.stored_px, self.stored_px**2 * 3
        with self._open_chunk(f"images/c/{row // self._chunk_rows}/0/0/0") as file:
            file.seek(row % self._chunk_rows * row_bytes)
            content = file.read(row_bytes)
        return Image.frombytes("RGB", (side, side), content) if len(content) == row_bytes else None


def file_picture(path: Path) -> Image.Image:
    """The RGB image in a file. Raises UserError if it cannot be read or decoded."""
    try:
        return decode_rgb(path.read_bytes(), lambda height, width: 1)[0]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give an image file") from None
    except BadImage as error:
        raise UserError(f"{path}: is not an image that can be decoded ({error}); give a JPEG or PNG file") from None


def fitted(picture: Image.Image, side_px: int) -> tuple[Image.Image, tuple[int, int]]:
    """The whole picture with its aspect ratio and a longer side of `side_px`, and its position (left, top) in a square of that side.

    Small pictures are enlarged without smoothing, so that pixels stay visible.
    """
    longer = max(picture.size)
    width, height = (max(1, round(side * side_px / longer)) for side in picture.size)
    how = Image.Resampling.NEAREST if longer * 2 <= side_px else Image.Resampling.BICUBIC
    return picture.resize((width, height), how), ((side_px - width) // 2, (side_px - height) // 2)
