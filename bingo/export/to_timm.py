"""timm: a safetensors file with timm's parameter names, which `timm.create_model(arch, checkpoint_path=...)` reads."""

from pathlib import Path

import timm

from bingo.export.contract import Loading, ReadBack, quoted
from bingo.export.rebuilding import changes, timm_lines
from bingo.export.stored import StoredNetwork
from bingo.export.twins import bare_name, twin, way_out
from bingo.nets.backbones import build_backbone
from bingo.nets.checkpoint import save_network
from bingo.runtime.errors import UserError

SUFFIXES = (".safetensors",)


def write(network: StoredNetwork, path: Path) -> None:
    """Write timm's parameter names; the metadata give timm's architecture, so that BINGO can read the file too."""
    arch = _arch(network)
    save_network(path, twin(network, arch).state_dict(), {**network.metadata, "arch": arch})


def read_back(network: StoredNetwork, path: Path) -> ReadBack:
    """Load the file with timm's loader, strictly."""
    net = build_backbone(_arch(network), network.width, network.stem, seed_value=0)
    timm.models.load_checkpoint(net, str(path))
    return ReadBack(f"timm {timm.__version__}", net.eval())


def loading(network: StoredNetwork, file_name: str) -> Loading:
    """A call of timm's create_model, with further lines for whatever a width or stem changes."""
    arch = _arch(network)
    if network.width == 1 and network.stem == "imagenet":
        call = f'net = timm.create_model("{arch}", num_classes=0, checkpoint_path={quoted(file_name)}).eval()'
        labels = "# for fine-tuning on 10 classes, with a new classifier:"
        overlay = f'pretrained_cfg_overlay={{"file": {quoted(file_name)}, "num_classes": 0}}'
        tuning = f'classifier = timm.create_model("{arch}", num_classes=10, pretrained=True, {overlay})'
        return Loading("python", "\n".join(["import timm", call, labels, tuning]))
    lines = timm_lines(twin(network, arch), arch, network.width, network.stem)
    return Loading(
        "python", "\n".join([*lines, f"timm.models.load_checkpoint(net, {quoted(file_name)})", "net.eval()"]), changes(network, "timm")
    )


def _arch(network: StoredNetwork) -> str:
    arch = bare_name(network.arch)
    if not timm.is_model(arch):
        raise UserError(f"--to = timm: timm {timm.__version__} has no network {arch}; {way_out(network)}")
    return arch
