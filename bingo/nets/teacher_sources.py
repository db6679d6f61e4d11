"""Where a teacher comes from: one function for each source and foreign format, all strict, none run when a teacher is only read.

Each gives a backbone, a projection head or None, and what the teacher's file says of its origin. `left_out` names what the
file held beyond the teacher; anything that was not foreseen there is refused.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import timm
from torch import Tensor, nn
from torchvision import models as vision

from bingo import seeds
from bingo.errors import UserError
from bingo.nets.backbones import Backbone, build_backbone, check_images
from bingo.nets.checkpoint import first_names, load_strictly
from bingo.nets.foreign import is_state_dict, read_checkpoint, state_dict_in, summary
from bingo.nets.heads import mlp_head
from bingo.nets.teachers import teacher_metadata
from bingo.params import ImageParams, TeacherParams

Made = tuple[Backbone, nn.Sequential | None, dict[str, Any]]
_QUERY = "module.encoder_q."
_PLAIN = {"0.weight": "weight", "0.bias": "bias"}  # MoCo-v1's head is one layer, not a sequence


def make_teacher(params: TeacherParams, image: ImageParams, seed: int) -> Made:
    """The backbone, head (or None) and metadata for `save_teacher`, from any source but `pretrain`. Raises UserError."""
    makers: dict[str, Callable[[], Made]] = {
        "timm": lambda: from_timm(params, image),
        "torchvision": lambda: from_torchvision(params, image),
        "checkpoint": lambda: {"moco": from_moco}[params.format](params),
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
    backbone = _empty(params)
    cfg: Any = backbone.pretrained_cfg
    _compare_normalisation(params, image, cfg["mean"], cfg["std"])
    if params.checkpoint:
        return _from_own_file(params, backbone)
    state = _download(params, lambda: timm.create_model(params.arch, pretrained=True))
    left_out = _load_trunk(backbone, state, f"timm's weights of {params.arch}")
    return backbone, None, {"pretrained": True, "weights": f"{cfg['architecture']}.{cfg['tag']}", "left_out": left_out}


def from_torchvision(params: TeacherParams, image: ImageParams) -> Made:
    """torchvision's default weights, or the local file `teacher.checkpoint` under its names; otherwise as `from_timm`."""
    if not params.arch.startswith("torchvision/"):
        raise UserError(f"teacher.arch = {params.arch}: is timm's name; set torchvision/{params.arch}, or teacher.source: timm")
    backbone, name = _empty(params), params.arch.removeprefix("torchvision/")
    weights: Any = vision.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    preset = weights.transforms()
    _compare_normalisation(params, image, preset.mean, preset.std)
    if params.checkpoint:
        return _from_own_file(params, backbone)
    state = _download(params, lambda: vision.get_model(name, weights=weights, progress=False))
    left_out = _load_trunk(backbone, state, f"torchvision's weights of {name}")
    return backbone, None, {"pretrained": True, "weights": str(weights), "left_out": left_out}


def from_moco(params: TeacherParams) -> Made:
    """A checkpoint of facebookresearch/moco (main_moco.py): `encoder_q` and its head, v1's one layer or v2's two.

    The released BINGO code takes encoder_q too (main_moco.py:303-310). encoder_k and the queue are left out. Raises UserError
    for other formats, for names that such a file does not have, and for an encoder that does not fit `teacher.arch`.
    """
    path = str(params.checkpoint)
    content, sha256 = read_checkpoint(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not is_state_dict(state) or not any(name.startswith(_QUERY) for name in state):
        found = summary(state if isinstance(state, dict) else content)
        line = f"{path}: is no MoCo checkpoint: expected a state_dict with {_QUERY}*, found {found}"
        raise UserError(f"{line}; set teacher.checkpoint, or teacher.source: timm or torchvision for plain weights")
    others = [name for name in state if not name.startswith(_QUERY)]
    known = {"module.encoder_k", "module.queue", "module.queue_ptr"}
    left_out = {"module.encoder_k" if name.startswith("module.encoder_k.") else name for name in others}
    if strange := sorted(left_out - known):
        raise UserError(f"{path}: holds what no MoCo checkpoint has: {first_names(strange)}; set teacher.checkpoint")
    query = {name.removeprefix(_QUERY): tensor for name, tensor in state.items() if name.startswith(_QUERY)}
    backbone = _empty(params)
    trunk = {name: tensor for name, tensor in query.items() if not name.startswith("fc.")}
    load_strictly(backbone, trunk, f"{path}: encoder_q does not fit {params.arch}")
    head = _moco_head({name.removeprefix("fc."): t for name, t in query.items() if name.startswith("fc.")}, backbone, path)
    return backbone, head, {"pretrained": True, "source_sha256": sha256, "format": "moco", "left_out": sorted(left_out)}


def _moco_head(state: dict[str, Tensor], backbone: Backbone, path: str) -> nn.Sequential:
    if "weight" in state:
        state = {{old: new for new, old in _PLAIN.items()}.get(name, name): tensor for name, tensor in state.items()}
    outputs = [state[name].shape[0] for name in ("0.weight", "2.weight") if name in state]
    head = mlp_head([backbone.feature_width, *outputs], seed_value=0) if outputs else None
    if head is None:
        raise UserError(f"{path}: encoder_q has no projection head: expected fc.weight, or fc.0.weight and fc.2.weight")
    load_strictly(head, state, f"{path}: encoder_q.fc is no head of MoCo-v1 or v2")
    return head


def _empty(params: TeacherParams) -> Backbone:
    """The network that weights are about to be loaded into."""
    return build_backbone(params.arch, params.width, params.stem, seed_value=0)


def _from_own_file(params: TeacherParams, backbone: Backbone) -> Made:
    content, sha256 = read_checkpoint(str(params.checkpoint))
    left_out = _load_trunk(backbone, state_dict_in(content, str(params.checkpoint)), str(params.checkpoint))
    return backbone, None, {"pretrained": True, "source_sha256": sha256, "left_out": left_out}


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
    if (image.mean, image.std) == (list(mean), list(std)):
        return
    expected = f"the published weights of {params.arch} expect {list(mean)}, {list(std)}"
    line = f"image.mean = {image.mean}, image.std = {image.std}: {expected}"
    if not params.checkpoint:
        raise UserError(f"{line}; set image.mean and image.std to these")
    print(f"{line}; right if teacher.checkpoint was trained otherwise", file=sys.stderr)
