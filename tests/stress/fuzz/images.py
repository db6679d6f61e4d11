"""Fuzzed images: every format and mode that Pillow writes, damaged; bombs; and folders of such files with any names."""

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from bingo.datasets.sources import scan
from bingo.images.decode import SUFFIXES, BadImage, check_header, check_pixels, decode_as_stored, decode_square, read_header
from bingo.images.decode_crops import CropsWanted, decode_crops
from bingo.images.draws import Crops, crop_boxes, draw_views
from bingo.images.listing import read_listing, write_listing
from bingo.params import AugmentParams, DatasetParams
from bingo.runtime.errors import UserError, printable
from tests.stress.fuzz.damage import Damage, damaged, damages
from tests.stress.fuzz.harness import Surface
from tests.stress.fuzz.parameters import shipped

Image.init()
WRITTEN = sorted(name for name in Image.SAVE if name not in ("BUFR", "GRIB", "HDF5", "WMF", "AVIF"))  # AVIF's writer uses all memory
COMMON = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "MPO")
MODES = ("RGB", "1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "I;16B", "F")
SIDES = (1, 2, 3, 8, 16, 17, 100, 300)
TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits", "group4", "zstd", "lzma", "webp")


@dataclass(frozen=True)
class Picture:
    """How a file is written: `orientation` in its EXIF (or not, None), `frames` if the format can have several."""

    format: str
    mode: str
    sides: tuple[int, int]
    orientation: int | None
    frames: int
    compression: int
    transparency: bool


def pictures() -> st.SearchStrategy:
    return st.builds(
        Picture,
        st.one_of(st.sampled_from(COMMON), st.sampled_from(WRITTEN)),
        st.sampled_from(MODES),
        st.tuples(st.sampled_from(SIDES), st.sampled_from(SIDES)),
        st.sampled_from((None, None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535)),
        st.sampled_from((1, 1, 3)),
        st.integers(0, 8),
        st.booleans(),
    )


@cache
def written(picture: Picture) -> bytes:
    """The file, in the requested mode and format if Pillow can write them, otherwise in RGB or grey, or as PNG."""
    for format in (picture.format, "PNG"):
        for mode in (picture.mode, "RGB", "L", "1"):
            try:
                return _encoded(replace(picture, format=format, mode=mode))
            except Exception:  # savers refuse modes and options in many ways
                continue
    raise AssertionError(f"cannot write {picture}")


def _encoded(picture: Picture) -> bytes:
    (height, width), mode = picture.sides, picture.mode
    noise = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    if mode in ("I;16", "I;16B"):
        image = Image.frombytes(mode, (width, height), noise.tobytes()[: 2 * height * width])
    elif mode in ("La", "RGBa"):
        image = image.convert("LA" if mode == "La" else "RGBA").convert(mode)
    elif mode in ("LAB",):
        image = Image.frombytes("LAB", (width, height), noise.tobytes())
    else:
        image = image.convert("L").convert(mode) if mode in ("LA", "I", "F", "PA") else image.convert(mode)
    options: dict[str, Any] = {}
    if picture.orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = picture.orientation
        options["exif"] = exif
    if picture.frames > 1 and picture.format in Image.SAVE_ALL:
        options |= {"save_all": True, "append_images": [image.copy() for _ in range(picture.frames - 1)]}
    if picture.transparency:
        options |= {"transparency": 0, "icc_profile": b"no profile", "progressive": True, "lossless": True}
    if picture.format == "TIFF":
        options["compression"] = TIFF_COMPRESSIONS[picture.compression]
    file = io.BytesIO()
    image.save(file, picture.format, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, colour: int, data: bytes, *others: tuple[bytes, bytes]) -> bytes:
    """A PNG with any header, around any deflated data and further chunks."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *others, (b"IDAT", data), (b"IEND", b"")]
    parts = (struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(*tags: tuple[int, int, int, int]) -> bytes:
    """A little-endian TIFF with one directory of these entries (tag, type, count, value or place), followed by a few bytes."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + bytes(range(256))


def _zeros(megabytes: int) -> bytes:
    deflate = zlib.compressobj(9)
    block = bytes(2**20)
    return b"".join([*(deflate.compress(block) for _ in range(megabytes)), deflate.flush()])


def _jpeg_of(width: int, height: int, scans: int = 0, progressive: bool = False) -> bytes:
    """A JPEG whose header claims these sides, with its first scan repeated `scans` times."""
    file = io.BytesIO()
    Image.new("L", (64, 64), 120).save(file, "JPEG", progressive=progressive)
    content = bytearray(file.getvalue())
    sof = next(i for i in range(len(content)) if content[i] == 0xFF and content[i + 1] in (0xC0, 0xC2))
    content[sof + 5 : sof + 9] = struct.pack(">HH", height, width)
    first = content.index(b"\xff\xda")
    ends = (i for i in range(first + 2, len(content) - 1) if content[i] == 0xFF and content[i + 1] in (0xDA, 0xC4))
    second = next(ends, len(content) - 2)
    return bytes(content[:second]) + bytes(content[first:second]) * scans + bytes(content[second:])


def _animation(format: str, sides: tuple[int, int], frames: int) -> bytes:
    file = io.BytesIO()
    pages = [Image.new("P" if format == "GIF" else "RGB", sides, i % 256) for i in range(frames)]
    pages[0].save(file, format, save_all=True, append_images=pages[1:])
    return file.getvalue()


def _plain_tiff(
    width: int, height: int, bits: int = 8, samples: int = 1, compression: int = 1, strip_bytes: int = 256, count: int = 1
) -> bytes:
    """A grey TIFF of one strip with a header that claims all this."""
    return tiff(
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, count, bits), (259, 3, 1, compression), (262, 3, 1, 1), (273, 4, count, 130),
        (277, 3, 1, samples), (278, 4, 1, height), (279, 4, count, strip_bytes),
    )  # fmt: skip


