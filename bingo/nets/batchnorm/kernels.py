"""BatchNorm with statistics of each group as Triton kernels, which read a channels_last batch where it lies, without copies.

To the kernels a batch is S segments of M rows of C channels, one after another in memory; segment s is in group s % G. A program has a
chunk of a segment's rows and W channels, in steps of R rows. What a program sums, and in which order, depends on shapes alone: results
repeat. Statistics are float32; means and sums of squared deviations are updated and merged as Welford's and Chan's, so that a mean far
above the deviation costs no digits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.language import constexpr, tensor

_OPTIONS = {"enable_fp_fusion": True}  # its default differs between versions of Triton
_PROGRAMS, _TILE, _MOST_CHANNELS, _MOST_PARTS = 2048, 2048, 64, 128  # W * R = _TILE; _MOST_PARTS chunks of a group are merged at once


@triton.jit
def _place(M: tensor, C: tensor, G: tensor, chunk: tensor, W: constexpr) -> tensor:
    """This program's group, its channels (W,), which of them there are, the number of its rows, and where its first row starts."""
    parts = tl.cdiv(M, chunk)
    segment, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    channels = tl.program_id(1) * W + tl.arange(0, W)
    return segment % G, channels, channels < C, tl.minimum(chunk, M - part * chunk), (segment.to(tl.int64) * M + part * chunk) * C


@triton.jit
def _parts(M: tensor, C: tensor, G: tensor, chunk: tensor, P: constexpr, W: constexpr) -> tensor:
    """For a program that merges: its channels (W,), which of them there are, the chunk in a segment and the number among all of group 0's
    P parts, (P, 1)."""
    channels = tl.program_id(0) * W + tl.arange(0, W)
    part, parts = tl.arange(0, P)[:, None], tl.cdiv(M, chunk)
    return channels, channels < C, part % parts, part // parts * G * parts + part % parts


@triton.jit
def _merged(count: tensor, total: tensor, mean: tensor, squares: tensor) -> tensor:
    """Mean and sum of squared deviations (W,) of parts with (P, 1) values each, given those of the parts, (P, W)."""
    share = count / total
    merged = tl.sum(mean * share, 0)
    merged += tl.sum((mean - merged[None, :]) * share, 0)  # what rounding lost
    apart = mean - merged[None, :]
    return merged, tl.sum(squares + count * apart * apart, 0)


