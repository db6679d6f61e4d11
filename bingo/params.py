"""The schema of params.yaml: frozen sections, every key required, unknown keys refused, all mistakes reported at once.

Values live in params.yaml alone, so a changed default is a changed file that DVC sees. This module imports no torch: a mistake
is reported in a fraction of a second, before any stage does any work. A method's own section is in bingo/methods/NAME_params.py.
"""

import importlib
import importlib.util
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from bingo.runtime.errors import UserError, near_matches, short
from bingo.runtime.places import expanded, located

# Bounds are far beyond sense: they keep a slip of the keyboard from becoming an overflow or an endless run.
Count = Annotated[int, Field(ge=1, le=10**9)]
Whole = Annotated[int, Field(ge=0, le=10**9)]
Width = Annotated[int, Field(ge=1, le=10**5)]
Pixels = Annotated[int, Field(ge=32, le=10**4)]
Positive = Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=1e-5, le=1e3, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Range = Annotated[list[Annotated[float, Field(ge=1e-3, le=1e3, allow_inf_nan=False)]], Field(min_length=2, max_length=2)]
PerChannel = Annotated[list[NotNegative], Field(min_length=3, max_length=3)]
FilePath = Annotated[str, AfterValidator(located)]  # a file or folder of the user's
PathUnderRoot = Annotated[str, AfterValidator(expanded)]
Precision = Literal["auto", "fp32", "bf16"]
Interpolation = Literal["bilinear", "bicubic"]
_MOST_MISTAKES = 40
_MOST_GROUPS, _LEAST_GROUP_IMAGES = 1024, 4
_SHUFFLED_GROUP_IMAGES = 32


def _check_name(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError("a name has small letters, digits and _, a letter first, such as percent_10")
    return name


Name = Annotated[str, BeforeValidator(_check_name)]  # of a file in reports/ and of an item in dvc.yaml


class Section(BaseModel):
    """A frozen group of parameters; no key may be missing, none may be added, no type is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MethodSection(Section):
    """A method's own section: its name as its paper writes it, whether it needs a teacher, and whether it reads the stored features
    beside the stored keys."""

    display_name: ClassVar[str]
    needs_teacher: ClassVar[bool]

    @property
    def reads_features(self) -> bool:
        """Whether stored training compares with the teacher's features (of centre views) and not with its keys."""
        return False

    def momentum_keys(self, keys: str) -> bool:
        """Whether the student is compared with a moving average of itself on another view, where `distill.keys` is `keys`."""
        return False


class DatasetParams(Section):
    """What the images are. `train_images` and `test_images` draw a seeded subset balanced over the classes (null: all).

    `follow_links`: links in a folder of images may lead out of it.
    """

    source: Literal["digits", "folder", "cifar10", "cifar100"]
    root: FilePath | None
    follow_links: bool
    store_px: Annotated[int, Field(ge=1, le=4096)] | None
    train_images: Count | None
    test_images: Count | None
    check: Literal["decode", "header"]
    on_bad_image: Literal["stop", "skip"]
    placements: Annotated[int, Field(ge=1, le=1000)]
    placement_scale: Range
    placement_degrees: Annotated[float, Field(ge=0, le=180)]

    @model_validator(mode="after")
    def _root_is_named(self) -> Self:
        if self.source != "digits" and not self.root:
            raise ValueError(f"root: null, but source {self.source} needs the folder of the images; set dataset.root")
        if self.source != "folder" and not self.store_px:
            raise ValueError(f"store_px: null, but source {self.source} is held in memory; set dataset.store_px, in pixels")
        low, high = self.placement_scale
        if not 0.05 <= low <= high <= 1:
            raise ValueError(f"placement_scale: [{low}, {high}], allowed are two numbers from 0.05 to 1, smaller first")
        return self


class ImageParams(Section):
    """What a network sees: views of `crop_px`; the centre view is resized to `resize_px` (short side), then cropped."""

    crop_px: Count
    resize_px: Count
    mean: PerChannel
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)]

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.crop_px > self.resize_px:
            raise ValueError(f"crop_px: {self.crop_px} is larger than resize_px {self.resize_px}; lower image.crop_px")
        return self

    @property
    def interpolation(self) -> Interpolation:
        """How pixels between those of the image are found where it is resized."""
        return "bilinear"


