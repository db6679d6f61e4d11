"""torch: a program of torch.export in a .pt2 archive, for any number of images; `torch.export.load` reads it without the network's code."""

import io
from copy import deepcopy
from pathlib import Path

import torch

from bingo.export.contract import Loading, ReadBack, quoted
from bingo.export.stored import StoredNetwork
from bingo.runtime.artefacts import canonical_json, write_bytes
from bingo.runtime.errors import UserError, reason_of

SUFFIXES = (".pt2",)
CLASSIFIES = True


def write(network: StoredNetwork, path: Path) -> None:
    """torch's program of the network in eval mode, without the traces of source files that it adds."""
    crop_px = network.image.crop_px
    example = torch.zeros(2, 3, crop_px, crop_px)  # two images: torch would treat a batch of one as a constant
    module = deepcopy(network.module).to(
        memory_format=torch.contiguous_format
    )  # torch.export.save takes other layouts for parts of tensors
    try:
        program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # torch raises many classes for what it cannot trace
        raise UserError(f"--to = torch: torch cannot export {network.arch} ({reason_of(error)}); export --to safetensors") from None
    for node in (node for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule) for node in part.graph.nodes):
        node.meta.pop("stack_trace", None)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"bingo.json": canonical_json(network.described)})
    write_bytes(path, content.getvalue())


def read_back(network: StoredNetwork, path: Path) -> ReadBack:
    """Loaded by torch."""
    return ReadBack(f"torch {torch.__version__}", torch.export.load(path).module())


def loading(network: StoredNetwork, file_name: str) -> Loading:
    """Code for torch alone."""
    lines = [
        "import torch",
        'extra = {"bingo.json": ""}  # how it was made, and the names of its classes if it has any',
        f"net = torch.export.load({quoted(file_name)}, extra_files=extra).module()",
        f"# net(images): {network.output} float32 (B, {'C' if network.classifier else 'D'}) of normalised float32 (B, 3, H, W)",
    ]
    return Loading("python", "\n".join(lines))
