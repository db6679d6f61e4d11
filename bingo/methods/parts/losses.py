"""The methods' losses: InfoNCE over many negatives, and soft labels over a common bank.

The sum over the negatives is taken block by block of the bank, so logits of shape (B, J) are never in memory (`negative_logsumexp`):
a block gives exp(logit - largest so far) as weights, and three running results are scaled down whenever the largest grows:
the largest logit, the sum of the weights, and the sum of the bank's rows by these weights. The third divided by the second is the mean row
under the softmax, which is the gradient times the temperature, so backward also needs only (B, P) (the online softmax of Milakov and
Gimelshein 2018, arXiv:1805.02867).

Shape letters: B queries, P key width, J negatives, j negatives of a block.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bingo.images.uploads import channels

WeightedKeys = Sequence[tuple[float | Tensor, Tensor]]
_LEAST, _TINY = torch.finfo(torch.float32).min, torch.finfo(torch.float32).tiny
LOGITS_AT_ONCE = 2**24  # 64 MiB in float32: all of a usual batch on a GPU
BANK_AT_ONCE = 2**20  # numbers of the bank, or logits: 4 MiB in float32, which stay in a CPU's cache until the gradient


@torch.no_grad()
def negative_logsumexp(
    query_BP: Tensor, bank_JP: Tensor, temperature: float, hidden_BJ: Tensor | None = None, products: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """log sum_j exp(q . n_j / temperature) for each query, float32 (B,), over the rows of the bank that are not hidden (`hidden_BJ` bool,
    or (1, J) for all), and the mean row under that softmax, which is its gradient times the temperature, float32 (B, P).

    The bank is float16 or float32. With `products` in float16, logits of unit rows, and so the result, are off by at most
    2^-9 / temperature, and the numbers of the mean row by 2^-8 / temperature + 2^-8.
    """
    query_PB = torch.div(query_BP, temperature, out=query_BP.new_empty(query_BP.shape, dtype=products)).T
    start, sums, shift_B = 0, list[Tensor](), query_BP.new_empty(0)
    for rows_jP in bank_JP.split(_rows_at_once(query_BP)):
        rows_jP, end = rows_jP.to(products), start + len(rows_jP)
        logits_jB = (rows_jP @ query_PB).float()
        if hidden_BJ is not None:
            logits_jB.masked_fill_(hidden_BJ[:, start:end].T, float("-inf"))
        last_B, shift_B = shift_B, _largest(logits_jB).clamp_(min=_LEAST)  # a query without negatives: a mean row of zeros, not NaN
        if sums:
            shift_B = torch.maximum(last_B, shift_B)
        p_jB = logits_jB.sub_(shift_B).exp_()
        sum_B = p_jB.sum(dim=0)
        added = [sum_B, _weighted(p_jB, sum_B, rows_jP)]
        if sums:
            scale_B = (last_B - shift_B).exp()
            added = [so_far * scale + part for so_far, part, scale in zip(sums, added, (scale_B, scale_B[:, None]), strict=True)]
        sums, start = added, end
    return sums[0].log() + shift_B, sums[1].div_(sums[0].clamp(min=_TINY)[:, None])


def _weighted(p_jB: Tensor, sum_B: Tensor, rows_jP: Tensor) -> Tensor:
    """The weighted sum of a block's unit rows, float32 (B, P); in float16, the weights are scaled to a sum of 2^15."""
    if rows_jP.dtype == torch.float32:
        return p_jB.T @ rows_jP
    scale_B = sum_B.clamp(min=1) / 2**15
    shares_jB = torch.div(p_jB, scale_B, out=p_jB.new_empty(p_jB.shape, dtype=rows_jP.dtype))
    return (shares_jB.T @ rows_jP) * scale_B[:, None]


def _largest(logits_jB: Tensor) -> Tensor:
    """The largest value of each column; on a CPU in two steps, because torch reduces a few long columns one number at a time there."""
    if logits_jB.device.type != "cpu" or len(logits_jB) % 64:
        return logits_jB.amax(dim=0)
    return logits_jB.unflatten(0, (64, -1)).amax(dim=0).amax(dim=0)


