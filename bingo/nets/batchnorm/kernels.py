# mypy: allow-untyped-defs, allow-incomplete-defs
"""BatchNorm with separate statistics for each group as Triton kernels, which read a channels_last batch without copies.

Letters: G groups; C channels; M consecutive rows of C values, a group's part of a block (`grouped_batchnorm`). A group consists of `count`
chunks of at most `chunk` rows; P is the next power of 2. A program handles W channels of a chunk, R rows at a time, or of all chunks. The
order of summation depends only on shapes, so results are reproducible. Sums are float32, of differences from the mean of a chunk's
first rows, merged as by Chan et al., so that no digits are lost if the mean is far above the deviation. `of_4GC`: mean, slope, shift, and
for x 1 / standard deviation, for a gradient its factor, as used by `_linear`. Kernels have no annotations: an argument is a tensor, a
number or None.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.language import constexpr

_PROGRAMS, _TILE, _MOST_CHANNELS, _MOST_CHUNKS, _MERGED_CHANNELS = 2048, 2048, 64, 128, 16
_OPTIONS = {"enable_fp_fusion": True}  # the default differs between versions of Triton


@triton.jit
def _place(M, C, G, chunk, count, R: constexpr, W: constexpr):
    """This program's group, its channels (W,), its number of rows, the start of its first row, and its offsets (R, W) from there."""
    group, part, parts = tl.program_id(0) // count, tl.program_id(0) % count, tl.cdiv(M, chunk)
    channels, first = tl.program_id(1) * W + tl.arange(0, W), part % parts * chunk
    start = ((part // parts * G + group).to(tl.int64) * M + first) * C
    return group, channels, tl.minimum(chunk, M - first), start, tl.arange(0, R)[:, None] * C + channels[None, :]


@triton.jit
def _sums(x, dy, of_4GC, parts_2PC, M, C, G, chunk, count, R: constexpr, W: constexpr):
    """For each chunk and channel: without dy, mean and sum of squared deviations; with dy, the sums of dy and of dy * (x - mean)."""
    group, channels, rows, start, offset = _place(M, C, G, chunk, count, R, W)
    there, lane = channels < C, tl.arange(0, R)[:, None]
    if dy is None:
        mean = tl.sum(tl.load(x + start + offset, (lane < rows) & there[None, :], 0).to(tl.float32), 0) / tl.minimum(rows, R)
    else:
        mean = tl.load(of_4GC + group * C + channels, there, 0)
    total, dot = tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32)
    for row in range(0, rows, R):
        mask = (row + lane < rows) & there[None, :]
        apart = tl.where(mask, tl.load(x + start + row * C + offset, mask, 0).to(tl.float32) - mean[None, :], 0)
        factor = apart if dy is None else tl.load(dy + start + row * C + offset, mask, 0).to(tl.float32)
        total += factor
        dot += factor * apart
    total_W, dot_W = tl.sum(total, 0), tl.sum(dot, 0)
    if dy is None:
        dot_W = tl.maximum(dot_W - total_W * total_W / rows, 0)
        total_W = mean + total_W / rows
    tl.store(parts_2PC + tl.program_id(0) * C + channels, total_W, there)
    tl.store(parts_2PC + (G * count + tl.program_id(0)) * C + channels, dot_W, there)


@triton.jit
def _statistics(
    parts_2PC, of_4GC, running_mean, running_var, weight, bias, momentum, eps, M, C, G, chunk, count, P: constexpr, W: constexpr
):
    """Mean, slope and shift of each group, from `_sums`; running statistics are updated with the mean over groups."""
    channels, part, parts = tl.program_id(0) * W + tl.arange(0, W), tl.arange(0, P)[:, None], tl.cdiv(M, chunk)
    there, total = channels < C, count // parts * M
    mask, rows = (part < count) & there[None, :], tl.where(part < count, tl.minimum(chunk, M - part % parts * chunk), 0).to(tl.float32)
    slope, shift = tl.full((W,), 1, tl.float32), tl.zeros((W,), tl.float32)
    if weight is not None:
        slope = tl.load(weight + channels, there, 0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + channels, there, 0).to(tl.float32)
    mean_sum, var_sum = tl.zeros((W,), tl.float32), tl.zeros((W,), tl.float32)
    for group in range(G):
        offset = (group * count + part) * C + channels[None, :]
        means, squares = tl.load(parts_2PC + offset, mask, 0), tl.load(parts_2PC + G * count * C + offset, mask, 0)
        mean = tl.sum(means * (rows / total), 0)
        mean += tl.sum((means - mean[None, :]) * (rows / total), 0)  # correct the rounding error
        square = tl.sum(squares + rows * (means - mean[None, :]) * (means - mean[None, :]), 0)
        rstd = 1 / tl.sqrt_rn(square / total + eps)
        place = of_4GC + group * C + channels
        tl.store(place, mean, there)
        tl.store(place + G * C, slope * rstd, there)
        tl.store(place + 2 * G * C, shift, there)
        tl.store(place + 3 * G * C, rstd, there)
        mean_sum, var_sum = mean_sum + mean, var_sum + square / (total - 1)
    if running_mean is not None:
        mean, var = tl.load(running_mean + channels, there, 0), tl.load(running_var + channels, there, 0)
        tl.store(running_mean + channels, mean + momentum * (mean_sum / G - mean), there)
        tl.store(running_var + channels, var + momentum * (var_sum / G - var), there)


@triton.jit
def _gradients(parts_2PC, of_4GC, gradient_4GC, dweight, dbias, M, C, G, chunk, count, P: constexpr, W: constexpr):
    """Gradients of weight and bias, and the coefficients for `_linear` of dx = rstd * weight * (dy - mean of dy - normalised x * mean of
    dy * normalised x)."""
    channels, part = tl.program_id(0) * W + tl.arange(0, W), tl.arange(0, P)[:, None]
    there, total = channels < C, count // tl.cdiv(M, chunk) * M
    weight, bias = tl.zeros((W,), tl.float32), tl.zeros((W,), tl.float32)
    for group in range(G):
        offset, mask = (group * count + part) * C + channels[None, :], (part < count) & there[None, :]
        place, out = of_4GC + group * C + channels, gradient_4GC + group * C + channels
        slope, rstd = tl.load(place + G * C, there, 0), tl.load(place + 3 * G * C, there, 0)
        dy, dot = tl.sum(tl.load(parts_2PC + offset, mask, 0), 0), tl.sum(tl.load(parts_2PC + G * count * C + offset, mask, 0), 0) * rstd
        tl.store(out, tl.load(place, there, 0), there)
        tl.store(out + G * C, -slope * rstd * dot / total, there)
        tl.store(out + 2 * G * C, -slope * dy / total, there)
        tl.store(out + 3 * G * C, slope, there)
        weight, bias = weight + dot, bias + dy
    if dweight is not None:
        tl.store(dweight + channels, weight, there)
    if dbias is not None:
        tl.store(dbias + channels, bias, there)


@triton.jit
def _linear(x, dy, out, of_4GC, M, C, G, chunk, count, R: constexpr, W: constexpr):
    """out = (x - mean) * slope + shift and, if dy is given, + dy * factor."""
    group, channels, rows, start, offset = _place(M, C, G, chunk, count, R, W)
    there, lane, place = channels < C, tl.arange(0, R)[:, None], of_4GC + group * C + channels
    mean, slope, shift = tl.load(place, there, 0), tl.load(place + G * C, there, 0), tl.load(place + 2 * G * C, there, 0)
    factor = tl.load(place + 3 * G * C, there, 0)
    for row in range(0, rows, R):
        mask = (row + lane < rows) & there[None, :]
        value = (tl.load(x + start + row * C + offset, mask, 0).to(tl.float32) - mean[None, :]) * slope[None, :] + shift[None, :]
        if dy is not None:
            value += tl.load(dy + start + row * C + offset, mask, 0).to(tl.float32) * factor[None, :]
        tl.store(out + start + row * C + offset, value, mask)


class GroupedBatchNorm(torch.autograd.Function):
    """BatchNorm of x (N, C, ...), which is dense in channels_last memory and consists of `blocks` blocks, each divided into `groups` parts.
    The statistics of a group are those of its parts in all blocks. Running statistics (both or neither), which are updated with the mean
    over groups, and weight and bias (or None) are (C,). The result has x's dtype and layout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        """`arguments`: running mean and variance, weight, bias, momentum, eps, blocks, groups."""
        *tensors, momentum, eps, blocks, groups = arguments
        sizes, programs, tile, merging, merged = _plan(x.numel(), x.shape[1], blocks, groups)
        y, (of_4GC, parts_2PC) = torch.empty_like(x), _sums_of(x, groups, programs)
        with torch.cuda.device_of(x):
            _sums[programs](x, None, None, parts_2PC, *sizes, *tile, **_OPTIONS)
            _statistics[merging](parts_2PC, of_4GC, *tensors, float(momentum), eps, *sizes, *merged, **_OPTIONS)
            _linear[programs](x, None, y, of_4GC, *sizes, *tile, **_OPTIONS)
        ctx.save_for_backward(x, of_4GC, *tensors[2:])
        ctx.blocks, ctx.groups = blocks, groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        """The gradients of x, weight and bias."""
        x, of_4GC, *weights = ctx.saved_tensors
        sizes, programs, tile, merging, merged = _plan(x.numel(), x.shape[1], ctx.blocks, ctx.groups)
        dx, *gradients = (None if value is None else torch.empty_like(value) for value in (x, *weights))
        gradient_4GC, parts_2PC = _sums_of(x, ctx.groups, programs)
        dy = dy.movedim(1, -1).contiguous()
        with torch.cuda.device_of(x):
            _sums[programs](x, dy, of_4GC, parts_2PC, *sizes, *tile, **_OPTIONS)
            _gradients[merging](parts_2PC, of_4GC, gradient_4GC, *gradients, *sizes, *merged, **_OPTIONS)
            _linear[programs](x, dy, dx, gradient_4GC, *sizes, *tile, **_OPTIONS)
        return dx, None, None, *gradients, None, None, None, None


def _sums_of(x: Tensor, groups: int, programs: tuple[int, int]) -> list[Tensor]:
    """Memory for of_4GC and parts_2PC."""
    return [x.new_empty((*shape, x.shape[1]), dtype=torch.float32) for shape in ((4, groups), (2, programs[0]))]


@cache
def _plan(values: int, C: int, blocks: int, G: int) -> Any:
    """(M, C, G, chunk, count); programs and (R, W) of kernels by chunk; programs and (P, W) of those that merge chunks."""
    M, W = values // (C * blocks * G), min(_MOST_CHANNELS, triton.next_power_of_2(C))
    R, columns = _TILE // W, triton.cdiv(C, W)
    most = min(triton.cdiv(_PROGRAMS, blocks * G * columns), max(1, _MOST_CHUNKS // blocks))
    chunk = triton.cdiv(triton.cdiv(M, most), R) * R
    count = blocks * triton.cdiv(M, chunk)
    merging = (triton.cdiv(C, _MERGED_CHANNELS),), (triton.next_power_of_2(count), _MERGED_CHANNELS)
    return (M, C, G, chunk, count), (G * count, columns), (R, W), *merging
