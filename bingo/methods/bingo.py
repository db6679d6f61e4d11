"""BINGO (ICLR 2022): contrast the student's anchor and bag member with the teacher's keys, as in the paper or as released.

Terms of one anchor a with its drawn bag member p; s are the student's queries, k the keys, l is InfoNCE against common negatives:
  paper          w0 l(s_a, k_a) + w1 l(s_p, k_a)
  symmetric      (w0 l(s_a, k_a) + w1 l(s_a, k_p) + w0 l(s_p, k_p) + w1 l(s_p, k_a)) / 2
  symmetric_mix  the same four terms and m l(s_m, k_a) + (1 - m) l(s_m, k_p), divided by 3, where s_m is the query of the CutMix image
                 and m the share of a in it (main_moco.py:371-387). One box is drawn for each BatchNorm group (released: for each GPU)
  expected       w0 l(s_a, k_a) + w1 l(s_a, m_a), m_a the mean key of the bag: nearly the mean of l(s_a, k_p) over the bag, since the
                 positive's logit is linear in the key; no member is drawn. With `anchor_views: 2`, the mean over two views of the anchor,
                 each with its own key
with (w0, w1) = (1, 0) before `inter_warmup_epochs`, `pair_weights` after. Keys are the stored ones, a live teacher's, or those of a
moving average of the student (ablation rows without the teacher's parameters).
"""

from functools import partial

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor, nn

from bingo import seeds
from bingo.images.uploads import upload
from bingo.methods.contract import Batch, Context, Method, Needs, Progress
from bingo.methods.negatives import Negatives
from bingo.methods.parts.losses import WeightedKeys, info_nce
from bingo.methods.parts.momentum import MomentumCopy, shuffled
from bingo.methods.targets import check_stored_views
from bingo.methods.view_gradients import sum_of_terms
from bingo.nets.batchnorm.groups import group_numbers
from bingo.nets.heads import mlp_head, unit
from bingo.nets.precision import autocast, dtype_of_similarities
from bingo.params.methods import BingoParams
from bingo.runtime.errors import UserError


