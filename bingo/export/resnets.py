"""The ResNets that detection libraries build: which of BINGO's networks are those, and by which depth they are called."""

from bingo.export.stored import StoredNetwork
from bingo.export.twins import bare_name, way_out
from bingo.runtime.errors import UserError

DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
BASIC_DEPTHS = (18, 34)  # of two 3x3 convolutions a block, the others of three with a bottleneck
STEM_CHANNELS = 64


def resnet_depth(network: StoredNetwork, target: str) -> int:
    """The number of layers. Raises UserError where the network is not He et al.'s ResNet with its 7x7 stem."""
    name = bare_name(network.arch)
    if name not in DEPTHS:
        raise UserError(f"--to = {target}: the network is {network.arch}, {target} builds {', '.join(DEPTHS)}; {way_out(network)}")
    if network.stem != "imagenet":
        line = f"--to = {target}: the network has stem {network.stem}, {target}'s ResNets begin with a 7x7 convolution and a pooling"
        raise UserError(f"{line} (stem imagenet); {way_out(network)}")
    return DEPTHS[name]


def in_255(values: list[float]) -> list[float]:
    """Mean or deviation of pixels in 0..255, where ours are in 0..1."""
    return [round(255 * value, 4) for value in values]
