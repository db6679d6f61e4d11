"""Read every image file once, in parallel: its size, its hash, whether it can be decoded, and its pixels if they are to be stored.

No torch. Shape letters: N files, S side of a stored image in pixels.
"""

import hashlib
import time
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bingo.datasets.known import SAVED_FILES, KnownFiles, ScannedRoot, column_of_bytes, fixed_bytes, identity_of
from bingo.images.decode import BadImage, bits_of, check_header, check_pixels, decode_square, has_deep_colours, largest_gray
from bingo.images.images import FileImages
from bingo.images.listing import Contents, joined_paths
from bingo.runtime.progress import Bar, progress_bar
from bingo.runtime.workers import in_order, worker_pool

CHUNK_FILES, CHUNKS_AHEAD = 64, 64
HEADER_BYTES = 65536  # enough for the header of most files


@dataclass(frozen=True, eq=False)
class Checks:
    """The results for N files: their contents; `largest_N` int32, the largest value of a 16-bit greyscale image, -1 for any other;
    `deep_colours_N` bool, whether it has 16 bits per colour channel; `reasons`, by row, why a file is not a readable image;
    `not_read`, rows that could not be read for a reason of the machine's, which may not recur."""

    contents: Contents
    largest_N: np.ndarray
    deep_colours_N: np.ndarray
    reasons: dict[int, str]
    not_read: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.largest_N)

    @property
    def readable_N(self) -> np.ndarray:
        """Which files are readable images, bool (N,)."""
        readable_N = np.ones(len(self), bool)
        readable_N[list(self.reasons)] = False
        return readable_N

    def part(self, rows_n: np.ndarray) -> dict[str, pa.Array]:
        """The results for some files as columns, for `KnownFiles`."""
        sha256_n = np.zeros((len(rows_n), 32), np.uint8) if self.contents.sha256_N is None else self.contents.sha256_N[rows_n]
        return {
            "size_bytes": pa.array(self.contents.sizes_N[rows_n]),
            "sha256": column_of_bytes(sha256_n),
            "largest": pa.array(self.largest_N[rows_n]),
            "deep_colours": pa.array(self.deep_colours_N[rows_n]),
            "reason": pa.array([self.reasons.get(row) for row in rows_n.tolist()] if self.reasons else [None] * len(rows_n), pa.string()),
        }

    def set(self, row: int, found: "_CheckedFile") -> None:
        """Set the result for one file."""
        self.contents.sizes_N[row], self.largest_N[row], self.deep_colours_N[row] = found.size_bytes, found.largest, found.deep_colours
        if self.contents.sha256_N is not None and found.sha256:
            self.contents.sha256_N[row] = np.frombuffer(found.sha256, np.uint8)
        if found.reason is not None:
            self.reasons[row] = found.reason
        if found.not_read:
            self.not_read.add(row)

    def put(self, rows_n: np.ndarray, known: pa.Table) -> None:
        """Set the results for some files from such columns."""
        self.contents.sizes_N[rows_n] = known["size_bytes"].to_numpy()
        if self.contents.sha256_N is not None:
            self.contents.sha256_N[rows_n] = fixed_bytes(known["sha256"])
        self.largest_N[rows_n], self.deep_colours_N[rows_n] = known["largest"].to_numpy(), known["deep_colours"].to_numpy()
        bad = pc.indices_nonzero(known["reason"].is_valid())
        self.reasons.update(zip(rows_n[bad.to_numpy()].tolist(), known["reason"].take(bad).to_pylist(), strict=True))


def check_files(
    files: FileImages, decode: bool, store_px: int | None, gray_bits: int | None = None, known: KnownFiles | None = None
) -> tuple[Checks, np.ndarray | None]:
    """Check N files; with `store_px` also their pixels as squares, uint8 (N, S, S, 3), black where unreadable.

    `decode`: read, hash and decode each file; otherwise only its size and header (and what `store_px` needs), without a hash.
    `gray_bits` is as in `bingo.images.decode.to_rgb`. Results that are `known` for unchanged files are reused, except pixels and parts of
    large files.
    """
    images_NSS3 = None if store_px is None else np.zeros((len(files), store_px, store_px, 3), np.uint8)
    sha256_N = np.zeros((len(files), 32), np.uint8) if decode else None
    contents = Contents(np.zeros(len(files), np.int64), sha256_N)
    checks = Checks(contents, np.full(len(files), -1, np.int32), np.zeros(len(files), bool), {})
    left, known = np.arange(len(files)), known if store_px is None and files.positions is None else None
    with progress_bar("checking the images", len(files), "images") as bar:
        if known is not None:
            place, paths = ScannedRoot(files.root, decode), joined_paths([files.paths])
            same_N, found = known.find(place, paths)
            checks.put(np.flatnonzero(same_N), found)
            bar.resume_at(int(same_N.sum()))
            left = np.flatnonzero(~same_N)
            begun_ns, identity_n4 = time.time_ns(), identity_of(files.root, paths.take(left))
        with worker_pool(len(left)) as pool:
            for start in range(0, len(left), SAVED_FILES):
                rows_n = left[start : start + SAVED_FILES]
                _check_rows(pool, files, rows_n, checks, images_NSS3, gray_bits, bar)
                if known is not None:
                    read_n = start + np.flatnonzero(~np.isin(rows_n, list(checks.not_read)))
                    rows_n = left[read_n]
                    known.add(place, paths.take(rows_n), identity_n4[read_n], checks.part(rows_n), begun_ns)
    return checks, images_NSS3