class Bingo(Method):
    """BINGO, as described at the top of this file. Negatives are rows of the stored bank or of a queue (bingo/methods/negatives.py)."""

    gradients_come_together = True

    def __init__(self, params: BingoParams, context: Context):
        super().__init__()
        _check(params, context)
        self.params, self.context = params, context
        self.related = params.relation == "bags"
        self.both = self.related and params.terms in ("symmetric", "symmetric_mix")  # whether the members' own keys are used
        self.student = context.student
        key_width = params.key_width if context.keys == "momentum" else context.keys_TVP.shape[2]  # type: ignore[union-attr]
        self.head = mlp_head([context.feature_width, params.head_hidden, key_width], seeds.torch_seed(context.seed, "student head"))
        if context.keys == "momentum":
            self.key_encoder = MomentumCopy(nn.Sequential(self.student, self.head), params.key_momentum)
        self.negatives = Negatives(params.negatives, params.negative_rows, key_width, params.mask_bag, context)
        self.similarities = dtype_of_similarities(context.precision, context.device)
        self.needs = self._needs()
        if context.teacher is not None:
            context.teacher.batch_statistics(params.teacher_batchnorm == "batch")

    def _needs(self) -> Needs:
        stored, same = self.context.keys == "stored", self.params.view_coupling == "same"
        expected = self.related and self.params.terms == "expected"
        views = self.params.anchor_views if stored else 1 if same else 2
        member_views = 0 if expected else 2 if not stored and self.params.terms != "paper" else 1
        live = self.context.keys == "live"
        return Needs(
            anchor_views=views,
            member_views=member_views if self.related else 0,
            stored_keys=stored,
            bag_means=expected,
            same_views=views if stored and same else 0,
            live_anchor_views=(views - 1,) if live else (),
            live_member_views=(member_views - 1,) if live and self.both else (),
        )

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        anchor_keys_BP, member_keys_BP = self._keys(batch, progress)
        self.pushed = [(self.negatives, anchor_keys_BP, batch.anchor_rows_B)]
        if member_keys_BP is not None and batch.member_rows_B is not None and self.params.queue_push == "anchor_and_member":
            self.pushed.append((self.negatives, member_keys_BP, batch.member_rows_B))
        bank_JP, hidden_BJ = self.negatives(batch, progress.step)
        if bank_JP.device.type != "cpu":  # once for all terms; a CPU converts a block while it is in the cache
            bank_JP = bank_JP.to(self.similarities)

        def loss_of(images_BCHW: Tensor, weighted_keys: WeightedKeys) -> Tensor:
            query_BP = self._query(images_BCHW)
            return info_nce(query_BP, weighted_keys, bank_JP, self.params.temperature, hidden_BJ, self.similarities)

        if not self.related:
            return {"loss": loss_of(batch.anchor_views[0], [(1.0, anchor_keys_BP)])}
        terms = self._terms(batch, progress, anchor_keys_BP, member_keys_BP)
        total, values = sum_of_terms({name: partial(loss_of, *term) for name, term in terms.items()}, self)
        return {"loss": total if self.params.terms == "paper" else total / len(terms), **values}

    def _terms(
        self, batch: Batch, progress: Progress, anchor_keys_BP: Tensor, member_keys_BP: Tensor | None
    ) -> dict[str, tuple[Tensor, WeightedKeys]]:
        """For each term the images (B, 3, H, W) that the student sees, and their keys (B, P) with the weights."""
        intra, inter = (1.0, 0.0) if progress.epoch < self.params.inter_warmup_epochs else self.params.pair_weights
        anchor = batch.anchor_views[0]
        if batch.bag_means_BP is not None:
            keys = batch.anchor_keys if len(batch.anchor_keys) > 1 else [anchor_keys_BP] * 2
            seen = list(zip(("anchor", "again"), batch.anchor_views, keys, strict=False))[: self.params.anchor_views]
            return {name: (view, [(intra, key_BP), (inter, batch.bag_means_BP)]) for name, view, key_BP in seen}
        member = batch.member_views[0]
        if member_keys_BP is None:  # the paper's terms
            return {"intra": (anchor, [(intra, anchor_keys_BP)]), "inter": (member, [(inter, anchor_keys_BP)])}
        terms: dict[str, tuple[Tensor, WeightedKeys]] = {
            "anchor": (anchor, [(intra, anchor_keys_BP), (inter, member_keys_BP)]),
            "member": (member, [(intra, member_keys_BP), (inter, anchor_keys_BP)]),
        }
        if self.params.terms == "symmetric_mix":
            uniform_G3 = seeds.uniforms(self.context.seed, "cutmix", progress.step, group_numbers(), draws=3)
            uniform_B3 = uniform_G3.repeat(len(anchor) // len(uniform_G3), axis=0)
            mixed, share_B = cutmix(anchor, member, uniform_B3, self.params.cutmix_alpha)
            terms["mix"] = mixed, [(share_B, anchor_keys_BP), (1 - share_B, member_keys_BP)]
        return terms

    def _query(self, images_BCHW: Tensor) -> Tensor:
        """Unit rows (B, P) of one kind of view, in a separate forward pass with its own BatchNorm statistics, as in the released code."""
        with autocast(self.context.precision, self.context.device):
            return unit(self.head(self.student(images_BCHW)))

    @torch.no_grad()
    def _keys(self, batch: Batch, progress: Progress) -> tuple[Tensor, Tensor | None]:
        """Keys of anchors and, if the terms use them, of members, unit rows (B, P)."""
        if self.context.keys == "stored":
            return batch.anchor_keys[0], batch.member_keys_BP if self.both else None
        live, last, last_member = self.context.keys == "live", len(batch.anchor_views) - 1, len(batch.member_views) - 1
        seen = [batch.anchor_for_teacher(last) if live else batch.anchor_views[last]]
        if self.both:
            seen.append(batch.member_for_teacher(last_member) if live else batch.member_views[last_member])
        if self.context.keys == "live" and self.params.teacher_batchnorm == "eval":  # a key depends only on its image: one pass for all
            keys = self._encode(torch.cat(seen), 0).split(len(seen[0]))
        else:
            keys = tuple(self._encode(images_BCHW, 2 * progress.step + draw) for draw, images_BCHW in enumerate(seen))
        return keys[0], keys[1] if self.both else None

    def _encode(self, images_BCHW: Tensor, draw: int) -> Tensor:
        """Keys of images by the live teacher or the moving average; `draw` is the number of the shuffle among processes."""
        with autocast(self.context.precision, self.context.device):
            if self.context.keys == "momentum":
                return unit(shuffled(self.key_encoder, images_BCHW, self.context.seed, draw))
            assert self.context.teacher is not None
            if self.params.teacher_batchnorm == "batch":
                return unit(shuffled(self.context.teacher.keys, images_BCHW, self.context.seed, draw))
            return self.context.teacher.keys(images_BCHW)


def _check(params: BingoParams, context: Context) -> None:
    """Raise UserError for settings that contradict each other."""
    expected = params.terms == "expected" and params.relation == "bags"
    if expected and context.keys == "momentum":
        way_out = "set distill.keys to stored, or methods.bingo.terms to symmetric"
        raise UserError(f"methods.bingo.terms = expected: with distill.keys = momentum no key is stored; {way_out}")
    if expected or context.keys == "stored":
        check_stored_views("bingo", context, params.anchor_views if params.view_coupling == "same" else 1)
    if context.keys == "momentum" and params.negatives == "bank":
        raise UserError(
            "methods.bingo.negatives = bank: with distill.keys = momentum no key is stored; set methods.bingo.negatives = queue"
        )
    if params.anchor_views > 1 and not (expected and context.keys == "stored"):
        raise UserError(
            "methods.bingo.anchor_views = 2: needs methods.bingo.terms = expected, bags and stored keys; set methods.bingo.anchor_views: 1"
        )
    if params.view_coupling == "same" and context.keys == "momentum":
        raise UserError("methods.bingo.view_coupling = same: needs a teacher's key of the same view; set distill.keys to stored or live")
    if context.bags is not None and params.mask_bag and params.relation == "bags":
        largest = int(context.bags.bag_sizes_T.max()) + 1
        if largest >= len(context.bags.members_TK):
            raise UserError(
                f"methods.bingo.mask_bag = true: a bag holds all {largest} train images, so no negative is left; lower bagging.k, "
                "raise bagging.clusters, or set methods.bingo.mask_bag: false"
            )


def cutmix(anchor_BCHW: Tensor, member_BCHW: Tensor, uniform_B3: np.ndarray, alpha: float) -> tuple[Tensor, Tensor]:
    """Paste a box of the member's view into the anchor's view: mixed images, and the anchor's share of the area (B,) float32.

    BINGO utils.py:20-47: share ~ Beta(alpha, alpha), box side sqrt(1 - share) of the image, centre uniform, clipped to the image.
    `uniform_B3` gives share, centre row and centre column.
    """
    height, width = anchor_BCHW.shape[-2:]
    side_B = np.sqrt(1 - betaincinv(alpha, alpha, uniform_B3[:, 0]))
    tops, bottoms = _box_edges(uniform_B3[:, 1], side_B, height)
    lefts, rights = _box_edges(uniform_B3[:, 2], side_B, width)
    share_B = 1 - (bottoms - tops) * (rights - lefts) / (height * width)
    edges_5B = upload(np.stack([tops, bottoms, lefts, rights, share_B]).astype(np.float32), anchor_BCHW.device)
    y_H = torch.arange(height, device=anchor_BCHW.device)
    x_W = torch.arange(width, device=anchor_BCHW.device)
    inside_BH = (y_H >= edges_5B[0][:, None]) & (y_H < edges_5B[1][:, None])
    inside_BW = (x_W >= edges_5B[2][:, None]) & (x_W < edges_5B[3][:, None])
    inside_B1HW = (inside_BH[:, :, None] & inside_BW[:, None, :])[:, None]
    return torch.where(inside_B1HW, member_BCHW, anchor_BCHW), edges_5B[4]


def _box_edges(centre_B: np.ndarray, side_B: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    half_B = (side_B * length).astype(np.int64) // 2
    centre_B = (centre_B * length).astype(np.int64)
    return np.clip(centre_B - half_B, 0, length), np.clip(centre_B + half_B, 0, length)


build = Bingo
