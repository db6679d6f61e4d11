"""The backbones that the evaluations judge, each from its own file alone: the student, its baselines, and the same network untrained."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bingo.pipeline import paths
from bingo.pipeline.run import Run

if TYPE_CHECKING:
    from bingo.nets.backbones import Backbone
    from bingo.params import Section


def backbones(run: Run, nets: Sequence[str]) -> "dict[str, Backbone]":
    """Those of `nets` on the CPU, in evaluation mode: all of them before any work, so that a missing one is told first."""
    from bingo import seeds
    from bingo.nets.backbones import build_backbone
    from bingo.nets.students import evaluated, load_student

    network, found = run.params.student, {}
    for name in nets:
        if name == "untrained":
            seed_value = seeds.torch_seed(run.params.seed, "student")
            found[name] = build_backbone(network.arch, network.width, network.stem, seed_value, evaluated(network.options)).eval()
        else:
            found[name] = load_student(_file(name), network)[0]
    return found


def backbone_files(nets: Sequence[str]) -> dict[str, str]:
    """What identifies the weights of `nets`: the fingerprint of each file. Raises UserError where one is missing."""
    from bingo.runtime.artefacts import file_fingerprint

    return {name: file_fingerprint(_file(name)) for name in nets if name != "untrained"}


def judged(run: Run, *sections: "Section") -> list[int | dict[str, Any]]:
    """The parameters that decide what an evaluation of a network gives, beside the network: seed, views, architecture, `sections`."""
    return [run.params.seed, *(section.model_dump() for section in (run.params.image, run.params.student, *sections))]


def _file(name: str) -> Path:
    return paths.STUDENT if name == "student" else paths.BASELINES / f"{name}.safetensors"
