"""CoSS (Singh and Wang 2024): match the student's outputs to the teacher's, image by image and feature by feature over the images.

s = head(student(x)), t the teacher's output for the same view, both (N, X) over a BatchNorm group, whose N images are anchors and
`companions` of their nearest neighbours. loss = -(mean_i cos(s_i, t_i) + mean_j cos(s_:j, t_:j)) / (teacher_temperature x
student_temperature), where s_:j is the j-th output for all images; the loss is the mean over the groups. The released losses.py divides
each of the two unit vectors by its temperature before it multiplies them, on each GPU separately. Published: 64 anchors on 4 GPUs, 15 of
their 31 neighbours each.
"""

import torch.nn.functional as F
from torch import Tensor

from bingo import seeds
from bingo.methods.contract import Batch, Context, Method, Needs, Progress
from bingo.methods.targets import Targets
from bingo.nets.batchnorm.groups import rows_by_group
from bingo.nets.heads import mlp_head
from bingo.nets.precision import autocast
from bingo.params.methods import CossParams


class Coss(Method):
    """CoSS, as described at the top of this file."""

    def __init__(self, params: CossParams, context: Context):
        super().__init__()
        self.params, self.context = params, context
        self.targets = Targets("coss", context, params.target)
        self.needs = Needs(anchor_views=1, companions=params.companions, **self.targets.needs)
        self.student = context.student
        widths = [context.feature_width, params.head_hidden, self.targets.width]
        self.head = mlp_head(widths, seeds.torch_seed(context.seed, "student head"))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        with autocast(self.context.precision, self.context.device):
            output_BX = self.head(self.student(batch.anchor_views[0])).float()
        target_BX = self.targets(batch)
        sample = -F.cosine_similarity(output_BX, target_BX, dim=1).mean()
        output_GNX, target_GNX = (rows_by_group(x_BX, len(x_BX) // (1 + self.params.companions)) for x_BX in (output_BX, target_BX))
        dimension = -F.cosine_similarity(output_GNX, target_GNX, dim=1).mean()
        loss = (sample + dimension) / (self.params.teacher_temperature * self.params.student_temperature)
        return {"loss": loss, "sample": sample, "dimension": dimension}


build = Coss
