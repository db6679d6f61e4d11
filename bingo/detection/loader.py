"""COCO's images and targets, decoded and resized ahead of use by worker processes, in the order in which they are requested.

A worker receives a path, numbers and a line of text, and keeps no state, so results do not depend on the number of workers. The EXIF
orientation is ignored, as in COCO's tools: its boxes refer to the pixels as stored in the file.
Shape letters: I instances, H and W height and width after resizing, P bytes of a packed line.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bingo.detection.coco import CocoImages, parse_targets
from bingo.images.decode import BadImage, decode_as_stored
from bingo.runtime.errors import UserError
from bingo.runtime.task_loader import Empty, TaskLoader, Work

IMAGES_AHEAD = 2  # for each worker
Item = TypeVar("Item")
_Sample = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class View:
    """A request for one image: its row, its short side (with the long side at most `max_side_px`), flipped or not."""

    row: int
    min_side_px: int
    max_side_px: int
    flip: bool = False


@dataclass(frozen=True)
class Example:
    """One image uint8 (3, H, W) with boxes float32 (I, 4), labels int64 (I,) and masks uint8 (I, H, W), each possibly of no instance."""

    row: int
    image_3HW: Tensor
    boxes_I4: Tensor
    labels_I: Tensor
    masks_IHW: Tensor


@dataclass(frozen=True)
class _CocoTask:
    path: Path
    name: str
    sides_px: tuple[int, int]
    line: str | None
    view: View


def resized_px(height: int, width: int, min_side_px: int, max_side_px: int) -> tuple[int, int]:
    """Height and width with the short side at `min_side_px`, or the long side at `max_side_px` if it would be longer.

    Rounded as by detectron2's ResizeShortestEdge (data/transforms/augmentation_impl.py); never 0.
    """
    scale = min(min_side_px / min(height, width), max_side_px / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


class CocoLoader:
    """Loads views of images; `lines` are their training targets, None to load only images."""

    def __init__(self, images: CocoImages, lines: list[str | None] | None, device: torch.device, workers: int | None = None):
        self._images, self._lines, self._device = images, lines, device
        self._loader = TaskLoader(_Load(), workers, IMAGES_AHEAD, pin=device.type == "cuda")

    def examples(self, views: Iterable[View]) -> Iterator[Example]:
        """The views in order, on the device. Raises UserError naming an image that cannot be read or does not have the size given in the
        annotations."""
        return (example for _, (example,) in self.batches((None, [view]) for view in views))

    def batches(self, items: Iterable[tuple[Item, list[View]]]) -> Iterator[tuple[Item, list[Example]]]:
        """Like `examples`, for batches of views that each come with an item, which is returned with the examples."""
        work = (((item, views), list(map(self._task, views))) for item, views in items)
        for (item, views), samples in self._loader.results(work):
            yield item, list(map(self._example, views, samples))

    def _task(self, view: View) -> _CocoTask:
        line = self._lines[view.row] if self._lines is not None else None
        return _CocoTask(self._images.path(view.row), self._images.name(view.row), self._images.sides_px(view.row), line, view)

    def _example(self, view: View, sample: _Sample | str) -> Example:
        if isinstance(sample, str):
            raise UserError(sample)
        image, boxes, labels, packed = (part.to(self._device, non_blocking=True, copy=True) for part in sample)
        return Example(view.row, image, boxes, labels, unpack(packed, image.shape[2]))


class _Load(Work):
    """The tensors of an image, or one line if it cannot be read."""

    def result(self, task: _CocoTask, empty: Empty) -> _Sample | str:
        try:
            image = decode_as_stored(task.path.read_bytes())
            if (image.height, image.width) != task.sides_px:
                height, width = task.sides_px
                return f"{task.name} is {image.width} x {image.height} pixels, and the annotations say {width} x {height}; restore it"
            return _sample(image, task.line, task.view, empty)
        except (BadImage, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            return f"{task.name} cannot be read ({reason}); restore it"


def _sample(image: Image.Image, line: str | None, view: View, empty: Empty) -> _Sample:
    """A decoded image as image, boxes, labels and packed masks, resized and flipped as requested by `view`."""
    height, width = resized_px(image.height, image.width, view.min_side_px, view.max_side_px)
    boxes, labels, masks = np.empty((0, 4), np.float32), np.empty(0, np.int64), np.empty((0, height, width), np.uint8)
    if line is not None:
        boxes, labels, masks = parse_targets(line, image.height, image.width)
        ys, xs = _nearest(height, image.height), _nearest(width, image.width)
        masks = masks[:, ys[:, None], xs]
        boxes = boxes * np.array([width / image.width, height / image.height] * 2, np.float32)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    if view.flip:
        pixels, masks = pixels[:, ::-1], masks[:, :, ::-1]
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    packed = np.packbits(masks, axis=2)  # an eighth of the shared memory
    image_3HW = empty(3, height, width)
    image_3HW.numpy()[:] = pixels.transpose(2, 0, 1)
    return image_3HW, torch.from_numpy(boxes), torch.from_numpy(labels), torch.from_numpy(packed)


def _nearest(length: int, source: int) -> np.ndarray:
    """For each of `length` pixels the one of `source` pixels under its centre."""
    return ((np.arange(length) + 0.5) * (source / length)).astype(np.int64).clip(0, source - 1)


def unpack(packed_IHP: Tensor, width: int) -> Tensor:
    """Masks uint8 (I, H, width) of 0 and 1 from bits, uint8, first pixel highest, as NumPy packs them."""
    shifts_8 = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed_IHP.device)
    bits_IHP8 = (packed_IHP[..., None] >> shifts_8) & 1
    return bits_IHP8.flatten(2)[..., :width]
