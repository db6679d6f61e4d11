"""Training of a detector: batches of images whose order, size and flips depend on the seed, SGD with a stepped learning rate.

A resumed run uses the same random numbers as an uninterrupted one and on the CPU ends with the same bytes; on a GPU
RoIAlign's gradient is summed in an arbitrary order. Shape letters: B images of one process's share, N rows.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from bingo import seeds
from bingo.detection.coco import CocoImages, DetectionTargets
from bingo.detection.detector import keep_sampling
from bingo.detection.loader import CocoLoader, Example, View
from bingo.nets.precision import autocast
from bingo.params import CocoParams
from bingo.runtime import distributed
from bingo.runtime.checkpoints import Checkpoints, Resumable
from bingo.runtime.errors import UserError
from bingo.runtime.finite import LossWatch
from bingo.runtime.progress import progress_bar
from bingo.schedules import step_lr, steps_in_epoch

CURVE_POINTS = 200
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class DetectionPlan:
    """One step of this process: its views, and a seed for each by which its anchors and regions are sampled."""

    views: list[View]
    sampling_B: list[int]


@dataclass
class DetectionResult:
    """Results of a training in addition to the weights: mean losses over equal spans of steps, and this run's speed."""

    history: list[dict[str, float]] = field(default_factory=list)
    images: int = 0
    seconds: float = 0.0


def steps_per_epoch(rows: int, batch_images: int) -> int:
    """Number of complete batches of images with usable instances. Raises UserError if there is none, or no equal share."""
    if rows == 0:
        way_out = "give annotations of instances with boxes and segmentations that are not all crowds"
        raise UserError(f"transfer_coco.train_annotations: no image has a usable instance; {way_out}")
    return steps_in_epoch(rows, batch_images, "transfer_coco.batch_images", "images with usable instances")


def plan_steps(images: CocoImages, rows_N: np.ndarray, params: CocoParams, seed: int, first: int, last: int) -> Iterator[DetectionPlan]:
    """Steps `first` to `last` - 1 (from 0) on the rows that have targets.

    A batch is sorted by the shape of its images, so that a process's share is mostly landscape or mostly portrait and needs little padding;
    detectron2 groups by shape for the same reason (ASPECT_RATIO_GROUPING).
    """
    per_epoch = steps_per_epoch(len(rows_N), params.batch_images)
    aspect_N = np.array([width / height for height, width in map(images.sides_px, rows_N)])
    for step in range(first, last):
        epoch, position = divmod(step, per_epoch)
        if step == first or position == 0:
            order_N = seeds.permutation(seed, "coco order", epoch, len(rows_N))
        batch = order_N[position * params.batch_images : (position + 1) * params.batch_images]
        batch = batch[np.argsort(aspect_N[batch], kind="stable")]
        yield plan_step(rows_N[distributed.own_share(batch)], params, seed, epoch)


def plan_step(rows_B: np.ndarray, params: CocoParams, seed: int, epoch: int) -> DetectionPlan:
    """The drawn size, flip and sampling seed of each row."""
    u_B3 = seeds.uniforms(seed, "coco view", epoch, rows_B, draws=3)
    sides = [params.min_side_px[int(u * len(params.min_side_px))] for u in u_B3[:, 0]]
    flips = u_B3[:, 1] < params.flip_p
    views = [View(int(row), side, params.max_side_px, bool(flip)) for row, side, flip in zip(rows_B, sides, flips, strict=True)]
    return DetectionPlan(views, [int(u * 2**53) for u in u_B3[:, 2]])


@contextmanager
def compiled_roi_align(device: torch.device) -> Iterator[None]:
    """Disable deterministic algorithms in the body: with them, torchvision's RoIAlign takes many times the memory on a GPU."""
    wanted = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted, warn_only=device.type == "cuda")


def sgd(detector: nn.Module, params: CocoParams) -> torch.optim.SGD:
    """SGD with momentum; normalisation layers have no weight decay, as in detectron2 (WEIGHT_DECAY_NORM 0)."""
    norms = [p for module in detector.modules() if isinstance(module, _NORMS) for p in module.parameters(recurse=False)]
    known = {id(p) for p in norms}
    others = [p for p in detector.parameters() if id(p) not in known]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=params.lr, momentum=params.sgd_momentum, weight_decay=params.weight_decay, fused=True)


