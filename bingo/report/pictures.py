"""Small pictures of a listing's images for pages that need no other file."""

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from bingo.images.decode import BadImage, decode_rgb
from bingo.images.images import Images, MemoryImages

if TYPE_CHECKING:
    from bingo.images.listing import Listing

THUMBNAIL_PX = 96
_TINY_PX = 48  # kept exactly, and enlarged without smoothing
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class Thumbnail:
    """A picture as a data URI (None if it cannot be read) with its size in pixels, its row, path and class's name."""

    row: int
    uri: str | None
    width_px: int
    height_px: int
    path: str
    class_name: str

    @property
    def tiny(self) -> bool:
        return max(self.width_px, self.height_px) <= _TINY_PX

    @property
    def file_name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def alt(self) -> str:
        """The alternative text of the picture."""
        of_class = f", class {self.class_name}" if self.class_name else ""
        return f"Image {self.row}{of_class}: {self.path}"


def thumbnail(images: Images, listing: "Listing", row: int) -> Thumbnail:
    """The whole image of a row with its aspect ratio, at most 96 pixels wide and high, as JPEG, or up to 48 pixels as PNG; without a
    picture if its file can no longer be read."""
    label = int(listing.labels_N[row])
    name = listing.classes[label] if label >= 0 else ""
    if (picture := picture_of(images, row)) is None:
        return Thumbnail(row, None, THUMBNAIL_PX, THUMBNAIL_PX, listing.paths[row], name)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    kind = "png" if max(picture.size) <= _TINY_PX else "jpeg"
    content = io.BytesIO()
    picture.save(content, kind, optimize=True, quality=_JPEG_QUALITY)
    uri = f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
    return Thumbnail(row, uri, picture.width, picture.height, listing.paths[row], name)


def picture_of(images: Images, row: int) -> Image.Image | None:
    """The RGB image of a row: as stored, or decoded at about twice a thumbnail's size; None if its file can no longer be read."""
    if isinstance(images, MemoryImages):
        return Image.fromarray(images.images_NSS3[row])
    try:
        return decode_rgb(images.read(row), lambda height, width: max(height, width) / (2 * THUMBNAIL_PX), images.gray_bits)[0]
    except (OSError, BadImage):
        return None
