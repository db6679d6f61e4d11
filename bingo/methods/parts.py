"""Parts that methods share: InfoNCE and soft labels over a common bank, queue, moving-average copy, heads, CutMix, ShuffleBN.

Shape letters: B anchors, P key width, J negatives, M rows that are no negatives of an anchor, Q queue rows.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor, nn

from bingo import seeds
from bingo.images.augment import upload
from bingo.nets import batchnorm
from bingo.runtime import distributed

LOGITS_AT_ONCE = 2**24  # 64 MiB in float32: all of a usual batch on a GPU
BANK_AT_ONCE = 2**20  # numbers of the bank, or logits: 4 MiB in float32, which stay in a CPU's cache up to the gradient


def negative_logsumexp(query_BP: Tensor, bank_JP: Tensor, temperature: float, hidden_BJ: Tensor | None = None) -> Tensor:
    """log sum_j exp(q . n_j / temperature) for each query, (B,) float32, over the rows of the bank that are not hidden
    (`hidden_BJ` bool, or (1, J) for all).

    Computed once per query, however many positives the query has: logits of shape (B, 1 + J) per positive are never made.
    The bank, float16 or float32, gets no gradient.
    """
    return _NegativeLogSumExp.apply(query_BP.float(), bank_JP.detach(), temperature, hidden_BJ)


class _NegativeLogSumExp(torch.autograd.Function):
    """By blocks of j rows of the bank, each read once: sums of exp(logit - largest so far), and of the bank's rows weighted alike. The
    second over the first is the gradient times the temperature, so nothing of shape (B, J) waits for backward."""

    @staticmethod
    def forward(ctx: Any, query_BP: Tensor, bank_JP: Tensor, temperature: float, hidden_BJ: Tensor | None) -> Tensor:
        query_PB, wanted = (query_BP / temperature).T, ctx.needs_input_grad[0]
        largest_B = query_BP.new_full((len(query_BP),), float("-inf"))
        shift_B, sum_B, weighted_BP = torch.zeros_like(largest_B), torch.zeros_like(largest_B), torch.zeros_like(query_BP)
        start = 0
        for rows_jP in bank_JP.split(_rows_at_once(query_BP)):
            rows_jP, end = rows_jP.float(), start + len(rows_jP)
            logits_jB = rows_jP @ query_PB
            if hidden_BJ is not None:
                logits_jB.masked_fill_(hidden_BJ[:, start:end].T, float("-inf"))
            new_B = torch.maximum(largest_B, _largest(logits_jB))
            shift_B = new_B.masked_fill(new_B.isneginf(), 0)  # a query without negatives: no gradient rather than NaN
            scale_B = (largest_B - shift_B).exp()
            p_jB = logits_jB.sub_(shift_B).exp_()
            sum_B = sum_B * scale_B + p_jB.sum(dim=0)
            if wanted:
                weighted_BP = torch.addmm(weighted_BP * scale_B[:, None], p_jB.T, rows_jP)
            largest_B, start = new_B, end
        tiny = torch.finfo(torch.float32).tiny
        ctx.save_for_backward(*([weighted_BP.div_((sum_B.clamp(min=tiny) * temperature)[:, None])] if wanted else []))
        return sum_B.log() + shift_B

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        saved = ctx.saved_tensors
        return (grad_outputs[0][:, None] * saved[0] if saved else None), None, None, None


def _largest(logits_jB: Tensor) -> Tensor:
    """The largest of each column, in two steps: torch goes through a few long columns one number at a time."""
    folds = 64 if len(logits_jB) % 64 == 0 else 1
    return logits_jB.unflatten(0, (folds, -1)).amax(dim=0).amax(dim=0)


def _rows_at_once(query_BP: Tensor) -> int:
    """Rows of a block: on a CPU neither they nor their logits leave the cache, on a GPU the fewest blocks that memory allows."""
    if query_BP.device.type == "cpu":
        return max(1, BANK_AT_ONCE // max(query_BP.shape))
    return max(1, LOGITS_AT_ONCE // len(query_BP))


def info_nce(query_BP: Tensor, key_BP: Tensor, negatives_B: Tensor, temperature: float) -> Tensor:
    """-log(exp(q.k/t) / (exp(q.k/t) + sum_j exp(q.n_j/t))) for each query, (B,) float32; `negatives_B` is `negative_logsumexp`."""
    positive_B = (query_BP.float() * key_BP.float()).sum(dim=1) / temperature
    return torch.logaddexp(positive_B, negatives_B) - positive_B


def soft_cross_entropy(logits_BJ: Tensor, target_logits_BJ: Tensor, hidden_BJ: Tensor | None = None) -> Tensor:
    """-sum_j p_j log softmax(logits)_j with p = softmax(target_logits), for each row (B,), over what is not hidden ((B, J) or (1, J))."""
    if hidden_BJ is not None:
        target_logits_BJ = target_logits_BJ.masked_fill(hidden_BJ, float("-inf"))
    p_BJ = target_logits_BJ.softmax(dim=1)
    expected_B = (p_BJ * logits_BJ).sum(dim=1)  # of the logits as they are: a hidden one has p = 0
    if hidden_BJ is not None:
        logits_BJ = logits_BJ.masked_fill(hidden_BJ, float("-inf"))
    return torch.logsumexp(logits_BJ, dim=1) - expected_B


def kl_divergence(logits_BJ: Tensor, target_logits_BJ: Tensor, hidden_BJ: Tensor | None = None) -> Tensor:
    """KL(softmax(target_logits) || softmax(logits)) for each row (B,), over what is not hidden."""
    entropy_B = soft_cross_entropy(target_logits_BJ, target_logits_BJ, hidden_BJ)
    return soft_cross_entropy(logits_BJ, target_logits_BJ, hidden_BJ) - entropy_B


def batchnorm_mlp(width: int, hidden: int, out: int, seed_value: int) -> nn.Sequential:
    """Linear (no bias), BatchNorm, ReLU, Linear, with seeded initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_value)
        return nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out)
        )  # fmt: skip


