"""The methods' losses: InfoNCE over many negatives, and soft labels over a common bank.

The sum over the negatives is taken block by block of the bank, so logits of shape (B, J) are never in memory (`negative_logsumexp`):
a block gives exp(logit - largest so far) as weights, and three running results are scaled down whenever the largest grows:
the largest logit, the sum of the weights, and the sum of the bank's rows by these weights. The third divided by the second is the mean row
under the
softmax, which is the gradient times the temperature, so backward also needs only (B, P) (the online softmax of Milakov and
Gimelshein 2018, arXiv:1805.02867).

Shape letters: B queries, P key width, J negatives, j negatives of a block.
"""

from typing import Any

import torch
from torch import Tensor

LOGITS_AT_ONCE = 2**24  # 64 MiB in float32: all of a usual batch on a GPU
BANK_AT_ONCE = 2**20  # numbers of the bank, or logits: 4 MiB in float32, which stay in a CPU's cache until the gradient


def negative_logsumexp(query_BP: Tensor, bank_JP: Tensor, temperature: float, hidden_BJ: Tensor | None = None) -> Tensor:
    """log sum_j exp(q . n_j / temperature) for each query, (B,) float32, over the rows of the bank that are not hidden
    (`hidden_BJ` bool, or (1, J) for all).

    Computed once for each query, however many positives it has. The bank, float16 or float32, gets no gradient.
    """
    return _NegativeLogSumExp.apply(query_BP.float(), bank_JP.detach(), temperature, hidden_BJ)


class _NegativeLogSumExp(torch.autograd.Function):
    """One pass over blocks of j rows of the bank, each read once."""

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
    """The largest of each column, in two steps: torch reduces a few long columns one number at a time."""
    folds = 64 if len(logits_jB) % 64 == 0 else 1
    return logits_jB.unflatten(0, (folds, -1)).amax(dim=0).amax(dim=0)


def _rows_at_once(query_BP: Tensor) -> int:
    """Rows of a block: on a CPU, few enough that they and their logits stay in the cache; on a GPU, as many as memory allows."""
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
    expected_B = (p_BJ * logits_BJ).sum(dim=1)  # of all logits: a hidden one has p = 0
    if hidden_BJ is not None:
        logits_BJ = logits_BJ.masked_fill(hidden_BJ, float("-inf"))
    return torch.logsumexp(logits_BJ, dim=1) - expected_B


def kl_divergence(logits_BJ: Tensor, target_logits_BJ: Tensor, hidden_BJ: Tensor | None = None) -> Tensor:
    """KL(softmax(target_logits) || softmax(logits)) for each row (B,), over what is not hidden."""
    entropy_B = soft_cross_entropy(target_logits_BJ, target_logits_BJ, hidden_BJ)
    return soft_cross_entropy(logits_BJ, target_logits_BJ, hidden_BJ) - entropy_B
