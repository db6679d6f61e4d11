"""One export: write the file under a temporary name, read it back with the target library, compare, then rename it into place.

Shape letters: B images, D feature width.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bingo import seeds
from bingo.export.contract import NotReadBack, Target
from bingo.export.stored import StoredNetwork
from bingo.runtime.errors import UserError

TOLERANCE = 1e-5  # of the largest output
_IMAGES = 3


def export_network(network: StoredNetwork, target: Target, path: Path) -> str:
    """Write `path`, and return a short text on the library that read it back and the difference of its outputs.

    Raises UserError if the format does not support the network, or the outputs differ; `path` is then left unchanged.
    """
    partial = path.with_name(f".partial.{path.name}")  # with the same suffix, from which libraries infer the format
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.write(network, partial)
        check = _check(network, target, partial, path)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return check


def _check(network: StoredNetwork, target: Target, partial: Path, path: Path) -> str:
    try:
        library, features = target.read_back(network, partial)
    except NotReadBack as reason:
        return f"not read back: {reason}"
    difference = largest_difference(network, features)
    if not difference <= TOLERANCE:  # nan too
        problem = f"{library} gives outputs that differ by {difference:.1g} of the largest, allowed is {TOLERANCE:g}"
        raise UserError(
            f"{path}: {problem}; nothing was written: {network.arch} computes something else there; export --to onnx or safetensors"
        )
    return f"read back with {library}: outputs differ by at most {difference:.1e} of the largest"


def largest_difference(network: StoredNetwork, features: Callable[[Tensor], Tensor]) -> float:
    """Largest difference between the outputs of two networks, relative to the largest output, over a batch and a single image.

    The images are seeded noise, float32 (B, 3, P, P), with the statistics of normalised images.
    """
    crop_px = network.image.crop_px
    generator = torch.Generator().manual_seed(seeds.torch_seed(0, "export"))
    images_B3PP = torch.randn(_IMAGES, 3, crop_px, crop_px, generator=generator)
    with torch.inference_mode():
        return max(_distance(features(x), network.backbone(x)) for x in (images_B3PP, images_B3PP[:1]))


def _distance(outputs_BD: Tensor, expected_BD: Tensor) -> float:
    largest = expected_BD.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((outputs_BD.double() - expected_BD.double()).abs().max() / largest).item()
