"""detectron2: the pickled dict of arrays that its checkpointer reads, named as its ResNet names them.

Layout and names are those written by MoCo's detection/convert-pretrain-to-detectron2.py, without BatchNorm's counters,
which detectron2's FrozenBatchNorm (its default) does not have. detectron2 is not on a package registry; if it is not installed,
tests/export/test_export.py rebuilds its ResNet (modeling/backbone/resnet.py) and compares outputs.
"""

import io
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bingo.export.contract import Loading, NotReadBack, ReadBack, quoted
from bingo.export.stored import StoredNetwork
from bingo.export.twins import bare_name, way_out
from bingo.runtime.artefacts import write_bytes
from bingo.runtime.errors import UserError, reason_of

SUFFIXES = (".pkl",)
CLASSIFIES = False
DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}
BASIC_DEPTHS = (18, 34)  # with two 3x3 convolutions in a block; the others have a bottleneck
STEM_CHANNELS = 64
_RENAMES = ((r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}"), (r"\bbn(\d)", r"conv\1.norm"))
_SHORTCUT = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"}


def write(network: StoredNetwork, path: Path) -> None:
    """The dict `model`, `__author__`, `matching_heuristics` as pickle."""
    _depth(network)
    state = {name: tensor for name, tensor in network.backbone.state_dict().items() if not name.endswith("num_batches_tracked")}
    arrays = {detectron2_name(name): tensor.contiguous().numpy() for name, tensor in state.items()}
    content = io.BytesIO()
    _ArrayPickler(content, protocol=5).dump({"model": arrays, "__author__": "BINGO", "matching_heuristics": True})
    write_bytes(path, content.getvalue())


def read_back(network: StoredNetwork, path: Path) -> ReadBack:
    """Read by detectron2's checkpointer into the ResNet that the card's configuration builds; its last stage is pooled."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import detectron2
            from detectron2.checkpoint import DetectionCheckpointer
            from detectron2.config import CfgNode, get_cfg
            from detectron2.layers import ShapeSpec
            from detectron2.modeling import build_resnet_backbone
    except Exception as error:  # also an extension compiled for another torch
        raise NotReadBack(f"detectron2 cannot be imported ({reason_of(error)})") from None
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode.load_cfg(loading(network, str(path)).text))
    cfg.merge_from_list(["MODEL.RESNETS.OUT_FEATURES", ["res5"]])
    net = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    DetectionCheckpointer(net).load(cfg.MODEL.WEIGHTS)

    def features(x: Tensor) -> Tensor:
        return net(x)["res5"].mean(dim=(2, 3))

    return ReadBack(f"detectron2 {detectron2.__version__}", features)


def loading(network: StoredNetwork, file_name: str) -> Loading:
    """The keys of detectron2's configuration that differ from its defaults."""
    depth, stem = _depth(network), int(STEM_CHANNELS * network.width)
    widths = {"STEM_OUT_CHANNELS": stem, "RES2_OUT_CHANNELS": stem if depth in BASIC_DEPTHS else 4 * stem, "WIDTH_PER_GROUP": stem}
    lines = [
        "MODEL:",
        f"  WEIGHTS: {quoted(file_name)}",
        f"  PIXEL_MEAN: {_in_255(network.image.mean)}",
        f"  PIXEL_STD: {_in_255(network.image.std)}",
        "  RESNETS:",
        f"    DEPTH: {depth}",
        "    STRIDE_IN_1X1: False",
        *(f"    {key}: {value}" for key, value in widths.items()),
        "INPUT:",
        '  FORMAT: "RGB"',
    ]
    return Loading("yaml", "\n".join(lines))


def detectron2_name(name: str) -> str:
    """detectron2's name for a parameter of torchvision's ResNet: layer1.0.bn2.bias becomes res2.0.conv2.norm.bias."""
    name = name if name.startswith("layer") else f"stem.{name}"
    for pattern, new in _RENAMES:
        name = re.sub(pattern, new, name)
    for old, shortcut in _SHORTCUT.items():
        name = name.replace(old, shortcut)
    return name


class _ArrayPickler(pickle.Pickler):
    """Pickles arrays as calls of numpy.ndarray: numpy 2 would refer to a module that is missing in numpy 1, which detectron2 often uses."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(obj.tobytes()))
        return NotImplemented


def _depth(network: StoredNetwork) -> int:
    """The number of layers. Raises UserError unless the network is He et al.'s ResNet with the 7x7 stem, in a width that detectron2
    builds."""
    depth = DEPTHS.get(bare_name(network.arch))
    if depth is None:
        problem = f"is {network.arch}, detectron2 builds {', '.join(DEPTHS)}"
    elif network.stem != "imagenet":
        problem = f"has stem {network.stem}, detectron2's ResNets begin with a 7x7 convolution and a pooling (stem imagenet)"
    elif depth in BASIC_DEPTHS and network.width != 1:
        problem = f"has width {network.width}, detectron2 builds ResNet-{depth} only at 1.0"
    else:
        return depth
    raise UserError(f"--to = detectron2: the network {problem}; {way_out(network)}")


def _in_255(values: list[float]) -> list[float]:
    """Mean or standard deviation for pixels in 0..255 instead of 0..1."""
    return [round(255 * value, 4) for value in values]