class DetectorTrainer(Resumable):
    """Trains a detector of `build_detector` on one process group; `schedule` is one of `params.schedules`."""

    def __init__(
        self,
        detector: GeneralizedRCNN,
        images: CocoImages,
        targets: DetectionTargets,
        params: CocoParams,
        schedule: list[int],
        seed: int,
        device: torch.device,
        checkpoints: Checkpoints,
        label: str = "detection",
        workers: int | None = None,
    ):
        if params.sync_batchnorm and device.type == "cuda" and distributed.world() > 1:
            detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
        self.detector = detector.to(device)
        cast(Any, detector.rpn).anchor_generator.set_cell_anchors(torch.float32, device)
        self.images, self.rows_N, self.params, self.seed, self.device = images, targets.rows, params, seed, device
        *self.drop_steps, self.total_steps = schedule
        self.checkpoints, self.label = checkpoints, label
        steps_per_epoch(len(self.rows_N), params.batch_images)
        self.loader = CocoLoader(images, targets.lines, device, workers)
        self.optimizer, self.watch = sgd(detector, params), LossWatch(device)
        self.network = distributed.data_parallel(self.detector, device)
        self.step, self.sums, self.summed, self.result = 0, dict[str, Tensor](), 0, DetectionResult()
        self.history: list[dict[str, float]] = []
        self.parts, self.values = {"detector": self.detector, "optimizer": self.optimizer}, ("step", "sums", "summed", "history")

    def run(self) -> DetectionResult:
        """Train to the end, from the last checkpoint if there is one; all processes then hold the same network.

        Raises Interrupted after SIGTERM or SIGINT, with a checkpoint, and UserError for a loss that is not finite, before it is saved.
        """
        self._resume()
        self.log.begin(self.step, self.total_steps, self.params.batch_images, "images")
        begun = time.monotonic()
        progress = progress_bar(self.label, self.total_steps * self.params.batch_images, "images")
        with self.checkpoints.stop_requests(), progress as bar, compiled_roi_align(self.device):
            bar.resume_at(self.step * self.params.batch_images)
            self._steps(bar)
        self.result.history, self.result.seconds = self.history, time.monotonic() - begun
        distributed.share_buffers(self.detector)
        return self.result

    def _steps(self, bar: Any) -> None:
        self.detector.train()
        for plan, batch in self._batches():
            self._train_step(plan, batch)
            self.step += 1
            self.result.images += self.params.batch_images
            bar.advance_to(self.step * self.params.batch_images)
            if self.step % max(1, self.total_steps // CURVE_POINTS) == 0 or self.step == self.total_steps:
                self._record()
            self._checkpoint_if_due()

    def _batches(self) -> Iterator[tuple[DetectionPlan, list[Example]]]:
        plans = plan_steps(self.images, self.rows_N, self.params, self.seed, self.step, self.total_steps)
        return self.loader.batches((plan, plan.views) for plan in plans)

    def _train_step(self, plan: DetectionPlan, batch: list[Example]) -> None:
        rate = step_lr(self.step, self.params.lr, self.drop_steps, warmup_steps=self.params.lr_warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        keep_sampling(self.detector, plan.sampling_B)
        targets = [{"boxes": example.boxes_I4, "labels": example.labels_I, "masks": example.masks_IHW} for example in batch]
        with autocast(self.params.precision, self.device):
            losses = self.network([example.image_3HW.float() / 255 for example in batch], targets)
        loss = torch.stack(list(losses.values())).sum()
        self._watch_loss(loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._log_step({"loss": loss, **losses})
        self.optimizer.step()
        self.summed += 1
        for name, value in {"loss": loss, **losses}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def way_out(self, step: int) -> str:
        return f"lower transfer_coco.lr (now {self.params.lr})" if step else "look at image.std and at the student's weights"

    def _record(self) -> None:
        """Write a point of the curves: means over the steps since the last point and over all processes."""
        self._refuse_what_is_not_finite()
        record = {"step": self.step, "lr": self.optimizer.param_groups[0]["lr"]}
        means = {name: round(float(distributed.mean(value / self.summed)), 6) for name, value in self.sums.items()}
        self.history.append(record | means)
        self.log.summary(self.step, "mean", means)
        self.sums, self.summed = {}, 0
