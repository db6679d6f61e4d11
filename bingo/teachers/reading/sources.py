"""Sources of teachers: one strict function for each. None of them is used when an existing teacher is read.

Each returns a backbone, a projection head or None, and the metadata on its origin. `left_out` names the parts of the
file that do not belong to the teacher; unexpected parts are an error. Published formats are in bingo/teachers/formats.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torchvision import models as vision

from bingo import seeds
from bingo.nets.backbones import Backbone, build_backbone, check_images, is_transformer, made_by_factory, without_numbers
from bingo.nets.checkpoint import check_fits, first_names, load_strictly
from bingo.nets.heads import layered_head
from bingo.params import ImageParams, TeacherParams, format_names, seen_image
from bingo.params.arch_names import OWN
from bingo.params.known import completed
from bingo.params.networks import source_mistakes
from bingo.runtime.artefacts import file_fingerprint
from bingo.runtime.errors import UserError, near_matches, reason_of
from bingo.teachers.contract import ANY_IMAGE, FIRST_WEIGHTS, Parts
from bingo.teachers.reading.foreign import read_checkpoint, states_in, summary
from bingo.teachers.reading.wrapped import (
    UNKNOWN_RANK,
    find,
    grid_px,
    places,
    settings_in,
    settings_that_fit,
    variants,
    without_classifier,
    without_masking,
)
from bingo.teachers.teacher import teacher_metadata

Made = tuple[Backbone, nn.Sequential | None, dict[str, Any]]
_STATES = ("state_dict", "model")  # where most published checkpoints keep their weights


def make_teacher(params: TeacherParams, image: ImageParams, seed: int) -> Made:
    """The backbone, head (or None) and metadata for `save_teacher`, from any source except `pretrain`. `image` describes the teacher's
    images. Raises UserError."""
    makers: dict[str, Callable[[], Made]] = {
        "timm": lambda: from_library(params, image),
        "torchvision": lambda: from_library(params, image),
        "checkpoint": lambda: from_checkpoint(params, image),
        "random": lambda: untrained(params, seed),
        "factory": lambda: from_factory(params, seed),
    }
    if lines := list(source_mistakes(params)):
        raise UserError(lines)
    if params.source == "factory":
        image = _factory_image(params, image)
    backbone, head, source = makers[params.source]()
    check_images(backbone, params.arch, image.crop_px, "teacher.image.crop_px")
    return backbone, head, teacher_metadata(params, image, backbone, head, {"source": params.source, **source})


def from_factory(params: TeacherParams, seed: int) -> Made:
    """The network that the user's own function returns, with its weights. The file's fingerprint is part of the teacher, so that editing
    the file reruns the stages that read the teacher."""
    backbone = build_backbone(params.arch, params.width, params.stem, seeds.torch_seed(seed, "random teacher"), params.options)
    return backbone, None, {"pretrained": True, "source_sha256": file_fingerprint(OWN / params.arch.rsplit(":", 1)[0])}


def _factory_image(params: TeacherParams, image: ImageParams) -> ImageParams:
    """`image` with the mean, std and size that the user's function returns, unless `teacher.image` sets them."""
    made = made_by_factory(params.arch)
    if len(made) != 5:
        raise UserError(f"teacher.factory = {params.arch}: returns no mean, std and image size; see `teacher` in bingo/nets/own/example.py")
    usual = {"mean": list(made[2]), "std": list(made[3]), "crop_px": made[4], "resize_px": made[4], "interpolation": image.interpolation}
    return seen_image(completed(usual, params.image.model_dump()))


def untrained(params: TeacherParams, seed: int) -> Made:
    """Seeded initial weights without a head: a control, and a way to try out the pipeline."""
    backbone = build_backbone(params.arch, params.width, params.stem, seeds.torch_seed(seed, "random teacher"), params.options)
    return backbone, None, {"pretrained": False, **_noted(params, {})}