def _rows_at_once(query_BP: Tensor) -> int:
    """Rows of a block: on a CPU, few enough that they and their logits stay in the cache; on a GPU, as many as memory allows."""
    if query_BP.device.type == "cpu":
        return max(1, BANK_AT_ONCE // max(query_BP.shape))
    return max(1, LOGITS_AT_ONCE // len(query_BP))


def info_nce(
    query_BP: Tensor,
    weighted_keys: WeightedKeys,
    bank_JP: Tensor,
    temperature: float,
    hidden_BJ: Tensor | None = None,
    products: torch.dtype = torch.float32,
) -> Tensor:
    """The mean over queries of w * -log(exp(q.k/t) / (exp(q.k/t) + sum_j exp(q.n_j/t))), summed over the keys k (B, P) with weights w,
    numbers or (B,): float32 (). For the negatives n_j see `negative_logsumexp`. Only the queries get a gradient, which is computed
    immediately and kept as (B, P). The sum over the negatives is computed once for all keys."""
    weights, keys = zip(*weighted_keys, strict=True)
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]  # what each key's terms count in the mean: (K, B) or (K, 1)
    numbers = () if tensors else tuple(weight / len(query_BP) for weight in weights)
    shares_KB = torch.stack(tensors) / len(query_BP) if tensors else channels(numbers, query_BP.device)[:, :, 0]
    return _InfoNce.apply(query_BP.float(), shares_KB, torch.stack(keys).float(), bank_JP, temperature, hidden_BJ, products)


class _InfoNce(torch.autograd.Function):
    """With d = log sum_j exp(q.n_j/t) - q.k/t, a term is softplus(d), and its derivative with respect to d is sigmoid(d)."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BP: Tensor,
        shares_KB: Tensor,
        keys_KBP: Tensor,
        bank_JP: Tensor,
        temperature: float,
        hidden_BJ: Tensor | None,
        products: torch.dtype,
    ) -> Tensor:
        negatives_B, mean_BP = negative_logsumexp(query_BP, bank_JP, temperature, hidden_BJ, products)
        away_KB = torch.sub(negatives_B, (query_BP * keys_KBP).sum(dim=2), alpha=1 / temperature)
        if ctx.needs_input_grad[0]:
            pull_KB = (away_KB.sigmoid() * shares_KB).div_(-temperature)
            to_keys_BP = (pull_KB[:, :, None] * keys_KBP).sum(dim=0)
            ctx.save_for_backward(to_keys_BP.addcmul_(pull_KB.sum(dim=0)[:, None], mean_BP, value=-1))
        return (F.softplus(away_KB) * shares_KB).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_BP,) = ctx.saved_tensors
        return grad_outputs[0] * gradient_BP, None, None, None, None, None, None


def soft_cross_entropy(logits_BJ: Tensor, target_logits_BJ: Tensor, hidden_BJ: Tensor | None = None) -> Tensor:
    """-sum_j p_j log softmax(logits)_j with p = softmax(target_logits), for each row (B,), over the j that are not hidden ((B, J) or (1,
    J))."""
    if hidden_BJ is not None:
        target_logits_BJ = target_logits_BJ.masked_fill(hidden_BJ, float("-inf"))
    p_BJ = target_logits_BJ.softmax(dim=1)
    expected_B = (p_BJ * logits_BJ).sum(dim=1)  # of all logits: a hidden one has p = 0
    if hidden_BJ is not None:
        logits_BJ = logits_BJ.masked_fill(hidden_BJ, float("-inf"))
    return torch.logsumexp(logits_BJ, dim=1) - expected_B


def kl_divergence(logits_BJ: Tensor, target_logits_BJ: Tensor, hidden_BJ: Tensor | None = None) -> Tensor:
    """KL(softmax(target_logits) || softmax(logits)) for each row (B,), over the columns that are not hidden."""
    entropy_B = soft_cross_entropy(target_logits_BJ, target_logits_BJ, hidden_BJ)
    return soft_cross_entropy(logits_BJ, target_logits_BJ, hidden_BJ) - entropy_B
