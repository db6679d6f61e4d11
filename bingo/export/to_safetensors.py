"""safetensors: the backbone with its library's parameter names and BINGO's metadata, like models/student.safetensors."""

from importlib.metadata import version
from pathlib import Path

import safetensors.torch

from bingo.export.contract import Loading, ReadBack, quoted
from bingo.export.rebuilding import changes, timm_lines, torchvision_lines
from bingo.export.stored import StoredNetwork
from bingo.export.twins import bare_name
from bingo.nets.backbones import build_backbone
from bingo.nets.checkpoint import save_network

SUFFIXES = (".safetensors",)
CLASSIFIES = False


def write(network: StoredNetwork, path: Path) -> None:
    """Write the file as the pipeline writes a student."""
    save_network(path, network.backbone.state_dict(), network.metadata)


def read_back(network: StoredNetwork, path: Path) -> ReadBack:
    """Load the tensors with safetensors into a newly built network."""
    net = build_backbone(network.arch, network.width, network.stem, seed_value=0)
    net.load_state_dict(safetensors.torch.load_file(path))
    return ReadBack(f"safetensors {version('safetensors')}", net.eval())


def loading(network: StoredNetwork, file_name: str) -> Loading:
    """Build the library's module, then read the file."""
    if network.arch.startswith("torchvision/"):
        library, lines = "torchvision", torchvision_lines(network.backbone, bare_name(network.arch), network.stem)
    else:
        library, lines = "timm", timm_lines(network.backbone, network.arch, network.width, network.stem)
    lines = ["import safetensors.torch", *lines, f"net.load_state_dict(safetensors.torch.load_file({quoted(file_name)}))", "net.eval()"]
    return Loading("python", "\n".join(lines), changes(network, library))
