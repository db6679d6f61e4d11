"""SEED (Fang et al. 2021; jacobswan1/SEED seed/builder.py): the student learns the teacher's similarities to a bank of keys.

z_s, z_t: unit outputs of student and teacher for the same view. Rows of similarities over [the teacher's own output; bank]:
a_s = [z_s . z_t; z_s . Q] / student_temperature, a_t = [1; z_t . Q] / teacher_temperature; the loss is the cross-entropy of
softmax(a_s) under softmax(a_t). The teacher is in eval mode, as published.
"""

import torch
from torch import Tensor

from bingo import seeds
from bingo.methods.contract import Batch, Context, Method, Needs, Progress
from bingo.methods.negatives import Negatives
from bingo.methods.parts.losses import soft_cross_entropy
from bingo.methods.targets import Targets
from bingo.nets.heads import mlp_head, unit
from bingo.nets.precision import autocast
from bingo.params.methods import SeedParams


class Seed(Method):
    """See the head of this file. The anchor's own row of the bank is excluded: its similarity is the first in the row."""

    def __init__(self, params: SeedParams, context: Context):
        super().__init__()
        self.params, self.precision, self.device = params, context.precision, context.device
        self.targets = Targets("seed", context, "keys")
        self.needs = Needs(anchor_views=1, **self.targets.needs)
        self.student = context.student
        widths = [context.feature_width, params.head_hidden, self.targets.width]
        self.head = mlp_head(widths, seeds.torch_seed(context.seed, "student head"))
        self.negatives = Negatives(params.negatives, params.negative_rows, self.targets.width, False, context)
        self.pushed: tuple[Tensor, Tensor] | None = None

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        with autocast(self.precision, self.device):
            query_BP = unit(self.head(self.student(batch.anchor_views[0])))
        key_BP = self.targets(batch)
        self.pushed = (key_BP, batch.anchor_rows_B)
        bank_JP, hidden_BJ = self.negatives(batch, progress.step)
        bank_JP = bank_JP.float()  # once for both
        if hidden_BJ is not None:  # the first column, the own key, is always visible
            hidden_BJ = torch.nn.functional.pad(hidden_BJ, (1, 0))
        student_BJ = _similarities(query_BP, key_BP, bank_JP) / self.params.student_temperature
        teacher_BJ = _similarities(key_BP, key_BP, bank_JP) / self.params.teacher_temperature
        return {"loss": soft_cross_entropy(student_BJ, teacher_BJ, hidden_BJ).mean()}

    def after_step(self) -> None:
        assert self.pushed is not None, "after_step follows forward"
        self.negatives.push(*self.pushed)


def _similarities(query_BP: Tensor, key_BP: Tensor, bank_JP: Tensor) -> Tensor:
    """Cosines to the own key and to the bank, (B, 1 + J) float32."""
    return torch.cat([(query_BP * key_BP).sum(dim=1, keepdim=True), query_BP @ bank_JP.T], dim=1)


def build(params: SeedParams, context: Context) -> Method:
    """SEED on the student of `context`. Raises UserError if there is no teacher."""
    return Seed(params, context)
