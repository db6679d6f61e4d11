"""bf16 if it is requested, or with `auto` if the hardware supports it; losses are computed in float32 outside of this context.

What a GPU computes in float32 it may multiply as TF32 (10 bits of mantissa), unless the precision is `fp32`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import torch

from bingo.runtime.errors import UserError

HALF_SIMILARITIES = ("cuda",)  # a CPU gains nothing by them


@cache
def hardware_has_bf16(device_type: str) -> bool:
    """Whether this device multiplies bf16 in hardware (CUDA: compute capability 8 on; CPU: AVX512-BF16 or AMX)."""
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
    """The autocast context for a network's forward pass on this device. On a GPU it also allows or forbids TF32 from now on, since the
    backward pass comes after the context."""
    dtype = resolve_precision(precision, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def dtype_of_similarities(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of products of unit rows with many keys: float16 where autocast is on on a GPU, float32 elsewhere."""
    half = device.type in HALF_SIMILARITIES and resolve_precision(precision, device) != torch.float32
    return torch.float16 if half else torch.float32


@contextmanager
def casts_kept(precision: str, device: torch.device) -> Iterator[None]:
    """In the body, bf16 copies of weights made by one `autocast` are reused by the next; everything outside of `autocast` stays in
    float32."""
    with autocast(precision, device), torch.autocast(device.type, enabled=False):
        yield
