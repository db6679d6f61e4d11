"""Sections of the two networks, teacher and student."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from bingo.params.arch_names import arch_mistake, arch_names, own_mistake
from bingo.params.data import ImageParams, seen_image
from bingo.params.fields import LIBRARIES, Count, FilePath, Interpolation, PerChannel, Positive, Rate, Section, Weights, Width, one_of
from bingo.params.known import OWN, KnownTeacher, completed, filled, known_names, known_teacher
from bingo.params.training import PretrainParams
from bingo.paths import MODELS
from bingo.runtime.errors import near_matches


def format_names() -> list[str]:
    """Names of all checkpoint formats, which are the files in bingo/teachers/formats."""
    folder = Path(__file__).parents[1] / "teachers/formats"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


class NetworkParams(Section):
    """A backbone: a timm name (for a teacher from timm also NAME.TAG, which selects the weights), or torchvision/NAME; `width`
    multiplies all channels (ResNets only); `stem: small` is for images under 64 px."""

    arch: str
    width: Positive
    stem: Literal["imagenet", "small"]

    @field_validator("arch")
    @classmethod
    def _arch_exists(cls, arch: str) -> str:
        if mistake := arch_mistake(arch):
            raise ValueError(mistake)
        return arch

    @property
    def options(self) -> dict[str, Any]:
        """Further options for `build_backbone`: none."""
        return {}


class OwnNetworkParams(NetworkParams):
    """A backbone that may be the user's own network: `factory` is FILE.py:FUNCTION in bingo/nets/own and sets arch, width and stem."""

    factory: str | None

    @model_validator(mode="before")
    @classmethod
    def _as_made_by_factory(cls, section: Any) -> Any:
        if isinstance(section, dict) and isinstance(factory := section.get("factory"), str) and own_mistake(factory) is None:
            return section | {"arch": factory, "width": 1.0, "stem": "imagenet"}
        return section

    @field_validator("factory")
    @classmethod
    def _factory_exists(cls, factory: str | None) -> str | None:
        if factory is not None and (mistake := own_mistake(factory)):
            raise ValueError(mistake)
        return factory


class StudentParams(OwnNetworkParams):
    """The student's backbone. `weights`: its initial weights, which are random (null), the library's published ones (`timm` or
    `torchvision`; timm: the default, or those of the tag in `arch`), or those in a file. Settings for its training:
    `drop_path_rate`, the rate of stochastic depth (drop-connect in EfficientNet) in the last block, increasing linearly along the
    network; `drop_rate`, dropout of the pooled feature; `batchnorm_momentum`, the momentum of the running statistics (null: the
    library's default, usually 0.1).
    """

    weights: Weights | None
    drop_path_rate: Rate
    drop_rate: Rate
    batchnorm_momentum: Annotated[float, Field(gt=0, le=1)] | None

    @property
    def options(self) -> dict[str, Any]:
        """The training settings that are set, for `build_backbone`."""
        return {name: value for name in STUDENT_OPTIONS if (value := getattr(self, name))}


STUDENT_OPTIONS = ("drop_path_rate", "drop_rate", "batchnorm_momentum")


class TeacherImageParams(Section):
    """The teacher's input."""

    crop_px: Count | None
    resize_px: Count | None
    mean: PerChannel | None
    std: PerChannel | None
    interpolation: Interpolation | None


