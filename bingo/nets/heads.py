"""Projection heads and the unit sphere that they map to. Shape letters: B rows of a batch, P key width."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPSILON = 1e-12  # the released code's: torch.nn.functional.normalize


def mlp_head(widths: Sequence[int], seed_value: int) -> nn.Sequential:
    """Linear layers from `widths[0]` to `widths[-1]` with ReLU between them and no normalisation, seeded initial weights.

    Three widths give the head of MoCo-v2 (Chen et al. 2020) and of BINGO (moco/builder.py, hidden width 2048), under the keys
    0.weight, 0.bias, 2.weight, 2.bias; two widths give MoCo-v1's single layer. torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_value)
        linears = [nn.Linear(before, after) for before, after in pairwise(widths)]
    return nn.Sequential(*[part for linear in linears for part in (linear, nn.ReLU(inplace=True))][:-1])


def head_widths(head: nn.Sequential) -> list[int]:
    """The widths that `mlp_head` was built from."""
    linears = [layer for layer in head if isinstance(layer, nn.Linear)]
    return [linears[0].in_features, *(linear.out_features for linear in linears)]


def unit(rows_BP: Tensor) -> Tensor:
    """Rows divided by their L2 norm, float32 (B, P), computed in float32 whatever came in; a zero row stays zero."""
    return F.normalize(rows_BP.float(), dim=1, eps=_EPSILON)
