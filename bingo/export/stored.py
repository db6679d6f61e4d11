"""A trained network in a BINGO file, for use outside the pipeline: backbone, metadata, and image preprocessing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bingo.nets.backbones import Backbone
from bingo.nets.checkpoint import building
from bingo.nets.students import load_student
from bingo.params import ImageParams, seen_image
from bingo.teachers.teacher import load_teacher


@dataclass(frozen=True)
class StoredNetwork:
    """A backbone in eval mode on the CPU, the metadata of its file, and how its images are cropped and normalised."""

    backbone: Backbone
    metadata: dict[str, Any]
    image: ImageParams

    @property
    def arch(self) -> str:
        """A timm name, or torchvision/NAME."""
        return self.metadata["arch"]

    @property
    def width(self) -> float:
        """The channel multiplier."""
        return self.metadata["width"]

    @property
    def stem(self) -> str:
        """`imagenet` or `small`."""
        return self.metadata["stem"]


def read_student(path: Path) -> StoredNetwork:
    """The student or baseline in a file. Raises UserError if the file holds neither or is damaged."""
    backbone, metadata = load_student(path)
    return StoredNetwork(backbone, metadata, _image(path, metadata))


def read_teacher(path: Path) -> StoredNetwork:
    """The teacher's backbone, without its head. Raises UserError if the file is not a teacher's, or is damaged."""
    teacher = load_teacher(path)
    return StoredNetwork(teacher.backbone, teacher.metadata, _image(path, teacher.metadata))  # type: ignore[arg-type]


def _image(path: Path, metadata: dict[str, Any]) -> ImageParams:
    with building(path):
        return seen_image(metadata)
