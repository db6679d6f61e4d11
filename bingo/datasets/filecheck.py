"""Read every image file once, in parallel: its size, its hash, whether it can be decoded, and its pixels if they are to be stored.

No torch. Shape letters: N files, S side of a stored image in pixels.
"""

import hashlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from bingo.images.decode import BadImage, bits_of, check_header, check_pixels, decode_square, has_deep_colours, largest_gray
from bingo.images.images import FileImages
from bingo.images.listing import Content
from bingo.runtime.progress import progress_bar
from bingo.runtime.workers import begin_worker

CHUNK_FILES = 64
HEADER_BYTES = 65536  # hold the header of most files
THREADS_UP_TO_FILES = 4096  # processes scale further than threads, but take about a second to start


@dataclass(frozen=True)
class Checked:
    """The result for one file; `reason` says in one line why it is not a readable image, None if it is one.

    `largest` is the largest value of a 16-bit greyscale image, None for any other; `deep_colours`: it has 16 bits per colour channel.
    """

    content: Content
    reason: str | None
    largest: int | None = None
    deep_colours: bool = False


def check_files(
    files: FileImages, decode: bool, store_px: int | None, gray_bits: int | None = None
) -> tuple[list[Checked], np.ndarray | None]:
    """Check N files; with `store_px` also their pixels as squares, uint8 (N, S, S, 3), black where unreadable.

    `decode`: read, hash and decode each file; otherwise only its size and header (and what `store_px` needs), without a hash.
    `gray_bits` is as in `bingo.images.decode.to_rgb`.
    """
    images_NSS3 = None if store_px is None else np.zeros((len(files), store_px, store_px, 3), np.uint8)
    chunks = [files.part(range(len(files))[start : start + CHUNK_FILES]) for start in range(0, len(files), CHUNK_FILES)]
    checked: list[Checked] = []
    with worker_pool(len(files)) as pool, progress_bar("checking the images", len(files), "images") as bar:
        for results in pool.map(partial(_check_chunk, decode, store_px, gray_bits), chunks):
            for file, pixels_SS3 in results:
                if images_NSS3 is not None and pixels_SS3 is not None:
                    images_NSS3[len(checked)] = pixels_SS3
                checked.append(file)
            bar.advance_to(len(checked))
    return checked, images_NSS3


def common_bits(files: FileImages, checked: list[Checked], images_NSS3: np.ndarray | None) -> int | None:
    """The largest number of bits used by 16-bit greyscale images, one of GRAY_BITS; None if there are none.

    Stored pixels of images that use fewer bits were scaled by their own number, so they are decoded again.
    """
    bits_N = [None if file.largest is None else bits_of(file.largest) for file in checked]
    common = max((bits for bits in bits_N if bits is not None), default=None)
    again = [row for row, bits in enumerate(bits_N) if bits not in (None, common)]
    if images_NSS3 is not None and again:
        _, images_nSS3 = check_files(files.part(again), False, images_NSS3.shape[1], common)
        images_NSS3[again] = images_nSS3
    return common


@contextmanager
def worker_pool(files: int) -> Iterator[Executor]:
    """A pool over this process's processors; pending work is dropped if the caller stops early."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool: Executor
    if processors == 1 or files <= THREADS_UP_TO_FILES:
        pool = ThreadPoolExecutor(processors)
    else:
        pool = ProcessPoolExecutor(processors, multiprocessing.get_context("forkserver"), begin_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _check_chunk(decode: bool, store_px: int | None, gray_bits: int | None, files: FileImages) -> list[tuple[Checked, np.ndarray | None]]:
    return [_check(files, row, decode, store_px, gray_bits) for row in range(len(files))]


def _check(files: FileImages, row: int, decode: bool, store_px: int | None, gray_bits: int | None) -> tuple[Checked, np.ndarray | None]:
    content, pixels_SS3 = Content(0, None), None
    try:
        if not decode and store_px is None:
            start, size_bytes = files.read_start(row, HEADER_BYTES)
            content = Content(size_bytes, None)
            try:
                largest = check_header(start)
            except BadImage:  # with a header that is not at the start, as in TIFF files, or damaged
                largest = check_header(files.read(row))
            return Checked(content, None, largest, has_deep_colours(start)), None
        file_bytes = files.read(row)
        content = Content(len(file_bytes), hashlib.sha256(file_bytes).hexdigest() if decode else None)
        if store_px is None:
            check_pixels(file_bytes)
        else:
            pixels_SS3 = decode_square(file_bytes, store_px, store_px, gray_bits=gray_bits)
        return Checked(content, None, largest_gray(file_bytes), has_deep_colours(file_bytes)), pixels_SS3
    except BadImage as error:
        return Checked(content, str(error)), None
    except OSError as error:
        return Checked(content, error.strerror or str(error)), None
