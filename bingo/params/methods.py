"""The sections of the methods, under `methods` in params.yaml; a method is implemented in bingo/methods/NAME.py.

A new method needs that file, its section here, a field of `MethodsParams` and its values in params.yaml.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from bingo.params.fields import Count, NotNegative, Positive, Rows, Section, Share, ShareRange, Temperature, Whole, Width


class MethodSection(Section):
    """A method's own section. `display_name`: as its paper writes it; `compares_views`: the student is compared with a moving average of
    itself on another view, whatever distill.keys is; `compares_images`: a term of the loss is computed over the images of a BatchNorm
    group, and is not a mean of one image's terms."""

    display_name: ClassVar[str]
    needs_teacher: ClassVar[bool] = True
    compares_views: ClassVar[bool] = False
    compares_images: ClassVar[bool] = False

    @property
    def reads_features(self) -> bool:
        """Whether stored training compares with the teacher's features (of centre views) and not with its keys."""
        return getattr(self, "target", "keys") == "features"

    def momentum_keys(self, keys: str) -> bool:
        """Whether the student is compared with a moving average of itself on another view, where `distill.keys` is `keys`."""
        return self.compares_views


class BingoParams(MethodSection):
    """BINGO: `terms` `paper` are intra and inter against the anchor's key, `symmetric` also against the member's own key, `symmetric_mix`
    also the CutMix pair, `expected` the anchor against its key and its bag's mean key; `pair_weights` are (1, 0) in the warmup."""

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
    """CompRess (Abbasi Koohpayegani et al. 2020). With `queues: 2`, the student is compared with a moving average of itself, of momentum
    `key_momentum`, without a head; with 1, student and teacher are both compared with the teacher's queue, and the student gets a linear
    layer to the teacher's width. `target`: keys of the stored view, which the student sees too, or features of the centre view."""

    display_name: ClassVar[str] = "CompRess"

    queues: Literal[1, 2]
    target: Literal["features", "keys"]
    temperature: Temperature
    queue_rows: Rows
    key_momentum: Share


class CossParams(MethodSection):
    """CoSS (Singh and Wang 2024): the student's outputs match the teacher's image by image and feature by feature.

    Each anchor adds `companions` of its bag's listed members to the batch. Both temperatures divide both terms, as released: they only
    scale the gradients.
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
    same views. The released code sums over a GPU's 32 anchors, which is a weight of 32 on the mean. `teacher_batchnorm`: of a live
    teacher; stored keys are those of eval mode."""

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
    are kept; `head_hidden` is the width inside its head."""

    compares_views: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    queue_rows: Rows
    key_momentum: Share
    head_hidden: Width


class IsdParams(MomentumParams):
    """ISD (Tejankar et al. 2021), self-distillation without a teacher. `weak_keys`: the key's view has the crop, rotation and flip of
    distill.augment but no colour jitter and no blur (ISD-plus). `projection_width`: width of a projector before the predictor, which
    the moving average has too; null: none, the features are compared."""

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
    and the student's head (published: as wide as the features; 2048 gives 2.3 points more).

    With live keys, student and teacher can be compared on `small_crops` further crops of each image too, of `small_crop_px` pixels and
    a fraction of the image's area in `small_crop_scale`, with a queue of their own (published with SwAV's teachers: 6 crops of 96 px).
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
    linear layers (4, or 2 without BatchNorm and ReLU; `head_hidden` wide inside), which is discarded afterwards."""

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
        """The section of the method `name`."""
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