def hidden_negatives(bank_rows_J: Tensor, excluded_BM: Tensor) -> Tensor:
    """(B, J) bool: whether row j of the bank shows one of the M rows that are no negatives of anchor b (-1 excludes nothing)."""
    hidden_BJ = torch.zeros(len(excluded_BM), len(bank_rows_J), dtype=torch.bool, device=bank_rows_J.device)
    for rows_B in excluded_BM.unbind(dim=1):
        hidden_BJ |= (bank_rows_J[None, :] == rows_B[:, None]) & (rows_B >= 0)[:, None]
    return hidden_BJ


def hidden_places(bank_rows_J: Tensor, excluded_BM: Tensor, rows: int) -> Tensor:
    """`hidden_negatives` where no row is twice in the bank: each of the M rows is looked up among all `rows`, not compared with J."""
    nowhere, places_J = len(bank_rows_J), torch.arange(len(bank_rows_J), device=bank_rows_J.device)
    place_T = torch.full((rows + 1,), nowhere, device=bank_rows_J.device)  # its last entry is that of row -1
    place_T[bank_rows_J] = places_J
    hidden_BJ = torch.zeros(len(excluded_BM), nowhere + 1, dtype=torch.bool, device=bank_rows_J.device)
    return hidden_BJ.scatter_(1, place_T[excluded_BM], True)[:, :nowhere]


class Queue(nn.Module):
    """A ring of the last Q keys with the rows that they show. Its places start as seeded random unit vectors of no row (-1), as in MoCo.

    Unlike in MoCo these are negatives in the first step alone: against noise a network first learns to point away from it. In a long
    training that is forgotten; on the digits, in 5 epochs, it cost 3 points of kNN accuracy.
    """

    keys_QP: Tensor
    rows_Q: Tensor
    pointer: Tensor

    def __init__(self, rows: int, key_width: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seeds.torch_seed(seed, "queue"))
        keys_QP = torch.randn(rows, key_width, generator=generator)
        self.register_buffer("keys_QP", nn.functional.normalize(keys_QP, dim=1))
        self.register_buffer("rows_Q", torch.full((rows,), -1, dtype=torch.int64))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def empty(self) -> Tensor:
        """(1, Q) bool: places that hold no key yet; all false before the first push, when the random vectors are all there is."""
        empty_Q = self.rows_Q < 0
        return (empty_Q & ~empty_Q.all())[None]

    @torch.no_grad()
    def push(self, keys_BP: Tensor, rows_B: Tensor) -> None:
        """Write the keys of all processes over the oldest ones; the ring wraps wherever its end falls in a batch."""
        keys_BP, rows_B = distributed.gather(keys_BP.float()), distributed.gather(rows_B)
        keys_BP, rows_B = keys_BP[-len(self.rows_Q) :], rows_B[-len(self.rows_Q) :]
        slots_B = (self.pointer + torch.arange(len(rows_B), device=rows_B.device)) % len(self.rows_Q)
        self.keys_QP[slots_B] = keys_BP
        self.rows_Q[slots_B] = rows_B
        self.pointer.copy_((self.pointer + len(rows_B)) % len(self.rows_Q))


class MomentumCopy(nn.Module):
    """A moving average of a network's parameters (MoCo: buffers are not averaged; its BatchNorm uses batch statistics)."""

    def __init__(self, network: nn.Module, momentum: float):
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.network(images_BCHW)

    @torch.no_grad()
    def move(self, network: nn.Module) -> None:
        """own = momentum * own + (1 - momentum) * network's."""
        own: list[Tensor] = [parameter.detach() for parameter in self.network.parameters()]
        torch._foreach_lerp_(own, [parameter.detach() for parameter in network.parameters()], 1 - self.momentum)


def shuffled(encode: Callable[[Tensor], Tensor], images_BCHW: Tensor, seed: int, step: int) -> Tensor:
    """`encode` with the images dealt out again among all processes' groups of BatchNorm, so that a query and its key are normalised
    with different images (ShuffleBN of MoCo).

    Every process draws the same permutation. With one process and one group it is `encode` itself.
    """
    if distributed.world() == 1 and batchnorm.groups() == 1:
        return encode(images_BCHW)
    everything = distributed.gather(images_BCHW)
    order = upload(seeds.permutation(seed, "shuffle batchnorm", step, len(everything)), images_BCHW.device)
    keys = distributed.gather(encode(everything[distributed.own_share(order)].contiguous(memory_format=torch.channels_last)))
    return distributed.own_share(keys[torch.argsort(order)])


def cutmix(anchor_BCHW: Tensor, member_BCHW: Tensor, uniform_B3: np.ndarray, alpha: float) -> tuple[Tensor, Tensor]:
    """Paste a box of the member's view into the anchor's view: mixed images, and the anchor's share of the area (B,) float32.

    BINGO utils.py:20-47: share ~ Beta(alpha, alpha), box side sqrt(1 - share) of the image, centre uniform, clipped to the image.
    Here a box for each image (there one for a whole GPU). `uniform_B3` gives share, centre row and centre column.
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
