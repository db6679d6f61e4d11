"""ISD (Tejankar et al. 2021; UMBCvision/ISD train_isd.py): the student learns its moving average's similarities to other images.

q = predictor(encoder(x1)), k = the moving average's encoder(x2), both unit; Q: keys of earlier steps.
loss = KL(softmax(k . Q / key_temperature) || softmax(q . Q / student_temperature)); the image itself is not in Q. With `weak_keys`,
x2 has neither colour jitter nor blur (ISD-plus); `projection_width` adds a projector after both encoders.
"""

import torch
from torch import Tensor, nn

from bingo import seeds
from bingo.methods.contract import Batch, Context, Method, Needs, Progress
from bingo.methods.parts.losses import kl_divergence
from bingo.methods.parts.momentum import MomentumCopy, Queue, shuffled
from bingo.nets.heads import batchnorm_mlp, unit
from bingo.nets.precision import autocast
from bingo.params.methods import IsdParams


class Isd(Method):
    """ISD, as described at the top of this file. The saved head is the projector, if there is one, and the predictor."""

    def __init__(self, params: IsdParams, context: Context):
        super().__init__()
        self.params, self.context = params, context
        self.needs = Needs(anchor_views=2, weak_views=1 if params.weak_keys else 0)
        self.student = context.student
        width, hidden = params.projection_width or context.feature_width, params.head_hidden
        self.projector: nn.Module = nn.Identity()
        if params.projection_width:
            self.projector = batchnorm_mlp(context.feature_width, hidden, width, seeds.torch_seed(context.seed, "projector"))
        predictor = batchnorm_mlp(width, hidden, width, seeds.torch_seed(context.seed, "student head"))
        self.head = nn.Sequential(self.projector, predictor)
        self.key_encoder = MomentumCopy(nn.Sequential(self.student, self.projector), params.key_momentum)
        self.queue = Queue(params.queue_rows, width, context.seed)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        with autocast(self.context.precision, self.context.device):
            query_BX = unit(self.head(self.student(batch.anchor_views[0])))
            with torch.no_grad():
                keys_BX = unit(shuffled(self.key_encoder, batch.anchor_views[1], self.context.seed, progress.step))
        self.pushed = [(self.queue, keys_BX, batch.anchor_rows_B)]
        student_BQ = query_BX @ self.queue.keys_QP.T / self.params.student_temperature
        key_BQ = keys_BX @ self.queue.keys_QP.T / self.params.key_temperature
        return {"loss": kl_divergence(student_BQ, key_BQ, self.queue.empty()).mean()}


build = Isd
