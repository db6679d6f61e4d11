"""The networks that are evaluated, each from its own file: the student, its baselines, the same network untrained; and, as features of
all rows, also the teacher and raw pixels. The evaluation of one network does not depend on another."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bingo.pipeline import paths
from bingo.pipeline.run import Run

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bingo.embeddings.store import Embeddings
    from bingo.images.listing import Listing
    from bingo.nets.backbones import Backbone
    from bingo.params import FeatureParams, Section

STORED = ("teacher", "pixels")  # no network is run for their features


def backbones(run: Run, nets: Sequence[str]) -> "dict[str, Backbone]":
    """The networks `nets` on the CPU, in evaluation mode, all loaded before any work, so that a missing one is reported first."""
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
    """The fingerprint of each file of `nets`, which identifies its weights. Raises UserError if one is missing."""
    from bingo.runtime.artefacts import file_fingerprint

    return {name: file_fingerprint(_file(name)) for name in nets if name != "untrained"}


def judged(run: Run, *sections: "Section") -> list[int | dict[str, Any]]:
    """The parameters on which the evaluation of a network depends: seed, views, architecture, `sections`."""
    return [run.params.seed, *(section.model_dump() for section in (run.params.image, run.params.student, *sections))]


def _file(name: str) -> Path:
    return paths.STUDENT if name == "student" else paths.BASELINES / f"{name}.safetensors"


class Networks:
    """Networks by name, opened before any work, so that a missing or damaged file is reported first.

    `teacher` holds the teacher's features, if it is one of them. `backbones` are the networks that are run, on the CPU. Raises UserError
    for
    a file that is missing or damaged, or belongs to another listing.
    """

    def __init__(self, run: Run, names: Sequence[str], listing: "Listing", teacher: "Embeddings | None"):
        from bingo.images.images import open_images

        self.run, self.listing = run, listing
        run_ones = [name for name in names if name not in STORED]
        self.backbones = backbones(run, run_ones) if run_ones else {}  # stored features need no timm
        self._teacher = teacher
        self.images = open_images(listing, paths.IMAGES, run.params.dataset) if set(names) - {"teacher"} else None

    def features(self, name: str, params: "FeatureParams", device: "torch.device | None") -> "np.ndarray | None":
        """Features (N, width) of every row, float32; None for pixels that are not held in memory. Stored ones need no device."""
        import numpy as np

        from bingo.images.images import MemoryImages

        if name == "teacher" and self._teacher is not None:
            return self._teacher.features_ND.astype(np.float32)
        if name == "pixels":
            pixels = self.images.images_NSS3 if isinstance(self.images, MemoryImages) else None
            return None if pixels is None else pixels.reshape(len(pixels), -1).astype(np.float32)
        return self._computed(name, params, device)

    def _computed(self, name: str, params: "FeatureParams", device: "torch.device | None") -> "np.ndarray":
        import numpy as np
        import torch

        from bingo.evals.features import backbone_features

        assert self.images is not None
        assert device is not None
        backbone = self.backbones[name].to(device).to(memory_format=torch.channels_last)
        rows, image = np.arange(len(self.listing)), params.view(self.run.params.image)
        return backbone_features(backbone, self.images, rows, image, device, params.precision, params.batch_images)
