"""Worker processes that decode image files ahead of use. Each image of a plan is decoded once for all its views.

A worker receives paths and random numbers, keeps no state, and returns uint8 crops, so views do not depend on the number of workers.
If a GPU decodes JPEG files, a worker returns those that nvJPEG can read undecoded, and crops of the others.
Processes are used instead of threads, because decoding in Python would hold the GIL that the training thread needs.
Shape letters: T views of a plan, t views of one size in a task, V views of one image, P side of a view in pixels.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from bingo.images.decode import BadImage, Header, decode_square, is_plain_baseline, read_header
from bingo.images.decode_crops import CropsWanted, decode_crops, may_shrink
from bingo.images.draws import Crops, crop_boxes
from bingo.images.images import FileImages
from bingo.params import ImageParams
from bingo.runtime.errors import UserError
from bingo.runtime.task_loader import Empty, TaskLoader, Work

IMAGES_PER_TASK = 32  # decoded by one worker at a time: a few megabytes of shared memory, about 0.1 s for photos of 500 x 375
TASKS_AHEAD = 2  # for each worker


@dataclass(frozen=True)
class DecodePlan:
    """T views to be decoded: the listing rows of their images, int64 (T,), and their crops; None for centre views. `kinds`: the sizes of
    the views; `kind_T`: which of these each view has, int64 (T,); None: all have the first."""

    image_rows_T: np.ndarray
    crops: Crops | None
    kinds: Sequence[ImageParams]
    kind_T: np.ndarray | None = None


AnyPlan = TypeVar("AnyPlan", bound=DecodePlan)


@dataclass(frozen=True)
class _DecodeTask:
    """Some images of a plan, `files`, of the listing's `rows`. Image i feeds views `starts[i]`..`starts[i + 1]` of `crops`, or one centre
    view. View t is as `images[kind_T[t]]` says."""

    files: FileImages
    rows: list[int]
    starts: list[int]
    crops: Crops | None
    images: Sequence[ImageParams]
    kind_T: np.ndarray


class _Result(NamedTuple):
    """What a worker makes of a task: crops of each size, uint8 (t, P, P, 3), without those of the images `left_U` (int64), whose files,
    `lengths_U` bytes each, are left in `files` (uint8), with the boxes of all views, int64 (T, 4). Or `lines`: the reasons, one line
    each, if images cannot be read."""

    lines: list[str]
    views: list[Tensor]
    files: Tensor
    left_U: list[int]
    lengths_U: list[int]
    boxes_T4: np.ndarray


@dataclass(frozen=True)
class Decoded:
    """The crops of a task, some of them still to be made from JPEG files by a GPU."""

    task: _DecodeTask
    result: _Result

    def on(self, device: torch.device) -> list[Tensor]:
        """The crops of each size on `device`, uint8 (t, P, P, 3). Raises UserError naming path and row of unreadable images."""
        views, lines = [part.to(device, non_blocking=True) for part in self.result.views], list[str]()
        if not self.result.left_U:
            return views
        from bingo.images.nvjpeg import crops_of_pixels, decode_on  # here, as releases of torchvision after 0.29 are to have no decoder

        files = self.result.files.split(self.result.lengths_U)
        wanted = _wanted(self.task, self.result.boxes_T4, views)
        for i, file, image_3HW in zip(self.result.left_U, files, decode_on(device, files), strict=True):
            if image_3HW is not None:
                crops_of_pixels(image_3HW, wanted[i])
                continue
            with _unreadable_noted(self.task, i, lines):
                content = file.numpy().tobytes()
                decode_crops(content, read_header(content), wanted[i], self.task.files.gray_bits)
        if lines:
            raise UserError(lines)
        return views


class FileDecoder:
    """Decodes plans in order, some tasks ahead, in `workers` processes (0: in this process, when needed)."""

    def __init__(self, images: FileImages, workers: int | None, pin: bool):
        self._images = images
        self._loader = TaskLoader(_Decode(), workers, TASKS_AHEAD, pin)

    def batches(self, plans: Iterable[AnyPlan]) -> Iterator[tuple[AnyPlan, list[Decoded], list[np.ndarray]]]:
        """Each plan with its tasks in the order of images and, for each size, the position of each view of that size, int64.

        The crops of a kind in all `task.on(device)`, joined by `torch.cat` and indexed with its positions, are the plan's views of that
        kind in order. Raises UserError naming path and row of unreadable images.
        """
        for (plan, places, tasks), results in self._loader.results(map(self._work, plans)):
            for result in results:
                if result.lines:
                    raise UserError(result.lines)
            yield plan, [Decoded(task, result) for task, result in zip(tasks, results, strict=True)], places

    def _work(self, plan: AnyPlan) -> tuple[tuple[AnyPlan, list[np.ndarray], list[_DecodeTask]], list[_DecodeTask]]:
        """A plan, for each size the positions of its views, and its tasks; the tasks again, as work."""
        order_T = np.argsort(plan.image_rows_T, kind="stable")
        kind_T = np.zeros(len(order_T), np.int64) if plan.kind_T is None else plan.kind_T
        rows_U, starts_U = np.unique(plan.image_rows_T[order_T], return_index=True)
        ends_U = np.append(starts_U[1:], len(order_T))
        tasks = []
        for first in range(0, len(rows_U), IMAGES_PER_TASK):
            part = slice(first, first + IMAGES_PER_TASK)
            start, end = int(starts_U[part][0]), int(ends_U[part][-1])
            crops = None if plan.crops is None else plan.crops[order_T[start:end]]
            starts = [*(starts_U[part] - start).tolist(), end - start]
            rows = rows_U[part].tolist()
            tasks.append(_DecodeTask(self._images.part(rows), rows, starts, crops, plan.kinds, kind_T[order_T[start:end]]))
        places = [np.argsort(order_T[kind_T[order_T] == kind]) for kind in range(len(plan.kinds))]
        return (plan, places, tasks), tasks


class _Decode(Work):
    """Decoding of some images."""

    def result(self, task: _DecodeTask, empty: Empty) -> _Result:
        lines: list[str] = []
        views = [empty((task.kind_T == kind).sum(), image.crop_px, image.crop_px, 3) for kind, image in enumerate(task.images)]
        files: list[tuple[int, bytes, Header]] = []
        for i in range(len(task.files)):
            with _unreadable_noted(task, i, lines):
                content = task.files.read(i)
                files.append((i, content, read_header(content)))
        boxes_T4 = _boxes(task, {i: header for i, _, header in files})
        wanted = [] if task.crops is None else _wanted(task, boxes_T4, views)
        left: list[tuple[int, bytes]] = []
        for i, content, header in files:
            with _unreadable_noted(task, i, lines):
                if task.crops is None:
                    image = task.images[0]
                    square_PP3 = decode_square(content, image.resize_px, image.crop_px, image.interpolation, task.files.gray_bits)
                    views[0][task.starts[i] : task.starts[i + 1]] = torch.from_numpy(square_PP3.copy())
                    continue
                if task.files.jpeg_decoder == "gpu" and header.plain_jpeg and may_shrink(wanted[i]) < 2 and is_plain_baseline(content):
                    left.append((i, content))
                else:
                    decode_crops(content, header, wanted[i], task.files.gray_bits)
        together = torch.from_numpy(np.frombuffer(bytearray(b"".join(content for _, content in left)), np.uint8))
        return _Result(lines, views, together, [i for i, _ in left], [len(content) for _, content in left], boxes_T4)


def _wanted(task: _DecodeTask, boxes_T4: np.ndarray, views: Sequence[Tensor]) -> list[list[CropsWanted]]:
    """For each of the task's images, the crops of each kind that it has."""
    assert task.crops is not None
    wanted = [list[CropsWanted]() for _ in task.starts[1:]]
    for kind, image in enumerate(task.images):
        rows_t = np.flatnonzero(task.kind_T == kind)
        boxes_t4, flip_t = boxes_T4[rows_t], task.crops.flip_B[rows_t]
        for i, (start, end) in enumerate(pairwise(np.searchsorted(rows_t, task.starts).tolist())):
            if start < end:
                wanted[i].append(CropsWanted(boxes_t4[start:end], flip_t[start:end], views[kind][start:end], image.interpolation))
    return wanted


