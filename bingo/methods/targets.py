"""The teacher's outputs with which a student is compared view by view: keys or features, stored or live.

Stored keys belong to views that are redrawn for the student. Stored features belong to the centre view (like those of the cached
teachers of CompRess and SimReg), while the student sees a random view. A live teacher sees the student's view.
Shape letters: B anchors, X width of keys or features.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from bingo.methods.contract import Batch, Context
from bingo.nets.precision import autocast
from bingo.runtime.errors import UserError


class Targets:
    """Teacher outputs of the kind `target` for the first `views` views of each anchor. Raises UserError if there is no teacher."""

    def __init__(self, method: str, context: Context, target: Literal["keys", "features"], views: int = 1):
        if context.keys == "momentum":
            raise UserError(f"distill.keys = momentum: {method} compares with a teacher; set distill.keys to stored or live")
        self.context, self.target, self.views = context, target, views
        self.stored = context.keys == "stored"
        if self.stored and target == "keys":
            check_stored_views(method, context, views)

    @property
    def needs(self) -> dict[str, Any]:
        """The fields of `Needs` that this requires."""
        keys = self.stored and self.target == "keys"
        live = () if self.stored else tuple(range(self.views))
        return {
            "stored_keys": keys,
            "same_views": self.views if keys else 0,
            "stored_features": self.stored and not keys,
            "live_anchor_views": live,
        }

    @property
    def width(self) -> int:
        """X."""
        if self.target == "features" and self.context.features_TD is not None:
            return self.context.features_TD.shape[1]
        if self.target == "keys" and self.context.keys_TVP is not None:
            return self.context.keys_TVP.shape[2]
        assert self.context.teacher is not None
        return self.context.teacher.metadata["feature_width" if self.target == "features" else "key_width"]

    @torch.no_grad()
    def __call__(self, batch: Batch, view: int = 0) -> Tensor:
        """float32 (B, X) for one view of each anchor: keys are unit rows, features are not."""
        if self.stored and self.target == "keys":
            return batch.anchor_keys[view]
        if self.stored:
            assert batch.anchor_features_BD is not None, "a method that needs stored features is given them"
            return batch.anchor_features_BD
        return self.live(batch.anchor_for_teacher(view))

    @torch.no_grad()
    def live(self, images_BCHW: Tensor) -> Tensor:
        """The live teacher's outputs for any images of its size and normalisation: float32 (B, X)."""
        teacher = self.context.teacher
        assert teacher is not None
        with autocast(self.context.precision, self.context.device):
            return (teacher.keys if self.target == "keys" else teacher.features)(images_BCHW)


def check_stored_views(method: str, context: Context, views: int) -> None:
    """Raise UserError if the store has fewer than `views` views of each image."""
    assert context.keys_TVP is not None
    if (stored := context.keys_TVP.shape[1]) < views:
        way_out = f"set extract.views to {views} or more"
        raise UserError(f"extract.views = {stored}: {method} with distill.keys = {context.keys} reads {views} of each image; {way_out}")
