"""Sections of the evaluations: linear, k-NN, few labels, transfer to other images and to detection."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from bingo.params.data import BicubicImageParams, ImageParams
from bingo.params.fields import (
    Count,
    FilePath,
    Interpolation,
    Name,
    NotNegative,
    PathUnderRoot,
    Pixels,
    Positive,
    Precision,
    Section,
    Share,
    ShareRange,
    Temperature,
    Whole,
)
from bingo.params.training import LrSchedule, OptimizerParams
from bingo.runtime.errors import near_matches


class LinearLayerParams(LrSchedule):
    """Training of a linear layer. Its weights are initialised from a normal distribution with standard deviation `init_std` and its bias
    with 0; null: both with torch's default (as in CompRess, SimReg and ISD)."""

    init_std: Positive | None


class CachedProbeParams(LinearLayerParams):
    """A linear layer on stored features of centre views (standardised per dimension), trained by SGD with momentum 0.9."""

    batch_images: Count
    lr: Positive
    weight_decay: NotNegative


class CropsParams(Section):
    """The crops on which a classifier is trained: their fraction of the image's area, and the probability of a flip."""

    crop_scale: ShareRange
    flip_p: Share


class CropProbeParams(CachedProbeParams, CropsParams):
    """The protocol of the released code: a linear layer on the frozen backbone's features of random crops, for the networks in `nets`.

    `standardise`: normalise features to unit length and standardise them with the statistics of the train images' centre views, as
    CompRess, SimReg and ISD do. `final_lr`: the learning rate at the end of a cosine.
    """

    nets: list[str]
    standardise: bool
    final_lr: NotNegative

    @model_validator(mode="after")
    def _cosine_ends_below_lr(self) -> Self:
        if self.final_lr and self.drop_epochs is not None:
            raise ValueError(f"final_lr: {self.final_lr:g} is for a cosine, but drop_epochs is {self.drop_epochs}; set final_lr: 0.0")
        if self.final_lr >= self.lr:
            raise ValueError(f"final_lr: {self.final_lr:g} must be less than lr, {self.lr:g}; lower final_lr")
        return self


class FeatureParams(Section):
    """How an evaluation computes features: from `batch_images` centre views at a time."""

    precision: Precision
    batch_images: Count

    def view(self, image: ImageParams) -> ImageParams:
        """The centre view to evaluate, for a network whose images are described by `image`."""
        return image


class LinearEvalParams(FeatureParams):
    """Linear evaluation with two protocols."""

    cached: CachedProbeParams
    crops: CropProbeParams


class KnnEvalParams(FeatureParams):
    """Nearest-neighbour evaluation for each `k`, with equal votes and with votes weighted by exp(cosine / temperature). For each of
    `agreement_k`, also the share of the teacher's nearest train images that a network finds, which needs no labels ([]: not measured).
    `resize_px` (null: as in section image) and `interpolation` set the centre views of networks other than the teacher (CoSS: bicubic,
    235 px).
    """

    k: Annotated[list[Count], Field(min_length=1)]
    agreement_k: list[Count]
    temperature: Temperature
    resize_px: Count | None
    interpolation: Interpolation

    def view(self, image: ImageParams) -> ImageParams:
        kind = BicubicImageParams if self.interpolation == "bicubic" else ImageParams
        return kind(**image.model_dump() | {"resize_px": self.resize_px or image.resize_px})


class TuneParams(LinearLayerParams, OptimizerParams):
    """Training of a classifier on labels; the momentum of sgd and lars is 0.9, and `batch_images` is the global batch size."""

    batch_images: Count
    nesterov: bool

    @model_validator(mode="after")
    def _momentum_is_used(self) -> Self:
        if self.nesterov and self.optimizer not in ("sgd", "lars"):
            raise ValueError(f"nesterov: true is for sgd and lars, but optimizer is {self.optimizer}; set nesterov: false")
        return self


class CropTuneParams(TuneParams):
    """Training of the linear layer of `CropProbeParams`."""

    final_lr: NotNegative


