"""BINGO (ICLR 2022): the student's anchor and bag member against the teacher's keys, as in the paper or as released.

Terms of one anchor a with its drawn bag member p; s are the student's queries, k the keys, l is InfoNCE against common negatives:
  paper          w0 l(s_a, k_a) + w1 l(s_p, k_a)
  symmetric      (w0 l(s_a, k_a) + w1 l(s_a, k_p) + w0 l(s_p, k_p) + w1 l(s_p, k_a)) / 2
  symmetric_mix  the same four and m l(s_m, k_a) + (1 - m) l(s_m, k_p), s_m of the CutMix image, m the share of a
                 in it; over 3 (main_moco.py:371-387)
with (w0, w1) = (1, 0) before `inter_warmup_epochs`, `pair_weights` after. Keys are the stored ones, a live teacher's, or those of a
moving average of the student (ablation rows without the teacher's parameters).
"""

import numpy as np
import torch
from torch import Tensor, nn

from bingo import seeds
from bingo.errors import UserError
from bingo.methods.bingo_params import Params
from bingo.methods.contract import Batch, Context, Method, Needs, Progress
from bingo.methods.parts import MomentumCopy, Queue, cutmix, hidden_negatives, info_nce, negative_logsumexp, shuffled
from bingo.nets.heads import mlp_head, unit
from bingo.nets.precision import autocast


