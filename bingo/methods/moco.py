"""MoCo-v2 (facebookresearch/moco): contrast two views of an image, one by a moving average of the student, with a queue of keys."""

import torch
from torch import Tensor, nn

from bingo import seeds
from bingo.methods.contract import Batch, Context, Method, Needs, Progress
from bingo.methods.parts.losses import info_nce
from bingo.methods.parts.momentum import MomentumCopy, Queue, shuffled
from bingo.nets.heads import mlp_head, unit
from bingo.nets.precision import autocast, dtype_of_similarities
from bingo.params.methods import MocoParams


class Moco(Method):
    """loss = InfoNCE(q(view 1), k(view 2); queue). Keys enter the queue after the step, and then the key encoder is updated, which is
    equivalent to MoCo's update at the start of the next forward pass."""

    needs = Needs(anchor_views=2)

    def __init__(self, params: MocoParams, context: Context):
        super().__init__()
        self.params, self.seed, self.precision, self.device = params, context.seed, context.precision, context.device
        self.student = context.student
        widths = [context.feature_width, params.head_hidden, params.key_width]
        self.head = mlp_head(widths, seeds.torch_seed(context.seed, "student head"))
        self.key_encoder = MomentumCopy(nn.Sequential(self.student, self.head), params.key_momentum)
        self.queue = Queue(params.queue_rows, params.key_width, context.seed)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        with autocast(self.precision, self.device):
            query_BP = unit(self.head(self.student(batch.anchor_views[0])))
            with torch.no_grad():
                keys_BP = unit(shuffled(self.key_encoder, batch.anchor_views[1], self.seed, progress.step))
        similarities = dtype_of_similarities(self.precision, self.device)
        self.pushed = [(self.queue, keys_BP, batch.anchor_rows_B)]
        negatives = self.queue.keys_QP, self.params.temperature, self.queue.empty(), similarities
        return {"loss": info_nce(query_BP, [(1.0, keys_BP)], *negatives)}


build = Moco
