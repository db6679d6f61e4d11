"""CompRess (Abbasi Koohpayegani et al. 2020; UMBCvision/CompRess): the student learns the teacher's similarities to other images.

t, s: unit outputs of teacher and student. With two queues (train_student.py) Q_t holds the teacher's outputs and Q_s those of a
moving average of the student, for the same images at the same positions; with one (train_student_one_queue.py, CompReSSA) a linear layer
maps the student to the teacher's width and Q_s is Q_t. loss = KL(softmax(t . Q_t / temperature) || softmax(s . Q_s / temperature)).
The image itself is not in the queues when its similarities are taken.
"""

import torch
from torch import Tensor, nn

from bingo import seeds
from bingo.methods.contract import Batch, Context, Method, Needs, Progress
from bingo.methods.parts.losses import kl_divergence
from bingo.methods.parts.momentum import MomentumCopy, Queue, shuffled
from bingo.methods.targets import Targets
from bingo.nets.heads import mlp_head, unit
from bingo.nets.precision import autocast
from bingo.params.methods import CompressParams


class Compress(Method):
    """CompRess, as described at the top of this file. With two queues, backbones are compared, so there is no head."""

    def __init__(self, params: CompressParams, context: Context):
        super().__init__()
        self.params, self.context = params, context
        self.targets = Targets("compress", context, params.target)
        self.needs = Needs(anchor_views=1, **self.targets.needs)
        self.student = context.student
        self.teacher_queue = Queue(params.queue_rows, self.targets.width, context.seed)
        if params.queues == 2:
            self.head: nn.Module = nn.Sequential()
            self.key_encoder = MomentumCopy(self.student, params.key_momentum)
            self.student_queue = Queue(params.queue_rows, context.feature_width, context.seed)
        else:
            self.head = mlp_head([context.feature_width, self.targets.width], seeds.torch_seed(context.seed, "student head"))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        images = batch.anchor_views[0]
        target_BX = unit(self.targets(batch))
        self.pushed = [(self.teacher_queue, target_BX, batch.anchor_rows_B)]
        with autocast(self.context.precision, self.context.device):
            output_BY = unit(self.head(self.student(images)))
            if self.params.queues == 2:
                with torch.no_grad():
                    own_BY = unit(shuffled(self.key_encoder, images, self.context.seed, progress.step))
                self.pushed.append((self.student_queue, own_BY, batch.anchor_rows_B))
        own_queue = self.student_queue if self.params.queues == 2 else self.teacher_queue
        student_BQ = output_BY @ own_queue.keys_QP.T / self.params.temperature
        teacher_BQ = target_BX @ self.teacher_queue.keys_QP.T / self.params.temperature
        return {"loss": kl_divergence(student_BQ, teacher_BQ, self.teacher_queue.empty()).mean()}


build = Compress
