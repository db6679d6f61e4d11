"""Where a teacher comes from: one function for each source, all strict, none run when a teacher is only read.

Each gives a backbone, a projection head or None, and what the teacher's file says of its origin. `left_out` names what the
file held beyond the teacher; anything that was not foreseen there is refused. Published formats are in bingo/nets/formats.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torchvision import models as vision

from bingo import seeds
from bingo.errors import UserError
from bingo.nets.backbones import Backbone, build_backbone, check_images, is_transformer
from bingo.nets.checkpoint import check_fits, first_names, load_strictly
from bingo.nets.foreign import read_checkpoint, state_dict_in, summary
from bingo.nets.heads import layered_head
from bingo.nets.parts import ANY_IMAGE, Parts
from bingo.nets.teachers import teacher_metadata
from bingo.params import ImageParams, TeacherParams, format_names

Made = tuple[Backbone, nn.Sequential | None, dict[str, Any]]
_STATES = ("state_dict", "model")  # where most checkpoints keep their weights


def make_teacher(params: TeacherParams, image: ImageParams, seed: int) -> Made:
    """The backbone, head (or None) and metadata for `save_teacher`, from any source but `pretrain`. Raises UserError."""
    makers: dict[str, Callable[[], Made]] = {
        "timm": lambda: from_timm(params, image),
        "torchvision": lambda: from_torchvision(params, image),
        "checkpoint": lambda: from_checkpoint(params, image),
        "random": lambda: untrained(params, seed),
    }
    backbone, head, source = makers[params.source]()
    check_images(backbone, params.arch, image.crop_px)
    return backbone, head, teacher_metadata(params, image, backbone, head, {"source": params.source, **source})


def untrained(params: TeacherParams, seed: int) -> Made:
    """Seeded initial weights without a head: a control, and a way to try the pipeline out."""
    backbone = build_backbone(params.arch, params.width, params.stem, seeds.torch_seed(seed, "random teacher"))
    return backbone, None, {"pretrained": False}


def from_timm(params: TeacherParams, image: ImageParams) -> Made:
    """timm's pretrained weights, or the local file `teacher.checkpoint` under timm's names; the classifier is left out.

    Raises UserError where the weights cannot be downloaded, do not fit, or were trained with another mean and std than `image`
    has (for a local file, whose training is not known, that is a line on stderr).
    """
    if params.arch.startswith("torchvision/"):
        raise UserError(f"teacher.arch = {params.arch}: is no network of timm; set teacher.source: torchvision")
    options = ANY_IMAGE if is_transformer(params.arch) else {}
    backbone = _empty(params, options)
    cfg: Any = backbone.pretrained_cfg
    _compare_normalisation(params, image, cfg["mean"], cfg["std"])
    if params.checkpoint:
        return _from_own_file(params, backbone, options)
    state = _download(params, lambda: timm.create_model(params.arch, pretrained=True))
    left_out = _load_trunk(backbone, state, f"timm's weights of {params.arch}")
    weights = f"{cfg['architecture']}.{cfg['tag']}"
    return backbone, None, {"pretrained": True, "weights": weights, "left_out": left_out, **_told(options)}


def from_torchvision(params: TeacherParams, image: ImageParams) -> Made:
    """torchvision's default weights, or the local file `teacher.checkpoint` under its names; otherwise as `from_timm`."""
    if not params.arch.startswith("torchvision/"):
        raise UserError(f"teacher.arch = {params.arch}: is timm's name; set torchvision/{params.arch}, or teacher.source: timm")
    backbone, name = _empty(params, {}), params.arch.removeprefix("torchvision/")
    weights: Any = vision.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    preset = weights.transforms()
    _compare_normalisation(params, image, preset.mean, preset.std)
    if params.checkpoint:
        return _from_own_file(params, backbone, {})
    state = _download(params, lambda: vision.get_model(name, weights=weights, progress=False))
    left_out = _load_trunk(backbone, state, f"torchvision's weights of {name}")
    return backbone, None, {"pretrained": True, "weights": str(weights), "left_out": left_out}


def from_checkpoint(params: TeacherParams, image: ImageParams) -> Made:
    """The backbone and the projection head, if there is one, of a checkpoint of the published format `teacher.format`.

    Raises UserError where it is of another format (and says of which), for names that such a file does not have, and for weights
    that do not fit `teacher.arch`. Another mean and std than `image` has are a line on stderr.
    """
    path = str(params.checkpoint)
    content, sha256 = read_checkpoint(path)
    parts = _format(params.format).parts(content)
    if parts is None:
        raise UserError(f"{path}: is no checkpoint of format {params.format}: {_what_instead(params, content)}")
    if parts.unknown:
        line = f"{path}: holds what no checkpoint of format {params.format} has: {first_names(parts.unknown)}"
        raise UserError(f"{line}; set teacher.checkpoint or teacher.format")
    backbone = _empty(params, parts.options)
    load_strictly(backbone, parts.trunk, f"{path}: its backbone does not fit {params.arch}")
    head = _head(parts, backbone, f"{path}: its projection head is not that of format {params.format}") if parts.layers else None
    _compare_normalisation(params, image, *parts.mean_std)
    source = {"pretrained": True, "source_sha256": sha256, "format": params.format, "left_out": parts.left_out}
    return backbone, head, source | _told(parts.options)


