"""One export: write the file under a temporary name, read it back with the target library, compare, then rename it into place.

Shape letters: B images, D feature width.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bingo import seeds
from bingo.export.contract import NotReadBack, ReadBack, Target
from bingo.export.measured import ExportFigures, Sample, measure
from bingo.export.stored import StoredNetwork
from bingo.runtime.artefacts import errors_named
from bingo.runtime.errors import UserError

TOLERANCE = 1e-5  # of the largest output
_IMAGES = 3


def export_network(
    network: StoredNetwork, target: Target, path: Path, sample: Sample | None = None, int8: bool = False
) -> tuple[str, ExportFigures]:
    """Write `path`, and return a short text on the library that read it back and the difference of its outputs, and what was measured of
    the file, on the images of `sample` too if there are any. `int8`: of ONNX, with weights and activations of 8 bits, calibrated on them.

    Raises UserError if the format does not support the network, or the outputs differ; `path` is then left unchanged.
    """
    partial, floating = (path.with_name(f".{state}.{path.name}") for state in ("partial", "float"))  # libraries infer formats from suffixes
    try:
        with errors_named(path, partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            target.write(network, floating if int8 else partial)
            read, check = _check(network, target, floating if int8 else partial, path)
            if int8:
                from bingo.export.to_onnx import quantize

                assert sample is not None
                quantize(network, floating, partial, sample.calibration_batches())
                read = target.read_back(network, partial)
            measured = measure(network, read, partial, floating if int8 else None, sample)
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(partial, path)
    finally:
        for left in (partial, floating):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return check, measured


def _check(network: StoredNetwork, target: Target, partial: Path, path: Path) -> tuple[ReadBack | None, str]:
    try:
        read = target.read_back(network, partial)
    except NotReadBack as reason:
        return None, f"not read back: {reason}"
    difference = largest_difference(network, read.outputs)
    if not difference <= TOLERANCE:  # nan too
        problem = f"{read.library} gives outputs that differ by {difference:.1g} of the largest, allowed is {TOLERANCE:g}"
        raise UserError(
            f"{path}: {problem}; nothing was written: {network.arch} computes something else there; export --to onnx or safetensors"
        )
    return read, f"read back with {read.library}: outputs differ by at most {difference:.1e} of the largest"


def largest_difference(network: StoredNetwork, outputs: Callable[[Tensor], Tensor]) -> float:
    """Largest difference of `outputs` from the network's own, relative to the largest output, over a batch and a single image.

    The images are seeded noise, float32 (B, 3, P, P), with the statistics of normalised images.
    """
    crop_px, module = network.image.crop_px, network.module
    generator = torch.Generator().manual_seed(seeds.torch_seed(0, "export"))
    images_B3PP = torch.randn(_IMAGES, 3, crop_px, crop_px, generator=generator)
    with torch.inference_mode():
        return max(_distance(outputs(x), module(x)) for x in (images_B3PP, images_B3PP[:1]))


def _distance(outputs_BD: Tensor, expected_BD: Tensor) -> float:
    largest = expected_BD.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((outputs_BD.double() - expected_BD.double()).abs().max() / largest).item()
