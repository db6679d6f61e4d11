"""The sections of the methods, under `methods` in params.yaml; a method is implemented in bingo/methods/NAME.py.

A new method needs that file, its section here, a field of `MethodsParams` and its values in params.yaml.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from bingo.params.fields import Count, NotNegative, Positive, Rows, Section, Share, ShareRange, Temperature, Whole, Width


class MethodSection(Section):
    """The section of a method. `display_name`: its name as written in its paper; `compares_views`: the student is compared with a moving
    average of itself on another view, regardless of distill.keys; `compares_images`: a term of the loss depends on all images of a
    BatchNorm group, and is not a mean over images."""

    display_name: ClassVar[str]
    needs_teacher: ClassVar[bool] = True
    compares_views: ClassVar[bool] = False
    compares_images: ClassVar[bool] = False

    @property
    def reads_features(self) -> bool:
        """Whether training with stored outputs uses the teacher's features (of centre views) instead of its keys."""
        return getattr(self, "target", "keys") == "features"

    def momentum_keys(self, keys: str) -> bool:
        """Whether the student is compared with a moving average of itself on another view if `distill.keys` is `keys`."""
        return self.compares_views


class BingoParams(MethodSection):
    """BINGO. `terms`: `paper` compares anchor and member with the anchor's key, `symmetric` also with the member's key, `symmetric_mix`
    also compares a CutMix of both; `expected` compares the anchor with its key and its bag's mean key. `pair_weights` are (1, 0) in the
    warmup."""

    display_name: ClassVar[str] = "BINGO"

    terms: Literal["paper", "symmetric", "symmetric_mix", "expected"]
    relation: Literal["bags", "none"]
    pair_weights: Annotated[list[NotNegative], Field(min_length=2, max_length=2)]
    inter_warmup_epochs: Whole
    view_coupling: Literal["independent", "same"]
    anchor_views: Annotated[int, Field(ge=1, le=2)]
    temperature: Temperature
    negatives: Literal["bank", "queue"]
    negative_rows: Rows
    mask_bag: bool
    queue_push: Literal["anchor", "anchor_and_member"]
    teacher_batchnorm: Literal["eval", "batch"]
    key_momentum: Share
    cutmix_alpha: Positive
    head_hidden: Width
    key_width: Width

    def momentum_keys(self, keys: str) -> bool:
        return keys == "momentum"

    @model_validator(mode="after")
    def _something_is_weighed(self) -> Self:
        if not sum(self.pair_weights):
            raise ValueError("pair_weights: both are 0, so nothing would be learned; set one above 0")
        return self


class CompressParams(MethodSection):
    """CompRess (Abbasi Koohpayegani et al. 2020). With `queues: 2`, the student has no head and is compared with a queue of its moving
    average (momentum `key_momentum`). With 1, student and teacher are both compared with the teacher's queue, and a linear layer maps the
    student to the teacher's width. `target`: keys of the stored view, which the student also sees, or features of the centre view."""

    display_name: ClassVar[str] = "CompRess"

    queues: Literal[1, 2]
    target: Literal["features", "keys"]
    temperature: Temperature
    queue_rows: Rows
    key_momentum: Share


class CossParams(MethodSection):
    """CoSS (Singh and Wang 2024): the student's outputs match the teacher's image by image and feature by feature.

    For each anchor, `companions` members of its bag are added to the batch. Both temperatures divide both terms, as in the released code,
    so they only scale the gradients.
    """

    display_name: ClassVar[str] = "CoSS"
    compares_images: ClassVar[bool] = True

    target: Literal["features", "keys"]
    companions: Annotated[int, Field(ge=0, le=1000)]
    teacher_temperature: Temperature
    student_temperature: Temperature
    head_hidden: Width


class DiscoParams(MethodSection):
    """DisCo (Gao et al. 2022): MoCo-v2's loss and, with weight `regression_weight`, the squared distances to the teacher's keys of the
    same views. The released code sums over a GPU's 32 anchors, which corresponds to a weight of 32 on the mean. `teacher_batchnorm`: mode
    of a live teacher; stored keys are computed in eval mode."""

    display_name: ClassVar[str] = "DisCo"
    compares_views: ClassVar[bool] = True

    temperature: Temperature
    queue_rows: Rows
    key_momentum: Share
    regression_weight: NotNegative
    teacher_batchnorm: Literal["eval", "batch"]
    head_hidden: Width


class MomentumParams(MethodSection):
    """A method without a teacher: the student is compared with keys of its moving average (`key_momentum`), the last `queue_rows` of which
    are kept; `head_hidden` is the width of the hidden layer of its head."""

    compares_views: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    queue_rows: Rows
    key_momentum: Share
    head_hidden: Width


class IsdParams(MomentumParams):
    """ISD (Tejankar et al. 2021), self-distillation without a teacher. `weak_keys`: the key's view has the crop, rotation and flip of
    distill.augment but no colour jitter and no blur (ISD-plus). `projection_width`: width of a projector before the predictor, which
    the moving average also has; null: no projector, the features are compared."""

    display_name: ClassVar[str] = "ISD"

    student_temperature: Temperature
    key_temperature: Temperature
    weak_keys: bool
    projection_width: Width | None


class MocoParams(MomentumParams):
    """MoCo-v2 (facebookresearch/moco): temperature, queue of keys, momentum of the key encoder, projection head."""

    display_name: ClassVar[str] = "MoCo-v2"

    temperature: Temperature
    key_width: Width


class SeedParams(MethodSection):
    """SEED (Fang et al. 2021): temperatures of the student's and the teacher's similarities, the bank with which both are compared,
    and the student's head (published: as wide as the features, 57.6 % for a ResNet-18; an unofficial implementation: 2048, 60.3 %).

    With live keys, student and teacher can also be compared on `small_crops` additional crops of each image, of `small_crop_px` pixels
    and a share of the image's area in `small_crop_scale`, with their own queue (published with SwAV's teachers: 6 crops of 96 px).
    """

    display_name: ClassVar[str] = "SEED"

    student_temperature: Temperature
    teacher_temperature: Temperature
    negatives: Literal["bank", "queue"]
    negative_rows: Rows
    head_hidden: Width
    small_crops: Annotated[int, Field(ge=0, le=100)]
    small_crop_px: Count
    small_crop_scale: ShareRange


class SimregParams(MethodSection):
    """SimReg (Navaneet et al. 2021): regression of the teacher's unit features, or of its keys, through a head of `head_layers`
    linear layers (4 of width `head_hidden`, or 2 without BatchNorm and ReLU), which is discarded afterwards."""

    display_name: ClassVar[str] = "SimReg"

    target: Literal["features", "keys"]
    head_layers: Literal[2, 4]
    head_hidden: Width


class MethodsParams(Section):
    """A section for each method, by name."""

    bingo: BingoParams
    moco: MocoParams
    seed: SeedParams
    compress: CompressParams
    disco: DiscoParams
    simreg: SimregParams
    isd: IsdParams
    coss: CossParams

    def section(self, method: str) -> MethodSection:
        """The section of a method."""
        found = getattr(self, method)
        assert isinstance(found, MethodSection)
        return found


def method_names() -> list[str]:
    """Names of all methods."""
    return sorted(MethodsParams.model_fields)


def display_name(method: str) -> str:
    """A method's name as written in its paper; for an unknown method, the given name."""
    return method_section(method).display_name if method in method_names() else method


def method_section(name: str) -> type[MethodSection]:
    """The class of a method's section."""
    section = MethodsParams.model_fields[name].annotation
    assert isinstance(section, type)
    assert issubclass(section, MethodSection)
    return section
