"""The teacher's pass: pooled features of all centre views and keys of random views of the train rows, computed once, in chunks of rows.

A chunk is computed by the process that takes it first, in batches of its own rows, so the result depends neither on the number and
speed of processes nor on interruptions: a chunk that is on the disk is not computed again. Host memory holds two chunks, regardless of
the length of the listing: one is written by a thread while the next is computed. Shape letters: n rows of a chunk, t train rows of a chunk,
D feature width, V views, P key width.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile, tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bingo.embeddings.store import EmbeddingsWriter, create_embeddings, embeddings_fingerprint, open_for_writing
from bingo.images.images import Images
from bingo.images.listing import Listing
from bingo.images.loader import Request, ViewLoader, center_batches
from bingo.nets.precision import autocast
from bingo.params import ExtractParams, image_values
from bingo.runtime import distributed
from bingo.runtime.artefacts import read_json, taken_first, write_bytes, write_json
from bingo.runtime.errors import UserError
from bingo.runtime.progress import Bar, progress_bar
from bingo.teachers.teacher import Teacher

LEAST_SPREAD = 1e-3  # 5e-4 for float16 numbers that differ only by rounding
PURPOSE = "extract"  # for bingo.seeds, with epoch 0 and seed row = row, so that the view of a stored key can be reproduced


def extract_embeddings(
    teacher: Teacher,
    listing: Listing,
    images: Images,
    extract: ExtractParams,
    seed: int,
    state: Path,
    out: Path,
    device: torch.device,
    attrs: Mapping[str, Any],
) -> float:
    """Write the store of `listing` to `out`. Every process of the group calls this with the same arguments except for the device.

    `state` is a folder for the unfinished store and the list of done chunks, kept between calls; `attrs` holds the fingerprint
    `teacher` and further attributes of the store. Returns images per second over all processes, counting every view that passes
    through the teacher as one image. Raises UserError if a feature or key is not finite (with its row), or if all features or
    all keys are nearly equal.
    """
    recipe = {"extract": extract.model_dump(mode="json"), "image": image_values(teacher.image), "seed": seed}
    attrs = {**attrs, "listing": listing.fingerprint, "recipe": recipe}
    store = _Unfinished(state)
    widths = teacher.metadata["feature_width"], extract.views, teacher.metadata["key_width"]
    size = len(listing), listing.train_rows, *widths, extract.chunk_rows
    store.open(lambda path: create_embeddings(path, *size, attrs), embeddings_fingerprint(attrs))
    todo = store.missing_chunks()
    distributed.barrier()  # no process writes before all have looked
    begun = time.monotonic()
    teacher.to(device).to(memory_format=torch.channels_last)
    _Pass(teacher, images, extract, seed, device).run(store, todo)
    distributed.barrier()
    seconds = time.monotonic() - begun
    if distributed.rank() == 0:
        store.publish(out)
    distributed.barrier()
    return _views(store.writer, todo, extract.views) / max(seconds, 1e-9)


def _views(writer: EmbeddingsWriter, chunks: Sequence[int], views: int) -> int:
    """Number of images that the teacher sees for these chunks: one centre view of each row, `views` random views of each train row."""
    return sum(len(writer.rows(chunk)) + views * len(writer.train_rows(chunk)) for chunk in chunks)


class _Pass:
    """Computes chunks on one device, while a thread writes the previous chunk."""

    def __init__(self, teacher: Teacher, images: Images, extract: ExtractParams, seed: int, device: torch.device):
        self.teacher, self.images, self.extract, self.device = teacher, images, extract, device
        self.loader = ViewLoader(images, teacher.image, extract.augment, seed, device)

    def run(self, store: "_Unfinished", chunks: Sequence[int]) -> None:
        """Compute and write those of these chunks that no other process takes first. Both streams of views run over all of them and
        prefetch: the next chunk is taken early, so that prefetching never stops."""
        writer, views = store.writer, self.extract.views
        writing: Future | None = None
        with progress_bar("extract", _views(writer, chunks, views), "images") as bar, ThreadPoolExecutor(1) as thread:
            own, for_centers, for_randoms = tee(self._taken(store, chunks, bar), 3)
            center_rows = (rows_B for chunk in for_centers for rows_B in self._batches(writer.rows(chunk)))
            centers = center_batches(self.images, center_rows, self.teacher.image, self.device)
            trained = takewhile(len, map(writer.train_rows, for_randoms))  # looking further ahead would take all chunks of test rows
            randoms = self.loader.views([request] for rows in trained for request in self._requests(rows))
            for chunk in own:
                features_nD = self._features(writer.rows(chunk), centers, bar)
                keys_tVP = self._keys(writer.train_rows(chunk), randoms, bar)
                if writing is not None:
                    writing.result()  # so that at most two chunks are held
                writing = thread.submit(store.write, chunk, features_nD, keys_tVP)
            if writing is not None:
                writing.result()

    def _taken(self, store: "_Unfinished", chunks: Sequence[int], bar: Bar) -> Iterator[int]:
        """The chunks of this process, taken one by one; the others count as done."""
        for chunk in chunks:
            if taken_first(store.taken / str(chunk)):
                yield chunk
            else:
                bar.advance(_views(store.writer, [chunk], self.extract.views))

    def _batches(self, rows: range) -> list[np.ndarray]:
        """Rows of a chunk in batches; the last one may be short, since no batch crosses the boundary of a chunk."""
        step = self.extract.batch_images
        return [np.arange(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]

    def _requests(self, rows: range) -> Iterator[Request]:
        """All views of a few rows at a time, at most `batch_images` in total (unless V is larger), so that each file is decoded once."""
        views = self.extract.views
        step = max(1, self.extract.batch_images // max(1, views))
        for start in range(rows.start, rows.stop, step):
            rows_B = np.repeat(np.arange(start, min(start + step, rows.stop)), views)
            yield Request(rows_B, rows_B, PURPOSE, 0, np.tile(np.arange(views), len(rows_B) // views))

    @torch.inference_mode()
    def _features(self, rows: range, centers: Iterator[Tensor], bar: Bar) -> np.ndarray:
        """Features of centre views, float32 (n, D)."""
        batches = []  # kept on the device, so that the host need not wait before the chunk is complete
        for _ in self._batches(rows):
            views_B = next(centers)
            with autocast(self.extract.precision, self.device):
                batches.append(self.teacher.features(views_B))
            bar.advance(len(views_B))
        return torch.cat(batches).cpu().numpy()

    @torch.inference_mode()
    def _keys(self, rows: range, randoms: Iterator[list[Tensor]], bar: Bar) -> np.ndarray:
        """Unit keys of random views, float32 (t, V, P)."""
        batches = []
        for _ in self._requests(rows):
            (views_B,) = next(randoms)
            with autocast(self.extract.precision, self.device):
                batches.append(self.teacher.keys(views_B).unflatten(0, (-1, self.extract.views)))
            bar.advance(len(views_B))
        if not batches:
            return np.empty((0, self.extract.views, self.teacher.metadata["key_width"]), np.float32)
        return torch.cat(batches).cpu().numpy()


class _Unfinished:
    """The store being written, and the lists of its chunks on the disk: a file in `done` for each complete chunk, and a file in `taken`
    for each chunk that a process of this run has taken."""

    writer: EmbeddingsWriter

    def __init__(self, state: Path):
        self.path, self.done, self.owner = state / "embeddings.zarr", state / "done", state / "owner.json"
        self.taken = state / "taken"

    def open(self, create: Callable[[Path], object], fingerprint: str) -> None:
        """Resume the store with this fingerprint, or let the first process create an empty store that replaces any other."""
        if distributed.rank() == 0 and not (self.owner.exists() and self.path.exists() and read_json(self.owner) == fingerprint):
            self.owner.unlink(missing_ok=True)  # removed first and written last, so that an incomplete store has no owner
            shutil.rmtree(self.done, ignore_errors=True)
            self.done.mkdir(parents=True)
            create(self.path)
            write_json(self.owner, fingerprint)
        if distributed.rank() == 0:
            shutil.rmtree(self.taken, ignore_errors=True)
            self.taken.mkdir()
        distributed.barrier()
        self.writer = open_for_writing(self.path)

    def missing_chunks(self) -> list[int]:
        """The chunks that are not done, in order."""
        return [c for c in range(self.writer.chunks) if not ((self.done / str(c)).exists() and self.writer.chunk_is_complete(c))]

    def write(self, chunk: int, features_nD: np.ndarray, keys_tVP: np.ndarray) -> None:
        """Write a chunk and, once its files are on the disk, add it to the list. Raises UserError if a number is not finite.

        Its file in `done` holds the `_moments` of its features and of its keys.
        """
        self.writer.write_chunk(chunk, features_nD, keys_tVP)
        for array in ("features", "keys"):
            for file in (self.path / array / "c" / str(chunk)).rglob("*"):
                if file.is_file():
                    with open(file, "rb") as opened:
                        os.fsync(opened.fileno())
        write_bytes(self.done / str(chunk), np.concatenate([_moments(features_nD), _moments(keys_tVP)]).tobytes())

    def publish(self, out: Path) -> None:
        """Check the store and move it to `out` in one rename; `state` keeps it until the caller removes it.

        Raises UserError if a chunk is missing, or if all features or all keys are nearly equal.
        """
        if not self.missing_chunks():
            for kind, images, spread in self._spreads():
                if images > 1 and spread < LEAST_SPREAD:
                    line = f"{out}: the teacher gives all {images} images the same {kind} (they differ by {spread:.1g} of their length)"
                    raise UserError(f"{line}, but they must differ; check teacher.checkpoint, teacher.image.mean/std, and the images")
        self.writer.finish(out)

    def _spreads(self) -> Iterator[tuple[str, int, float]]:
        """For features and for keys: the name, the number of images, and the standard deviation divided by the root mean square."""
        rows = [self.writer.rows(chunk) for chunk in range(self.writer.chunks)]
        train_rows = sum(len(self.writer.train_rows(chunk)) for chunk in range(self.writer.chunks))
        moments = np.sum([np.frombuffer((self.done / str(chunk)).read_bytes()) for chunk in range(self.writer.chunks)], axis=0)
        width = self.writer.feature_width
        for kind, images, part in (("feature", rows[-1].stop, moments[: width + 2]), ("key", train_rows, moments[width + 2 :])):
            count, squares, sums = part[0], part[1], part[2:]
            if count and squares:
                mean_square = squares / count
                yield kind, images, float(np.sqrt(max(0.0, mean_square - ((sums / count) ** 2).sum()) / mean_square))
            else:
                yield kind, images if count else 0, 0.0


def _moments(x: np.ndarray) -> np.ndarray:
    """For vectors in the last dimension, as stored: their number, the sum of squared norms, and their sum; float64 (2 + D,)."""
    x_nD = x.reshape(-1, x.shape[-1]).astype(np.float16).astype(np.float64)
    return np.concatenate([[len(x_nD), (x_nD**2).sum()], x_nD.sum(axis=0)])