def _format(name: str) -> Any:
    return importlib.import_module(f"bingo.nets.formats.{name}")


def _what_instead(params: TeacherParams, content: Any) -> str:
    """What was expected and what was found, and which parameter the file would suit."""
    inside = [content[name] for name in _STATES if isinstance(content, dict) and content.get(name)]
    line = f"expected {_format(params.format).EXPECTED}, found {summary(inside[0] if inside else content)}"
    read_by = {name: parts for name in format_names() if (parts := _format(name).parts(content)) is not None}
    if fitting := [name for name, parts in read_by.items() if parts.sure]:
        return f"{line}; set teacher.format: {' or '.join(fitting)}"
    if read_by:
        return f"{line}; it holds a backbone alone: set teacher.source: timm or torchvision, or teacher.format: {' or '.join(read_by)}"
    return f"{line}; set teacher.checkpoint"


def _head(parts: Parts, backbone: Backbone, origin: str) -> nn.Sequential:
    """The head that the checkpoint's shapes tell, loaded strictly."""
    linears = [f"{i}.weight" for i, kind in enumerate(parts.layers) if kind.startswith("linear")]
    shapes = [tuple(parts.head[name].shape) if name in parts.head else () for name in linears]
    widths = [shape[0] if len(shape) == 2 else 1 for shape in shapes]  # where it is 1, loading names what is wrong
    with torch.device("meta"):  # shapes that do not fit one another may be of any size
        check_fits(layered_head(parts.layers, [backbone.feature_width, *widths]).state_dict(), parts.head, origin)
    head = layered_head(parts.layers, [backbone.feature_width, *widths])
    load_strictly(head, parts.head, origin)
    return head


def _empty(params: TeacherParams, options: Mapping[str, Any]) -> Backbone:
    """The network that weights are about to be loaded into."""
    return build_backbone(params.arch, params.width, params.stem, 0, options)


def _told(options: Mapping[str, Any]) -> dict[str, Any]:
    """What metadata say of the backbone's options: nothing where there are none, so that such files stay as they were."""
    return {"options": dict(options)} if options else {}


def _from_own_file(params: TeacherParams, backbone: Backbone, options: Mapping[str, Any]) -> Made:
    content, sha256 = read_checkpoint(str(params.checkpoint))
    left_out = _load_trunk(backbone, state_dict_in(content, str(params.checkpoint)), str(params.checkpoint))
    return backbone, None, {"pretrained": True, "source_sha256": sha256, "left_out": left_out, **_told(options)}


def _load_trunk(backbone: Backbone, state: Mapping[str, Tensor], origin: str) -> list[str]:
    """Load all but the classifier, strictly, and return the names that were left out."""
    own = backbone.state_dict()
    left_out = [k for k in state if k not in own and any(k.startswith(f"{prefix}.") for prefix in backbone.classifier_names)]
    load_strictly(backbone, {name: tensor for name, tensor in state.items() if name not in left_out}, origin)
    return sorted(left_out)


def _download(params: TeacherParams, get: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The state dict of a pretrained network with its classifier, loaded strictly by the library itself."""
    if params.width != 1 or params.stem != "imagenet":
        named = f"teacher.width = {params.width}, teacher.stem = {params.stem}"
        raise UserError(f"{named}: published weights have 1.0 and imagenet; set these, or teacher.checkpoint to a file of yours")
    try:
        return get().state_dict()
    except Exception as error:  # the libraries' network clients raise errors of many kinds
        line = f"teacher.arch = {params.arch}: no pretrained weights could be had ({' '.join(str(error).split())[:160]})"
        raise UserError(f"{line}; set teacher.checkpoint to a local file of them") from None


def _compare_normalisation(params: TeacherParams, image: ImageParams, mean: Any, std: Any) -> None:
    if np.allclose([*image.mean, *image.std], [*mean, *std], rtol=0, atol=2e-3):  # SwAV's 0.228 for 0.229 is of no consequence
        return
    expected = f"the published weights of {params.arch} expect {list(mean)}, {list(std)}"
    line = f"image.mean = {image.mean}, image.std = {image.std}: {expected}"
    if not params.checkpoint:
        raise UserError(f"{line}; set image.mean and image.std to these")
    print(f"{line}; right if teacher.checkpoint was trained otherwise", file=sys.stderr)