_EXIF_ENTRY = b"\x01\x12\0\x02\xff\xff\xff\xff\0\0\0\0"  # an orientation of 4 GB of text


def _bmp(header: tuple[int, ...], body: bytes) -> bytes:
    """A BMP with this header: bytes, two zeros, start of the pixels, then BITMAPINFOHEADER."""
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", *header) + body


BOMBS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"no image\n" * 100,
    "html": lambda: b"<html><body>404</body></html>",
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9999999" height="9999999"/>',
    "eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n{} loop\n%%EOF\n",
    "zip": lambda: b"PK\x03\x04" + bytes(100),
    "png header 60000": lambda: png(60000, 60000, 8, 2, zlib.compress(b"x")),
    "png header 2^31": lambda: png(2**31 - 1, 2**31 - 1, 16, 6, b""),
    "png 9400, one bit": lambda: png(9400, 9400, 1, 0, _zeros(11)),
    "png 9400, 16 bits grey": lambda: png(9400, 9400, 16, 0, _zeros(169)),
    "png 9400, 16 bits, alpha": lambda: png(9400, 9400, 16, 6, _zeros(675)),
    "png 9400, palette": lambda: png(9400, 9400, 1, 3, _zeros(11), (b"PLTE", bytes(6)), (b"tRNS", b"\0\x80")),
    "png 1 x 80000000": lambda: png(1, 80_000_000, 1, 0, _zeros(160)),
    "png 80000000 x 1": lambda: png(80_000_000, 1, 1, 0, _zeros(10)),
    "png of 1 pixel, 1 GB": lambda: png(1, 1, 8, 2, _zeros(1024)),
    "png text": lambda: png(1, 1, 8, 0, zlib.compress(bytes(2)), (b"zTXt", b"a\0\0" + _zeros(1024))),
    "png texts": lambda: png(1, 1, 8, 0, zlib.compress(bytes(2)), *[(b"iTXt", b"a\0\1\0\0\0" + _zeros(1))] * 300),
    "png profile": lambda: png(1, 1, 8, 0, zlib.compress(bytes(2)), (b"iCCP", b"a\0\0" + _zeros(1024))),
    "png exif": lambda: png(1, 1, 8, 0, zlib.compress(bytes(2)), (b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + _EXIF_ENTRY * 1000)),
    "gif 65535": lambda: b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;",
    "gif 9400": lambda: _animation("GIF", (9400, 9400), 1),
    "gif of frames": lambda: _animation("GIF", (2000, 2000), 50),
    "webp 16383": lambda: b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xfe\x3f\0\xfe\x3f\0VP8L\x05\0\0\0/\xfe\xff\xff\x0f",
    "webp 9000": lambda: _animation("WEBP", (9000, 9000), 1),
    "bmp 2^31": lambda: _bmp((100, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0), bytes(50)),
    "bmp rle": lambda: _bmp((1100, 0, 0, 1078, 40, 9000, 9000, 1, 8, 1, 0, 0, 0, 256, 0), bytes(1024) + b"\xff\0" * 9999),
    "ppm 60000": lambda: b"P6 60000 60000 255\n" + bytes(100),
    "ppm 9000": lambda: b"P6 9000 9000 255\n" + bytes(100),
    "ppm digits": lambda: b"P3 " + b"9" * 100_000 + b" 1 255\n1 1 1",
    "ppm comments": lambda: b"P6 " + b"#\n" * 200_000 + b"1 1 255\nabc",
    "pgm maxval": lambda: b"P5 9000 9000 65535\n" + bytes(9000 * 9000 * 2),
    "pgm text": lambda: b"P2 4000 4000 65535\n" + b"1 " * 4_000_000,
    "jpeg 65535": lambda: _jpeg_of(65535, 65535),
    "jpeg 9000": lambda: _jpeg_of(9000, 9000),
    "jpeg of scans": lambda: _jpeg_of(9000, 9000, 20_000, progressive=True),
    "tiff 2^32": lambda: _plain_tiff(2**32 - 1, 2**32 - 1),
    "tiff 9400": lambda: _plain_tiff(9400, 9400),
    "tiff samples": lambda: _plain_tiff(16, 16, samples=65535),
    "tiff bits": lambda: _plain_tiff(16, 16, bits=65535),
    "tiff counts": lambda: _plain_tiff(16, 16, count=2**32 - 1),
    "tiff strip": lambda: _plain_tiff(16, 16, strip_bytes=2**32 - 1),
    "tiff deflate": lambda: _plain_tiff(9400, 9400, compression=8),
    "tiff jpeg": lambda: _plain_tiff(9400, 9400, compression=7),
    "tiff fax": lambda: _plain_tiff(9400, 9400, bits=1, compression=4),
    "tiff in a circle": lambda: b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 330, 4, 1, 8) + struct.pack("<I", 8),
    "tiff directories": lambda: b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 270, 2, 2**32 - 1, 8) * 65535,
}  # fmt: skip


