"""Batches of views on the device, for training (random views by seed row) and for features (centre views in row order).

The same seed row, purpose, epoch and view give the same pixels for every caller, number of workers and batch, so that a view of the teacher
can be reproduced. The exception is a JPEG file far larger than its crops: it is decoded at a reduced size that suits all views requested
together (bingo/images/decode.py), so a view requested alone may differ by about 1/100 of a pixel's standard deviation.

Shape letters: B views of a request, T views of a plan (all its requests), P side of a view in pixels.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from bingo.images.augment import center_view, cropped_views, random_views, to_unit
from bingo.images.colours import normalize
from bingo.images.decoding import AnyPlan, Decoded, DecodePlan, FileDecoder
from bingo.images.draws import Colours, Crops, draw_views, join_colours, join_crops
from bingo.images.images import Images, MemoryImages
from bingo.images.uploads import upload
from bingo.params import AugmentParams, ImageParams
from bingo.runtime.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Request:
    """B random views: of images `image_rows_B` (int64), their randomness a function of (purpose, epoch, seed row, view).

    The seed row is the image's own row, unless two images are to have the same crop and colours. `augment`: replaces the loader's
    augmentation. `for_teacher`: rendered as set by the loader's `teacher_image`. `crop_px`: replaces the side in pixels.
    """

    image_rows_B: np.ndarray
    seed_rows_B: np.ndarray
    purpose: str
    epoch: int
    view_B: int | np.ndarray
    augment: AugmentParams | None = None
    for_teacher: bool = False
    crop_px: int | None = None


class ViewLoader:
    """Random views of `images` on `device`. `workers` (None: chosen automatically) is used only for files.

    `augment` is the default augmentation of requests; `teacher_image` sets the size and the normalisation of requests for the teacher,
    which have the same crop, rotation, flip and colours (the blur's sigma is in pixels of each view); `wait_seconds` is the total time
    that the consumer has waited for files or, on the CPU, for views to be computed.
    """

    def __init__(
        self,
        images: Images,
        image: ImageParams,
        augment: AugmentParams,
        seed: int,
        device: torch.device,
        workers: int | None = None,
        teacher_image: ImageParams | None = None,
    ):
        self.wait_seconds = 0.0
        self.augment, self.image, self.teacher_image = augment, image, teacher_image
        self._images, self._seed, self._device = images, seed, device
        self._decoder: FileDecoder | None = None
        if not isinstance(images, MemoryImages):
            if images.jpeg_decoder == "gpu" and device.type != "cuda":
                raise UserError("dataset.jpeg_decoder = gpu: this process runs on the CPU; set dataset.jpeg_decoder: cpu, or run on a GPU")
            self._decoder = FileDecoder(images, workers, pin=device.type == "cuda")

    def views(self, plans: Iterable[list[Request]]) -> Iterator[list[Tensor]]:
        """For each plan one normalised float32 (B, 3, P, P) channels_last tensor for each request, in order.

        Plans are read ahead of use. Raises UserError with path and row if a file can no longer be read.
        """
        return (views for _, views in self.items_with_views((None, plan) for plan in plans))

    def items_with_views(self, items: Iterable[tuple[Item, list[Request]]]) -> Iterator[tuple[Item, list[Tensor]]]:
        """Like `views`, for pairs of an item and a plan; the item is returned with the views."""
        source = self._from_memory(items) if self._decoder is None else self._from_files(self._decoder, items)
        while True:
            asked = time.perf_counter()
            found = next(source, None)
            self.wait_seconds += time.perf_counter() - asked
            if found is None:
                return
            yield found

    def _draw(self, request: Request) -> tuple[Crops, Colours]:
        drawn_by = (request.purpose, request.epoch, request.seed_rows_B, request.view_B)
        return draw_views(self._family(request), self._seed, *drawn_by)

    def _family(self, request: Request) -> AugmentParams:
        return request.augment or self.augment

    def _seen(self, request: Request) -> ImageParams:
        image = self.teacher_image if request.for_teacher and self.teacher_image is not None else self.image
        return image if request.crop_px is None else image.model_copy(update={"crop_px": request.crop_px})

    def _from_memory(self, items: Iterable[tuple[Item, list[Request]]]) -> Iterator[tuple[Item, list[Tensor]]]:
        for item, plan in items:
            groups = groupby(plan, lambda request: (self._family(request), self._seen(request)))
            together = [self._memory_views(list(requests), *kind) for kind, requests in groups]
            yield item, [views_B3PP for views in together for views_B3PP in views]

    def _memory_views(self, requests: list[Request], family: AugmentParams, image: ImageParams) -> Sequence[Tensor]:
        """Views of consecutive requests with one augmentation and size, computed together, because on a GPU a small batch costs mainly its
        calls."""
        assert isinstance(self._images, MemoryImages)
        rows_T = np.concatenate([request.image_rows_B for request in requests])
        crops, colours = zip(*(self._draw(request) for request in requests), strict=True)
        views_T3PP = random_views(self._images.on_device(self._device), rows_T, join_crops(crops), join_colours(colours), family, image)
        return views_T3PP.split([len(request.image_rows_B) for request in requests])

    def _from_files(self, decoder: FileDecoder, items: Iterable[tuple[Item, list[Request]]]) -> Iterator[tuple[Item, list[Tensor]]]:
        for plan, kinds in _on_device(decoder.batches(self._drawn(*pair) for pair in items), self._device):
            yield plan.item, self._file_views(plan, kinds)

    def _file_views(self, plan: "_DrawnPlan[Item]", kinds: list[Tensor]) -> list[Tensor]:
        """The views of a plan's requests from their crops of each size, uint8 (T, P, P, 3); consecutive ones together, as in memory."""
        views, begins = list[Tensor](), [0] * len(kinds)
        drawn = zip(plan.requests, plan.kind_of_request, plan.colours, strict=True)
        for (kind, family), group in groupby(drawn, lambda one: (one[1], self._family(one[0]))):
            requests, _, colours = zip(*group, strict=True)
            counts = [len(request.image_rows_B) for request in requests]
            crops_TPP3 = kinds[kind][begins[kind] :][: sum(counts)]
            begins[kind] += sum(counts)
            views += cropped_views(crops_TPP3, join_colours(colours), family, plan.kinds[kind]).split(counts)
        return views

    def _drawn(self, item: Item, requests: list[Request]) -> "_DrawnPlan[Item]":
        crops, colours = zip(*(self._draw(request) for request in requests), strict=True)
        rows_T = np.concatenate([request.image_rows_B for request in requests])
        seen = [self._seen(request) for request in requests]
        kinds = [image for i, image in enumerate(seen) if image not in seen[:i]]
        numbers = [kinds.index(image) for image in seen]
        kind_T = np.repeat(numbers, [len(request.image_rows_B) for request in requests])
        return _DrawnPlan(rows_T, join_crops(crops), kinds, kind_T, item=item, requests=requests, kind_of_request=numbers, colours=colours)


@dataclass(frozen=True)
class _DrawnPlan(DecodePlan, Generic[Item]):
    """Requests in the form that the decoder needs, with the number of each request's size in `kinds`, and its colours."""

    item: Item = field(kw_only=True)
    requests: list[Request] = field(kw_only=True)
    kind_of_request: list[int] = field(kw_only=True)
    colours: Sequence[Colours] = field(kw_only=True)


def center_views(
    images: Images, rows_N: ArrayLike, image: ImageParams, device: torch.device, batch_images: int, workers: int | None = None
) -> Iterator[Tensor]:
    """Centre views of the listing rows `rows_N` in that order, `batch_images` at a time: normalised float32 (b, 3, P, P).

    Raises UserError with path and row if a file can no longer be read.
    """
    rows_N = np.asarray(rows_N, np.int64)
    batches = [rows_N[start : start + batch_images] for start in range(0, len(rows_N), batch_images)]
    return center_batches(images, batches, image, device, workers)


def center_batches(
    images: Images, batches: Iterable[np.ndarray], image: ImageParams, device: torch.device, workers: int | None = None
) -> Iterator[Tensor]:
    """Centre views of batches of listing rows, int64 (b,) each, read ahead of use, as returned by `center_views`."""
    if isinstance(images, MemoryImages):
        for rows_B in batches:
            yield center_view(_gather(images, rows_B, device), image)
        return
    decoder = FileDecoder(images, workers, pin=device.type == "cuda")
    for _, (x_BPP3,) in _on_device(decoder.batches(DecodePlan(rows_B, None, [image]) for rows_B in batches), device):
        yield normalize(to_unit(x_BPP3), image)


def _gather(images: Images, rows_B: np.ndarray, device: torch.device) -> Tensor:
    """Images of these rows, uint8 (B, S, S, 3)."""
    assert isinstance(images, MemoryImages)
    return images.on_device(device).index_select(0, upload(rows_B, device))


Found = tuple[AnyPlan, list[Decoded], list[np.ndarray]]


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """A GPU's stream for copies, created once, because torch keeps memory that a stream has freed only for that stream."""
    return torch.cuda.Stream(device)


def _on_device(batches: Iterable[Found[AnyPlan]], device: torch.device) -> Iterator[tuple[AnyPlan, list[Tensor]]]:
    """Each plan with its views of each size in order, uint8 (T, P, P, 3). A GPU copies them on a separate stream, in parallel with the
    running step."""
    if device.type != "cuda":
        for plan, tasks, places in batches:
            yield plan, _in_order(tasks, places, device)
        return
    beside = _copying_stream(device)
    for plan, tasks, places in batches:
        with torch.cuda.stream(beside):
            views = _in_order(tasks, places, device)
        here = torch.cuda.current_stream(device)
        here.wait_stream(beside)
        for x_TPP3 in views:
            x_TPP3.record_stream(here)
        yield plan, views


def _in_order(tasks: Sequence[Decoded], places: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The views of each size in the plan's order, uint8 (T, P, P, 3)."""
    parts = zip(*(task.on(device) for task in tasks), strict=True)
    return [torch.cat(kind).index_select(0, upload(places_T, device)) for kind, places_T in zip(parts, places, strict=True)]
