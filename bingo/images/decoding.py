"""Worker processes that decode image files ahead of use. Each image of a plan is decoded once for all its views.

A worker receives paths and random numbers, keeps no state, and returns uint8 crops, so views do not depend on the number of workers.
Processes are used instead of threads, because decoding in Python would hold the GIL that the training thread needs.
Shape letters: T views of a plan, V views of one image, P side of a view in pixels.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bingo.images.decode import BadImage, Header, decode_square, read_header
from bingo.images.decode_crops import decode_crops
from bingo.images.draws import Crops, crop_boxes
from bingo.images.images import FileImages
from bingo.params import ImageParams
from bingo.runtime.errors import UserError
from bingo.runtime.inside import path_inside
from bingo.runtime.task_loader import TaskLoader

IMAGES_PER_TASK = 32  # decoded by one worker at a time: a few megabytes of shared memory, about 0.1 s for photos of 500 x 375
TASKS_AHEAD = 2  # for each worker


@dataclass(frozen=True)
class DecodePlan:
    """T views to be decoded: the listing rows of their images, int64 (T,), and their crops; None for centre views."""

    image_rows_T: np.ndarray
    crops: Crops | None


AnyPlan = TypeVar("AnyPlan", bound=DecodePlan)


@dataclass(frozen=True)
class _DecodeTask:
    """Some images of a plan. Image i feeds views `starts[i]`..`starts[i + 1]` of `crops`, or one centre view."""

    root: str
    paths: list[str]
    rows: list[int]
    starts: list[int]
    crops: Crops | None
    image: ImageParams
    follow_links: bool
    gray_bits: int | None


class FileDecoder:
    """Decodes plans in order, some tasks ahead, in `workers` processes (0: in this one, at use)."""

    def __init__(self, images: FileImages, image: ImageParams, workers: int | None, pin: bool):
        self._images, self._image = images, image
        self._loader = TaskLoader(_Decode(), workers, TASKS_AHEAD, pin)

    def batches(self, plans: Iterable[AnyPlan]) -> Iterator[tuple[AnyPlan, list[Tensor], np.ndarray]]:
        """Each plan with its crops in parts, uint8 (t, P, P, 3), in the order of images, and the position of each view, int64 (T,).

        `torch.cat(parts)[places_T]` are the plan's views in order. Raises UserError naming path and row of unreadable images.
        """
        for (plan, places_T), parts in self._loader.results(map(self._work, plans)):
            for part in parts:
                if not isinstance(part, Tensor):
                    raise UserError(part)
            yield plan, parts, places_T

    def _work(self, plan: AnyPlan) -> tuple[tuple[AnyPlan, np.ndarray], list[_DecodeTask]]:
        """A plan and the position of each of its views, with its tasks."""
        order_T = np.argsort(plan.image_rows_T, kind="stable")
        rows_U, starts_U = np.unique(plan.image_rows_T[order_T], return_index=True)
        ends_U = np.append(starts_U[1:], len(order_T))
        tasks = []
        for first in range(0, len(rows_U), IMAGES_PER_TASK):
            part = slice(first, first + IMAGES_PER_TASK)
            start, end = int(starts_U[part][0]), int(ends_U[part][-1])
            crops = None if plan.crops is None else plan.crops[order_T[start:end]]
            tasks.append(self._task(rows_U[part].tolist(), [*(starts_U[part] - start).tolist(), end - start], crops))
        return (plan, np.argsort(order_T)), tasks

    def _task(self, rows: list[int], starts: list[int], crops: Crops | None) -> _DecodeTask:
        paths = [self._images.paths[row] for row in rows]
        images = self._images
        return _DecodeTask(images.root, paths, rows, starts, crops, self._image, images.follow_links, images.gray_bits)


class _Decode(Dataset):
    """A dataset whose index is a task and whose item is its crops, or the reasons, one line each, if images cannot be read."""

    def __getitem__(self, task: _DecodeTask) -> Tensor | list[str]:
        crop_px, interpolation = task.image.crop_px, task.image.interpolation
        lines: list[str] = []
        views_TPP3 = torch.empty((task.starts[-1], crop_px, crop_px, 3), dtype=torch.uint8)
        files: list[tuple[int, bytes, Header]] = []
        for i in range(len(task.paths)):
            with _unreadable_noted(task, i, lines):
                content = path_inside(task.root, task.paths[i], task.follow_links).read_bytes()
                files.append((i, content, read_header(content)))
        boxes_T4 = _boxes(task, {i: header for i, _, header in files})
        for i, content, header in files:
            views = slice(task.starts[i], task.starts[i + 1])
            with _unreadable_noted(task, i, lines):
                if task.crops is None:
                    square_PP3 = decode_square(content, task.image.resize_px, crop_px, interpolation, task.gray_bits)
                    views_TPP3[views] = torch.from_numpy(square_PP3.copy())
                else:
                    crops = boxes_T4[views], task.crops.flip_B[views], views_TPP3[views]
                    decode_crops(content, header, *crops, interpolation, task.gray_bits)
        return lines or views_TPP3


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
        name = f"{task.paths[i]} (row {task.rows[i]})"
        lines.append(f"dataset.root: {name} can no longer be read ({reason}); restore it, or {way_out}")
