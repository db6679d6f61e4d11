"""torchvision: a state dict with torchvision's parameter names, without the classifier, which `torch.load(weights_only=True)` reads."""

import io
from pathlib import Path

import torch
import torchvision
from torchvision import models as vision

from bingo.export.contract import Loading, ReadBack, quoted
from bingo.export.rebuilding import changes, torchvision_lines
from bingo.export.stored import StoredNetwork
from bingo.export.twins import bare_name, twin, way_out
from bingo.nets.backbones import build_backbone
from bingo.runtime.artefacts import write_bytes
from bingo.runtime.errors import UserError

SUFFIXES = (".pth", ".pt")
CLASSIFIES = False


def write(network: StoredNetwork, path: Path) -> None:
    """Write a plain dict of tensors with torch.save."""
    state = twin(network, f"torchvision/{_name(network)}").state_dict()
    content = io.BytesIO()
    torch.save({name: tensor.contiguous() for name, tensor in state.items()}, content)
    write_bytes(path, content.getvalue())


def read_back(network: StoredNetwork, path: Path) -> ReadBack:
    """Load the state dict into torchvision's network, strictly."""
    net = build_backbone(f"torchvision/{_name(network)}", network.width, network.stem, seed_value=0)
    net.load_state_dict(torch.load(path, weights_only=True))
    return ReadBack(f"torchvision {torchvision.__version__}", net.eval())


def loading(network: StoredNetwork, file_name: str) -> Loading:
    """torchvision's network without its classifier, then the file."""
    name = _name(network)
    lines = torchvision_lines(twin(network, f"torchvision/{name}"), name, network.stem)
    lines += [f"net.load_state_dict(torch.load({quoted(file_name)}, weights_only=True))", "net.eval()"]
    return Loading("python", "\n".join(lines), changes(network, "torchvision"))


def _name(network: StoredNetwork) -> str:
    name = bare_name(network.arch)
    if name not in vision.list_models(module=vision):
        raise UserError(f"--to = torchvision: torchvision {torchvision.__version__} has no network {name}; {way_out(network)}")
    if network.width != 1:
        raise UserError(f"--to = torchvision: the network has width {network.width}, torchvision's have 1.0; {way_out(network)}")
    return name