def from_library(params: TeacherParams, image: ImageParams) -> Made:
    """timm's or torchvision's pretrained weights of `teacher.arch`, or those in the local file `teacher.checkpoint` under the library's
    names; the classifier is left out.

    Raises UserError if the weights cannot be downloaded, do not fit, or were trained with a mean and std other than those of `image`
    (for a local file, whose training is not known, this is a line on stderr).
    """
    options = ANY_IMAGE if is_transformer(params.arch) else {}
    backbone, name = _empty(params, options), params.arch.removeprefix("torchvision/")
    published: Any = None if params.arch == name else vision.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    cfg: Any = backbone.pretrained_cfg if published is None else vars(published.transforms())
    _compare_normalisation(params, image, cfg["mean"], cfg["std"])
    if params.checkpoint:
        return _from_own_file(params, image, backbone, options)
    if published is None:
        state, library = _download(params, lambda: timm.create_model(params.arch, pretrained=True)), "timm"
        weights = f"{cfg['architecture']}.{cfg['tag']}"
    else:
        state, library = _download(params, lambda: vision.get_model(name, weights=published, progress=False)), "torchvision"
        weights = str(published)
    trunk, left_out = without_classifier(backbone, state)
    load_strictly(backbone, trunk, f"{library}'s weights of {name}", lambda: "install the versions in requirements.lock")
    return backbone, None, {"pretrained": True, "weights": weights, "left_out": left_out, **_noted(params, options)}


def from_names(params: TeacherParams, image: ImageParams) -> Made:
    """The weights in `teacher.checkpoint` under the network's own names, without a check of mean and std."""
    options = ANY_IMAGE if is_transformer(params.arch) else {}
    return _from_own_file(params, image, _empty(params, options), options)


def from_checkpoint(params: TeacherParams, image: ImageParams) -> Made:
    """The backbone and the projection head, if there is one, of a checkpoint of the published format `teacher.format`.

    Wrappers around the format's own names are removed, with a line on stderr. Raises UserError if the checkpoint has a different format
    (and names it), for names that do not belong in such a file, and for weights that do not fit `teacher.arch`. A mean and std that
    differ from those of `image` are reported on stderr.
    """
    path = str(params.checkpoint)
    content, sha256 = _content(params)
    parts = _parts(params, content)
    if parts.unknown:
        line = f"{path}: holds what no checkpoint of format {params.format} has: {first_names(parts.unknown)}"
        otherwise = f"set {params.key('checkpoint')} to a file without it"
        raise UserError(f"{line}; {_ways_out(params, content, _or_format(params, otherwise))}")
    origin = f"{path}: its backbone does not fit {params.arch}"
    if "dynamic_img_size" in parts.options and not is_transformer(params.arch):
        raise UserError(f"{origin}: these are the weights of a vision transformer; {_ways_out(params, content)}")
    backbone, options = _with_grid(params, parts)
    trunk, masked = without_masking(parts.trunk, backbone)
    load_strictly(backbone, trunk, origin, lambda: _ways_out(params, content, _no_usual(params, backbone, parts.trunk)))
    head = None
    if parts.layers:
        origin = f"{path}: its projection head is not that of format {params.format}"
        head = layered_head(parts.layers, _head_widths(params, parts, backbone, origin))
        load_strictly(head, parts.head, origin)
    _compare_normalisation(params, image, *parts.mean_std)
    _mention_stem(params)
    source = {"pretrained": True, "source_sha256": sha256, "format": params.format, "left_out": parts.left_out + masked}
    return backbone, head, source | _noted(params, options)


def _parts(params: TeacherParams, content: Any) -> Parts:
    """The parts of a checkpoint of `teacher.format`, possibly with wrappers. Raises UserError if it has a different format."""
    if (parts := _format(params.format).parts(content)) is not None:
        return parts
    found = _unwrapped(params.format, content)
    others = [name for name, parts in _readers(content).items() if parts.sure and name != params.format]
    if found is None and not others:
        found = _beside(params, content)
    if found is None or (others and not found[0].sure):
        raise UserError(f"{params.checkpoint}: is not a checkpoint of format {params.format}: {_what_instead(params, content)}")
    parts, taken = found
    if taken:
        left_out = f"; left out: {first_names(parts.left_out)}" if parts.left_out else ""
        print(f"{params.key('checkpoint')} = {params.checkpoint}: read {taken}{left_out}", file=sys.stderr)
    return parts


