"""Sections of the trainings: learning rate schedule, optimizer and batches, the teacher's pretraining and the student's distillation."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from bingo.params.fields import Count, NotNegative, Positive, Precision, Rate, Section, Share, Whole, one_of
from bingo.params.methods import MocoParams, method_names
from bingo.params.views import AugmentParams

_MOST_GROUPS, _LEAST_GROUP_IMAGES = 1024, 4
_SHUFFLED_GROUP_IMAGES = 32


class LrSchedule(Section):
    """The learning rate schedule of trainings and evaluations; `bingo.schedules.learning_rate` has the formula.

    `drop_epochs`: the learning rate is multiplied by `drop_factor` at the start of each of these epochs (counted from 0, as in the released
    scripts); []: constant; null: cosine decay to 0 over all steps, except for the first `hold_epochs`, which keep the full learning rate.
    """

    epochs: Count
    drop_epochs: list[Whole] | None
    drop_factor: Annotated[float, Field(gt=0, le=1)]
    hold_epochs: Whole

    @property
    def warmup_epochs(self) -> int:
        """Epochs of linear warmup; 0 of a schedule without them."""
        return getattr(self, "lr_warmup_epochs", 0)

    @property
    def last_lr(self) -> float:
        """The learning rate at the end of a cosine; 0 of a schedule without `final_lr`."""
        return getattr(self, "final_lr", 0.0)

    @model_validator(mode="after")
    def _drops_come(self) -> Self:
        drops, least = self.drop_epochs, max(1, self.warmup_epochs)
        if drops and (drops != sorted(set(drops)) or not least <= drops[0] <= drops[-1] < self.epochs):
            between = f"increasing epochs from {least} to {self.epochs - 1}" if least < self.epochs else "none in so few epochs"
            raise ValueError(f"drop_epochs: {drops}, allowed are {between}; []: a constant rate; null: a cosine")
        if drops and self.drop_factor == 1:
            raise ValueError(f"drop_factor: 1.0 drops nothing at the epochs {drops}; lower it, or set drop_epochs: []")
        return self

    @model_validator(mode="after")
    def _held_rate_falls(self) -> Self:
        if self.hold_epochs and self.drop_epochs is not None:
            problem = f"hold_epochs: {self.hold_epochs} is for a cosine, but drop_epochs is {self.drop_epochs}"
            raise ValueError(f"{problem}; set hold_epochs: 0, or drop_epochs: null")
        if self.warmup_epochs + self.hold_epochs >= self.epochs:
            warmup = f"lr_warmup_epochs: {self.warmup_epochs} plus " if self.warmup_epochs else ""
            raise ValueError(f"{warmup}hold_epochs: {self.hold_epochs} must be less than epochs, {self.epochs}")
        return self


PLAIN_SGD: dict[str, Any] = {"optimizer": "sgd", "betas": None, "decay_norms_and_biases": True, "clip_grad_norm": None}

_OFF = PLAIN_SGD | {"accumulate_steps": 1, "student_ema": 0.0}


class OptimizerParams(Section):
    """An optimizer of timm. `betas`: for adamw, lamb and lion; null: the optimizer's own. `weight_decay` applies to all weights or,
    without `decay_norms_and_biases`, neither to those of one dimension nor to those that timm exempts, such as position embeddings.
    If the norm of all gradients together exceeds `clip_grad_norm`, they are scaled down to it."""

    optimizer: Literal["sgd", "adamw", "lamb", "lars", "lion"]
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)] | None
    weight_decay: NotNegative
    decay_norms_and_biases: bool
    clip_grad_norm: Positive | None

    @model_validator(mode="after")
    def _betas_are_used(self) -> Self:
        if self.betas is not None and self.optimizer in ("sgd", "lars"):
            raise ValueError(f"betas: {self.betas}, but optimizer: {self.optimizer} has none; set betas: null")
        return self


class ScheduleParams(LrSchedule, OptimizerParams):
    """The learning rate rises to `lr` over `lr_warmup_epochs`; `batch_anchors` is the global batch size. BatchNorm's
    statistics are computed in each of `batchnorm_groups` equal groups (1: over all images of a process; null: see `groups_for`). A batch
    passes through the networks in `accumulate_steps` equal parts, whose gradients are added before the weights change.
    `sgd_momentum` is the momentum of sgd and lars."""

    batch_anchors: Count
    accumulate_steps: Annotated[int, Field(ge=1, le=_MOST_GROUPS)]
    batchnorm_groups: Annotated[int, Field(ge=1, le=_MOST_GROUPS)] | None
    lr: Positive
    lr_warmup_epochs: Whole
    sgd_momentum: Share
    precision: Precision
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None
    probe_every_epochs: Whole

    @model_validator(mode="after")
    def _groups_are_of_several_images(self) -> Self:
        images, groups, parts = self.batch_anchors, self.batchnorm_groups, self.accumulate_steps
        largest = min(_MOST_GROUPS, images // _LEAST_GROUP_IMAGES)
        if images % parts:
            raise ValueError(
                f"accumulate_steps: {parts} equal parts of batch_anchors {images} are impossible; set batch_anchors: a multiple"
            )
        allowed = [n for n in range(parts, largest + 1, parts) if images % n == 0] or [parts]
        if groups is not None and groups not in allowed:
            given = f"batch_anchors {images}" + (f" and accumulate_steps {parts}" if parts > 1 else "")
            raise ValueError(
                f"batchnorm_groups: {groups}, allowed for {given} are {', '.join(map(str, allowed))} (equal groups of "
                f"{_LEAST_GROUP_IMAGES} images or more); set one of these, or null"
            )
        return self

    @model_validator(mode="after")
    def _graphs_keep_no_gradients(self) -> Self:
        if self.accumulate_steps > 1 and self.compile not in (None, "default"):
            problem = f"accumulate_steps: {self.accumulate_steps}: the CUDA graphs of compile: {self.compile} overwrite gradients"
            raise ValueError(f"{problem} that are to be added to; set compile: default, or accumulate_steps: 1")
        return self

    def groups_for(self, momentum_keys: bool, processes: int) -> int:
        """The number of groups of the global batch that BatchNorm normalises separately: `batchnorm_groups`, or if that is null, one for
        each part. If a method with a momentum encoder trains in one process, ShuffleBN needs groups: then it is the largest number of equal
        groups with at least 32 images, a GPU's share in the released code."""
        if self.batchnorm_groups is not None:
            return self.batchnorm_groups
        images = self.batch_anchors // self.accumulate_steps
        most = images // _SHUFFLED_GROUP_IMAGES if momentum_keys and processes == 1 else 1
        return self.accumulate_steps * max(n for n in range(1, max(1, most) + 1) if images % n == 0)


class PretrainParams(ScheduleParams):
    """MoCo-v2 pretraining of the teacher; `moco` has the method's settings."""

    augment: AugmentParams
    moco: MocoParams


class DistillParams(ScheduleParams):
    """Training of the student: the method, the source of the teacher's keys, the views that the student sees, whether the best epoch by
    the probe is also kept, and the decay of a moving average of the student (0: no moving average)."""

    method: Annotated[str, one_of(method_names)]
    keys: Literal["stored", "live", "momentum"]
    keep_best: bool
    student_ema: Rate
    augment: AugmentParams

    def recorded(self) -> dict[str, Any]:
        """The settings for a student's file; options that are off are left out, so that files from before they existed do not change."""
        return {key: value for key, value in self.model_dump().items() if _OFF.get(key, ...) != value}

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        if self.keep_best and not self.probe_every_epochs:
            problem = "keep_best: true needs a probe, but probe_every_epochs is 0"
            raise ValueError(f"{problem}; set probe_every_epochs: 1 or more, or keep_best: false")
        return self
