"""The networks that are evaluated, each from its own file: the student, its moving average, its baselines, and the same network untrained,
with the student's initial weights, and with supervised weights. As features of all rows, also the teacher and raw pixels. The evaluation of
one network does not depend on another."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bingo import paths, seeds
from bingo.images.images import PIXELS_PX, MemoryImages, open_images
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
_BLOCK_BYTES, _LEAST_BLOCK_ROWS = 64 << 20, 32768  # of features in which neighbours are searched; workers start again for each block
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
        (features_ND,) = self._blocks(name, params, device, np.arange(len(self.listing)), [len(self.listing)])
        return features_ND

    def blocks(self, name: str, params: FeatureParams, device: "torch.device | None") -> Iterator[np.ndarray] | None:
        """Features in blocks, for `nearest_in_blocks`: those of the test rows that are evaluated, then those of the train rows, of which
        one block is in memory at a time. None for a network that is not among `names`."""
        if name not in self.names:
            return None
        if name == "teacher":
            return self.blocks_of_teacher()
        test_N, train = self.listing.test_rows_N, self.listing.train_rows
        width = 3 * PIXELS_PX**2 if name == "pixels" else self.backbones[name].feature_width
        block_rows = [len(test_N), *(len(block) for block in self._train_blocks(4 * width))]
        return self._blocks(name, params, device, np.concatenate([test_N, np.arange(train)]), block_rows)

    def blocks_of_teacher(self) -> Iterator[np.ndarray]:
        """`blocks` of the stored features of the teacher, float16."""
        assert self._teacher is not None
        stored = self._teacher.features
        yield stored[self.listing.test_rows_N]
        for block in self._train_blocks(4 * stored.shape[1]):
            yield stored[block.start : block.stop]

    def _train_blocks(self, row_bytes: int) -> list[range]:
        most_rows = max(_LEAST_BLOCK_ROWS, _BLOCK_BYTES // row_bytes)
        return [range(self.listing.train_rows)[start : start + most_rows] for start in range(0, self.listing.train_rows, most_rows)]

    def _blocks(
        self, name: str, params: FeatureParams, device: "torch.device | None", rows_n: np.ndarray, block_rows: list[int]
    ) -> Iterator[np.ndarray]:
        """`feature_blocks` of a network, or raw pixels, float32 (n, 3 S S): of whole images in memory, or of the files' centre squares at
        S = `PIXELS_PX`."""
        assert self.images is not None
        if name == "pixels" and isinstance(self.images, MemoryImages):
            for rows in np.split(rows_n, np.cumsum(block_rows)[:-1]):
                yield self.images.images_NSS3[rows].reshape(len(rows), -1).astype(np.float32)
            return
        import torch

        from bingo.evals.features import feature_blocks

        if name == "pixels":
            square = ImageParams(crop_px=PIXELS_PX, resize_px=PIXELS_PX, mean=[0.0] * 3, std=[1.0] * 3)
            yield from feature_blocks(torch.nn.Flatten(), self.images, rows_n, square, torch.device("cpu"), "fp32", 512, block_rows)
        else:
            assert device is not None
            network, how = self.backbones[name], (params.precision, params.batch_images)
            yield from feature_blocks(network, self.images, rows_n, params.view(self.run.params.image), device, *how, block_rows)
