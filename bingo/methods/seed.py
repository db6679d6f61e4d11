"""SEED (Fang et al. 2021; jacobswan1/SEED seed/builder.py): the student learns the teacher's similarities to a bank of keys.

z_s, z_t: unit outputs of student and teacher for the same view. Rows of similarities over [the teacher's own output; bank]:
a_s = [z_s . z_t; z_s . Q] / student_temperature, a_t = [1; z_t . Q] / teacher_temperature; the loss is the cross-entropy of
softmax(a_s) under softmax(a_t). The teacher is in eval mode, as published.

With `small_crops` (seed/small_patch_builder.py), the same loss of several small crops of each image is added, as a mean over all of them.
They pass through the networks separately and have their own queue, which takes the key of the first crop of each image.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bingo import seeds
from bingo.methods.contract import Batch, Context, Method, Needs, Progress, SmallCrops
from bingo.methods.negatives import Negatives
from bingo.methods.parts.losses import soft_cross_entropy
from bingo.methods.targets import Targets
from bingo.nets.heads import mlp_head, unit
from bingo.nets.precision import autocast
from bingo.params.methods import SeedParams
from bingo.runtime.errors import UserError


class Seed(Method):
    """SEED, as described at the top of this file. The anchor's own row of the bank is excluded, since its similarity is the first entry."""

    def __init__(self, params: SeedParams, context: Context):
        super().__init__()
        self.params, self.precision, self.device = params, context.precision, context.device
        if params.small_crops and context.keys != "live":
            line = f"methods.seed.small_crops = {params.small_crops}: only a live teacher has keys of small crops"
            raise UserError(f"{line}; set distill.keys: live, or methods.seed.small_crops: 0")
        self.targets = Targets("seed", context, "keys")
        crops = SmallCrops(params.small_crops, params.small_crop_px, params.small_crop_scale) if params.small_crops else None
        self.needs = Needs(anchor_views=1, small_crops=crops, **self.targets.needs)
        self.student = context.student
        widths = [context.feature_width, params.head_hidden, self.targets.width]
        self.head = mlp_head(widths, seeds.torch_seed(context.seed, "student head"))
        self.negatives = Negatives(params.negatives, params.negative_rows, self.targets.width, False, context)
        if crops is not None:
            self.small_negatives = Negatives("queue", params.negative_rows, self.targets.width, False, replace(context, keys_TVP=None))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        key_BP = self.targets(batch)
        self.pushed = [(self.negatives, key_BP, batch.anchor_rows_B)]
        loss = self._loss(batch.anchor_views[0], key_BP, *self.negatives(batch, progress.step))
        if batch.small_crops is None:
            return {"loss": loss}
        key_CP = self.targets.live(batch.small_crops if batch.live_small_crops is None else batch.live_small_crops)
        self.pushed.append((self.small_negatives, key_CP[: len(key_BP)], batch.anchor_rows_B))
        small = self._loss(batch.small_crops, key_CP, *self.small_negatives(batch, progress.step))
        return {"loss": loss + small, "common_view": loss, "small_crops": small}

    def _loss(self, images_BCHW: Tensor, key_BP: Tensor, bank_JP: Tensor, hidden_BJ: Tensor | None) -> Tensor:
        """The mean loss over images, from the student's outputs and the teacher's `key_BP`; `hidden_BJ` is from `Negatives`."""
        with autocast(self.precision, self.device):
            query_BP = unit(self.head(self.student(images_BCHW)))
        bank_JP = bank_JP.float()  # once for both
        if hidden_BJ is not None:  # the first column, the own key, is always visible
            hidden_BJ = torch.nn.functional.pad(hidden_BJ, (1, 0))
        student_BJ = _similarities(query_BP, key_BP, bank_JP) / self.params.student_temperature
        teacher_BJ = _similarities(key_BP, key_BP, bank_JP) / self.params.teacher_temperature
        return soft_cross_entropy(student_BJ, teacher_BJ, hidden_BJ).mean()


def _similarities(query_BP: Tensor, key_BP: Tensor, bank_JP: Tensor) -> Tensor:
    """Cosines to the own key and to the bank, (B, 1 + J) float32."""
    return torch.cat([(query_BP * key_BP).sum(dim=1, keepdim=True), query_BP @ bank_JP.T], dim=1)


build = Seed
