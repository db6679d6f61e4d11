"""Build a training as in a run, but with synthetic images, keys, features and bags, to check that it works and to measure its cost.

It runs on the CPU in float32, regardless of the parameters. Shape letters: T synthetic train rows, V stored views, P key width,
D feature width, K bag size.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bingo import seeds
from bingo.bags.index import Bags
from bingo.images.images import MemoryImages
from bingo.images.loader import ViewLoader
from bingo.methods.contract import Batch, Method
from bingo.nets.backbones import Backbone, build_backbone, check_images
from bingo.nets.heads import mlp_head
from bingo.params import Params, ScheduleParams, image_values
from bingo.runtime.checkpoints import Checkpoints
from bingo.teachers.reading.sources import make_teacher, published_key_width
from bingo.teachers.teacher import Teacher
from bingo.training.assembly import TrainingSetup, baseline, distillation, pretraining
from bingo.training.batches import Batches, Stored
from bingo.training.loop import Trainer
from bingo.training.narrow_keys import narrowing_head

CPU = torch.device("cpu")
_ROWS = 64
_MOST_ROWS = 65536
_IMAGE_PX = 8  # side of the synthetic images, which are enlarged to views of image.crop_px


@dataclass(frozen=True)
class DryTraining:
    """A method on synthetic data, its training setup, and the images of one step."""

    name: str
    method: Method
    schedule: ScheduleParams
    loader: ViewLoader
    seed: int
    bags: Bags | None
    stored: Stored | None

    @property
    def anchors(self) -> int:
        """The number of anchors in a step: BatchNorm needs two images."""
        return 1 if self.method.needs.companions else 2

    def batch(self, anchors: int) -> Batch:
        """One batch of `anchors` anchors."""
        return next(self._batches(anchors).epoch(0, 0))

    def _batches(self, anchors: int) -> Batches:
        """Epochs of a single batch."""
        return Batches(self.method.needs, self.loader, self.seed, anchors, anchors, self.bags, self.stored)

    def step(self) -> dict[str, float]:
        """One step of the real training loop: the loss terms. Raises UserError if the loss is not finite."""
        once = {
            "epochs": 1,
            "batch_anchors": self.anchors,
            "accumulate_steps": 1,
            "batchnorm_groups": 1,
            "lr_warmup_epochs": 0,
            "probe_every_epochs": 0,
        }
        schedule = self.schedule.model_copy(update=once | {"precision": "fp32", "compile": None})  # fp32: what the method was built with
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(Path(folder), every_seconds=float("inf"))
            trainer = Trainer(self.method, self._batches(self.anchors), schedule, CPU, checkpoints, label=self.name)
            (record,) = trainer.run().history
        return {name: value for name, value in record.items() if name not in ("epoch", "lr")}


def dry_teacher(params: Params, checkpoint: bool) -> Teacher:
    """The teacher on the CPU: read from `teacher.checkpoint` if `checkpoint`, otherwise with random weights.

    A random teacher has MoCo-v2's head, with keys as wide as those of published files of `teacher.format`. Raises UserError like the
    teacher stage.
    """
    made = _random_teacher(params) if not checkpoint and params.teacher.source != "factory" else None
    backbone, head, metadata = made or make_teacher(params.teacher, params.teacher_image, params.seed)
    key_width, assumed = params.teacher.key_width, made is not None and params.teacher.source == "checkpoint"
    if key_width and not (assumed and key_width >= metadata["key_width"]):  # the head in the file may differ from the published ones
        head, metadata = narrowing_head(head, metadata["feature_width"], key_width), metadata | {"key_width": key_width}
    return Teacher(backbone, head, metadata)


def _random_teacher(params: Params) -> tuple[Backbone, nn.Sequential | None, dict[str, Any]]:
    """Backbone, head and metadata of a random teacher, as `make_teacher` returns them for other sources."""
    teacher = params.teacher
    backbone = build_backbone(teacher.arch, teacher.width, teacher.stem, seeds.torch_seed(params.seed, "random teacher"), teacher.options)
    check_images(backbone, teacher.arch, params.teacher_image.crop_px, "teacher.image.crop_px")
    width = backbone.feature_width
    head = None
    if teacher.source == "pretrain":
        head = mlp_head([width, teacher.pretrain.moco.head_hidden, teacher.pretrain.moco.key_width], seed_value=0)
    elif teacher.source == "checkpoint" and teacher.format and (published := published_key_width(teacher.format)):
        head = mlp_head([width, width, published], seed_value=0)
    key_width = width if head is None else head[-1].out_features
    return backbone, head, {"feature_width": width, "key_width": key_width, **image_values(params.teacher_image)}


def dry_student(params: Params, teacher: Teacher, bank: bool = True) -> DryTraining:
    """Training of the student as in the stage `distill`; without `bank`, with so few rows that negatives cost nothing."""
    setup = distillation(params)
    negatives = getattr(setup.section, "negative_rows", 0) if bank else 0  # enough rows for them, so that their matrix product is counted
    rows = max(_ROWS, 2 * min(params.bagging.k, 1024) + 2, min(negatives, _MOST_ROWS))
    return _dry(setup, _stored(params, teacher, rows, setup.reads_features), _bags(params, rows), teacher)


def dry_baseline(params: Params, method: str) -> DryTraining:
    """Training of the student without a teacher, as in the stage `baseline`."""
    return _dry(baseline(params, method))


def dry_pretraining(params: Params) -> DryTraining:
    """Pretraining of the teacher, as in the stage `teacher`."""
    return _dry(pretraining(params))


def _dry(setup: TrainingSetup, stored: Stored | None = None, bags: Bags | None = None, teacher: Teacher | None = None) -> DryTraining:
    """The method of a training, and a loader of synthetic images, as many as there are bags."""
    method = setup.build(CPU, "fp32", stored, bags, teacher).to(memory_format=torch.channels_last)
    rows, seed = len(bags.members_TK) if bags else _ROWS, setup.params.seed
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, _IMAGE_PX, _IMAGE_PX, 3), dtype=np.uint8)
    return DryTraining(setup.method, method, setup.schedule, setup.loader(MemoryImages(pixels), CPU, teacher), seed, bags, stored)


def _stored(params: Params, teacher: Teacher, rows: int, features: bool) -> Stored:
    """Random unit keys, a few of which are repeated (which costs as much as different ones), and random features if they are used."""
    generator = torch.Generator().manual_seed(params.seed)

    def units(width: int) -> torch.Tensor:
        few = torch.nn.functional.normalize(torch.randn(_ROWS, width, generator=generator), dim=1).half()
        return few[torch.arange(rows) % _ROWS]

    keys_TVP = units(teacher.metadata["key_width"])[:, None].expand(-1, min(params.extract.views, 2), -1)
    return Stored(keys_TVP, params.extract.augment, units(teacher.metadata["feature_width"]) if features else None)


def _bags(params: Params, rows: int) -> Bags:
    """Bags of the next rows, for any `bagging.method`, since the cost of a step is the same."""
    members_TK = (np.arange(rows)[:, None] + 1 + np.arange(min(params.bagging.k, 1024))).astype(np.int32) % rows
    similarity_TK = np.ones(members_TK.shape, np.float16)
    return Bags({"method": "knn", "draw_temperature": params.bagging.draw_temperature}, members_TK, similarity_TK)