def _unwrapped(name: str, content: Any) -> tuple[Parts, str] | None:
    """The parts of a checkpoint of this format after removing wrappers, if all its names are known, and a description of the wrappers."""
    reads = ((_format(name).parts(variant), taken) for variant, taken in variants(content))
    return next(((parts, taken) for parts, taken in reads if parts is not None and not parts.unknown), None)


def _beside(params: TeacherParams, content: Any) -> tuple[Parts, str] | None:
    """A backbone that is stored under its own name next to other modules, for formats that read a backbone alone."""
    candidates = sorted((place for anchor in FIRST_WEIGHTS for place in places(content, anchor)), key=lambda place: place.rank)
    for place in candidates:
        parts = _format(params.format).parts(place.state)
        if parts is not None and not parts.unknown and place.rank != [UNKNOWN_RANK]:
            return replace(parts, left_out=sorted({*parts.left_out, *place.beside})), str(place)
    return None


def _mention_stem(params: TeacherParams) -> None:
    """Report on stderr if the stems differ only in their stride, so that the file does not show with which stem it was trained."""
    if params.stem == "small":
        line = f"{params.key('stem')} = small: fits the file, which does not say with which stem it was trained"
        print(f"{line}; published networks have {params.key('stem')}: imagenet", file=sys.stderr)


def _with_grid(params: TeacherParams, parts: Parts) -> tuple[Backbone, dict[str, Any]]:
    return _of_its_grid(params, _empty(params, parts.options), parts.options, parts.trunk)


