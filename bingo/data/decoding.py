"""Worker processes that decode image files ahead of use: one decode for each image and plan, whatever number of views it feeds.

A worker gets paths and random numbers, keeps nothing, and gives back uint8 crops, so views do not depend on how many there are.
Processes, not threads: the Python part of decoding would hold the interpreter's lock that the training thread needs to launch.
Shape letters: T views of a plan, V views of one image, P side of a view in pixels.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bingo.data.decode import BadImage, decode_crops, decode_square
from bingo.data.draws import Crops, crop_boxes
from bingo.data.images import FileImages
from bingo.data.inside import path_inside
from bingo.data.task_loader import TaskLoader
from bingo.errors import UserError
from bingo.params import ImageParams

IMAGES_PER_TASK = 32  # what one worker decodes at a time: a few megabytes of shared memory, about 0.1 s of 500 x 375 photos
TASKS_AHEAD = 2  # for each worker


@dataclass(frozen=True)
class Plan:
    """T views to be decoded: the listing rows of their images, int64 (T,), and their crops; None for centre views."""

    image_rows_T: np.ndarray
    crops: Crops | None


@dataclass(frozen=True)
class _Task:
    """Some images of a plan. Image i feeds views `starts[i]`..`starts[i + 1]` of `crops`, or one centre view."""

    root: str
    paths: list[str]
    rows: list[int]
    starts: list[int]
    crops: Crops | None
    image: ImageParams


class FileDecoder:
    """Decodes plans in order, some tasks ahead, in `workers` processes (0: in this one, at use)."""

    def __init__(self, images: FileImages, image: ImageParams, workers: int | None, pin: bool):
        self._images, self._image = images, image
        self._loader = TaskLoader(_Decode(), workers, TASKS_AHEAD, pin)

    def batches(self, plans: Iterable[Plan]) -> Iterator[tuple[list[Tensor], np.ndarray]]:
        """For each plan: its crops in parts, uint8 (t, P, P, 3), in the order of images, and where each view stands, int64 (T,).

        `torch.cat(parts)[places_T]` are the plan's views in order. Raises UserError naming path and row of unreadable images.
        """
        pending: deque[tuple[int, np.ndarray]] = deque()
        parts: list[Tensor] = []
        for result in self._loader.results(self._tasks(plans, pending)):
            if not isinstance(result, Tensor):
                raise UserError(result)
            parts.append(result)
            count, places_T = pending[0]
            if len(parts) == count:
                pending.popleft()
                yield parts, places_T
                parts = []

    def _tasks(self, plans: Iterable[Plan], pending: deque[tuple[int, np.ndarray]]) -> Iterator[_Task]:
        """The tasks of each plan; `pending` receives how many they are and where each view will stand."""
        for plan in plans:
            order_T = np.argsort(plan.image_rows_T, kind="stable")
            rows_U, starts_U = np.unique(plan.image_rows_T[order_T], return_index=True)
            ends_U = np.append(starts_U[1:], len(order_T))
            firsts = range(0, len(rows_U), IMAGES_PER_TASK)
            pending.append((len(firsts), np.argsort(order_T)))
            for first in firsts:
                part = slice(first, first + IMAGES_PER_TASK)
                start, end = int(starts_U[part][0]), int(ends_U[part][-1])
                crops = None if plan.crops is None else plan.crops[order_T[start:end]]
                starts = [*(starts_U[part] - start).tolist(), end - start]
                yield self._task(rows_U[part].tolist(), starts, crops)

    def _task(self, rows: list[int], starts: list[int], crops: Crops | None) -> _Task:
        paths = [self._images.paths[row] for row in rows]
        return _Task(self._images.root, paths, rows, starts, crops, self._image)


class _Decode(Dataset):
    """A task as index, its crops as item; reasons, one line each, where images cannot be read."""

    def __getitem__(self, task: _Task) -> Tensor | list[str]:
        views_VPP3, lines = [], []
        for i, (path, row) in enumerate(zip(task.paths, task.rows, strict=True)):
            try:
                views_VPP3.append(_image_views(task, i, path_inside(task.root, path).read_bytes()))
            except (BadImage, OSError) as error:
                reason = str(error) if isinstance(error, BadImage) else error.strerror or str(error)
                lines.append(f"dataset.root: {path} (row {row}) can no longer be read ({reason}); restore it, or run: dvc repro -f scan")
        return lines or torch.from_numpy(np.concatenate(views_VPP3))


def _image_views(task: _Task, i: int, file_bytes: bytes) -> np.ndarray:
    """The views of a task's i-th image, uint8 (V, P, P, 3)."""
    start, end = task.starts[i], task.starts[i + 1]
    if task.crops is None:
        center_PP3 = decode_square(file_bytes, task.image.resize_px, task.image.crop_px)
        return np.broadcast_to(center_PP3, (end - start, *center_PP3.shape))
    crops = task.crops[start:end]
    boxes = partial(crop_boxes, crops)
    return decode_crops(file_bytes, boxes, crops.flip_B, task.image.crop_px)
