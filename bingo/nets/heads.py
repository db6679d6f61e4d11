"""Projection heads, their description in files, and normalisation of their outputs. Shape letters: B rows of a batch, P key width."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPSILON = 1e-12  # as in the released code: torch.nn.functional.normalize
# Kinds of layers, each built from its input and output width.
_LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": lambda before, after: nn.Linear(before, after),
    "linear_no_bias": lambda before, after: nn.Linear(before, after, bias=False),
    "batchnorm": lambda width, _: nn.BatchNorm1d(width),
    "batchnorm_no_affine": lambda width, _: nn.BatchNorm1d(width, affine=False),
    "relu": lambda _, __: nn.ReLU(inplace=True),
    "gelu": lambda _, __: nn.GELU(),
    "unit": lambda _, __: Unit(),
}


def mlp_head(widths: Sequence[int], seed_value: int) -> nn.Sequential:
    """Linear layers from `widths[0]` to `widths[-1]` with ReLU between them and no normalisation, seeded initial weights.

    Three widths give the head of MoCo-v2 (Chen et al. 2020) and of BINGO (moco/builder.py, hidden width 2048), under the keys
    0.weight, 0.bias, 2.weight, 2.bias; two widths give MoCo-v1's single layer.
    """
    return layered_head(_mlp_layers(len(widths)), widths, seed_value)


def layered_head(layers: Sequence[str], widths: Sequence[int], seed_value: int = 0) -> nn.Sequential:
    """A Sequential of layers of these kinds (keys of `_LAYERS`); `widths`: the input width of the first linear layer and the output widths
    of all. The weights are torch's default, seeded; torch's global generator does not change.
    """
    width, behind = widths[0], iter(widths[1:])
    parts = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_value)
        for kind in layers:
            after = next(behind) if kind.startswith("linear") else width
            parts.append(_LAYERS[kind](width, after))
            width = after
    return nn.Sequential(*parts)


def describe_head(head: nn.Sequential) -> list[int] | dict[str, Any]:
    """The description of a head for `described_head`, stored in a file's metadata; only the widths if it is an `mlp_head`."""
    layers, widths = [_kind(layer) for layer in head], head_widths(head)
    return widths if layers == _mlp_layers(len(widths)) else {"layers": layers, "widths": widths}


def described_head(description: list[int] | dict[str, Any]) -> nn.Sequential:
    """A head with this description, into which weights will be loaded."""
    if isinstance(description, list):
        return mlp_head(description, seed_value=0)
    return layered_head(description["layers"], description["widths"])


def head_widths(head: nn.Sequential) -> list[int]:
    """The input and output widths of a head's linear layers."""
    linears = [layer for layer in head if isinstance(layer, nn.Linear)]
    return [linears[0].in_features, *(linear.out_features for linear in linears)]


def unit(rows_BP: Tensor) -> Tensor:
    """Rows divided by their L2 norm, float32 (B, P), computed in float32 for any input dtype; a zero row stays zero."""
    return _Normalised.apply(rows_BP.float())


class _Normalised(torch.autograd.Function):
    """`torch.nn.functional.normalize` with a backward pass of 4 kernels instead of 15."""

    @staticmethod
    def forward(ctx: Any, rows_BP: Tensor) -> Tensor:
        norm_B1 = torch.linalg.vector_norm(rows_BP, dim=1, keepdim=True).clamp_min(_EPSILON)
        unit_BP = rows_BP / norm_B1
        ctx.save_for_backward(unit_BP, norm_B1)
        return unit_BP

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        unit_BP, norm_B1 = ctx.saved_tensors
        along_B1 = (grad_outputs[0] * unit_BP).sum(dim=1, keepdim=True)
        return torch.addcmul(grad_outputs[0], unit_BP, along_B1, value=-1).div_(norm_B1)


class Unit(nn.Module):
    """`unit` as a layer of a head, using only operations that every exporter supports."""

    def forward(self, rows_BP: Tensor) -> Tensor:
        return F.normalize(rows_BP.float(), dim=1, eps=_EPSILON)


def _mlp_layers(widths: int) -> list[str]:
    return ["linear", "relu"] * (widths - 2) + ["linear"]


def _kind(layer: nn.Module) -> str:
    """The key in _LAYERS for a layer."""
    if isinstance(layer, nn.Linear):
        return "linear" if layer.bias is not None else "linear_no_bias"
    if isinstance(layer, nn.BatchNorm1d):
        return "batchnorm" if layer.affine else "batchnorm_no_affine"
    return {nn.ReLU: "relu", nn.GELU: "gelu", Unit: "unit"}[type(layer)]


def batchnorm_mlp(width: int, hidden: int, out: int, seed_value: int) -> nn.Sequential:
    """Linear (no bias), BatchNorm, ReLU, Linear, with seeded initial weights."""
    return layered_head(("linear_no_bias", "batchnorm", "relu", "linear"), [width, hidden, out], seed_value)
