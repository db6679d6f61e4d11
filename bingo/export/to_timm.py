"""timm: a safetensors file with timm's parameter names, which `timm.create_model(arch, checkpoint_path=...)` reads."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
from torch import nn

from bingo.export.contract import Loading, ReadBack, quoted
from bingo.export.rebuilding import changes, timm_call, timm_lines
from bingo.export.stored import StoredNetwork
from bingo.export.twins import bare_name, twin, way_out
from bingo.nets.backbones import build_backbone
from bingo.nets.checkpoint import save_network
from bingo.runtime.errors import UserError

SUFFIXES = (".safetensors",)
CLASSIFIES = True


def write(network: StoredNetwork, path: Path) -> None:
    """Write timm's parameter names; the metadata give timm's architecture, so that BINGO can read the file of a backbone too."""
    save_network(path, timm_module(network).state_dict(), {**network.described, "arch": timm_arch(network)})


def read_back(network: StoredNetwork, path: Path) -> ReadBack:
    """Load the file with timm's loader, strictly."""
    net: Any = build_backbone(timm_arch(network), network.width, network.stem, seed_value=0)
    if network.classifier:
        net.reset_classifier(len(network.classes))
    timm.models.load_checkpoint(net, str(path))
    return ReadBack(f"timm {timm.__version__}", net.eval())


def loading(network: StoredNetwork, file_name: str) -> Loading:
    """A call of timm's create_model, with further lines for whatever a width or stem changes."""
    arch, backbone, classes = timm_arch(network), twin(network, timm_arch(network)), len(network.classes)
    if network.width == 1 and network.stem == "imagenet":
        lines = ["import timm", f"net = {timm_call(backbone, arch, 1, classes)}, checkpoint_path={quoted(file_name)}).eval()"]
        if not classes:
            overlay = f'pretrained_cfg_overlay={{"file": {quoted(file_name)}, "num_classes": 0}}'
            lines.append("# for fine-tuning on 10 classes, with a new classifier:")
            lines.append(f"classifier = {timm_call(backbone, arch, 1, 10)}, pretrained=True, {overlay})")
        return Loading("python", "\n".join(lines))
    lines = timm_lines(backbone, arch, network.width, network.stem, classes)
    lines += [f"timm.models.load_checkpoint(net, {quoted(file_name)})", "net.eval()"]
    return Loading("python", "\n".join(lines), changes(network, "timm"))


def timm_module(network: StoredNetwork) -> nn.Module:
    """timm's module with the network's weights, and with its classifier if it has one, in eval mode. Raises UserError if timm has no such
    network, or gives it another kind of classifier."""
    arch = timm_arch(network)
    net: Any = twin(network, arch)
    if network.classifier is None:
        return net
    net = deepcopy(net)
    net.reset_classifier(len(network.classes))
    if not isinstance(layer := net.get_classifier(), nn.Linear):
        raise UserError(f"--head = linear: timm's {arch} has no single linear layer as its classifier; export --to onnx or torch")
    layer.load_state_dict(network.classifier.state_dict())
    return net.eval()


def timm_arch(network: StoredNetwork) -> str:
    """timm's name of the architecture. Raises UserError if timm does not have it."""
    arch = bare_name(network.arch)
    if not timm.is_model(arch):
        raise UserError(f"--to: timm {timm.__version__} has no network {arch}; {way_out(network)}")
    return arch
