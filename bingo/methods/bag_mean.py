"""Bag-mean regression, a method of this project: SimReg's loss against the mean key of an image and its bag.

BINGO draws a member p of the bag in each step, for an inter term against its key k_p. The part of such a term that pulls is linear in the
key, so its mean over the bag is the same term against the mean of the members' keys, which is known before training: no draw, no view of a
member, no negatives. loss = 2 - 2 cos(g(s), t), t = unit((1 - w) k_a + w m_a), k_a the stored key of the view that the student sees, m_a
the mean key of the bag (bingo/training/bag_means.py), w `member_weight`, g SimReg's head of 4 layers. `dimension_weight` times the
same distance of each dimension over the images of a BatchNorm group, as in CoSS, is added.
"""

import torch.nn.functional as F
from torch import Tensor

from bingo.methods.contract import Batch, Context, Method, Needs, Progress
from bingo.methods.targets import Targets, check_stored_views, regression_head
from bingo.nets.batchnorm.groups import rows_by_group
from bingo.nets.heads import unit
from bingo.nets.precision import autocast
from bingo.params.methods import BagMeanParams


class BagMean(Method):
    """See the head of this file."""

    def __init__(self, params: BagMeanParams, context: Context):
        super().__init__()
        self.params, self.context = params, context
        self.targets = Targets("bag_mean", context, "keys")
        check_stored_views("bag_mean", context, 1)
        self.needs = Needs(anchor_views=1, bag_means=True, **self.targets.needs)
        self.student = context.student
        self.head = regression_head(context.feature_width, params.head_hidden, self.targets.width, context.seed)

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        with autocast(self.context.precision, self.context.device):
            output_BP = self.head(self.student(batch.anchor_views[0])).float()
        assert batch.bag_means_BP is not None, "a method that needs the bags' mean keys is given them"
        weight = self.params.member_weight
        target_BP = unit((1 - weight) * self.targets(batch) + weight * batch.bag_means_BP)
        sample = (2 - 2 * F.cosine_similarity(output_BP, target_BP, dim=1)).mean()
        if not self.params.dimension_weight:
            return {"loss": sample}
        output_GNP, target_GNP = (rows_by_group(x_BP, len(x_BP)) for x_BP in (output_BP, target_BP))
        dimension = (2 - 2 * F.cosine_similarity(output_GNP, target_GNP, dim=1)).mean()
        return {"loss": sample + self.params.dimension_weight * dimension, "sample": sample, "dimension": dimension}


build = BagMean
