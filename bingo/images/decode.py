"""Decode one image file to uint8 RGB pixels: every mode that Pillow opens, upright, and at reduced size if that is sufficient.

No torch: scans import this file. Lengths are in pixels; P is the side of the result.
"""

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, features

from bingo.params import Interpolation

_SUFFIXES = {  # by format, most common first
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
}
_OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000"}  # may be missing in this build of Pillow
# Formats that are read, regardless of the suffix. Others are rare or decoded in pure Python, and EPS files are programs that would be run.
FORMATS = tuple(name for name in _SUFFIXES if name not in _OPTIONAL or features.check(_OPTIONAL[name]))
SUFFIXES = tuple(
    sorted((suffix for name in FORMATS for suffix in _SUFFIXES[name]), key=(".jpg", ".jpeg", ".png").__contains__, reverse=True)
)
MOST_SCANS = 100  # of a JPEG file; progressive ones have about 10, and each may cost a pass over all pixels without a byte of data
MOST_PLAIN_PIXELS = 4_000_000  # of a PPM file in plain text, which Pillow decodes in pure Python
PILLOW_FILTERS: dict[Interpolation, Image.Resampling] = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
DRAFT_MARGIN = 2  # a JPEG is decoded at 1/2, 1/4 or 1/8 only if this many times the required size remains
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG = ("JPEG", "MPO")
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xDA), 0xFF)  # markers of a JPEG file without a length, and fill bytes
_TURNED = (5, 6, 7, 8)  # height and width are swapped

# An image of this many pixels is an error here, where Pillow would only warn; its other warnings name no file.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


GRAY_BITS = (8, 10, 12, 14, 16)  # used by cameras and scanners in 16-bit greyscale images


class BadImage(Exception):
    """A file that is not a readable image; the message is the reason, in one line."""


@dataclass(frozen=True)
class Header:
    """Height and width of the upright image; plain_jpeg: a JPEG file whose pixels are stored upright, and RGB or greyscale."""

    height: int
    width: int
    plain_jpeg: bool


def check_header(file_bytes: bytes) -> int | None:
    """Open an image file without decoding it; a 16-bit greyscale image is decoded, and its largest value returned. Raises BadImage."""
    with _reasons(), Image.open(io.BytesIO(file_bytes), formats=FORMATS) as image:
        return _largest(image)


def largest_gray(file_bytes: bytes) -> int | None:
    """The largest value of a 16-bit greyscale image, None for any other image. Raises BadImage."""
    is_png, is_other = file_bytes.startswith(b"\x89PNG"), file_bytes.startswith((b"\xff\xd8", b"GIF", b"BM", b"RIFF"))
    if is_other or (is_png and file_bytes[24:25] != b"\x10"):
        return None
    with _opened(file_bytes) as image:
        return _largest(image)


def has_deep_colours(start: bytes) -> bool:
    """Whether a file with these first 26 bytes is a PNG with 16 bits per channel, of which Pillow reads only the upper 8."""
    return start.startswith(b"\x89PNG") and start[24:25] == b"\x10" and start[25:26] != b"\0"


def _largest(image: Image.Image) -> int | None:
    if not image.mode.startswith("I"):
        return None
    values_HW = np.asarray(image)
    least, largest = int(values_HW.min()), int(values_HW.max())
    if least < 0 or largest > 65535:
        raise BadImage("its pixels do not have 8 or 16 bits")
    return largest


def bits_of(largest: int) -> int:
    """The smallest of GRAY_BITS that can hold a value."""
    return next(bits for bits in GRAY_BITS if largest < 2**bits)


def read_header(file_bytes: bytes) -> Header:
    """The header of an image file. Raises BadImage."""
    if (header := _upright_jpeg(file_bytes)) is not None:
        return header
    with _opened(file_bytes) as image:
        orientation = _orientation(image)
        height, width = image.size if orientation in _TURNED else image.size[::-1]
        return Header(height, width, image.format == "JPEG" and image.mode in ("RGB", "L") and orientation not in _UPRIGHT)


def _upright_jpeg(file_bytes: bytes) -> Header | None:
    """The header of a plain JPEG file of one scan, in a tenth of the time of Pillow; None if Pillow must be used."""
    head = _before_the_only_scan(file_bytes)
    if not head or b"Exif\0\0" in head or b"tiff:Orientation" in head:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(file_bytes)
    except (ValueError, KeyError):  # KeyError: a subsampling that simplejpeg does not know
        return None
    plain = colours in ("RGB", "YCbCr", "Gray") and height * width <= (Image.MAX_IMAGE_PIXELS or math.inf)
    return Header(height, width, True) if plain else None


def _before_the_only_scan(file_bytes: bytes) -> bytes:
    """A JPEG file up to its pixels, if these are sequential, have 8 bits and are in one scan of all components; empty for other files."""
    place, components = 2 if file_bytes.startswith(b"\xff\xd8") else len(file_bytes), 0
    while len(segment := file_bytes[place : place + 10]) == 10 and segment[0] == 0xFF and segment[1] not in _WITHOUT_LENGTH:
        if segment[1] in (0xC0, 0xC1) and segment[4] == 8:  # sequential; 0xC2 is progressive
            components = segment[9]
        if segment[1] == 0xDA:
            return file_bytes[:place] if segment[4] == components else b""
        place += 2 + int.from_bytes(segment[2:4], "big")
    return b""


