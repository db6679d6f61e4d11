"""SimReg (Navaneet et al. 2021; UCDvision/simreg simreg.py): regression of the teacher's output, without negatives.

loss = mean(2 - 2 cos(g(s), t)), s the student's features, t the teacher's output, g a regression head that is discarded. Of 4 layers
(mlp_arch.py): width -> hidden (BatchNorm, ReLU) -> width -> hidden (BatchNorm, ReLU) -> the teacher's width; of 2: width -> hidden -> the
teacher's width, with nothing between the linear layers.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from bingo import seeds
from bingo.methods.contract import Batch, Context, Method, Needs, Progress
from bingo.methods.targets import Targets
from bingo.nets.heads import batchnorm_mlp, layered_head
from bingo.nets.precision import autocast
from bingo.params.methods import SimregParams


class SimReg(Method):
    """SimReg, as described at the top of this file."""

    def __init__(self, params: SimregParams, context: Context):
        super().__init__()
        self.context = context
        self.targets = Targets("simreg", context, params.target)
        self.needs = Needs(anchor_views=1, **self.targets.needs)
        self.student = context.student
        width, hidden, out = context.feature_width, params.head_hidden, self.targets.width
        seed_value = seeds.torch_seed(context.seed, "student head")
        if params.head_layers == 4:
            inner = batchnorm_mlp(width, hidden, width, seeds.torch_seed(context.seed, "inner head"))
            self.head = nn.Sequential(inner, batchnorm_mlp(width, hidden, out, seed_value))
        else:
            self.head = layered_head(["linear", "linear"], [width, hidden, out], seed_value)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        with autocast(self.context.precision, self.context.device):
            output_BX = self.head(self.student(batch.anchor_views[0]))
        cosine_B = F.cosine_similarity(output_BX.float(), self.targets(batch), dim=1)
        return {"loss": (2 - 2 * cosine_B).mean()}


build = SimReg