class TeacherParams(OwnNetworkParams):
    """The source of the teacher. `name` is either a known teacher, which replaces source, arch, width, stem and format, or `own`, a teacher
    described by these keys. `checkpoint` is a file for the source `checkpoint` (and optionally for timm and torchvision), and `format` the
    code that wrote it. `pooling` sets the feature of a vision transformer; null: as published. `key_width`: the number of principal
    components, fitted on train images, to which keys are reduced; null: not reduced.
    """

    name: str
    source: Literal["pretrain", "timm", "torchvision", "checkpoint", "random", "factory"]
    checkpoint: FilePath | None
    format: Annotated[str, one_of(format_names)]
    pooling: Literal["token", "patches", "both"] | None
    key_width: Width | None
    key_whiten: bool
    image: TeacherImageParams
    pretrain: PretrainParams

    @model_validator(mode="before")
    @classmethod
    def _as_named(cls, section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        if section.get("name") == OWN:
            return section | ({"source": "factory"} if section.get("factory") else {})
        return filled(section)

    @field_validator("name")
    @classmethod
    def _name_is_known(cls, name: str) -> str:
        if name not in (names := [OWN, *known_names()]):
            raise ValueError(f"unknown teacher{near_matches(name, names)}; see: bingo teachers, or set teacher.name: {OWN}")
        return name

    def key(self, name: str) -> str:
        """The dotted key of one of these settings, for messages."""
        return f"teacher.{name}"

    @property
    def options(self) -> dict[str, Any]:
        """Further options for `build_backbone`."""
        return {"pooling": self.pooling} if self.pooling else {}

    @property
    def known(self) -> KnownTeacher | None:
        """The description of the teacher that `name` selects, or None."""
        return None if self.name == OWN else known_teacher(self.name)

    def image_for(self, image: ImageParams) -> ImageParams:
        """The teacher's image settings: those of `image` (the student's) where its own section has null. Raises ValueError if the crop is
        larger than the resized image."""
        usual = {**image.model_dump(), "interpolation": image.interpolation}
        return seen_image(completed(usual, self.image.model_dump()))

    @model_validator(mode="after")
    def _checkpoint_is_named(self) -> Self:
        if self.source == "checkpoint" and not self.checkpoint:
            raise ValueError("checkpoint: null, but teacher.source is checkpoint; set teacher.checkpoint to the file")
        return self


def place_mistakes(key: str, value: str | None, student: StudentParams) -> Iterator[str]:
    """Errors in `value`, which `key` gives as weights of the student's network, as far as they can be found without reading a file."""
    library = "torchvision" if student.arch.startswith("torchvision/") else "timm"
    if value in LIBRARIES and student.factory:
        yield f"{key} = {value}: {student.arch} is a network of your own; set {key} to a file of its weights, or to null"
    elif value in LIBRARIES and value != library:
        yield f"{key} = {value}: student.arch = {student.arch} is a name of {library}; set {key}: {library}"
    elif value in LIBRARIES and (student.width != 1 or student.stem != "imagenet"):
        named = f"student.width = {student.width}, student.stem = {student.stem}"
        yield f"{key} = {value}: {named}, but published weights have width 1.0 and stem imagenet; set {key} to a file, or to null"
    elif value and value not in LIBRARIES and MODELS.resolve() in Path(value).resolve().parents:
        yield f"{key} = {value}: {MODELS} holds what the stages write; copy the file to another folder, and set {key} to the copy"


def source_mistakes(teacher: TeacherParams) -> Iterator[str]:
    """Settings of a teacher that its library does not support: another shape than published, or the other library's name."""
    published = teacher.source in ("timm", "torchvision") and not teacher.checkpoint
    if published and (teacher.width != 1 or teacher.stem != "imagenet"):
        named = f"teacher.width = {teacher.width}, teacher.stem = {teacher.stem}"
        yield f"{named}: published weights have others; set teacher.width: 1.0, teacher.stem: imagenet, or teacher.checkpoint to a file"
    of_torchvision = teacher.arch.startswith("torchvision/")
    if teacher.source == "timm" and of_torchvision:
        yield f"teacher.arch = {teacher.arch}: is not a timm network; set teacher.source: torchvision"
    if teacher.source == "torchvision" and not of_torchvision:
        other = f"torchvision/{teacher.arch}"
        way_out = f"set teacher.arch: {other}, or teacher.source: timm" if other in arch_names() else "set teacher.source: timm"
        yield f"teacher.arch = {teacher.arch}: is timm's name; {way_out}"
