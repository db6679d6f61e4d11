"""SimCLR v1 and v2 (Chen et al. 2020), Google's TensorFlow weights as two public converters write them for PyTorch.

v1: tonylins/simclr-converter, convert.py. v2: Separius/SimCLRv2-Pytorch, convert.py and resnet.py.
"""

import re
from typing import Any

from bingo.teachers.contract import Parts, bare, divide, entry, under

EXPECTED = "v1's state_dict of a ResNet, or v2's resnet and head"
KEY_WIDTH = None
_NOT_NORMALISED = ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
_BLOCK = re.compile(r"net\.(\d)\.blocks\.(\d+)\.(.+)$")
# Names in v2's blocks (Sequentials of convolutions and of pairs of BatchNorm and ReLU) and in torchvision's.
_IN_BLOCK = {
    "projection.shortcut.": "downsample.0.",
    "projection.bn.0.": "downsample.1.",
    **{f"net.{2 * i}.": f"conv{i + 1}." for i in range(3)},
    **{f"net.{2 * i + 1}.0.": f"bn{i + 1}." for i in range(3)},
}
_STEM = {"net.0.0.": "conv1.", "net.0.1.0.": "bn1."}


def parts(content: Any) -> Parts | None:
    """v1: a ResNet-50 (1x, 2x, 4x: `width`) without a head, whose unit feature is the key; v2: a ResNet with its contrastive head.

    v2's head has three linear layers without bias, each followed by a BatchNorm, with ReLU between. Classifiers are left out. Images were
    not normalised: image.mean is 0 and image.std 1. timm has no networks like v2's with selective kernels (sk1), which are
    recognised by their names and refused.
    """
    if state := bare(entry(content, "state_dict")):
        return divide(state, "", left_out=("fc",), mean_std=_NOT_NORMALISED, sure=False)
    resnet, head = entry(content, "resnet"), entry(content, "head")
    if not under(resnet, "net.0.") or not under(head, "layers."):
        return None
    layers = ("linear_no_bias", "batchnorm", "relu") * 2 + ("linear_no_bias", "batchnorm")
    state = {_torchvision(name): tensor for name, tensor in resnet.items()}
    state |= {f"head.{name}": tensor for name, tensor in head.items()}
    return divide(state, "", "head.layers.", ("fc",), layers=layers, mean_std=_NOT_NORMALISED)


def _torchvision(name: str) -> str:
    """torchvision's name of one of v2's tensors; other names are not changed."""
    if match := _BLOCK.match(name):
        stage, block, rest = match.groups()
        renamed = _replaced(rest, _IN_BLOCK)
        return name if renamed == rest else f"layer{stage}.{block}.{renamed}"
    return _replaced(name, _STEM)


def _replaced(name: str, prefixes: dict[str, str]) -> str:
    return next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name)
