"""Comparison of an exported file with its network on images of the workspace, and its cost on this machine.

Shape letters: B images of a batch, Q images for the comparison, D feature width, C classes.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bingo import paths, seeds
from bingo.export.contract import ReadBack
from bingo.export.stored import StoredNetwork
from bingo.images.images import Images, open_images
from bingo.images.listing import Listing, read_judged_listing
from bingo.images.loader import center_views
from bingo.params import ImageParams, load_params
from bingo.runtime.errors import UserError, reason_of
from bingo.runtime.progress import progress_bar

BATCHES = (1, 32)  # batch sizes for which latency and memory are measured
_BATCH_IMAGES = 32
_NEIGHBORS = 10
_FEW_IMAGES = 512  # decoded by this process before workers would have started


class ExportFigures(NamedTuple):
    """Rows of measurements: name, figure of the float32 network, figure of the file (empty: not measured); and the machine, empty if only
    bytes were counted."""

    rows: list[tuple[str, str, str]]
    machine: str


@dataclass(frozen=True)
class Sample:
    """Images of the workspace on which an export is calibrated and compared. `layer` classifies the network's features, if there is a layer
    with the listing's classes."""

    listing: Listing
    images: Images
    image: ImageParams
    seed: int
    calibration_images: int
    test_images: int
    layer: nn.Linear | None

    def calibration_batches(self) -> Iterator[Tensor]:
        """Centre views of train images drawn by seed, or of all if there are fewer: float32 (B, 3, P, P)."""
        return self._views(seeds.distinct(self.seed, "calibration", 0, self.listing.train_rows, self.calibration_images))

    def compare(self, module: nn.Module, outputs: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, np.ndarray, str]:
        """The outputs of both on evaluated test images drawn by seed, or on train images if there are none: float32 (Q, X), (Q, X); the
        rows, int64 (Q,); and a description of the images."""
        split = "test" if len(self.listing.test_rows_N) else "train"
        rows_N = self.listing.test_rows_N if split == "test" else np.arange(self.listing.train_rows)
        rows_Q, before, after = rows_N[seeds.distinct(self.seed, "export", 0, len(rows_N), self.test_images)], [], []
        with torch.inference_mode(), progress_bar("outputs of the export", len(rows_Q), "images") as bar:
            for views_BCPP in self._views(rows_Q):
                before.append(module(views_BCPP))
                after.append(outputs(views_BCPP))
                bar.advance(len(views_BCPP))
            return torch.cat(before), torch.cat(after), rows_Q, f"{len(rows_Q):,} {split} images"

    def _views(self, rows_B: np.ndarray) -> Iterator[Tensor]:
        workers = 0 if len(rows_B) <= _FEW_IMAGES else None
        return center_views(self.images, rows_B, self.image, torch.device("cpu"), _BATCH_IMAGES, workers)


def open_sample(image: ImageParams, layer: nn.Linear | None, layer_listing: str, calibration_images: int, test_images: int) -> Sample:
    """The workspace's images as a network sees them, classified by `layer` if it was trained on this listing. Raises UserError if listing
    or images are missing or damaged."""
    listing, params = read_judged_listing(paths.LISTING, paths.LEFT_OUT), load_params()
    known = layer if layer_listing == listing.fingerprint and listing.can_judge else None
    images = open_images(listing, paths.IMAGES, params.dataset)
    return Sample(listing, images, image, params.seed, calibration_images, test_images, known)


def measure(network: StoredNetwork, read: ReadBack | None, file: Path, floating: Path | None, sample: Sample | None) -> ExportFigures:
    """Bytes; for a file that is a program, latency and peak memory; with a sample, accuracy or agreement. `floating`: the float32 file from
    which an INT8 `file` was made."""
    rows = [("bytes", f"{floating.stat().st_size:,}" if floating else "", f"{_bytes(file):,}")]
    if read is None:
        return ExportFigures(rows, "")
    if sample is not None:
        rows += _judged(network, read.outputs, sample)
    programs = [program for program in (floating, file) if program and program.suffix in (".onnx", ".pt2")]
    for batch_images in BATCHES if programs else ():
        costs = [cost(program, batch_images, network.image.crop_px) for program in programs]
        for name, unit in (("latency", "ms"), ("peak memory", "MB")):
            before, after = ["", *(f"{found[name]:.4g}" for found in costs)][-2:]
            rows.append((f"{name} at batch {batch_images}, {unit}", before, after))
    return ExportFigures(rows, _machine(read.library) if len(rows) > 1 else "")


def _judged(network: StoredNetwork, outputs: Callable[[Tensor], Tensor], sample: Sample) -> list[tuple[str, str, str]]:
    """Accuracy if there is a layer, and for features their similarity to those of the network."""
    *both, rows_Q, images = sample.compare(network.module, outputs)
    found = []
    if sample.layer is not None:
        labels_Q = torch.from_numpy(sample.listing.labels_N[rows_Q])
        with torch.inference_mode():
            logits = both if network.classifier else [sample.layer(features_QD) for features_QD in both]
        before, after = (f"{100 * (logits_QC.argmax(1) == labels_Q).double().mean():.2f}" for logits_QC in logits)
        found.append((f"accuracy of the linear layer, percent of {images}", before, after))
    if not network.classifier:
        cosine, common = agreement(*both)
        found.append((f"cosine to the float32 features, mean of {images}", "1", f"{cosine:.4f}"))
        found.append((f"{min(_NEIGHBORS, len(rows_Q) - 1)} nearest of {images} in common, percent", "100", f"{common:.1f}"))
    return found


def agreement(features_QD: Tensor, others_QD: Tensor) -> tuple[float, float]:
    """Mean cosine between two networks' features of the same images, and the percentage of the 10 nearest other images (by cosine; or of
    all, if there are fewer) that both find."""
    units = [torch.nn.functional.normalize(x_QD.double()) for x_QD in (features_QD, others_QD)]
    cosine, k = (units[0] * units[1]).sum(1).mean().item(), min(_NEIGHBORS, len(features_QD) - 1)
    if k < 1:
        return cosine, 100.0
    first_QK, second_QK = ((x_QD @ x_QD.T).fill_diagonal_(-2).topk(k).indices for x_QD in units)
    return cosine, 100 * (first_QK[:, :, None] == second_QK[:, None, :]).any(2).double().mean().item()


def cost(program: Path, batch_images: int, crop_px: int) -> dict[str, float]:
    """`latency` in ms and `peak memory` in MB of 2^20 bytes of a process that runs only the program, by `bingo.export.speed`."""
    command = [sys.executable, "-m", "bingo.export.speed", str(program), str(batch_images), str(crop_px)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = reason_of((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
        raise UserError(f"{program.name}: its latency cannot be measured ({reason}); export --to safetensors")
    return json.loads(done.stdout)


def _bytes(file: Path) -> int:
    return sum(part.stat().st_size for part in file.iterdir()) if file.is_dir() else file.stat().st_size


def _machine(library: str) -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.machine()}, {cores} cores, {library}"
