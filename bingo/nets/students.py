"""The student's files: the backbone with timm's or torchvision's parameter names, and its projection head in a separate file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bingo.nets.backbones import Backbone, build_backbone
from bingo.nets.checkpoint import building, load_network, load_strictly, save_network
from bingo.params import STUDENT_OPTIONS, ImageParams, NetworkParams, StudentParams
from bingo.paths import NO_WEIGHTS, START
from bingo.runtime.artefacts import file_fingerprint, new_directory, write_bytes, write_json
from bingo.runtime.errors import UserError


def save_student(
    path: Path, head_path: Path, backbone: nn.Module, head: nn.Module, network: NetworkParams, image: ImageParams, made_from: dict
) -> None:
    """Write the backbone to `path` and the head to `head_path`, with their descriptions and the fingerprints of their inputs."""
    save_backbone(path, backbone.state_dict(), network, image, made_from)
    save_network(head_path, head.state_dict(), {"kind": "student head", "backbone": file_fingerprint(path), **made_from})


def save_backbone(path: Path, weights: Mapping[str, Tensor], network: NetworkParams, image: ImageParams, made_from: dict) -> None:
    """Write a backbone's state dict to `path`, with its description and the fingerprints of its inputs; `load_backbone` reads it."""
    shape = {"arch": network.arch, "width": network.width, "stem": network.stem, **image.model_dump()}
    options = {"options": network.options} if network.options else {}  # files from before options existed do not change
    save_network(path, weights, {"kind": "student", **shape, **options, **made_from})


def save_best(folder: Path, best: Mapping[str, Any], network: NetworkParams, image: ImageParams, made_from: dict) -> None:
    """Replace `folder` by one with `best` of a TrainingResult: student.safetensors, and epoch.json with the epoch and the probe's figures.

    Without a best epoch there is only epoch.json, with {"epoch": null}, because DVC warns about an empty output folder.
    """
    with new_directory(folder) as partial:
        found = {"epoch": best["epoch"], **best["probe"]} if best else {"epoch": None}
        write_json(partial / "epoch.json", found)
        if best:
            save_backbone(partial / "student.safetensors", best["weights"], network, image, {**made_from, "best": found})


def save_average(path: Path, weights: Mapping[str, Tensor], network: NetworkParams, image: ImageParams, made_from: dict) -> None:
    """Write the student's moving average to `path`, or the text `none` if there is no moving average."""
    if weights:
        save_backbone(path, weights, network, image, {**made_from, "average": True})
    else:
        write_bytes(path, NO_WEIGHTS)


def load_start(network: StudentParams) -> tuple[Backbone | None, dict[str, Any]]:
    """The backbone with the student's initial weights, and the metadata of its file; (None, {}) if they are random. Raises the errors of
    `load_backbone`."""
    if network.weights is None:
        return None, {}
    backbone, metadata = load_backbone(START, network)
    return backbone, {"start": {name: metadata[name] for name in ("weights", "source_sha256")}}


def load_backbone(path: Path, network: NetworkParams | None = None) -> tuple[Backbone, dict[str, Any]]:
    """The backbone in a student's file, in eval mode, and the file's metadata. It is also deterministic in train mode: dropout and
    stochastic depth were used only for its own training.

    Raises UserError if the file is not a student's or, if `network` is given, if it has a different architecture.
    """
    state, metadata = load_network(path)
    if metadata.get("kind") != "student":
        raise UserError(
            f"{path}: holds a {metadata.get('kind', 'network of another kind')}, not a student; give another, or run: dvc repro distill"
        )
    with building(path):
        shape = {name: metadata[name] for name in ("arch", "width", "stem")}
        options = dict(metadata.get("options", {}))
        if network is not None:
            _compare(path, shape | options, network)
        backbone = build_backbone(**shape, seed_value=0, options=evaluated(options))
        load_strictly(backbone, state, str(path))
    return backbone.eval(), metadata


def _compare(path: Path, found: Mapping[str, Any], network: NetworkParams) -> None:
    """Raise UserError if the file's network differs from `network` in its architecture, or in the rates of dropout and stochastic depth."""
    defaults: dict[str, Any] = dict.fromkeys(STUDENT_OPTIONS, 0.0) | {"batchnorm_momentum": "null"}
    asked = defaults | {name: getattr(network, name) for name in ("arch", "width", "stem")} | network.options
    found = defaults | dict(found)
    if other := [name for name in asked if asked[name] != found[name]]:
        differences = ", ".join(f"student.{name} = {asked[name]}, this network has {found[name]}" for name in other)
        raise UserError(f"{path}: {differences}; run the stage that writes it: dvc repro")


def evaluated(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a student that matter after training: all except drop rates."""
    return {name: value for name, value in options.items() if name == "batchnorm_momentum"}