def _boxes(task: _DecodeTask, headers: dict[int, Header]) -> np.ndarray:
    """Each view's box, int64 (T, 4), all drawn at once; arbitrary for images that cannot be read."""
    if task.crops is None:
        return np.empty((0, 4), np.int64)
    views_U = np.diff(task.starts)
    sizes_U2 = [(headers[i].height, headers[i].width) if i in headers else (1, 1) for i in range(len(views_U))]
    heights_T, widths_T = np.repeat(np.array(sizes_U2), views_U, axis=0).T
    return crop_boxes(task.crops, heights_T, widths_T)


@contextmanager
def _unreadable_noted(task: _DecodeTask, i: int, lines: list[str]) -> Iterator[None]:
    """Add a line if the task's i-th file cannot be read."""
    try:
        yield
    except (BadImage, OSError) as error:
        undecodable = isinstance(error, BadImage)
        reason = str(error) if undecodable else getattr(error, "strerror", None) or str(error)
        # If scan has read only headers, scanning again would not find the file.
        way_out = (
            "set dataset.check: decode, with which scan finds such files, and run: dvc repro" if undecodable else "run: dvc repro -f scan"
        )
        name, packed = f"{task.files.paths[i]} (row {task.rows[i]})", task.files.positions is not None and task.files.positions.in_store
        where = os.path.relpath(task.files.root) if packed else "dataset.root"
        lines.append(f"{where}: {name} can no longer be read ({reason}); restore it, or {way_out}")