@cache
def bomb(name: str) -> bytes:
    return BOMBS[name]()


def _content(what: Picture | str) -> bytes:
    return bomb(what) if isinstance(what, str) else written(what)


def _crops(content: bytes, crops: Crops) -> None:
    header = read_header(content)
    boxes = crop_boxes(crops, header.height, header.width)
    decode_crops(content, header, [CropsWanted(boxes, crops.flip_B, torch.empty(3, 12, 12, 3, dtype=torch.uint8))])


def _look(case: tuple[Picture | str, list[Damage]], folder: Path) -> None:
    """Open an image in every way of the program, bombs only in the first ones. Refused if any of them refuses."""
    what, changes = case
    content = damaged(_content(what), changes)
    path = folder / "image.jpg"
    path.write_bytes(content)
    augment = AugmentParams.model_validate(shipped()["distill"]["augment"])
    crops, _ = draw_views(augment, 0, "fuzz", 0, np.arange(3), 0)
    ways: list[Callable[[], Any]] = [
        lambda: check_header(path.read_bytes()),
        lambda: check_pixels(content),
        lambda: decode_square(content, 16, 12),
        lambda: _crops(content, crops),
        lambda: decode_as_stored(content),
    ]
    reasons: list[str] = []
    for way in ways[:3] if isinstance(what, str) else ways:
        try:
            way()
        except BadImage as error:
            reasons.append(str(error))
    if reasons:
        raise UserError(reasons)