@triton.jit
def _moments(
    x: tensor,
    means: tensor,
    squares: tensor,
    M: tensor,
    C: tensor,
    G: tensor,
    chunk: tensor,
    R: constexpr,
    W: constexpr,
) -> None:
    """Mean and sum of squared deviations of each chunk's channels."""
    _, channels, there, rows, start = _place(M, C, G, chunk, W)
    lane = tl.arange(0, R)[:, None]
    mean, square = tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32)
    for row in range(0, rows, R):
        mask = (row + lane < rows) & there[None, :]
        offset = (row + lane) * C + channels[None, :]
        value = tl.load(x + start + offset, mask, 0).to(tl.float32)
        apart = tl.where(mask, value - mean, 0)
        mean += apart / (row // R + 1)
        square += apart * (value - mean)
    mean_W, square_W = _merged(((rows - lane + R - 1) // R).to(tl.float32), rows, mean, square)
    tl.store(means + tl.program_id(0) * C + channels, mean_W, there)
    tl.store(squares + tl.program_id(0) * C + channels, square_W, there)


@triton.jit
def _statistics(
    means: tensor, squares: tensor, mean_GC: tensor, rstd_GC: tensor, running_mean: tensor, running_var: tensor,
    momentum: tensor, eps: tensor, blocks: tensor, M: tensor, C: tensor, G: tensor, chunk: tensor, P: constexpr, W: constexpr,
) -> None:  # fmt: skip
    """Mean and 1 / standard deviation of each group; running statistics move by the mean over groups."""
    channels, there, part, place = _parts(M, C, G, chunk, P, W)
    known = (tl.arange(0, P) < blocks * tl.cdiv(M, chunk))[:, None]
    count, total = tl.where(known, tl.minimum(chunk, M - part * chunk), 0).to(tl.float32), blocks * M
    mean_sum, var_sum = tl.zeros((W,), tl.float32), tl.zeros((W,), tl.float32)
    for group in range(G):
        offset = (place + group * tl.cdiv(M, chunk)) * C + channels[None, :]
        mask = known & there[None, :]
        mean, square = _merged(count, total, tl.load(means + offset, mask, 0), tl.load(squares + offset, mask, 0))
        tl.store(mean_GC + group * C + channels, mean, there)
        tl.store(rstd_GC + group * C + channels, 1 / tl.sqrt_rn(square / total + eps), there)
        mean_sum += mean
        var_sum += square / (total - 1)
    if running_mean is not None:
        before = tl.load(running_mean + channels, there, 0).to(tl.float32)
        tl.store(running_mean + channels, before + momentum * (mean_sum / G - before), there)
        before = tl.load(running_var + channels, there, 0).to(tl.float32)
        tl.store(running_var + channels, before + momentum * (var_sum / G - before), there)


@triton.jit
def _normalise(
    x: tensor, y: tensor, mean_GC: tensor, rstd_GC: tensor, weight: tensor, bias: tensor, M: tensor, C: tensor, G: tensor, chunk: tensor,
    R: constexpr, W: constexpr,
) -> None:  # fmt: skip
    """y = (x - mean) * rstd * weight + bias."""
    group, channels, there, rows, start = _place(M, C, G, chunk, W)
    mean = tl.load(mean_GC + group * C + channels, there, 0)
    scale = tl.load(rstd_GC + group * C + channels, there, 0)
    shift = tl.zeros((W,), tl.float32)
    if weight is not None:
        scale *= tl.load(weight + channels, there, 0).to(tl.float32)
    if bias is not None:
        shift += tl.load(bias + channels, there, 0).to(tl.float32)
    lane = tl.arange(0, R)[:, None]
    for row in range(0, rows, R):
        mask = (row + lane < rows) & there[None, :]
        offset = (row + lane) * C + channels[None, :]
        value = tl.load(x + start + offset, mask, 0).to(tl.float32)
        tl.store(y + start + offset, (value - mean[None, :]) * scale[None, :] + shift[None, :], mask)


@triton.jit
def _gradient_sums(
    x: tensor, dy: tensor, mean_GC: tensor, rstd_GC: tensor, sums: tensor, dots: tensor, M: tensor, C: tensor, G: tensor, chunk: tensor,
    R: constexpr, W: constexpr,
) -> None:  # fmt: skip
    """Of each chunk's channels the sums of dy, and of dy * normalised x."""
    group, channels, there, rows, start = _place(M, C, G, chunk, W)
    mean = tl.load(mean_GC + group * C + channels, there, 0)
    rstd = tl.load(rstd_GC + group * C + channels, there, 0)
    lane = tl.arange(0, R)[:, None]
    total, dot = tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32)
    for row in range(0, rows, R):
        mask = (row + lane < rows) & there[None, :]
        offset = (row + lane) * C + channels[None, :]
        gradient = tl.load(dy + start + offset, mask, 0).to(tl.float32)
        total += gradient
        dot += gradient * (tl.load(x + start + offset, mask, 0).to(tl.float32) - mean[None, :])
    tl.store(sums + tl.program_id(0) * C + channels, tl.sum(total, 0), there)
    tl.store(dots + tl.program_id(0) * C + channels, tl.sum(dot, 0) * rstd, there)


@triton.jit
def _parameter_gradients(
    sums: tensor, dots: tensor, sum_GC: tensor, dot_GC: tensor, dweight: tensor, dbias: tensor, blocks: tensor,
    M: tensor, C: tensor, G: tensor, chunk: tensor, P: constexpr, W: constexpr,
) -> None:  # fmt: skip
    """The sums of each group's chunks, and over groups."""
    channels, there, _, place = _parts(M, C, G, chunk, P, W)
    mask = (tl.arange(0, P) < blocks * tl.cdiv(M, chunk))[:, None] & there[None, :]
    weight, bias = tl.zeros((W,), tl.float32), tl.zeros((W,), tl.float32)
    for group in range(G):
        offset = (place + group * tl.cdiv(M, chunk)) * C + channels[None, :]
        total, dot = tl.sum(tl.load(sums + offset, mask, 0), 0), tl.sum(tl.load(dots + offset, mask, 0), 0)
        tl.store(sum_GC + group * C + channels, total, there)
        tl.store(dot_GC + group * C + channels, dot, there)
        weight += dot
        bias += total
    if dweight is not None:
        tl.store(dweight + channels, weight, there)
    if dbias is not None:
        tl.store(dbias + channels, bias, there)


@triton.jit
def _input_gradient(
    x: tensor, dy: tensor, dx: tensor, mean_GC: tensor, rstd_GC: tensor, sum_GC: tensor, dot_GC: tensor, weight: tensor, total: tensor,
    M: tensor, C: tensor, G: tensor, chunk: tensor, R: constexpr, W: constexpr,
) -> None:  # fmt: skip
    """dx = rstd * weight * (dy - mean of dy - normalised x * mean of dy * normalised x)."""
    group, channels, there, rows, start = _place(M, C, G, chunk, W)
    mean = tl.load(mean_GC + group * C + channels, there, 0)
    rstd = tl.load(rstd_GC + group * C + channels, there, 0)
    mean_dy = tl.load(sum_GC + group * C + channels, there, 0) / total
    slope = tl.load(dot_GC + group * C + channels, there, 0) / total * rstd
    if weight is not None:
        rstd *= tl.load(weight + channels, there, 0).to(tl.float32)
    lane = tl.arange(0, R)[:, None]
    for row in range(0, rows, R):
        mask = (row + lane < rows) & there[None, :]
        offset = (row + lane) * C + channels[None, :]
        gradient = tl.load(dy + start + offset, mask, 0).to(tl.float32) - mean_dy[None, :]
        value = tl.load(x + start + offset, mask, 0).to(tl.float32)
        tl.store(dx + start + offset, (gradient - (value - mean[None, :]) * slope[None, :]) * rstd[None, :], mask)


class GroupedBatchNorm(torch.autograd.Function):
    """BatchNorm of each of `groups` parts of every one of `blocks` blocks of x (N, C, ...), whose memory is channels_last and dense, with
    the statistics of the group's parts in all blocks. Running statistics move by the mean over groups; those, weight and bias may be
    None. Returns x's dtype and layout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Any,
        running_var: Any,
        weight: Any,
        bias: Any,
        momentum: float,
        eps: float,
        blocks: int,
        groups: int,
    ) -> Tensor:
        """Three kernels."""
        shape, grid, tile, merging = _shapes(x, blocks, groups)
        y = torch.empty_like(x)
        parts_2PC, statistics_2GC = (x.new_empty((2, rows, x.shape[1]), dtype=torch.float32) for rows in (grid[0], groups))
        with torch.cuda.device_of(x):
            _moments[grid](x, *parts_2PC, *shape, *tile, **_OPTIONS)
            merge = (triton.cdiv(x.shape[1], merging[1]),)
            _statistics[merge](
                *parts_2PC, *statistics_2GC, running_mean, running_var, float(momentum), eps, blocks, *shape, *merging, **_OPTIONS
            )
            _normalise[grid](x, y, *statistics_2GC, weight, bias, *shape, *tile, **_OPTIONS)
        ctx.save_for_backward(x, statistics_2GC, weight, bias)
        ctx.blocks, ctx.groups = blocks, groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Three kernels."""
        x, statistics_2GC, weight, bias = ctx.saved_tensors
        shape, grid, tile, merging = _shapes(x, ctx.blocks, ctx.groups)
        dx, dweight, dbias = (None if like is None else torch.empty_like(like) for like in (x, weight, bias))
        parts_2PC, sums_2GC = x.new_empty((2, grid[0], x.shape[1]), dtype=torch.float32), torch.empty_like(statistics_2GC)
        dy = dy.movedim(1, -1).contiguous()
        with torch.cuda.device_of(x):
            _gradient_sums[grid](x, dy, *statistics_2GC, *parts_2PC, *shape, *tile, **_OPTIONS)
            merge = (triton.cdiv(x.shape[1], merging[1]),)
            _parameter_gradients[merge](*parts_2PC, *sums_2GC, dweight, dbias, ctx.blocks, *shape, *merging, **_OPTIONS)
            _input_gradient[grid](x, dy, dx, *statistics_2GC, *sums_2GC, weight, ctx.blocks * shape[0], *shape, *tile, **_OPTIONS)
        return dx, None, None, dweight, dbias, None, None, None, None


def _shapes(x: Tensor, blocks: int, groups: int) -> Any:
    """(M, C, G, rows of a chunk), the grid, (R, W), and (P, W) of the programs that merge a group's chunks."""
    C = x.shape[1]
    M = x.numel() // (C * blocks * groups)
    W = min(_MOST_CHANNELS, triton.next_power_of_2(C))
    R, columns = _TILE // W, triton.cdiv(C, W)
    most = min(triton.cdiv(_PROGRAMS, blocks * groups * columns), max(1, _MOST_PARTS // blocks))
    chunk = triton.cdiv(triton.cdiv(M, most), R) * R
    parts = blocks * triton.cdiv(M, chunk)
    return (M, C, groups, chunk), (groups * parts, columns), (R, W), (triton.next_power_of_2(parts), min(W, 16))
