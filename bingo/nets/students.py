"""The student's files: the backbone alone under timm's or torchvision's key names, its projection head beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bingo.artefacts import file_fingerprint
from bingo.errors import UserError
from bingo.nets.backbones import Backbone, build_backbone
from bingo.nets.checkpoint import building, load_network, load_strictly, save_network
from bingo.params import ImageParams, NetworkParams


def save_student(
    path: Path, head_path: Path, backbone: nn.Module, head: nn.Module, network: NetworkParams, image: ImageParams, made_from: dict
) -> None:
    """Write the backbone to `path` and the head to `head_path`, with what they are and what they were made from."""
    shape = {"arch": network.arch, "width": network.width, "stem": network.stem, **image.model_dump()}
    save_network(path, backbone.state_dict(), {"kind": "student", **shape, **made_from})
    save_network(head_path, head.state_dict(), {"kind": "student head", "backbone": file_fingerprint(path), **made_from})


def load_student(path: Path, network: NetworkParams | None = None) -> tuple[Backbone, dict[str, Any]]:
    """The backbone in a student's file, in eval mode, and the file's metadata.

    Raises UserError where the file is no student's or, with `network` given, where it is of another architecture.
    """
    state, metadata = load_network(path)
    if metadata.get("kind") != "student":
        raise UserError(f"{path}: holds a {metadata.get('kind', 'network of another kind')}, not a student; run: dvc repro distill")
    with building(path):
        return _built(path, state, metadata, network).eval(), metadata


def _built(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any], network: NetworkParams | None) -> Backbone:
    """The backbone that the metadata describe, which must be that of `network` where it is given, with the file's tensors."""
    shape = {name: metadata[name] for name in ("arch", "width", "stem")}
    wanted = shape if network is None else {name: getattr(network, name) for name in shape}
    if other := [name for name in shape if shape[name] != wanted[name]]:
        differences = ", ".join(f"student.{name} = {wanted[name]}, this network has {shape[name]}" for name in other)
        raise UserError(f"{path}: {differences}; run the stage that writes it: dvc repro")
    backbone = build_backbone(**shape, seed_value=0)
    load_strictly(backbone, state, str(path))
    return backbone