def _of_its_grid(
    params: TeacherParams, backbone: Backbone, options: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[Backbone, dict[str, Any]]:
    """The network with a position embedding of the file's grid, and the options with which it is built."""
    side_px = grid_px(backbone, state["pos_embed"]) if "pos_embed" in state else None
    own: Any = backbone
    if side_px is None or state["pos_embed"].shape == own.pos_embed.shape:
        return backbone, dict(options)
    options = {**options, "img_size": side_px}
    return _empty(params, options), options


def published_key_width(format_name: str) -> int | None:
    """The width of the keys of a format's published files; None if these contain no head, so that the feature is the key."""
    return _format(format_name).KEY_WIDTH


def _format(name: str) -> Any:
    return importlib.import_module(f"bingo.teachers.formats.{name}")


def _readers(content: Any) -> dict[str, Parts]:
    """The formats that can read a checkpoint, with or without wrappers, and the parts that they find."""
    found = {name: parts for name in format_names() if (parts := _format(name).parts(content)) is not None}
    if not any(parts.sure for parts in found.values()):
        found = {name: within[0] for name in format_names() if (within := _unwrapped(name, content))} | found
    return found


def _what_instead(params: TeacherParams, content: Any) -> str:
    """What was expected and what was found, and parameters that would fit the file."""
    inside = [content[name] for name in _STATES if isinstance(content, dict) and content.get(name)]
    line = f"expected {_format(params.format).EXPECTED}, found {summary(inside[0] if inside else content)}"
    otherwise = f"set {params.key('checkpoint')} to a file of one of the formats {', '.join(format_names())}"
    return f"{line}; {_ways_out(params, content, otherwise)}"


def _ways_out(params: TeacherParams, content: Any, otherwise: str = "") -> str:
    """Settings with which the checkpoint can be read, if there are any. Each was tried, so that none leads to another error."""
    found = dict.fromkeys(_as_settings(params, settings) for settings in readings(params, content))
    settings = ", or ".join(filter(None, found))
    return f"set {settings}" if settings else otherwise or f"give a complete file in {params.key('checkpoint')}"


def _or_format(params: TeacherParams, way_out: str) -> str:
    return f"{way_out}, or {params.key('format')} to the code that wrote it" if params.key("format") else way_out


def readings(params: TeacherParams, content: Any) -> Iterator[dict[str, Any]]:
    """Source, format, arch, width and stem that read a checkpoint: its published format, or otherwise a library and formats that use a
    library's names."""
    read_by = _readers(content)
    sure = any(parts.sure for parts in read_by.values())  # even if it fits no network: a library would find another part of the file
    networks = {name: _network_of(params, parts) for name, parts in sorted(read_by.items()) if parts.sure == sure}
    formats = {name: network for name, network in networks.items() if network is not None}
    if params.source == "checkpoint" and params.format in formats:
        yield formats[params.format]
        return
    of_library = [] if sure else list(_of_a_library(params, content))
    yield from of_library
    if sure or of_library:
        for network in [network for i, network in enumerate(formats.values()) if network not in list(formats.values())[:i]]:
            names = [name for name, other in formats.items() if other == network]
            yield {"source": "checkpoint", "format": " or ".join(names), **network}


def _network_of(params: TeacherParams, parts: Parts) -> dict[str, Any] | None:
    """arch, width and stem with which these parts load: the configured ones, or those of a common network; None if there are none."""
    asked = {name: getattr(params, name) for name in ("arch", "width", "stem")}
    for network in filter(None, (asked, settings_that_fit(parts.trunk))):
        own = params.model_copy(update=network)
        if parts.unknown or ("dynamic_img_size" in parts.options and not is_transformer(own.arch)):
            continue
        with suppress(UserError):
            backbone, _ = without_numbers(partial(_with_grid, own, parts))
            check_fits(backbone.state_dict(), without_masking(parts.trunk, backbone)[0], "")
            if parts.layers:
                _head_widths(params, parts, backbone, "")
            return network
    return None


def _of_a_library(params: TeacherParams, content: Any) -> Iterator[dict[str, Any]]:
    """Source, arch, width and stem for which a library's names fit the weights, at any place in the checkpoint."""
    asked = {name: getattr(params, name) for name in ("arch", "width", "stem")}
    with suppress(UserError):
        network = asked if find(content, _empty(params, {})) else settings_in(content)
        if network is not None:
            yield {"source": "torchvision" if network["arch"].startswith("torchvision/") else "timm", **network}


def _no_usual(params: TeacherParams, backbone: Backbone, state: Mapping[str, Tensor]) -> str:
    """How to fix the error if no common network has these weights: extra weights can be left out, but missing ones are needed."""
    if backbone.state_dict().keys() <= state.keys():
        return "if these are not part of the network, save its state_dict() without them"
    line = f"no common network has exactly these weights: give a complete file in {params.key('checkpoint')}"
    return f"{line}, or set {params.key('arch')}, width and stem to those of the trained network"


def _as_settings(params: TeacherParams, found: Mapping[str, Any]) -> str:
    differing = {params.key(name): value for name, value in found.items() if getattr(params, name) != value}
    return ", ".join(f"{key}: {value}" for key, value in differing.items() if key)


def _head_widths(params: TeacherParams, parts: Parts, backbone: Backbone, origin: str) -> list[int]:
    """The widths of the head's layers, from the shapes in the checkpoint. Raises UserError if they do not fit such a head."""
    linears = [f"{i}.weight" for i, kind in enumerate(parts.layers) if kind.startswith("linear")]
    shapes = [tuple(parts.head[name].shape) if name in parts.head else () for name in linears]
    widths = [shape[0] if len(shape) == 2 else 1 for shape in shapes]  # after a 1, loading reports the error
    with torch.device("meta"):  # shapes that do not fit together may have any size
        empty = layered_head(parts.layers, [backbone.feature_width, *widths]).state_dict()
        check_fits(empty, parts.head, origin, lambda: _or_format(params, f"set {params.key('checkpoint')} to a complete file"))
    return [backbone.feature_width, *widths]


def _empty(params: TeacherParams, options: Mapping[str, Any]) -> Backbone:
    """The network into which weights will be loaded."""
    return build_backbone(params.arch, params.width, params.stem, 0, {**options, **params.options})


def _noted(params: TeacherParams, options: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata on the backbone's options; empty without options, so that files from before options existed do not change."""
    return {"options": {**options, **params.options}} if options or params.options else {}


def _content(params: TeacherParams) -> tuple[Any, str]:
    """The content of `teacher.checkpoint`, as returned by `read_checkpoint`. Raises UserError, with the address of a known teacher's
    weights."""
    if params.known is not None and not Path(str(params.checkpoint)).exists():
        raise UserError(f"{params.key('checkpoint')} = {params.checkpoint}: the file does not exist; {params.known.way_in()}")
    return read_checkpoint(str(params.checkpoint), params.key("checkpoint"))


def _from_own_file(params: TeacherParams, image: ImageParams, backbone: Backbone, options: Mapping[str, Any]) -> Made:
    """The weights of `backbone` at any place in `teacher.checkpoint`, and the names of the parts stored next to them. Weights of a known
    teacher may have the names of the code that wrote them."""
    path = str(params.checkpoint)
    content, sha256 = _content(params)
    try:
        found = find(content, backbone)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if found is None and params.known is not None and _format(params.format).parts(content) is not None:
        return from_checkpoint(params, image)
    if found is None:
        raise _misfit(params, backbone, content)
    place, others = found
    state, left_out = without_classifier(backbone, place.state)
    if (place.keys, place.prefix) != ((), ""):
        more = "".join(f"; {other} would fit as well" for other in others)
        unused = [*place.beside, *dict.fromkeys(name.partition(".")[0] for name in left_out)]
        beside = f"; left out: {first_names(unused)}" if unused else ""
        print(f"{params.key('checkpoint')} = {path}: read {place}{beside}{more}", file=sys.stderr)
    backbone, options = _of_its_grid(params, backbone, options, state)
    load_strictly(backbone, state, path)
    _mention_stem(params)
    left_out += sorted(place.beside)
    return backbone, None, {"pretrained": True, "source_sha256": sha256, "left_out": left_out, **_noted(params, options)}


def _misfit(params: TeacherParams, backbone: Backbone, content: Any) -> UserError:
    """The differences from the network at the most similar place in a checkpoint, and which network would fit the file."""
    path, own = str(params.checkpoint), backbone.state_dict()
    states = [place.state for place in places(content, next(iter(own)))] + [state for _, state in states_in(content)]
    if not states:
        return UserError(f"{path}: holds no weights by name, but {summary(content)}; save the network's state_dict() with torch.save")
    state, _ = without_classifier(backbone, max(states, key=lambda state: sum(name in own for name in state)))

    try:
        check_fits(
            own, state, f"{path}: does not fit {params.arch}", lambda: _ways_out(params, content, _no_usual(params, backbone, state))
        )
    except UserError as error:
        return error
    raise AssertionError("a state dict that fits is found")


def _download(params: TeacherParams, get: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The state dict of a pretrained network with its classifier, loaded strictly by the library itself."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its messages on each attempt are summarised below
    try:
        return get().state_dict()
    except Exception as error:  # the libraries' network clients raise errors of many kinds
        reason = reason_of(error)
        line = f"{params.key('arch')} = {params.arch}: no pretrained weights could be obtained ({reason})"
        if "No pretrained weights exist" in reason or "Invalid pretrained tag" in reason:
            near = near_matches(params.arch, timm.list_pretrained())
            raise UserError(f"{line}; set {params.key('arch')} to one of timm.list_pretrained(){near}") from None
        way_out = params.known.way_in() if params.known else f"set {params.key('checkpoint')} to a local file of them"
        raise UserError(f"{line}; {way_out}") from None


def _compare_normalisation(params: TeacherParams, image: ImageParams, mean: Any, std: Any) -> None:
    if np.allclose([*image.mean, *image.std], [*mean, *std], rtol=0, atol=2e-3):  # SwAV's 0.228 instead of 0.229 does not matter
        return
    expected = f"the published weights of {params.arch} expect {list(mean)}, {list(std)}"
    mean_key, std_key = params.key("image.mean"), params.key("image.std")
    line = f"{mean_key} = {image.mean}, {std_key} = {image.std}: {expected}"
    if not params.checkpoint:
        raise UserError(f"{line}; set {mean_key} and {std_key} to these")
    print(f"{line}; ignore this if {params.key('checkpoint')} was trained differently", file=sys.stderr)
