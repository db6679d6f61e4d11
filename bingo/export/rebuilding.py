"""Python code with which a user builds a backbone from timm or torchvision, as `build_backbone` does, without BINGO.

The code is derived from the module that was built, so that it describes what the module is.
"""

from typing import Any

from timm.models.resnet import ResNet
from torch import nn
from torchvision import models as vision

from bingo.export.stored import StoredNetwork
from bingo.nets.backbones import Backbone, is_transformer


def changes(network: StoredNetwork, library: str) -> str:
    """A note on how this network differs from the library's, empty if it does not."""
    own = {"width": 1.0, "stem": "imagenet"}
    found = " and ".join(f"{name} {getattr(network, name)}" for name, value in own.items() if getattr(network, name) != value)
    return f"{network.arch} has {found}, which {library} cannot build by name: see the model card for the code" if found else ""


def timm_arguments(backbone: Backbone, arch: str, width: float) -> dict[str, Any]:
    """Arguments of timm.create_model that give the backbone, but for a first convolution that is replaced: `stem_type` is then among
    them, since timm hard-codes 64 channels for every stem but the deep one."""
    net: Any = backbone
    arguments: dict[str, Any] = {"dynamic_img_size": True} if is_transformer(arch) else {}
    if width != 1:
        arguments["channels"] = tuple(info["num_chs"] // getattr(net, info["module"])[0].expansion for info in net.feature_info[1:])
        arguments["stem_width"] = net.bn1.num_features // 2
        arguments |= {} if isinstance(net.conv1, nn.Sequential) else {"stem_type": "deep"}
    return arguments


def timm_call(backbone: Backbone, arch: str, width: float, classes: int) -> str:
    """The call of timm.create_model with these arguments, without its closing bracket; `classes` is 0 of a backbone."""
    arguments = {"num_classes": classes, **timm_arguments(backbone, arch, width)}
    return f'timm.create_model("{arch}", {", ".join(f"{name}={value!r}" for name, value in arguments.items())}'


def timm_lines(backbone: Backbone, arch: str, width: float, stem: str, classes: int = 0) -> list[str]:
    """Lines that leave timm's module in `net`, with untrained weights."""
    net: Any = backbone
    lines = ["import timm", "import torch", f"net = {timm_call(backbone, arch, width, classes)})"]
    if isinstance(net, ResNet):
        first: Any = net.conv1
        replaced = isinstance(first, nn.Conv2d) and (width != 1 or stem == "small")
        return lines + ([_first_conv(first)] if replaced else []) + _no_pooling(stem)
    return lines + (["net.conv_stem.stride = 1, 1"] if stem == "small" else [])


def torchvision_lines(backbone: Backbone, name: str, stem: str) -> list[str]:
    """Lines that leave torchvision's module in `net`, with untrained weights and without the classifier."""
    net: Any = backbone
    lines = ["import torch", "import torchvision", f"net = torchvision.models.{name}()"]
    lines += [f'net.set_submodule("{path}", torch.nn.Identity())' for path in backbone.classifier_names]
    if isinstance(net, vision.ResNet):
        return lines + ([_first_conv(net.conv1)] if stem == "small" else []) + _no_pooling(stem)
    return lines + (["net.features[0][0].stride = 1, 1"] if stem == "small" else [])


def _first_conv(conv: nn.Conv2d) -> str:
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    return f"net.conv1 = torch.nn.Conv2d(3, {conv.out_channels}, {kernel}, {stride}, padding={padding}, bias=False)"


def _no_pooling(stem: str) -> list[str]:
    return ["net.maxpool = torch.nn.Identity()"] if stem == "small" else []
