"""The networks that are evaluated, each from its own file: the student, its moving average, its baselines, and the same network untrained,
with the student's initial weights, and with supervised weights. As features of all rows, also the teacher and raw pixels. The evaluation of
one network does not depend on another."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bingo import paths, seeds
from bingo.images.images import PIXELS_PX, Images, MemoryImages, open_images
from bingo.params import FeatureParams, ImageParams, Section
from bingo.pipeline.run import Run, code_fingerprint
from bingo.pipeline.state import state_folder
from bingo.runtime.artefacts import file_fingerprint

if TYPE_CHECKING:
    import torch

    from bingo.embeddings.store import Embeddings
    from bingo.images.listing import Listing
    from bingo.nets.backbones import Backbone

NOT_ASKED_FOR = "this network is not configured"
_READ_ROWS = 65536  # of the features at once
STORED = ("teacher", "pixels")  # their features need no forward pass
_FILES = {"student": paths.STUDENT, "ema": paths.EMA, "start": paths.START, "supervised": paths.SUPERVISED}  # others are baselines


def backbones(run: Run, nets: Sequence[str]) -> "dict[str, Backbone]":
    """The networks `nets` on the CPU, in evaluation mode, all loaded before any work, so that a missing network is reported first."""
    from bingo.nets.backbones import build_backbone
    from bingo.nets.students import evaluated, load_backbone

    network, found = run.params.student, {}
    for name in nets:
        if name == "untrained":
            seed_value = seeds.torch_seed(run.params.seed, "student")
            found[name] = build_backbone(network.arch, network.width, network.stem, seed_value, evaluated(network.options)).eval()
        else:
            found[name] = load_backbone(file_of(name), network)[0]
    return found


def state_of(run: Run, item: str, nets: Sequence[str], inputs: Sequence[Any], *decide: Section | str) -> AbstractContextManager[Path]:
    """The `state_folder` of an evaluation of `nets`, named after everything that determines the result: seed, views, architecture, files of
    the networks, `inputs` (JSON-serialisable) and the parameters `decide`. Only checkpoints with the same values are used."""
    sections = (run.params.image, run.params.student, *decide)
    values = {
        "params": [run.params.seed, *(section.model_dump() if isinstance(section, Section) else section for section in sections)],
        "inputs": [*inputs, {name: file_fingerprint(file_of(name)) for name in nets if name != "untrained"}],
        "code": code_fingerprint(run.name),
    }
    return state_folder(f"{run.name}-{item}", values)


def file_of(name: str) -> Path:
    """The file of a network; None if its features are stored or it is untrained."""
    return _FILES.get(name, paths.BASELINES / f"{name}.safetensors")


def existing(names: Sequence[str]) -> list[str]:
    """`names` without those that are not configured, for which the stages `distill` and `weights` have written no network."""
    files = {name: file_of(name) for name in names if name in ("ema", "start", "supervised")}
    absent = [name for name, file in files.items() if not file.exists() or file.stat().st_size <= len(paths.NO_WEIGHTS)]
    return [name for name in names if name not in absent]


class Networks:
    """Networks by name, opened before any work, so that a missing or damaged file is reported first.

    `teacher` holds the teacher's features, if it is among them. `backbones` are the networks to run, on the CPU. Raises UserError
    for a file that is missing or damaged, or belongs to another listing.
    """

    def __init__(self, run: Run, names: Sequence[str], listing: "Listing", teacher: "Embeddings | None"):
        self.run, self.names, self.listing, self._teacher = run, names, listing, teacher
        run_ones = [name for name in names if name not in STORED]
        self.backbones = backbones(run, run_ones) if run_ones else {}  # stored features need no timm
        self.images = open_images(listing, paths.IMAGES, run.params.dataset) if set(names) - {"teacher"} else None

    def features(self, name: str, params: FeatureParams, device: "torch.device | None") -> np.ndarray | None:
        """Features (N, width) of every row, float32; None for a network that is not among `names`. Stored features need no device."""
        if name not in self.names:
            return None
        if self._teacher is not None and name == "teacher":
            stored = self._teacher.features
            features_ND = np.empty(stored.shape, np.float32)
            for start in range(0, len(stored), _READ_ROWS):
                features_ND[start : start + _READ_ROWS] = stored[start : start + _READ_ROWS]
            return features_ND
        assert self.images is not None
        if name == "pixels":
            return _pixels(self.images)
        from bingo.evals.features import backbone_features

        assert device is not None
        rows, image = range(len(self.listing)), params.view(self.run.params.image)
        return backbone_features(self.backbones[name], self.images, rows, image, device, params.precision, params.batch_images)


def _pixels(images: Images) -> np.ndarray:
    """The pixels of every row, float32 (N, 3 S S): of whole images in memory, or of the files' centre squares at S = `PIXELS_PX`."""
    if isinstance(images, MemoryImages):
        return images.images_NSS3.reshape(len(images), -1).astype(np.float32)
    import torch

    from bingo.images.loader import center_views

    square = ImageParams(crop_px=PIXELS_PX, resize_px=PIXELS_PX, mean=[0.0] * 3, std=[1.0] * 3)
    views = center_views(images, range(len(images)), square, torch.device("cpu"), batch_images=512)
    return np.concatenate([view_BCPP.flatten(1).numpy() for view_BCPP in views])
