"""A trained network in a BINGO file, for use outside the pipeline: backbone, metadata, and image preprocessing."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from bingo import paths
from bingo.nets.backbones import Backbone
from bingo.nets.checkpoint import building, load_network, own_metadata
from bingo.nets.students import load_backbone
from bingo.params import ImageParams, seen_image
from bingo.runtime.artefacts import file_fingerprint
from bingo.runtime.errors import UserError
from bingo.teachers.teacher import load_teacher


@dataclass(frozen=True)
class StoredNetwork:
    """A backbone in eval mode on the CPU, the metadata of its file, and how its images are cropped and normalised; and a linear layer
    that classifies its pooled features, with the names of the classes, if it has one."""

    backbone: Backbone
    metadata: dict[str, Any]
    image: ImageParams
    classifier: nn.Linear | None = None
    classes: tuple[str, ...] = ()

    @property
    def module(self) -> nn.Module:
        """The backbone, followed by the classifier if there is one: normalised images (B, 3, P, P) to features (B, D) or logits (B, C)."""
        return self.backbone if self.classifier is None else nn.Sequential(self.backbone, self.classifier).eval()

    @property
    def output(self) -> str:
        """What `module` returns: `features` or `logits`."""
        return "features" if self.classifier is None else "logits"

    @property
    def described(self) -> dict[str, Any]:
        """The metadata of a file of `module`: those of a student, or of a classifier with the names of its classes."""
        return self.metadata if self.classifier is None else {**self.metadata, "kind": "classifier", "classes": list(self.classes)}

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
    backbone, metadata = load_backbone(path)
    return StoredNetwork(backbone, metadata, _image(path, metadata))


def layers_of(file: Path) -> list[Path]:
    """The files in models/linear with a layer for the features of a network, found by the bytes of its `file`, whatever its name."""
    wanted = file_fingerprint(file)
    return [path for path in sorted(paths.LINEAR.glob("*.safetensors")) if (own_metadata(path) or {}).get("backbone") == wanted]


def with_classifier(network: StoredNetwork, file: Path) -> tuple[StoredNetwork, str]:
    """`network`, read from `file`, with the layer that `linear_eval` trained on its stored features, and the fingerprint of the listing
    on which that was. Raises UserError if there is none, or if it is damaged."""
    layers = layers_of(file)
    if not layers:
        empty = paths.LINEAR / file.name
        unlabelled = empty.is_file() and empty.read_bytes() == paths.NO_WEIGHTS
        reason = "linear_eval had no labelled train and test images" if unlabelled else "run: dvc repro linear_eval linear_eval_baseline"
        raise UserError(f"--head = linear: {paths.LINEAR} holds no layer of {file}; {reason}, or leave --head out")
    state, metadata = load_network(layers[0])
    with building(layers[0]):
        layer = nn.Linear(network.backbone.feature_width, len(metadata["classes"]))
        layer.load_state_dict(state)
        return replace(network, classifier=layer.requires_grad_(False), classes=tuple(metadata["classes"])), metadata["listing"]


def read_teacher(path: Path) -> StoredNetwork:
    """The teacher's backbone, without its head. Raises UserError if the file is not a teacher's, or is damaged."""
    teacher = load_teacher(path)
    return StoredNetwork(teacher.backbone, teacher.metadata, _image(path, teacher.metadata))  # type: ignore[arg-type]


def _image(path: Path, metadata: dict[str, Any]) -> ImageParams:
    with building(path):
        return seen_image(metadata)