class Bingo(Method):
    """See the head of this file. Negatives: rows of the stored bank or a queue; the anchor and its member are never among the bank's,
    and with `mask_bag` neither is the anchor's bag."""

    def __init__(self, params: Params, context: Context):
        super().__init__()
        self.params, self.context = params, context
        self.related = params.relation == "bags"
        self.student = context.student
        key_width = params.key_width if context.keys == "momentum" else context.keys_TVP.shape[2]  # type: ignore[union-attr]
        self.head = mlp_head([context.feature_width, params.head_hidden, key_width], seeds.torch_seed(context.seed, "student head"))
        if context.keys == "momentum":
            self.key_encoder = MomentumCopy(nn.Sequential(self.student, self.head), params.key_momentum)
        if params.negatives == "queue":
            self.queue = Queue(params.negative_rows, key_width, context.seed)
            self._prefill()
        self.needs = self._needs()
        self.pushed: list[tuple[Tensor, Tensor]] = []

    def _needs(self) -> Needs:
        stored, same = self.context.keys == "stored", self.params.view_coupling == "same"
        views = 1 if stored or same else 2
        member_views = 2 if not stored and self.params.terms != "paper" else 1
        return Needs(
            anchor_views=views,
            member_views=member_views if self.related else 0,
            stored_keys=stored,
            same_view=stored and same,
        )

    def _prefill(self) -> None:
        """Start the queue from stored keys where they exist: the first steps then train against real negatives."""
        if self.context.keys == "momentum" or self.context.keys_TVP is None:
            return
        count = min(len(self.queue.rows_Q), len(self.context.keys_TVP))
        order = seeds.permutation(self.context.seed, "prefill", 0, len(self.context.keys_TVP))[:count]
        rows = torch.from_numpy(order)
        self.queue.keys_QP[:count] = self.context.keys_TVP[rows.to(self.context.keys_TVP.device), 0].float().to(self.queue.keys_QP)
        self.queue.rows_Q[:count] = rows

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        anchor_keys_BP, member_keys_BP = self._keys(batch, progress)
        self.pushed = [(anchor_keys_BP, batch.anchor_rows_B)]
        if member_keys_BP is not None and batch.member_rows_B is not None and self.params.queue_push == "anchor_and_member":
            self.pushed.append((member_keys_BP, batch.member_rows_B))
        bank_JP, hidden_BJ = self._negatives(batch, progress)
        intra, inter = (1.0, 0.0) if progress.epoch < self.params.inter_warmup_epochs else self.params.pair_weights

        def loss_of(query_BP: Tensor, weighted_keys: list[tuple[float | Tensor, Tensor]]) -> Tensor:
            negatives_B = negative_logsumexp(query_BP, bank_JP, self.params.temperature, hidden_BJ)
            terms = [weight * info_nce(query_BP, key_BP, negatives_B, self.params.temperature) for weight, key_BP in weighted_keys]
            return torch.stack([term.mean() for term in terms]).sum()

        anchor_BP = self._query(batch.anchor_views[0])
        if not self.related:
            return {"loss": loss_of(anchor_BP, [(1.0, anchor_keys_BP)])}
        member_BP = self._query(batch.member_views[0])
        if member_keys_BP is None:  # the paper's terms
            terms = {
                "intra": loss_of(anchor_BP, [(intra, anchor_keys_BP)]),
                "inter": loss_of(member_BP, [(inter, anchor_keys_BP)]),
            }
            return {"loss": terms["intra"] + terms["inter"], **terms}
        terms = {
            "anchor": loss_of(anchor_BP, [(intra, anchor_keys_BP), (inter, member_keys_BP)]),
            "member": loss_of(member_BP, [(intra, member_keys_BP), (inter, anchor_keys_BP)]),
        }
        if self.params.terms == "symmetric_mix":
            mixed, share_B = self._mix(batch, progress)
            terms["mix"] = loss_of(self._query(mixed), [(share_B, anchor_keys_BP), (1 - share_B, member_keys_BP)])
        return {"loss": torch.stack(list(terms.values())).mean(), **terms}

    def _query(self, images_BCHW: Tensor) -> Tensor:
        with autocast(self.context.precision, self.context.device):
            return unit(self.head(self.student(images_BCHW)))

    @torch.no_grad()
    def _keys(self, batch: Batch, progress: Progress) -> tuple[Tensor, Tensor | None]:
        """Keys of anchors and, where the terms use them, of members, unit rows (B, P)."""
        both = self.related and self.params.terms != "paper"
        if self.context.keys == "stored":
            assert batch.anchor_keys_BP is not None
            return batch.anchor_keys_BP, batch.member_keys_BP if both else None
        anchor_BP = self._encode(batch.anchor_views[-1], 2 * progress.step)
        return anchor_BP, self._encode(batch.member_views[-1], 2 * progress.step + 1) if both else None

    def _encode(self, images_BCHW: Tensor, draw: int) -> Tensor:
        """Keys of images by the live teacher or the moving average; `draw` numbers the shuffle of the processes."""
        with autocast(self.context.precision, self.context.device):
            if self.context.keys == "momentum":
                return unit(shuffled(self.key_encoder, images_BCHW, self.context.seed, draw))
            assert self.context.teacher is not None
            if self.params.teacher_batchnorm == "batch":
                return unit(shuffled(self.context.teacher.keys, images_BCHW, self.context.seed, draw))
            return self.context.teacher.keys(images_BCHW)

    def _negatives(self, batch: Batch, progress: Progress) -> tuple[Tensor, Tensor | None]:
        """Common negatives (J, P) of all queries, and which of them each anchor does not see, (B, J)."""
        if self.params.negatives == "bank":
            bank_JP, rows_J = self._bank_draw(progress.step)
            return bank_JP, self._hidden(batch, rows_J) if self.params.mask_bag else hidden_negatives(rows_J, self._own_rows(batch))
        bank_JP, rows_J = self.queue.keys_QP.clone(), self.queue.rows_Q.clone()  # a push may come before backward is done with these
        return bank_JP, self.queue.empty() | self._hidden(batch, rows_J) if self.params.mask_bag else self.queue.empty()

    def _bank_draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Distinct rows of the bank with one stored view each, the same on every process: `negative_rows` of them, or all."""
        bank_TVP = self.context.keys_TVP
        assert bank_TVP is not None
        rows, views = len(bank_TVP), bank_TVP.shape[1]
        count = min(rows, self.params.negative_rows)
        chosen = np.arange(rows) if count == rows else seeds.permutation(self.context.seed, "negatives", step, rows)[:count]
        drawn = (seeds.uniforms(self.context.seed, "negative view", step, chosen)[:, 0] * views).astype(np.int64)
        rows_J, view_J = (torch.from_numpy(x).to(bank_TVP.device) for x in (chosen, drawn))
        return bank_TVP[rows_J, view_J], rows_J

    @staticmethod
    def _own_rows(batch: Batch) -> Tensor:
        own = [batch.anchor_rows_B] if batch.member_rows_B is None else [batch.anchor_rows_B, batch.member_rows_B]
        return torch.stack(own, dim=1)

    def _hidden(self, batch: Batch, rows_J: Tensor) -> Tensor:
        """(B, J): anchor, member and the anchor's bag. A bag of the kind `cluster` is compared by group, not member by member."""
        bags, own_BM = self.context.bags, self._own_rows(batch)
        if bags is None:
            return hidden_negatives(rows_J, own_BM)
        if bags.cluster_T is not None:
            cluster_T = torch.from_numpy(bags.cluster_T).to(rows_J.device)
            same_BJ = (cluster_T[rows_J.clamp(min=0)][None] == cluster_T[batch.anchor_rows_B][:, None]) & (rows_J >= 0)
            return same_BJ | hidden_negatives(rows_J, own_BM)
        members_BK = torch.from_numpy(bags.members_TK[batch.anchor_rows_B.cpu().numpy()].astype(np.int64)).to(rows_J.device)
        return hidden_negatives(rows_J, torch.cat([own_BM, members_BK], dim=1))

    def _mix(self, batch: Batch, progress: Progress) -> tuple[Tensor, Tensor]:
        rows = batch.anchor_rows_B.cpu().numpy()
        uniform_B3 = seeds.uniforms(self.context.seed, "cutmix", progress.epoch, rows, draws=3)
        return cutmix(batch.anchor_views[0], batch.member_views[0], uniform_B3, self.params.cutmix_alpha)

    def after_step(self) -> None:
        if self.params.negatives == "queue":
            for keys_BP, rows_B in self.pushed:
                self.queue.push(keys_BP, rows_B)
        if self.context.keys == "momentum":
            self.key_encoder.move(nn.Sequential(self.student, self.head))


def build(params: Params, context: Context) -> Method:
    """BINGO on the student of `context`. Raises UserError for switches that contradict each other."""
    if context.keys == "momentum" and params.negatives == "bank":
        raise UserError("bingo.negatives = bank: with distill.keys = momentum no key is stored; set bingo.negatives = queue")
    if params.view_coupling == "same" and context.keys == "momentum":
        raise UserError("bingo.view_coupling = same: needs a teacher's key of the same view; set distill.keys to stored or live")
    if context.bags is not None and params.mask_bag and params.relation == "bags":
        largest = int(context.bags.bag_sizes_T.max()) + 1
        if largest >= len(context.bags.members_TK):
            raise UserError(
                f"bingo.mask_bag = true: a bag holds all {largest} train images, so no negative is left; lower bagging.k, "
                "raise bagging.clusters, or set bingo.mask_bag: false"
            )
    if context.teacher is not None:
        context.teacher.batch_statistics(params.teacher_batchnorm == "batch")
    return Bingo(params, context)