class BicubicImageParams(ImageParams):
    """The same views, resized bicubically."""

    @property
    def interpolation(self) -> Interpolation:
        return "bicubic"


class AugmentParams(Section):
    """A family of random views (MoCo-v2's: crop, colour jitter, grey, blur, flip; here also a turn by at most `rotate_degrees`).

    `crop_scale` is a share of the image's area, `crop_ratio` width over height, `jitter` the strengths of brightness,
    contrast, saturation and hue as torchvision's ColorJitter takes them, `blur_sigma_px` the standard deviation.
    """

    crop_scale: Range
    crop_ratio: Range
    rotate_degrees: Annotated[float, Field(ge=0, le=180)]
    jitter: Annotated[list[NotNegative], Field(min_length=4, max_length=4)]
    jitter_p: Share
    gray_p: Share
    blur_p: Share
    blur_sigma_px: Range
    flip_p: Share

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for name in ("crop_scale", "crop_ratio", "blur_sigma_px"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: [{low}, {high}], allowed is the smaller number first")
        if self.crop_scale[1] > 1 or self.jitter[3] > 0.5:
            raise ValueError("crop_scale is at most 1, and the fourth number of jitter (hue) at most 0.5")
        return self


class NetworkParams(Section):
    """A backbone: a timm name (of a teacher from timm also NAME.TAG, where the tag chooses the weights), or torchvision/NAME; `width`
    scales all channels (ResNets only); `stem: small` suits images under 64 px."""

    arch: str
    width: Positive
    stem: Literal["imagenet", "small"]

    @field_validator("arch")
    @classmethod
    def _arch_exists(cls, arch: str) -> str:
        from bingo.runtime.names import arch_mistake

        if mistake := arch_mistake(arch):
            raise ValueError(mistake)
        return arch

    @property
    def options(self) -> dict[str, Any]:
        """What `build_backbone` takes beside arch, width and stem: nothing."""
        return {}


class StudentParams(NetworkParams):
    """The student's backbone, and how it is trained: `drop_path_rate`, the share of residual branches that are left out of a step at
    random (stochastic depth; drop-connect of EfficientNet), rising along the network to this; `drop_rate`, dropout of the pooled
    feature; `batchnorm_momentum`, the share of a batch in the running statistics (null: what the library has, mostly 0.1).
    """

    drop_path_rate: Rate
    drop_rate: Rate
    batchnorm_momentum: Annotated[float, Field(gt=0, le=1)] | None

    @property
    def options(self) -> dict[str, Any]:
        """What of these is not the default; `build_backbone` takes it."""
        return {name: value for name in STUDENT_OPTIONS if (value := getattr(self, name))}


STUDENT_OPTIONS = ("drop_path_rate", "drop_rate", "batchnorm_momentum")


class LrSchedule(Section):
    """How a learning rate moves over the epochs, for trainings and evaluations; `bingo.schedules.learning_rate` is the formula.

    `drop_epochs`: the rate is multiplied by `drop_factor` when each of these epochs begins (counted from 0, as in the released
    scripts); []: constant; null: a cosine to 0 over all steps, but for `hold_epochs` at its beginning, which keep the full rate.
    """

    epochs: Count
    drop_epochs: list[Whole] | None
    drop_factor: Annotated[float, Field(gt=0, le=1)]
    hold_epochs: Whole

    @property
    def warmup_epochs(self) -> int:
        """Epochs over which the rate rises at first."""
        return 0

    @model_validator(mode="after")
    def _drops_come(self) -> Self:
        drops, least = self.drop_epochs, max(1, self.warmup_epochs)
        if drops and (drops != sorted(set(drops)) or not least <= drops[0] <= drops[-1] < self.epochs):
            between = f"epochs from {least} to {self.epochs - 1} that rise" if least < self.epochs else "none in so few epochs"
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


class ScheduleParams(LrSchedule):
    """SGD with momentum; the rate rises to `lr` over `lr_warmup_epochs`; `batch_anchors` is the global batch, and BatchNorm's statistics
    are of each of its `batchnorm_groups` equal groups (1: of all images of a process; null: as `groups_for` has it)."""

    batch_anchors: Count
    batchnorm_groups: Annotated[int, Field(ge=1, le=_MOST_GROUPS)] | None
    lr: Positive
    lr_warmup_epochs: Whole
    sgd_momentum: Share
    weight_decay: NotNegative
    precision: Precision
    probe_every_epochs: Whole

    @property
    def warmup_epochs(self) -> int:
        return self.lr_warmup_epochs

    @model_validator(mode="after")
    def _groups_are_of_several_images(self) -> Self:
        images, groups = self.batch_anchors, self.batchnorm_groups
        largest = min(_MOST_GROUPS, images // _LEAST_GROUP_IMAGES)
        allowed = [n for n in range(1, largest + 1) if images % n == 0] or [1]
        if groups is not None and groups not in allowed:
            raise ValueError(
                f"batchnorm_groups: {groups}, allowed for batch_anchors {images} are {', '.join(map(str, allowed))} (equal groups of "
                f"{_LEAST_GROUP_IMAGES} images or more); set one of these, or null"
            )
        return self

    def groups_for(self, momentum_keys: bool, processes: int) -> int:
        """How many groups of the global batch BatchNorm normalises by themselves: `batchnorm_groups`, or if that is null, 1 but where
        a momentum encoder trains in one process. There ShuffleBN needs groups, which are then as many equal ones as have 32 images or
        more, a GPU's share in the released codes."""
        if self.batchnorm_groups is not None:
            return self.batchnorm_groups
        most = self.batch_anchors // _SHUFFLED_GROUP_IMAGES if momentum_keys and processes == 1 else 1
        return max(n for n in range(1, max(1, most) + 1) if self.batch_anchors % n == 0)


class PretrainParams(ScheduleParams):
    """MoCo-v2 pretraining of the teacher; `moco` has the method's own numbers."""

    augment: AugmentParams
    moco: Section

    @field_validator("moco", mode="before")
    @classmethod
    def _moco_section(cls, value: Any) -> Section:
        return method_section("moco").model_validate(value)


class TeacherParams(NetworkParams):
    """Where the teacher comes from. `checkpoint` is a file for the source `checkpoint` (and, if set, for timm and torchvision),
    `format` whose code wrote it.
    """

    source: Literal["pretrain", "timm", "torchvision", "checkpoint", "random"]
    checkpoint: FilePath | None
    format: str
    pretrain: PretrainParams

    @field_validator("format")
    @classmethod
    def _format_exists(cls, name: str) -> str:
        if name not in (names := format_names()):
            raise ValueError(f"allowed are {', '.join(names)}{near_matches(name, names)}")
        return name

    @model_validator(mode="after")
    def _checkpoint_is_named(self) -> Self:
        if self.source == "checkpoint" and not self.checkpoint:
            raise ValueError("checkpoint: null, but teacher.source is checkpoint; set teacher.checkpoint to the file")
        return self


class ExtractParams(Section):
    """The one pass of the teacher: `views` random views' keys for each train image, written in chunks of `chunk_rows`."""

    views: Count
    batch_images: Count
    chunk_rows: Count
    precision: Precision
    augment: AugmentParams


class BaggingParams(Section):
    """How images become bags: `k` members (for kmeans and label: the members that are listed, nearest first).

    `relation` names whose features say what is similar, and with it the file in models/: the teacher, or a student that was trained
    as a baseline (the papers' ablation). `mutual` keeps a member of a knn bag only if the anchor is in the member's bag too.
    `search` of knn: exact, or by an inverted file of `lists` lists (null: 4 * sqrt(train rows)), of which `probes` are searched.
    `draw_temperature`: members are drawn with probability proportional to exp(cosine / t), of those listed; null: alike.
    """

    method: Literal["knn", "kmeans", "label"]
    k: Count
    clusters: Count
    iterations: Count
    relation: str
    mutual: bool
    search: Literal["exact", "ivf"]
    lists: Count | None
    probes: Count
    draw_temperature: Temperature | None

    @model_validator(mode="after")
    def _mutual_needs_neighbours(self) -> Self:
        if self.mutual and self.method != "knn":
            raise ValueError(f"mutual: true, but bags by {self.method} are groups, in which all are mutual; set bagging.mutual: false")
        return self

    @model_validator(mode="after")
    def _lists_need_neighbours(self) -> Self:
        if self.search != "exact" and self.method != "knn":
            raise ValueError(f"search: {self.search}, but bags by {self.method} are searched exactly; set bagging.search: exact")
        return self


class DistillParams(ScheduleParams):
    """Training of the student: the method by name, where the teacher's keys come from, and the views that the student sees."""

    method: str
    keys: Literal["stored", "live", "momentum"]
    augment: AugmentParams

    @field_validator("method")
    @classmethod
    def _method_exists(cls, method: str) -> str:
        if method not in (names := method_names()):
            raise ValueError(f"allowed are {', '.join(names)}{near_matches(method, names)}")
        return method


class CachedProbeParams(LrSchedule):
    """A linear layer on stored features of centre views (standardised per dimension), trained by SGD with momentum 0.9."""

    batch_images: Count
    lr: Positive
    weight_decay: NotNegative


class CropsParams(Section):
    """The crops on which a classifier is trained: their share of the image's area, and how often they are mirrored."""

    crop_scale: Range
    flip_p: Share

    @model_validator(mode="after")
    def _scale_is_a_share(self) -> Self:
        low, high = self.crop_scale
        if not low <= high <= 1:
            raise ValueError(f"crop_scale: [{low}, {high}], allowed are two numbers up to 1, smaller first")
        return self


class CropProbeParams(CachedProbeParams, CropsParams):
    """The released protocol: a linear layer on features of random crops, the backbone frozen; `nets` says for which networks.

    `standardise`: as CompRess, SimReg and ISD do, features of unit length by the mean and deviation of the train images' centre views.
    """

    nets: list[str]
    standardise: bool


class FeatureParams(Section):
    """How an evaluation computes a network's features: `batch_images` centre views at once."""

    precision: Precision
    batch_images: Count


class LinearEvalParams(FeatureParams):
    """Linear evaluation by both protocols, in `precision` both."""

    cached: CachedProbeParams
    crops: CropProbeParams


class KnnEvalParams(FeatureParams):
    """Nearest-neighbour evaluation for each `k`, plain votes and votes weighted by exp(cosine / temperature)."""

    k: Annotated[list[Count], Field(min_length=1)]
    temperature: Temperature


class CocoParams(Section):
    """Mask R-CNN on COCO with the student as backbone. `runs` are named HEAD-SCHEDULE; each schedule lists the steps at which the
    learning rate falls to a tenth, and last the step at which training ends. The four paths start at `root`.
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
                raise ValueError(f"{name}: {steps}, allowed are steps that rise, the last being the end of the training")
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


class TuneParams(LrSchedule):
    """Training of a classifier on labels by SGD with momentum 0.9, `batch_images` in all processes together."""

    batch_images: Count
    weight_decay: NotNegative
    nesterov: bool


class SplitParams(Section):
    """A share of the train labels: `list_file` names the images (SimCLR's lists), or null for a seeded draw balanced over the classes."""

    percent: Annotated[float, Field(gt=0, le=100)]
    list_file: FilePath | None
    trunk_lr: Positive
    head_lr: Positive
    linear_lr: Positive


class SemiEvalParams(CropsParams):
    """Few labels: the whole network fine-tuned, and a linear layer on the frozen one, for each of `splits` and of `nets`."""

    splits: dict[Name, SplitParams]
    nets: list[str]
    precision: Precision
    finetune: TuneParams
    linear: TuneParams


class TransferSetParams(Section):
    """Other labelled images to transfer to; what is not said here is as in `dataset`."""

    source: Literal["digits", "folder", "cifar10", "cifar100"]
    root: FilePath | None
    store_px: Annotated[int, Field(ge=1, le=4096)] | None
    train_images: Count | None
    test_images: Count | None


class LinearTuneParams(TuneParams):
    """The layer alone: `lr`."""

    lr: Positive


class WholeTuneParams(TuneParams):
    """The whole network: `trunk_lr` of the backbone, `head_lr` of the layer."""

    trunk_lr: Positive
    head_lr: Positive


class TransferParams(CropsParams):
    """Transfer to each of `datasets` by each of `protocols`, for each of `nets`, in views of `interpolation`."""

    datasets: dict[Name, TransferSetParams]
    nets: list[str]
    protocols: Annotated[list[Literal["linear_resized", "linear_native", "finetune"]], Field(min_length=1)]
    resized_px: Annotated[int, Field(ge=1, le=4096)]
    interpolation: Interpolation
    precision: Precision
    linear: LinearTuneParams
    finetune: WholeTuneParams


class ReportParams(Section):
    """The HTML report: title (null: the dataset's name and numbers), how many bags the gallery shows, and published numbers to print
    beside the measured ones."""

    title: str | None
    gallery_anchors: Whole
    published: dict[str, str]


class _Core(Section):
    seed: Whole
    dataset: DatasetParams
    image: ImageParams
    teacher: TeacherParams
    extract: ExtractParams
    bagging: BaggingParams
    student: StudentParams
    distill: DistillParams
    baselines: list[str]
    linear_eval: LinearEvalParams
    knn_eval: KnnEvalParams
    transfer_coco: CocoParams
    semi_eval: SemiEvalParams
    transfer: TransferParams
    report: ReportParams

    @model_validator(mode="after")
    def _names_are_of_networks(self) -> Self:
        if lines := [*self._unknown_nets(), *self._unknown_relation()]:
            raise ValueError("\n".join(lines))
        return self

    def _unknown_nets(self) -> list[str]:
        allowed = ["student", *self.baselines, "untrained"]
        named = {"linear_eval.crops": self.linear_eval.crops.nets, "semi_eval": self.semi_eval.nets, "transfer": self.transfer.nets}
        return [
            f"{section}.nets: {name!r} is no network, allowed are {', '.join(allowed)}{near_matches(name, allowed)}"
            + ("; to train it, name it in `baselines`" if name in method_names() and not method_section(name).needs_teacher else "")
            for section, names in named.items()
            for name in names
            if name not in allowed
        ]

    def _unknown_relation(self) -> list[str]:
        allowed = ["teacher", *(f"baselines/{name}" for name in self.baselines)]
        if (relation := self.bagging.relation) in allowed:
            return []
        way_out = "; a student's relation needs it among `baselines`" if relation.startswith("baselines/") else ""
        return [f"bagging.relation: {relation!r}, allowed are {', '.join(allowed)}{near_matches(relation, allowed)}{way_out}"]

    @model_validator(mode="after")
    def _transfer_sets_are_datasets(self) -> Self:
        for name in self.transfer.datasets:
            try:
                self.transfer_set(name)
            except ValidationError as error:
                message = _message(error.errors()[0]).replace("set dataset.", f"set transfer.datasets.{name}.")
                raise ValueError(f"transfer.datasets.{name}.{message}") from None
        return self

    def transfer_set(self, name: str) -> DatasetParams:
        """The dataset that `transfer.datasets` has under this name."""
        as_dataset = self.dataset.model_dump(exclude=set(TransferSetParams.model_fields))
        return DatasetParams.model_validate(as_dataset | self.transfer.datasets[name].model_dump())

    @field_validator("baselines")
    @classmethod
    def _baselines_need_no_teacher(cls, names: list[str]) -> list[str]:
        allowed = [name for name in method_names() if not method_section(name).needs_teacher]
        for name in names:
            if name not in allowed:
                raise ValueError(f"{name!r}: a baseline is a method without a teacher, allowed are {', '.join(allowed)}")
        return names


def method_names() -> list[str]:
    """Every method that has a file in bingo/methods."""
    folder = Path(__file__).parent / "methods"
    return sorted(path.name.removesuffix("_params.py") for path in folder.glob("*_params.py"))


def display_name(method: str) -> str:
    """A method's name as its paper writes it; of one that has no file here, the name that was given."""
    return method_section(method).display_name if method in method_names() else method


def format_names() -> list[str]:
    """Every format of checkpoints that has a file in bingo/teachers/formats."""
    folder = Path(__file__).parent / "teachers/formats"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def method_section(name: str) -> Any:
    """The pydantic section of one method, `Params` in bingo/methods/NAME_params.py."""
    return importlib.import_module(f"bingo.methods.{name}_params").Params


def schema() -> Any:
    """The whole schema: the core sections and, under `methods`, one section for each method."""
    sections: Any = {name: (method_section(name), ...) for name in method_names()}
    methods: Any = (create_model("Methods", __base__=Section, **sections), ...)
    return create_model("Params", __base__=_Core, methods=methods)


Params = Any  # an instance of what `schema()` returns: the methods' sections are known only by looking at the folder


def load_params(path: Path | str = "params.yaml") -> Params:
    """Read and validate the whole file. Raises UserError with one line for each mistake."""
    return validate(read_yaml(path), str(path))


def validate(raw: Any, origin: str) -> Params:
    """Validate a mapping that was read from `origin`. Raises UserError with one line for each mistake."""
    if not isinstance(raw, dict):
        raise UserError(f"{origin}: holds {type(raw).__name__}, not sections; restore it with: git checkout {origin}")
    try:
        return schema().model_validate(raw)
    except ValidationError as error:
        lines = [f"{origin}: {line}" for line in mistakes(error, schema())]
        more = [f"{origin}: and {len(lines) - _MOST_MISTAKES} more mistakes"] if len(lines) > _MOST_MISTAKES else []
        raise UserError([*lines[:_MOST_MISTAKES], *more]) from None


def read_yaml(path: Path | str) -> Any:
    """A YAML 1.2 file (so that 1e-05, as DVC writes it, is a number). Raises UserError where it cannot be read or parsed."""
    from ruamel.yaml import YAML

    try:
        return YAML(typ="safe", pure=True).load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run from the folder that holds params.yaml") from None
    except Exception as error:  # arbitrary text makes the parser raise almost anything
        raise UserError(f"{path}: is not YAML: {_yaml_reason(error)}; mend it") from None


def _yaml_reason(error: Exception) -> str:
    """What is wrong and where, in one line of at most some 200 characters."""
    mark = getattr(error, "problem_mark", None)
    reason = " ".join(str(getattr(error, "problem", None) or error).split()) or type(error).__name__
    place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return (reason if len(reason) <= 160 else f"{reason[:160]}...") + place


def mistakes(error: ValidationError, model: Any, section: str = "") -> list[str]:
    """One line for each mistake in a section of this name ("": the whole file): dotted key, value, what is allowed."""
    lines = []
    for item in error.errors(include_url=False, include_context=False):
        parts = [str(part) for part in (section, *item["loc"]) if part not in ("", "[key]")]
        key = ".".join(part if part.isprintable() else ascii(part) for part in parts) or "the file"
        if item["type"] == "missing":
            lines.append(f"{key} is missing; add it (recipes/ and the shipped params.yaml show its form)")
        elif item["type"] == "extra_forbidden":
            keys = _keys_beside(model, item["loc"])
            lines.append(f"{key} is not a known key{near_matches(str(item['loc'][-1]), keys)}; allowed are {', '.join(keys)}")
        else:
            value = "" if isinstance(item["input"], dict | BaseModel) else f" = {short(item['input'])}"
            lines += [f"{key}{value}: {message}" if key else message for message in _message(item).split("\n")]
    return lines


def _message(item: Any) -> str:
    if item["type"] in ("model_type", "dict_type"):
        return "allowed is a section, that is keys with values"
    return item["msg"].removeprefix("Value error, ").replace("Input should be", "allowed is")


def _keys_beside(model: Any, loc: tuple) -> list[str]:
    """The keys that a section allows, found by walking the schema along an error's location."""
    for part in loc[:-1]:
        if get_origin(model) is dict:  # part is a name that the user gave
            model = get_args(model)[1]
            continue
        field = model.model_fields.get(part)
        model = method_section("moco") if part == "moco" else field.annotation  # teacher.pretrain.moco has no type of its own
        if get_origin(model) is UnionType:  # a section, or null
            model = get_args(model)[0]
    return list(model.model_fields)
