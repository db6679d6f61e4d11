"""onnx: one file of graph and weights, any number of images at once: `images` float32 (B, 3, P, P), normalised, to `features` (B, D), or to
`logits` (B, C) with a classifier."""

import logging
from collections.abc import Iterator
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
CLASSIFIES = True
_WRITERS = ("onnx", "onnxscript")  # what torch's exporter imports
_INSTALL = "run: pip install onnx onnxscript onnxruntime"


def write(network: StoredNetwork, path: Path) -> None:
    """torch's export of the network in eval mode, without the traces of source files that it adds."""
    if missing := [name for name in _WRITERS if find_spec(name) is None]:
        raise UserError(f"--to = onnx: {' and '.join(missing)} not installed; {_INSTALL}")
    crop_px = network.image.crop_px
    example = torch.zeros(2, 3, crop_px, crop_px)  # two images: torch would treat a batch of one as a constant
    try:
        program = torch.onnx.export(
            network.module, (example,), dynamo=True, verbose=False, external_data=False,
            input_names=["images"], output_names=[network.output], dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"--to = onnx: torch cannot export {network.arch} ({reason_of(error)}); export --to safetensors") from None
    assert program is not None
    model: Any = program.model_proto
    _drop_traces(model)
    _describe(network, model)
    write_bytes(path, model.SerializeToString(deterministic=True))


def quantize(network: StoredNetwork, floating: Path, path: Path, batches: Iterator[Tensor]) -> None:
    """Write the file `floating` with weights and activations of 8 bits: ONNX Runtime's static quantisation, with a scale for each
    channel of a weight, and for each activation one by the least and the largest value over `batches` of images. Raises UserError if ONNX
    Runtime is not installed or fails.
    """
    if find_spec("onnxruntime") is None:
        raise UserError(f"--int8: onnxruntime is not installed; {_INSTALL}")
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def get_next(self) -> Any:
            images_BCPP = next(batches, None)
            return None if images_BCPP is None else {"images": images_BCPP.numpy()}

    eight_bits = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    logging.disable()  # it recommends the step before to every user
    try:
        quant_pre_process(floating, path, skip_symbolic_shape=True)
        quantize_static(path, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **eight_bits)
    except UserError:
        raise
    except Exception as error:  # both raise many classes for graphs that they do not support
        raise UserError(f"--int8: ONNX Runtime cannot quantise {network.arch} ({reason_of(error)}); leave --int8 out") from None
    finally:
        logging.disable(logging.NOTSET)
    model = onnx.load(path)
    _describe(network, model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _describe(network: StoredNetwork, model: Any) -> None:
    """Replace the metadata of a model by BINGO's."""
    del model.metadata_props[:]
    model.metadata_props.add(key="bingo", value=canonical_json(network.described))


def read_back(network: StoredNetwork, path: Path) -> ReadBack:
    """Run by ONNX Runtime on the CPU."""
    if find_spec("onnxruntime") is None:
        raise NotReadBack("onnxruntime is not installed (pip install onnxruntime)")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def outputs(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    return ReadBack(f"onnxruntime {onnxruntime.__version__}", outputs)


def loading(network: StoredNetwork, file_name: str) -> Loading:
    """Code for ONNX Runtime."""
    lines = [
        "import onnxruntime",
        f'session = onnxruntime.InferenceSession({quoted(file_name)}, providers=["CPUExecutionProvider"])',
        f'({network.output},) = session.run(None, {{"images": images}})  # float32 (B, {"C" if network.classifier else "D"}) from '
        "normalised float32 (B, 3, H, W)",
    ]
    return Loading("python", "\n".join(lines))


def _drop_traces(model: Any) -> None:
    """Remove the exporter's notes, which contain paths of this machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")
