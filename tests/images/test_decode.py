"""Headers of JPEG files are read without Pillow as Pillow reads them, for intact and for damaged files."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from bingo.images import decode
from bingo.images.decode import BadImage, Header, read_header


def jpeg(mode: str = "RGB", **options) -> bytes:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((80, 60)).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags


def with_xmp(content: bytes) -> bytes:
    """An orientation of 6 as some programs store it, which Pillow reads since 11.2."""
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>'
    return content[:2] + b"\xff\xe1" + (2 + len(xmp)).to_bytes(2, "big") + xmp + content[2:]


FILES = {
    "plain": jpeg(), "grey": jpeg("L"), "CMYK": jpeg("CMYK"), "progressive": jpeg(progressive=True), "RGB": jpeg(keep_rgb=True),
    "of one orientation": jpeg(exif=exif(1)), "turned": jpeg(exif=exif(6)), "mirrored": jpeg(exif=exif(2)),
    "turned, in XMP": with_xmp(jpeg()), "with a comment": jpeg(comment=b"\xff\xda, tiff:"),
    "of a comment like EXIF": jpeg(comment=b"Exif\0\0"),
}  # fmt: skip


def described(content: bytes) -> Header | str:
    try:
        return read_header(content)
    except BadImage as error:
        return str(error)


@pytest.mark.parametrize("name", FILES)
def test_a_header_is_read_as_by_pillow(monkeypatch, name):
    draw, contents = random.Random(name), [FILES[name]]
    for _ in range(300):
        content = bytearray(FILES[name])
        for _ in range(draw.choice([1, 1, 3])):
            content[draw.randrange(draw.choice([30, 500, len(content)]))] = draw.randrange(256)
        contents.append(bytes(content[: draw.randrange(len(content))] if draw.random() < 0.2 else content))
    ours = [described(content) for content in contents]
    monkeypatch.setattr(decode, "_upright_jpeg", lambda content: None)
    assert ours == [described(content) for content in contents]
    assert ours[0] == Header(*((80, 60) if "turned" in name else (60, 80)), name not in ("CMYK", "turned", "turned, in XMP", "mirrored"))
    assert any(isinstance(header, str) for header in ours)


ORIENTED = ("JPEG", "PNG", "WEBP", "TIFF")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_name", ORIENTED)
def test_an_image_is_turned_once(format_name, orientation):
    """A red corner at the top left of the stored image ends up where EXIF's table says: as row 0 at the top and column 0 at the left."""
    stored = Image.new("RGB", (64, 48))
    stored.paste((255, 0, 0), (0, 0, 24, 16))
    file = io.BytesIO()
    stored.save(file, format_name, exif=exif(orientation), **({"lossless": True} if format_name == "WEBP" else {}))
    upright, _ = decode.decode_rgb(file.getvalue(), lambda height, width: 1)
    bottom, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    assert upright.size == ((48, 64) if orientation >= 5 else (64, 48))
    header = read_header(file.getvalue())
    assert (header.width, header.height) == upright.size
    corner = upright.getpixel((upright.width - 4 if right else 3, upright.height - 4 if bottom else 3))
    assert corner[0] > 200 > 50 > corner[1], corner


def after_start(content: bytes, *segments: bytes) -> bytes:
    return content[:2] + b"".join(segments) + content[2:]


def comment(text: bytes) -> bytes:
    return b"\xff\xfe" + (2 + len(text)).to_bytes(2, "big") + text


FAKE = b"\xff\xc0\x00\x0b\x08\x00\x08\x00\x08\x01\x01\x11\x00\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"  # one component, and its scan
ODD = {
    "fill bytes": after_start(FILES["turned"], b"\xff\xff"),
    "a marker alone": after_start(FILES["turned"], b"\xff\x01"),
    "a comment that looks like a header": after_start(FILES["turned"], comment(FAKE)),
    "a jump into a comment": after_start(FILES["turned"], b"\xff\x01" + comment(b"." * 0xFE + FAKE + b"." * 300)),
    "a fill byte before a comment": after_start(FILES["progressive"], b"\xff" + comment(b"." * 0xFA + FAKE + b"." * 300)),
    "of 12 bits": FILES["plain"].replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),
    "4:4:1": jpeg(subsampling=0).replace(b"\x03\x01\x11\x00", b"\x03\x01\x14\x00"),
}


@pytest.mark.parametrize("name", ODD)
def test_unusual_headers_are_left_to_pillow(monkeypatch, name):
    ours = described(ODD[name])
    monkeypatch.setattr(decode, "_upright_jpeg", lambda content: None)
    assert ours == described(ODD[name])


def test_pillow_is_used_only_if_necessary(monkeypatch):
    monkeypatch.setattr(decode, "_opened", lambda content: pytest.fail("Pillow was asked"))
    for name in ("plain", "grey", "RGB", "with a comment"):
        assert read_header(FILES[name]).plain_jpeg


def test_too_many_pixels_or_scans_are_refused_by_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 80 - 1)
    assert "decompression bomb" in described(FILES["plain"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_header(FILES["plain"]).plain_jpeg
    assert read_header(FILES["progressive"]).plain_jpeg
    monkeypatch.setattr(decode, "MOST_SCANS", 2)
    assert described(FILES["progressive"]).startswith("it has ")


def test_lack_of_memory_is_not_reported_as_a_bad_file(monkeypatch):
    """Otherwise `dataset.on_bad_image: skip` would leave out a good image."""

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    for read in (read_header, decode.check_pixels):
        with pytest.raises(MemoryError):
            read(FILES["turned"])
