"""Store a smaller copy of each photograph in a few large files, which every later stage reads instead of the originals.

The bytes of these files depend neither on the number of workers nor on interruptions.
No torch. Shape letters: N images, n images of one file.
"""

import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from bingo.datasets.filecheck import CHUNK_FILES, CHUNKS_AHEAD
from bingo.datasets.folder import BAD_LINES
from bingo.images.decode import DRAFT_MARGIN, BadImage, decode_rgb, read_header
from bingo.images.images import FileImages
from bingo.images.positions import Positions
from bingo.runtime.artefacts import new_file, write_bytes
from bingo.runtime.errors import UserError
from bingo.runtime.progress import progress_bar
from bingo.runtime.workers import in_order, worker_pool

PART_IMAGES = 16384  # in one file, 0.8 GB at 320 px: the most that a killed run repeats
QUALITY = 90  # of JPEG, with colours at half the resolution (4:2:0)
_MOST_PX = 65_500  # of a side of a JPEG file
_SAMPLE_IMAGES = 64

Packed = bytes | str  # an image's bytes, or the reason why it cannot be read


def packed(file_bytes: bytes, pack_px: int, gray_bits: int | None = None) -> bytes:
    """The upright image in a file as a JPEG file with a short side of `pack_px`; the original bytes if the image is not larger.

    It is resized with Keys' cubic filter, antialiased. `gray_bits` is as in `bingo.images.decode.to_rgb`. Raises BadImage.
    """
    header = read_header(file_bytes)
    short, long = sorted((header.height, header.width))
    if short <= pack_px or long * pack_px > _MOST_PX * short:
        return file_bytes
    image, _ = decode_rgb(file_bytes, lambda height, width: min(height, width) / (DRAFT_MARGIN * pack_px), gray_bits)
    width, height = (round(side * pack_px / min(image.size)) for side in image.size)
    pixels_HW3 = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return simplejpeg.encode_jpeg(pixels_HW3, QUALITY, "RGB", "420", fastdct=False)


def pack_images(files: FileImages, pack_px: int, folder: Path, say: Callable[[str], None]) -> Positions:
    """Pack N images into files in `folder`, which may already have those of a killed run; return their positions, with names relative to
    `folder`.

    `say` is called with a line on the disk space that is needed. Raises UserError if there is less, or with a line for each image that
    cannot be read.
    """
    (folder / "pack").mkdir(parents=True, exist_ok=True)
    parts = {
        f"pack/{start // PART_IMAGES:05d}": range(len(files))[start : start + PART_IMAGES] for start in range(0, len(files), PART_IMAGES)
    }
    todo = {name: rows_n for name, rows_n in parts.items() if _lengths(folder / name) is None}
    left, bad = sum(map(len, todo.values())), list[tuple[int, str]]()
    _check_space(files, pack_px, folder, [row for rows_n in todo.values() for row in rows_n[:: -(-left // _SAMPLE_IMAGES)]], left, say)
    with worker_pool(left) as pool, progress_bar("packing the images", len(files), "images") as bar:
        bar.resume_at(len(files) - left)
        for name, rows_n in todo.items():
            chunks = (files.part(rows_n[start : start + CHUNK_FILES]) for start in range(0, len(rows_n), CHUNK_FILES))
            bad += _write(folder / name, rows_n, in_order(pool, partial(_pack_chunk, pack_px), chunks, CHUNKS_AHEAD), bar.advance)
    if bad:
        raise _unreadable(files, pack_px, bad)
    rows_N3 = [_positions(number, _lengths(folder / name)) for number, name in enumerate(parts)]
    return Positions(list(parts), [(folder / name).stat().st_size for name in parts], np.concatenate(rows_N3), in_store=True)


def _pack_chunk(pack_px: int, files: FileImages) -> list[Packed]:
    return [_pack(pack_px, files, row) for row in range(len(files))]


def _pack(pack_px: int, files: FileImages, row: int) -> Packed:
    try:
        return packed(files.read(row), pack_px, files.gray_bits)
    except BadImage as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


def _write(path: Path, rows_n: range, chunks: Iterable[list[Packed]], advance: Callable[[int], None]) -> list[tuple[int, str]]:
    """Write a file of the pack and, once it is on the disk, the lengths of its images to a second file, which marks it as complete. Return
    the rows of images that cannot be read, with reasons."""
    lengths, reasons, rows = list[int](), list[tuple[int, str]](), iter(rows_n)
    with new_file(path) as unfinished, unfinished.open("wb") as file:
        for chunk in chunks:
            for image, row in zip(chunk, rows, strict=False):
                if isinstance(image, str):
                    reasons.append((row, image))
                else:
                    lengths.append(file.write(image))
            advance(len(chunk))
    if not reasons:
        write_bytes(path.with_suffix(".lengths"), np.array(lengths, "<i8").tobytes())
    return reasons


def _lengths(path: Path) -> np.ndarray | None:
    """The lengths in bytes of the images in a file of the pack, int64 (n,); None if it is not complete."""
    beside = path.with_suffix(".lengths")
    lengths_n = np.fromfile(beside, "<i8") if beside.is_file() else None
    return lengths_n if lengths_n is not None and path.is_file() and path.stat().st_size == lengths_n.sum() else None


def _positions(number: int, lengths_n: np.ndarray | None) -> np.ndarray:
    """Rows of `Positions` for images stored consecutively in a file, int64 (n, 3)."""
    assert lengths_n is not None
    return np.stack([np.full_like(lengths_n, number), np.cumsum(lengths_n) - lengths_n, lengths_n], axis=1)


def _unreadable(files: FileImages, pack_px: int, bad: list[tuple[int, str]]) -> UserError:
    lines = [f"dataset.pack_px = {pack_px}: {files.paths[row]} (row {row}) cannot be read: {reason}" for row, reason in bad[:BAD_LINES]]
    way_out = "repair them, or set dataset.check: decode, with which scan finds them beforehand, and run: dvc repro"
    return UserError([*lines, f"{len(bad)} of {len(files)} images are unreadable; {way_out}"])


def _check_space(files: FileImages, pack_px: int, folder: Path, rows_s: list[int], images: int, say: Callable[[str], None]) -> None:
    """Raise UserError if `images` images of the sampled rows' mean size do not fit on the disk."""
    sample = [image for image in _pack_chunk(pack_px, files.part(rows_s)) if isinstance(image, bytes)]
    if not sample:
        return
    need, free = images * sum(map(len, sample)) / len(sample), shutil.disk_usage(folder).free
    line = f"dataset.pack_px = {pack_px}: {images:,} images need some {need / 1e9:.2g} GB of disk space, {free / 1e9:.2g} GB are free"
    if need > free:
        raise UserError(f"{line}; free some, or lower dataset.pack_px")
    say(line)