class SplitParams(Section):
    """A share of the train labels: `list_file` lists the images (SimCLR's lists); null: a seeded, class-balanced sample."""

    percent: Annotated[float, Field(gt=0, le=100)]
    list_file: FilePath | None
    trunk_lr: Positive
    head_lr: Positive
    linear_lr: Positive


class SemiEvalParams(CropsParams):
    """Few labels: fine-tuning, and a linear layer on the frozen network, for each of `splits` and `nets`."""

    splits: dict[Name, SplitParams]
    nets: list[str]
    precision: Precision
    finetune: TuneParams
    linear: TuneParams


class TransferSetParams(Section):
    """Other labelled images for transfer; all other settings are taken from `dataset`."""

    source: Literal["digits", "folder", "webdataset", "huggingface", "cifar10", "cifar100"]
    root: FilePath | None
    store_px: Annotated[int, Field(ge=1, le=4096)] | None
    train_images: Count | None
    test_images: Count | None


class LinearTuneParams(TuneParams):
    """Only the linear layer, with learning rate `lr`."""

    lr: Positive


class WholeTuneParams(TuneParams):
    """The whole network: learning rates `trunk_lr` of the backbone and `head_lr` of the linear layer."""

    trunk_lr: Positive
    head_lr: Positive


class TransferParams(CropsParams):
    """Transfer of each of `nets` to each of `datasets` with each of `protocols`; views are resized with `interpolation`."""

    datasets: dict[Name, TransferSetParams]
    nets: list[str]
    protocols: Annotated[list[Literal["linear_resized", "linear_native", "finetune"]], Field(min_length=1)]
    resized_px: Annotated[int, Field(ge=1, le=4096)]
    interpolation: Interpolation
    precision: Precision
    linear: LinearTuneParams
    finetune: WholeTuneParams


class CocoParams(Section):
    """Mask R-CNN on COCO with the student as backbone. `runs` are named HEAD-SCHEDULE. Each schedule lists the steps at which the
    learning rate is divided by 10; its last entry is the end of training. The four paths are relative to `root`.
    """

    runs: list[str]
    root: FilePath | None
    train_images: PathUnderRoot
    train_annotations: PathUnderRoot
    val_images: PathUnderRoot
    val_annotations: PathUnderRoot
    schedules: dict[str, Annotated[list[Count], Field(min_length=1)]]
    batch_images: Count
    lr: Positive
    lr_warmup_steps: Whole
    sgd_momentum: Share
    weight_decay: NotNegative
    min_side_px: Annotated[list[Pixels], Field(min_length=1)]
    max_side_px: Pixels
    test_min_side_px: Pixels
    flip_p: Share
    precision: Precision
    sync_batchnorm: bool

    @field_validator("schedules")
    @classmethod
    def _steps_rise(cls, schedules: dict[str, list[int]]) -> dict[str, list[int]]:
        for name, steps in schedules.items():
            if steps != sorted(set(steps)):
                raise ValueError(f"{name}: {steps}, allowed are increasing steps, of which the last ends the training")
            if not re.fullmatch(r"\w+", name):
                raise ValueError(f"{name!r}: allowed in a schedule's name are letters, digits and _")
        return schedules

    @model_validator(mode="after")
    def _runs_can_be_made(self) -> Self:
        allowed = [f"{head}-{schedule}" for head in ("fpn", "c4") for schedule in self.schedules]
        for name in self.runs:
            if name not in allowed:
                raise ValueError(f"runs: {name!r}, allowed are {', '.join(allowed)}{near_matches(name, allowed)}")
        if len(set(self.runs)) < len(self.runs):
            raise ValueError(f"runs: {self.runs} names a run twice; leave one out")
        if self.runs and not self.root:
            raise ValueError("root: null, but transfer_coco.runs needs the folder of COCO; set transfer_coco.root")
        if (largest := max(*self.min_side_px, self.test_min_side_px)) > self.max_side_px:
            raise ValueError(f"max_side_px: {self.max_side_px} is less than the short side {largest}; raise transfer_coco.max_side_px")
        return self
