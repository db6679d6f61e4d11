"""The interface of a distillation method: it declares what a batch must contain, owns its networks and state, and returns its loss terms.

Shape letters: B anchors of this process with their companions, T train rows, V stored views, P key width, D feature width, K bag size,
J negatives.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bingo.methods.parts.momentum import MomentumCopy
from bingo.params import MethodSection

if TYPE_CHECKING:  # a method without bags or teacher does not depend on them
    from bingo.bags.index import Bags
    from bingo.nets.backbones import Backbone
    from bingo.teachers.teacher import Teacher


@dataclass(frozen=True)
class SmallCrops:
    """`count` additional random crops of each anchor, with a side of `crop_px` pixels and a share of the image's area in `crop_scale`."""

    count: int
    crop_px: int
    crop_scale: list[float]


@dataclass(frozen=True)
class Needs:
    """What a method needs in a batch.

    `anchor_views`, `member_views`: numbers of views of the anchor and of one drawn member of its bag. The first `same_views` of the
    anchor's views are those from which stored keys were computed (if there are two, they differ), and the last `weak_views` have neither
    colour jitter nor blur. `stored_keys`: the teacher's stored keys of both; `stored_features`: its stored features of the anchors.
    `live_anchor_views`, `live_member_views`: the indices of the views that a live teacher sees.
    `small_crops`: of the anchors, for student and live teacher.
    `bag_means`: the mean key of each anchor's bag, over members and stored views, instead of a drawn member.
    `companions`: the number of listed members of each anchor's bag that are added to the batch as further anchors, after the anchors.
    """

    anchor_views: int
    member_views: int = 0
    stored_keys: bool = False
    same_views: int = 0
    weak_views: int = 0
    stored_features: bool = False
    bag_means: bool = False
    companions: int = 0
    live_anchor_views: tuple[int, ...] = ()
    live_member_views: tuple[int, ...] = ()
    small_crops: SmallCrops | None = None

    @property
    def members(self) -> bool:
        return self.member_views > 0

    @property
    def bags(self) -> bool:
        """Whether bags are needed."""
        return self.members or self.bag_means or self.companions > 0


@dataclass
class Batch:
    """One process's share of a step: rows (B,) int64, views (B, 3, H, W) float32, unit keys (B, P) and features (B, D) float32.
    `bag_means_BP` are means of keys, not of unit length.

    `anchor_keys` has one entry, or `Needs.same_views` entries if that is more: then key i is the key of view i. `host_rows_B`
    are the anchor's rows on the host, for random draws: reading them back from a GPU would wait for its work. `live_anchor_views`
    and `live_member_views` hold the views that `Needs` lists, by their indices, if the teacher's image size or normalisation differs from
    the student's; otherwise they are empty. `small_crops` (C * B, 3, P, P) are the first crop of every anchor, then the second, and so
    on; `live_small_crops` are the same crops with the teacher's normalisation if it differs.
    """

    anchor_rows_B: Tensor
    anchor_views: list[Tensor]
    member_rows_B: Tensor | None = None
    member_views: list[Tensor] = field(default_factory=list)
    anchor_keys: list[Tensor] = field(default_factory=list)
    member_keys_BP: Tensor | None = None
    anchor_features_BD: Tensor | None = None
    bag_means_BP: Tensor | None = None
    host_rows_B: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    live_anchor_views: dict[int, Tensor] = field(default_factory=dict)
    live_member_views: dict[int, Tensor] = field(default_factory=dict)
    small_crops: Tensor | None = None
    live_small_crops: Tensor | None = None

    def anchor_for_teacher(self, view: int) -> Tensor:
        """A view of the anchors as a live teacher sees it."""
        return self.live_anchor_views[view] if self.live_anchor_views else self.anchor_views[view]

    def member_for_teacher(self, view: int) -> Tensor:
        """A view of the members as a live teacher sees it."""
        return self.live_member_views[view] if self.live_member_views else self.member_views[view]

    def __post_init__(self) -> None:
        if len(self.host_rows_B) != len(self.anchor_rows_B):
            self.host_rows_B = self.anchor_rows_B.cpu().numpy()


@dataclass(frozen=True)
class Progress:
    """The progress of training: epoch and global step, both from 0."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Context:
    """The inputs for building a method. `student` is the backbone; `keys_TVP` and `features_TD` are float16 on the device; absent parts are
    None. `keys` is the source of the teacher's outputs: stored, live, or momentum (no teacher)."""

    student: "Backbone"
    feature_width: int
    seed: int
    keys: str
    precision: str
    device: torch.device
    teacher: "Teacher | None" = None
    keys_TVP: Tensor | None = None
    features_TD: Tensor | None = None
    bags: "Bags | None" = None


class Method(nn.Module):
    """A method. `forward` has no effect on keys, queues or moving averages; these are updated only in `after_step`.

    `gradients_come_together`: gradients are computed in `forward`, and backward returns them all at once. `frozen`: networks of a live
    teacher. `pushed`: the queues to be updated after the last `forward`, each with its new keys (B, P) and rows (B,).
    """

    gradients_come_together = False
    frozen: Sequence[nn.Module] = ()
    needs: Needs
    student: "Backbone"
    head: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.pushed: list[tuple[Any, Tensor, Tensor]] = []

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Loss terms, scalars in float32: `loss` is minimised, the others are only logged."""
        raise AssertionError(f"{type(self).__name__} has no forward")

    def after_step(self) -> None:
        """Update queues and moving averages, after the optimizer step of the last `forward`."""
        for queue, keys_BP, rows_B in self.pushed:
            queue.push(keys_BP, rows_B)
        for part in self.children():
            if isinstance(part, MomentumCopy):
                part.move()


def build_method(name: str, section: MethodSection, context: Context) -> Method:
    """The method `name` from bingo/methods/NAME.py, with its section of params.yaml."""
    method: Method = importlib.import_module(f"bingo.methods.{name}").build(section, context)
    if (teacher := context.teacher) is not None:
        method.frozen = [teacher.backbone] if teacher.head is None else [teacher.backbone, teacher.head]  # a list, so not submodules
    return method
