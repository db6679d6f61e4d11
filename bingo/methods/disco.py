"""DisCo (Gao et al. 2022; Yuting-Gao/DisCo-pytorch main.py:434-442): MoCo-v2, and regression of the teacher's outputs.

q, k: outputs of the student and of its moving average, T: the teacher's, all unit; x1, x2: two views of the anchor.
loss = InfoNCE(q(x1), k(x2); queue) + regression_weight * mean(|q(x1) - T(x1)|^2 + |q(x2) - T(x2)|^2). The released code sums the squares
over the 32 anchors of a GPU, which corresponds to a weight of 32; its teacher's BatchNorm uses batch statistics (`teacher_batchnorm:
batch`).
"""

import torch
from torch import Tensor, nn

from bingo import seeds
from bingo.methods.contract import Batch, Context, Method, Needs, Progress
from bingo.methods.parts.losses import info_nce
from bingo.methods.parts.momentum import MomentumCopy, Queue, shuffled
from bingo.methods.targets import Targets
from bingo.nets.heads import mlp_head, unit
from bingo.nets.precision import autocast, dtype_of_similarities
from bingo.params.methods import DiscoParams


class Disco(Method):
    """DisCo, as described at the top of this file."""

    def __init__(self, params: DiscoParams, context: Context):
        super().__init__()
        self.params, self.context = params, context
        self.targets = Targets("disco", context, "keys", views=2)
        self.needs = Needs(anchor_views=2, **self.targets.needs)
        self.student = context.student
        widths = [context.feature_width, params.head_hidden, self.targets.width]
        self.head = mlp_head(widths, seeds.torch_seed(context.seed, "student head"))
        self.key_encoder = MomentumCopy(nn.Sequential(self.student, self.head), params.key_momentum)
        self.queue = Queue(params.queue_rows, self.targets.width, context.seed)
        if context.teacher is not None:
            context.teacher.batch_statistics(params.teacher_batchnorm == "batch")

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        with autocast(self.context.precision, self.context.device):
            first_BP, second_BP = (unit(self.head(self.student(view))) for view in batch.anchor_views)
            with torch.no_grad():
                keys_BP = unit(shuffled(self.key_encoder, batch.anchor_views[1], self.context.seed, progress.step))
        self.pushed = [(self.queue, keys_BP, batch.anchor_rows_B)]
        similarities = dtype_of_similarities(self.context.precision, self.context.device)
        negatives = self.queue.keys_QP, self.params.temperature, self.queue.empty(), similarities
        contrast = info_nce(first_BP, [(1.0, keys_BP)], *negatives)
        distances = [(x_BP - self.targets(batch, view)).square().sum(dim=1).mean() for view, x_BP in enumerate((first_BP, second_BP))]
        regression = torch.stack(distances).sum()
        return {"loss": contrast + self.params.regression_weight * regression, "contrast": contrast, "regression": regression}


build = Disco
