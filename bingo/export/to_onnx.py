"""onnx: one file of graph and weights, any number of images at once: `images` float32 (B, 3, P, P), normalised, to `features` (B, D)."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bingo.export.contract import Loading, NotReadBack, ReadBack, quoted
from bingo.export.stored import StoredNetwork
from bingo.runtime.artefacts import canonical_json, write_bytes
from bingo.runtime.errors import UserError, reason_of

SUFFIXES = (".onnx",)
_WRITERS = ("onnx", "onnxscript")  # what torch's exporter imports


def write(network: StoredNetwork, path: Path) -> None:
    """torch's export of the network in eval mode, without the traces of source files that it adds."""
    if missing := [name for name in _WRITERS if find_spec(name) is None]:
        raise UserError(f"--to = onnx: {' and '.join(missing)} not installed; run: pip install onnx onnxscript onnxruntime")
    crop_px = network.image.crop_px
    example = torch.zeros(2, 3, crop_px, crop_px)  # two images: torch would treat a batch of one as a constant
    try:
        program = torch.onnx.export(
            network.backbone, (example,), dynamo=True, verbose=False, external_data=False,
            input_names=["images"], output_names=["features"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"--to = onnx: torch cannot export {network.arch} ({reason_of(error)}); export --to safetensors") from None
    assert program is not None
    model: Any = program.model_proto
    _drop_traces(model)
    model.metadata_props.add(key="bingo", value=canonical_json(network.metadata))
    write_bytes(path, model.SerializeToString(deterministic=True))


def read_back(network: StoredNetwork, path: Path) -> ReadBack:
    """Run by ONNX Runtime on the CPU."""
    if find_spec("onnxruntime") is None:
        raise NotReadBack("onnxruntime is not installed (pip install onnxruntime)")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def features(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    return ReadBack(f"onnxruntime {onnxruntime.__version__}", features)


def loading(network: StoredNetwork, file_name: str) -> Loading:
    """Code for ONNX Runtime."""
    lines = [
        "import onnxruntime",
        f'session = onnxruntime.InferenceSession({quoted(file_name)}, providers=["CPUExecutionProvider"])',
        '(features,) = session.run(None, {"images": images})  # float32 (B, D) from normalised float32 (B, 3, H, W)',
    ]
    return Loading("python", "\n".join(lines))


def _drop_traces(model: Any) -> None:
    """Remove the exporter's notes, which contain paths of this machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")
