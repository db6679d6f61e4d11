"""Finding a network in a checkpoint within any wrappers: entries around the dict of its weights, and modules before their names.

A place is recognised as the network if all names and shapes fit; only then is a wrapper removed.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from bingo.nets.backbones import Backbone, build_backbone, without_numbers
from bingo.runtime.errors import UserError
from bingo.teachers.reading.foreign import dicts_in, shared_prefix, states_in, without_wrapping

# If several networks fit, the one whose wrapper comes first here is preferred; all others come after these, with equal rank.
_PREFERRED = (
    "teacher", "module", "state_dict", "model", "model_state_dict", "net", "network", "backbone", "encoder", "trunk", "base_encoder",
    "encoder_q", "online_encoder", "online_network", "online",
)  # fmt: skip
UNKNOWN_RANK = len(_PREFERRED)
_COUNTER = "num_batches_tracked"
_OF_MASKING = re.compile(r"(?:mask_token|masked_embed|decoder\w*)(?:\.|$)")
# Networks to try if a file does not fit, by a name that every network of a family has.
_FAMILIES = {
    "layer1.0.conv1.weight": (
        "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet10t", "resnet14t", "resnet26", "resnet18d", "resnet50d",
        "resnet200", "wide_resnet50_2", "resnext50_32x4d",
    ),
    "cls_token": (
        *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")), "vit_small_patch8_224", "vit_base_patch8_224",
        *(f"vit_{size}_patch14_{kind}" for kind in ("dinov2", "reg4_dinov2") for size in ("small", "base", "large")),
        "deit3_small_patch16_224", "deit3_base_patch16_224",
        *(f"vit_{size}_patch16_dinov3_qkvb" for size in ("small", "base", "large")),
    ),
    "conv_stem.weight": (
        "efficientnet_b0", "tf_efficientnet_b0", "efficientnet_b1", "mobilenetv3_large_100", "mobilenetv3_small_100", "mobilenetv2_100",
    ),
    "stem.0.weight": ("convnext_tiny", "convnext_small", "convnext_base", "convnext_nano"),
    "features.0.0.weight": tuple(
        f"torchvision/{name}" for name in ("mobilenet_v3_large", "mobilenet_v3_small", "mobilenet_v2", "efficientnet_b0", "convnext_tiny")
    ),
    "conv_proj.weight": ("torchvision/vit_b_16", "torchvision/vit_b_32", "torchvision/vit_l_16"),
}  # fmt: skip
_ANCHORS = ("conv1.weight", "conv1.0.weight", "cls_token", "conv_stem.weight", "stem.0.weight", "features.0.0.weight", "conv_proj.weight")


@dataclass(frozen=True)
class Place:
    """A dict of weights in a checkpoint: the keys that lead to it, the prefix of its names, and what is stored next to it."""

    keys: tuple[str, ...]
    prefix: str
    state: dict[str, Tensor]
    beside: tuple[str, ...] = ()

    @property
    def rank(self) -> list[int]:
        """Lower if it is more likely to be the wanted network."""
        words = [*self.keys, *self.prefix.split(".")[:-1]]
        return sorted((_PREFERRED.index(word) if word in _PREFERRED else UNKNOWN_RANK for word in words), reverse=True)

    def __str__(self) -> str:
        entry = f"its entry {'.'.join(self.keys)}" if self.keys else "it"
        return f"{entry} without the prefix {self.prefix} of the names" if self.prefix else entry


def places(content: Any, anchor: str) -> list[Place]:
    """Every dict of weights in a checkpoint that has the name `anchor` after some prefix, with the names that follow that prefix."""
    found = []
    for keys, state in states_in(without_wrapping(content)):
        for prefix in [name.removesuffix(anchor) for name in state if name == anchor or name.endswith(f".{anchor}")]:
            inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            beside = dict.fromkeys(_module(name, prefix) for name in state if not name.startswith(prefix))
            found.append(Place(keys, prefix, inside, tuple(beside)))
    return found


def _module(name: str, prefix: str) -> str:
    """The outermost module of a name that does not begin with `prefix`."""
    parts, known = name.split("."), prefix.split(".")
    same = next((i for i, (one, other) in enumerate(zip(parts, known, strict=False)) if one != other), 0)
    return ".".join(parts[: same + 1])


def without_classifier(backbone: Backbone, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights without those of the classifier and of masked pretraining, and the names of the latter two."""
    own, classifier = backbone.state_dict(), tuple(f"{prefix}." for prefix in backbone.classifier_names)
    kept, left_out = without_masking(state, backbone)
    left_out += [name for name in kept if name not in own and name.startswith(classifier)]
    return {name: tensor for name, tensor in kept.items() if name not in left_out}, sorted(left_out)