NAMES = (
    "a",
    "A",
    "\u00e9",
    "e\u0301",
    "\u6570",
    "a\nb",
    "\x1b[2J",
    "\udcff",
    "\u202e",
    " ",
    "-",
    "'",
    '"',
    "<b>",
    "a" * 200,
    ".hidden",
    "%s",
    "a,b",
    "a\\b",
)


@dataclass(frozen=True)
class Entry:
    """One entry of a folder of images: its class, name, suffix and content."""

    place: str
    name: str
    suffix: str
    kind: str
    what: Picture | str
    damage: list[Damage]


def entries() -> st.SearchStrategy:
    small = st.one_of(pictures(), st.sampled_from(("empty", "text", "eps", "png header 60000", "gif 65535", "tiff 2^32", "jpeg 65535")))
    return st.builds(
        Entry,
        st.sampled_from(
            (
                *("train/0", "train/1", "val/0", "val/1") * 8,
                "Test/0",
                "train/e\u0301",
                "train/\u00e9",
                "val/\udcff",
                "",
                "train",
                "test/0",
                "0",
            )
        ),
        st.one_of(st.sampled_from(NAMES), st.from_regex(r"[a-z0-9]{1,3}", fullmatch=True)),
        st.sampled_from((*SUFFIXES * 2, ".JPG", "", ".txt")),
        st.sampled_from(("file",) * 60 + ("folder", "fifo", "link", "circle", "broken link", "outside")),
        small,
        damages(),
    )


def _make(entry: Entry, root: Path) -> None:
    path = root / entry.place / f"{entry.name}{entry.suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() or path.is_symlink():
        return
    if entry.kind == "folder":
        path.mkdir()
    elif entry.kind == "fifo":
        os.mkfifo(path)
    elif entry.kind in ("link", "circle", "broken link", "outside"):
        path.symlink_to({"link": "other.png", "circle": path.name, "broken link": "gone", "outside": "/etc/passwd"}[entry.kind])
    else:
        path.write_bytes(damaged(_content(entry.what), entry.damage))


@dataclass(frozen=True)
class FolderCase:
    """The entries of a folder, and the parameters that determine how it is read."""

    entries: list[Entry]
    changes: dict[str, Any]


def _folder(case: FolderCase, folder: Path) -> None:
    root = folder / "images"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for entry in case.entries:
        try:
            _make(entry, root)
        except (FileExistsError, NotADirectoryError):
            continue  # two entries with the same name
    dataset = DatasetParams.model_validate(shipped()["dataset"] | {"source": "folder", "root": str(root)} | case.changes)
    try:
        listing, _ = scan(dataset, 0)
    except UserError as error:  # names of files are made printable when lines are printed
        raise UserError([printable(line) for line in error.lines]) from None
    write_listing(folder / "listing.parquet", listing)
    assert read_listing(folder / "listing.parquet").paths == listing.paths


DAMAGED = Surface("images, damaged", 30, st.tuples(pictures(), damages()), _look)
BOMBED = Surface("images, bombs", 1, st.tuples(st.sampled_from(sorted(BOMBS)), damages()), _look)
FOLDERS = Surface(
    "folders of images",
    10,
    st.builds(
        FolderCase,
        st.lists(entries(), min_size=1, max_size=8),
        st.fixed_dictionaries(
            {
                "check": st.sampled_from(("decode", "header")),
                "on_bad_image": st.sampled_from(("skip", "skip", "stop")),
                "follow_links": st.booleans(),
                "store_px": st.sampled_from((None, 1, 16)),
                "train_images": st.sampled_from((None, None, 1, 2, 1000)),
                "test_images": st.sampled_from((None, None, 1)),
            }
        ),
    ),
    _folder,
)
