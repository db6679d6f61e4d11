"""Sections of the two networks, teacher and student."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from bingo.params.arch_names import arch_mistake, arch_names
from bingo.params.fields import FilePath, Positive, Rate, Section
from bingo.params.training import PretrainParams
from bingo.runtime.errors import near_matches


class NetworkParams(Section):
    """A backbone: a timm name (of a teacher from timm also NAME.TAG, where the tag chooses the weights), or torchvision/NAME; `width`
    scales all channels (ResNets only); `stem: small` suits images under 64 px."""

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
    def options(self) -> dict[str, float]:
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
    def options(self) -> dict[str, float]:
        """What of these is not the default; `build_backbone` takes it."""
        return {name: value for name in STUDENT_OPTIONS if (value := getattr(self, name))}


STUDENT_OPTIONS = ("drop_path_rate", "drop_rate", "batchnorm_momentum")


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


def format_names() -> list[str]:
    """Every format of checkpoints that has a file in bingo/teachers/formats."""
    folder = Path(__file__).parents[1] / "teachers/formats"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def source_mistakes(teacher: TeacherParams) -> Iterator[str]:
    """What a teacher's section asks of a library that the library has not: another shape than published, the other library's name."""
    published = teacher.source in ("timm", "torchvision") and not teacher.checkpoint
    if published and (teacher.width != 1 or teacher.stem != "imagenet"):
        named = f"teacher.width = {teacher.width}, teacher.stem = {teacher.stem}"
        yield f"{named}: published weights have others; set teacher.width: 1.0, teacher.stem: imagenet, or teacher.checkpoint to a file"
    of_torchvision = teacher.arch.startswith("torchvision/")
    if teacher.source == "timm" and of_torchvision:
        yield f"teacher.arch = {teacher.arch}: is no network of timm; set teacher.source: torchvision"
    if teacher.source == "torchvision" and not of_torchvision:
        other = f"torchvision/{teacher.arch}"
        way_out = f"set teacher.arch: {other}, or teacher.source: timm" if other in arch_names() else "set teacher.source: timm"
        yield f"teacher.arch = {teacher.arch}: is timm's name; {way_out}"
