"""What a method of distillation is: it says what a batch must hold, owns its networks and state, and returns its loss terms.

Shape letters: B anchors of this process, T train rows, V stored views, P key width, D feature width, K bag size, J negatives.
"""

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # a method without bags or teacher does not depend on them
    from bingo.bags import Bags
    from bingo.nets.teachers import Teacher


@dataclass(frozen=True)
class Needs:
    """What a method wants to find in a batch.

    `anchor_views`, `member_views`: random views of the anchor and of one drawn member of its bag. `stored_keys`: the teacher's stored
    keys of both. `same_view`: the first anchor view is the very view that the anchor's stored key was made from.
    """

    anchor_views: int
    member_views: int = 0
    stored_keys: bool = False
    same_view: bool = False

    @property
    def members(self) -> bool:
        return self.member_views > 0


@dataclass
class Batch:
    """One process's share of a step: rows (B,) int64, views (B, 3, H, W) float32, unit keys (B, P) float32."""

    anchor_rows_B: Tensor
    anchor_views: list[Tensor]
    member_rows_B: Tensor | None = None
    member_views: list[Tensor] = field(default_factory=list)
    anchor_keys_BP: Tensor | None = None
    member_keys_BP: Tensor | None = None


@dataclass(frozen=True)
class Progress:
    """Where training stands: epoch and global step, both from 0."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Context:
    """What a method is built from. `student` is the backbone; `keys_TVP` float16 on the device; absent parts are None."""

    student: nn.Module
    feature_width: int
    seed: int
    keys: str
    precision: str
    device: torch.device
    teacher: "Teacher | None" = None
    keys_TVP: Tensor | None = None
    bags: "Bags | None" = None


class Method(nn.Module):
    """A method. `forward` has no effect on keys, queues or moving averages; these move in `after_step` alone."""

    needs: Needs
    student: nn.Module
    head: nn.Module

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Loss terms, scalars in float32: `loss` is what is minimised, the others are for the curves."""
        raise AssertionError(f"{type(self).__name__} has no forward")

    def after_step(self) -> None:
        """Move queues and moving averages, after the optimizer's step that used the last `forward`."""


def build_method(name: str, section: Any, context: Context) -> Method:
    """The method `name` from bingo/methods/NAME.py, with its section of params.yaml."""
    return importlib.import_module(f"bingo.methods.{name}").build(section, context)
