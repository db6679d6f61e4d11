"""bf16 if it is requested, or with `auto` if the hardware supports it; losses are computed in float32 outside of this context.

A GPU may use TF32 (10 bits of mantissa) for float32 products, unless the precision is `fp32`.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bingo.runtime.errors import UserError

HALF_SIMILARITIES = ("cuda",)  # not faster on a CPU
_CAST_LAYERS = (nn.Linear, nn.Conv2d)  # not their subclasses, which may compute with the weight before autocast casts the result


@cache
def hardware_has_bf16(device_type: str) -> bool:
    """Whether this device multiplies bf16 in hardware (CUDA: compute capability 8 or higher; CPU: AVX512-BF16 or AMX)."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    return bool(torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """`fp32`, `bf16` or `auto` as the dtype of the matrix products on this device.

    Raises UserError for bf16 on a GPU that lacks it; a CPU without it computes bf16 slowly but correctly.
    """
    if precision == "auto":
        return torch.bfloat16 if hardware_has_bf16(device.type) else torch.float32
    if precision == "bf16" and device.type == "cuda" and not hardware_has_bf16("cuda"):
        raise UserError("precision = bf16: this GPU does not support bf16; set precision to fp32 or auto")
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The autocast context for a network's forward pass on this device. On a GPU it also allows or forbids TF32, also after the context,
    since the backward pass comes later."""
    dtype = resolve_precision(precision, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def dtype_of_similarities(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of products of unit rows with many keys: float16 on a GPU with autocast enabled, otherwise float32."""
    half = device.type in HALF_SIMILARITIES and resolve_precision(precision, device) != torch.float32
    return torch.float16 if half else torch.float32


@contextmanager
def casts_kept(network: nn.Module, precision: str, device: torch.device) -> Iterator[None]:
    """Context manager in which bf16 copies of weights made by one `autocast` are reused by the next; everything outside of `autocast`
    stays in float32. The copies for linear and convolutional layers are made, and their gradients cast back, by one operation for all
    layers, so the gradients of these weights are complete only at the end of the backward pass."""
    dtype = resolve_precision(precision, device)
    layers = [layer for layer in network.modules() if type(layer) in _CAST_LAYERS and dtype != torch.float32]
    named = [(layer, name, weight) for layer in layers for name, weight in layer.named_parameters()]
    try:
        if named:
            for (layer, name, _), cast in zip(named, _Cast.apply(dtype, *(weight for *_, weight in named)), strict=True):
                layer.__dict__[name] = cast  # found before the parameter, which is not moved
        with autocast(precision, device), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for layer, name, _ in named:
            layer.__dict__.pop(name, None)


class _Cast(torch.autograd.Function):
    """Cast tensors to another dtype, and their gradients back to the original one, which is the same for all. Tensors that do not require
    a gradient get none."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        copies = _as_dtype(tensors, dtype)
        ctx.mark_non_differentiable(*(copy for copy, wanted in zip(copies, ctx.needs_input_grad[1:], strict=True) if not wanted))
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = iter(_as_dtype([gradient for gradient in gradients if gradient is not None], ctx.dtype))
        return None, *(gradient if gradient is None else next(found) for gradient in gradients)


def _as_dtype(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if tensors:
        torch._foreach_copy_(copies, list(tensors))
    return copies
