"""Convert a network between timm and torchvision, with the same weights, if both have it.

Most ResNets and DenseNets have equal names in both; EfficientNets have the same tensors in the same order under other names. A pairing
is an assumption that the export verifies by comparing outputs; a different epsilon of BatchNorm, for example, shows only there.
"""

from bingo.export.stored import StoredNetwork
from bingo.nets.backbones import Backbone, build_backbone
from bingo.runtime.errors import UserError


def twin(network: StoredNetwork, arch: str) -> Backbone:
    """The backbone of `network` as `arch`, in eval mode; the backbone itself if it has this architecture.

    Raises UserError if the tensors of the two differ in number or shape.
    """
    if network.arch == arch:
        return network.backbone
    other = build_backbone(arch, network.width, network.stem, seed_value=0)
    own, wanted = network.backbone.state_dict(), other.state_dict()
    if set(own) == set(wanted):
        other.load_state_dict(own)
    elif [tensor.shape for tensor in own.values()] == [tensor.shape for tensor in wanted.values()]:
        other.load_state_dict(dict(zip(wanted, own.values(), strict=True)))
    else:
        raise UserError(f"{arch} has other layers than {network.arch}, the network's arch; {way_out(network)}")
    return other.eval()


def bare_name(arch: str) -> str:
    """`arch` without the library's name."""
    return arch.removeprefix("torchvision/")


def way_out(network: StoredNetwork) -> str:
    """The alternative: the library that the network comes from, or a format for all networks."""
    own = "torchvision" if network.arch.startswith("torchvision/") else "timm"
    return f"export --to {own}, onnx or safetensors"
