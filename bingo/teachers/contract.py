"""The parts of a foreign checkpoint: the weights of the backbone and of the projection head, and what is left out.

Each file in bingo/teachers/formats has `EXPECTED`, a description of such checkpoints for error messages, `KEY_WIDTH`, the width of the keys
of published files (None: they contain no head, and the feature is the key), and `parts`, which finds the parts in the result of
`read_checkpoint`, or returns None if it has a different format.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bingo.teachers.reading.foreign import is_state_dict

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
ANY_IMAGE = {"dynamic_img_size": True}  # vision transformers of timm: position embeddings are resampled to the image
FIRST_WEIGHTS = ("conv1.weight", "patch_embed.proj.weight", "conv_stem.weight", "cls_token")


@dataclass(frozen=True)
class Parts:
    """A checkpoint's parts. `trunk` has the names of timm and torchvision, `head` those of a Sequential of `layers`
    (bingo.nets.heads; none: the checkpoint has no head).

    `left_out` names modules of the file that the teacher does not have, `unknown` names that do not belong in such a checkpoint. `options`
    are the network's options that differ from timm's defaults (bingo.nets.backbones). `mean_std` is the normalisation that it was trained
    with. `sure` is False if the names are a library's own, so that other formats may fit as well.
    """

    trunk: dict[str, Tensor]
    head: dict[str, Tensor] = field(default_factory=dict)
    layers: Sequence[str] = ()
    left_out: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    mean_std: tuple[list[float], list[float]] = IMAGENET
    sure: bool = True


def divide(state: Mapping[str, Tensor], trunk: str, head: str | None = None, left_out: Sequence[str] = (), **more: Any) -> Parts:
    """Sort names by their prefixes: `head` and `left_out` (whole modules) first, then `trunk`; all others are unknown.

    `trunk` and `head` end with a dot or are empty. `more` are additional fields of Parts.
    """
    prefixes = {f"{module}.": module for module in left_out}
    others = {name: next((prefixes[prefix] for prefix in prefixes if f"{name}.".startswith(prefix)), None) for name in state}
    rest = [name for name, module in others.items() if module is None]
    in_head = {name for name in rest if head and name.startswith(head)}
    in_trunk = [name for name in rest if name not in in_head and name.startswith(trunk)]
    return Parts(
        trunk={name.removeprefix(trunk): state[name] for name in in_trunk},
        head={name.removeprefix(head or ""): state[name] for name in rest if name in in_head},
        left_out=sorted({module for module in others.values() if module}),
        unknown=sorted(set(rest) - in_head - set(in_trunk)),
        **more,
    )


def whole(content: Any) -> dict[str, Tensor]:
    """The content itself, if it is a state dict; otherwise {}."""
    return content if is_state_dict(content) else {}


def entry(content: Any, name: str) -> dict[str, Tensor]:
    """The state dict in a checkpoint's entry with this name; {} if there is none."""
    return whole(content.get(name)) if isinstance(content, dict) else {}


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with this prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def wrapper(state: Mapping[str, Tensor], module: str) -> str:
    """`module.` if DDP has put it before the names of this module, otherwise the empty string."""
    return "module." if under(state, f"module.{module}.") else ""


def bare(content: Any) -> dict[str, Tensor]:
    """The content itself, if it is the state dict of only a backbone with a library's names; otherwise {}."""
    return whole(content) if any(name in whole(content) for name in FIRST_WEIGHTS) else {}


def renamed(name: str, replacements: Iterable[tuple[str, str]]) -> str:
    """A tensor's name with parts of it replaced, one after the other."""
    for old, new in replacements:
        name = name.replace(old, new)
    return name


def depth_of(head: Mapping[str, Tensor]) -> int:
    """The number of linear layers in a Sequential's state dict (those whose weight is a matrix)."""
    return sum(name.endswith(".weight") and tensor.ndim == 2 for name, tensor in head.items())