def is_plain_baseline(file_bytes: bytes) -> bool:
    """Whether a JPEG file is complete and has one sequential scan of 8-bit YCbCr or greyscale, which all decoders read in the same way."""
    if not _before_the_only_scan(file_bytes) or not file_bytes.endswith(b"\xff\xd9"):
        return False
    try:
        return simplejpeg.decode_jpeg_header(file_bytes)[2] in ("YCbCr", "Gray")
    except (ValueError, KeyError):  # the second: a subsampling that simplejpeg has no name for
        return False


def check_pixels(file_bytes: bytes) -> None:
    """Decode a file to its end, at an eighth of its size if that is faster. Raises BadImage."""
    decode_rgb(file_bytes, min)


def decode_rgb(file_bytes: bytes, may_shrink: Callable[[int, int], float], gray_bits: int | None = None) -> tuple[Image.Image, int]:
    """The upright RGB image in a file, and the factor (1, 2, 4 or 8) by which it was decoded smaller.

    `may_shrink(height, width)` returns the largest factor allowed for the upright image; it is called once, and only for JPEG files
    (scaled DCT).
    `gray_bits` is as in `to_rgb`. Raises BadImage for anything that cannot be decoded, including truncated files and decompression bombs.
    """
    with _opened(file_bytes) as image:
        orientation = _orientation(image)
        (width, height), factor = image.size, 1
        most = may_shrink(width, height) if orientation in _TURNED else may_shrink(height, width)
        if image.format in _JPEG:
            factor = max(f for f in (1, 2, 4, 8) if f == 1 or f <= most)
            if factor > 1:
                image.draft("RGB", (width // factor, height // factor))
        rgb = to_rgb(image, gray_bits)
        return (rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb), factor


def decode_as_stored(file_bytes: bytes) -> Image.Image:
    """The RGB image in a file at full size, ignoring the EXIF orientation. Raises BadImage."""
    with _opened(file_bytes) as image:
        return to_rgb(image)


def decode_square(
    file_bytes: bytes, resize_px: int, crop_px: int, interpolation: Interpolation = "bilinear", gray_bits: int | None = None
) -> np.ndarray:
    """Short side resized to `resize_px` (antialiased), then a centre crop of `crop_px`: uint8 (P, P, 3). Raises BadImage.

    Equals torchvision's Resize and CenterCrop pixel by pixel; only the crop is computed.
    """
    image, _ = decode_rgb(file_bytes, lambda height, width: min(height, width) / (DRAFT_MARGIN * resize_px), gray_bits)
    scale_2, start_2 = [], []
    for side in image.size:
        resized = max(resize_px, int(resize_px * side / min(image.size)))
        scale_2.append(side / resized)
        start_2.append(round((resized - crop_px) / 2))
    left, top = (scale * start for scale, start in zip(scale_2, start_2, strict=True))
    right, bottom = (scale * (start + crop_px) for scale, start in zip(scale_2, start_2, strict=True))
    box = (left, top, min(right, image.width), min(bottom, image.height))
    return np.asarray(image.resize((crop_px, crop_px), PILLOW_FILTERS[interpolation], box=box))


def to_rgb(image: Image.Image, gray_bits: int | None = None) -> Image.Image:
    """An image of any mode as RGB. Alpha is dropped, as in torchvision's loader. Raises BadImage.

    For 16-bit grey values, the picture is in the lowest `gray_bits`, of which the upper 8 are kept; larger values are white. None: the
    smallest of GRAY_BITS that holds the image's largest value. A dataset uses one number for all images, so that they remain comparable.
    """
    if image.mode == "F":
        raise BadImage("its pixels are floating-point numbers of unknown range")
    if (largest := _largest(image)) is not None:
        bits = gray_bits or bits_of(largest)
        values_HW = np.minimum(np.asarray(image), 2**bits - 1)
        image = Image.fromarray((values_HW >> (bits - 8)).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # transparency may be an entry of the palette
    return image.convert("RGB")


@contextmanager
def _opened(file_bytes: bytes) -> Iterator[Image.Image]:
    """Context manager that opens the image in a file, to be decoded in the body; any error is raised as BadImage."""
    with _reasons(), Image.open(io.BytesIO(file_bytes), formats=FORMATS) as image:
        if image.format in _JPEG and (scans := file_bytes.count(b"\xff\xda")) > MOST_SCANS:
            raise BadImage(f"it has {scans} scans, allowed are {MOST_SCANS}")
        if image.format == "PPM" and file_bytes[1:2] in b"123" and image.width * image.height > MOST_PLAIN_PIXELS:
            raise BadImage(f"it has {image.width} x {image.height} pixels in plain text, which would take too long to read")
        yield image


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow rotates it itself
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


@contextmanager
def _reasons() -> Iterator[None]:
    """Context manager that converts any error that Pillow raises for a damaged file (they have no common class) to BadImage."""
    try:
        yield
    except (BadImage, MemoryError):  # the second is caused by the machine, not by the file
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("no image format is recognised in it") from None
    except Exception as error:
        raise BadImage(" ".join(str(error).split()) or type(error).__name__) from None