def _check_rows(
    pool: Executor, files: FileImages, rows_n: np.ndarray, checks: Checks, images_NSS3: np.ndarray | None, gray_bits: int | None, bar: Bar
) -> None:
    """Check some of the files; chunks are handed to the workers a few at a time."""
    store_px = None if images_NSS3 is None else images_NSS3.shape[1]
    chunks = [rows_n[start : start + CHUNK_FILES].tolist() for start in range(0, len(rows_n), CHUNK_FILES)]
    work = partial(_check_chunk, checks.contents.sha256_N is not None, store_px, gray_bits)
    for rows, results in zip(chunks, in_order(pool, work, map(files.part, chunks), CHUNKS_AHEAD), strict=True):
        for row, found in zip(rows, results, strict=True):
            checks.set(row, found)
            if images_NSS3 is not None and found.pixels_SS3 is not None:
                images_NSS3[row] = found.pixels_SS3
        bar.advance(len(rows))


def common_bits(files: FileImages, checks: Checks, images_NSS3: np.ndarray | None) -> int | None:
    """The largest number of bits used by 16-bit greyscale images, one of GRAY_BITS; None if there are none.

    Stored pixels of images that use fewer bits were scaled by their own number, so they are decoded again.
    """
    gray_rows = np.flatnonzero(checks.largest_N >= 0)
    largest, places = np.unique(checks.largest_N[gray_rows], return_inverse=True)
    bits = [bits_of(value) for value in largest.tolist()]
    common = max(bits, default=None)
    again = gray_rows[np.array(bits, int)[places] != common]
    if images_NSS3 is not None and len(again):
        _, images_nSS3 = check_files(files.part(again.tolist()), False, images_NSS3.shape[1], common)
        images_NSS3[again] = images_nSS3
    return common


class _CheckedFile(NamedTuple):
    """A worker's result for one file."""

    size_bytes: int
    sha256: bytes
    reason: str | None
    largest: int = -1
    deep_colours: bool = False
    pixels_SS3: np.ndarray | None = None
    not_read: bool = False


def _check_chunk(decode: bool, store_px: int | None, gray_bits: int | None, files: FileImages) -> list[_CheckedFile]:
    return [_check(files, row, decode, store_px, gray_bits) for row in range(len(files))]


def _check(files: FileImages, row: int, decode: bool, store_px: int | None, gray_bits: int | None) -> _CheckedFile:
    size_bytes, sha256, pixels_SS3 = 0, b"", None
    try:
        if not decode and store_px is None:
            start, size_bytes = files.read_start(row, HEADER_BYTES)
            try:
                largest = check_header(start)
            except BadImage:  # with a header that is not at the start, as in TIFF files, or damaged
                largest = check_header(files.read(row))
            return _CheckedFile(size_bytes, b"", None, _or_none(largest), has_deep_colours(start))
        file_bytes = files.read(row)
        size_bytes, sha256 = len(file_bytes), hashlib.sha256(file_bytes).digest() if decode else b""
        if store_px is None:
            check_pixels(file_bytes)
        else:
            pixels_SS3 = decode_square(file_bytes, store_px, store_px, gray_bits=gray_bits)
        return _CheckedFile(size_bytes, sha256, None, _or_none(largest_gray(file_bytes)), has_deep_colours(file_bytes), pixels_SS3)
    except BadImage as error:
        return _CheckedFile(size_bytes, sha256, str(error))
    except OSError as error:
        return _CheckedFile(size_bytes, sha256, error.strerror or str(error), not_read=True)


def _or_none(largest: int | None) -> int:
    return -1 if largest is None else largest