def without_masking(state: Mapping[str, Tensor], backbone: Backbone) -> tuple[dict[str, Tensor], list[str]]:
    """The weights without those needed only for images with masked patches (of MAE, SimMIM, iBOT), and the names of these."""
    left_out = sorted(name for name in state.keys() - backbone.state_dict().keys() if _OF_MASKING.match(name))
    return {name: tensor for name, tensor in state.items() if name not in left_out}, left_out


def fits(backbone: Backbone, state: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of the network, ignoring classifier and counters; a position embedding may have a different grid."""
    own = backbone.state_dict()
    state, _ = without_classifier(backbone, state)
    needed = {name for name in own if not name.endswith(_COUNTER)}
    if not needed <= state.keys() <= own.keys():
        return False
    other = {name for name in needed if own[name].shape != state[name].shape}
    return not other or (other == {"pos_embed"} and grid_px(backbone, state["pos_embed"]) is not None)


def grid_px(backbone: Backbone, pos_embed: Tensor) -> int | None:
    """The image's side in pixels for which a vision transformer has this position embedding (1, tokens, width), if there is one."""
    own: Any = backbone
    if not getattr(own, "dynamic_img_size", False) or pos_embed.ndim != 3 or pos_embed.shape[2] != own.pos_embed.shape[2]:
        return None
    grid = own.patch_embed.grid_size
    patches = pos_embed.shape[1] - (own.pos_embed.shape[1] - grid[0] * grid[1])
    side = round(max(patches, 0) ** 0.5)
    return side * max(own.patch_embed.patch_size) if side and side * side == patches else None


def find(content: Any, backbone: Backbone) -> tuple[Place, list[Place]] | None:
    """The place of the network in a checkpoint, and others that also fit; None if no place fits.

    Raises UserError if several fit and none is preferred.
    """
    anchor = next(iter(backbone.state_dict()))
    fitting = sorted((place for place in places(content, anchor) if fits(backbone, place.state)), key=lambda place: place.rank)
    if not fitting:
        return None
    if len(fitting) > 1 and fitting[0].rank == fitting[1].rank:
        named = " and ".join(f"({place})" for place in fitting)
        raise UserError(f"holds several networks that fit: {named}; save the state_dict() of one alone with torch.save")
    return fitting[0], fitting[1:]


def variants(content: Any) -> Iterator[tuple[Any, str]]:
    """The forms in which formats may recognise a checkpoint: unchanged, then without wrappers; each with a description of what was removed.

    `module.` is put before all names if it is missing, as by training on several GPUs, since formats are described with it.
    """
    yield content, ""
    plain = without_wrapping(content)
    for keys, inner in dicts_in(plain):
        yield inner, f"its entry {'.'.join(keys)}" if keys else "the names without _orig_mod. and the like"
    for keys, state in states_in(plain):
        prefix = shared_prefix(state)
        for cut in range(prefix.count(".") + 1):
            start = "".join(f"{part}." for part in prefix.split(".")[:cut])
            bare = {name.removeprefix(start): tensor for name, tensor in state.items()}
            for form in (bare, {f"module.{name}": tensor for name, tensor in bare.items()}):
                for wrapped in (form, {"state_dict": form}, {"model": form}, {"teacher": form}):
                    yield wrapped, str(Place(keys, start, state)) if start or len(keys) > 1 else ""


def settings_in(content: Any) -> dict[str, Any] | None:
    """arch, width and stem of a common network whose weights are at any place in a checkpoint, or None."""
    states = (place.state for anchor in _ANCHORS for place in places(content, anchor))
    return next((found for state in states if (found := settings_that_fit(state))), None)


def settings_that_fit(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """arch, width and stem of a common network that has these weights, or None."""
    family = next((names for anchor, names in _FAMILIES.items() if anchor in state), ())
    for arch in family:
        for width, stem in _width_and_stem(state) if arch.startswith("re") else [(1.0, "imagenet")]:
            backbone = _empty(arch, width, stem)
            if backbone is not None and fits(backbone, state):
                return {"arch": arch, "width": width, "stem": stem}
    return None


@cache
def _empty(arch: str, width: float, stem: str) -> Backbone | None:
    """The network on the meta device, or None if there is no such network."""
    try:
        return without_numbers(lambda: build_backbone(arch, width, stem, 0))
    except UserError:
        return None


def _width_and_stem(state: Mapping[str, Tensor]) -> list[tuple[float, str]]:
    """The widths and stems that a ResNet may have, judging by its first layers: 64 channels are width 1."""
    block, first = state["layer1.0.conv1.weight"], state.get("conv1.weight")
    widths = dict.fromkeys((block.shape[1] / 64, block.shape[0] / 64, 1.0))
    stem = "small" if first is not None and first.shape[-1:] == (3,) else "imagenet"
    return [(width, stem) for width in widths]
