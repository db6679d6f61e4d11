"""The kernels of grouped BatchNorm on the CPU, run by Triton's interpreter. The interpreter must be chosen before Triton is imported, so
test_batchnorm.py runs this file in a separate process."""

import pytest
import torch
from torch import Tensor

from bingo.nets.batchnorm import kernels

CASES = {  # shape, blocks, groups, dtype, mean / deviation, weight and bias, running statistics
    "rows that fill no chunk": ((8, 24, 5, 3), 1, 4, torch.float32, 0, True, True),
    "companions, large mean, channels that fill no tile": ((6, 130, 3, 2), 2, 3, torch.float32, 1e3, True, True),
    "bf16": ((16, 16, 4, 4), 2, 2, torch.bfloat16, 1, True, True),
    "fp16, an odd number of channels": ((6, 5, 7, 3), 3, 1, torch.float16, 3, True, False),
    "a head's rows, no affine": ((12, 24), 1, 3, torch.float32, 1, False, True),
    "two values a group": ((4, 3, 1), 1, 2, torch.float32, 1, True, True),
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch) -> None:
    """Small inputs with several steps, chunks and tiles of channels."""
    monkeypatch.setattr(kernels, "_TILE", 128)
    monkeypatch.setattr(kernels, "_PROGRAMS", 12)


def inputs(name: str) -> tuple[list[Tensor | None], Tensor]:
    """x, running mean and variance, weight, bias; and the gradient."""
    shape, _, _, dtype, mean, affine, running = CASES[name]
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    scales = 0.5 + torch.rand(4, shape[1], generator=generator)
    x, dy = ((part.movedim(1, -1).contiguous().movedim(-1, 1)).to(dtype) for part in (x * 0.7 + 0.7 * mean, dy))
    others = [scales[index] if given else None for index, given in enumerate((running, running, affine, affine))]
    return [x, *others], dy


def grouped(x: Tensor, running_mean, running_var, weight, bias, blocks: int, groups: int) -> Tensor:
    """The definition."""
    parts, means, variances = x.unflatten(0, (blocks, groups, -1)), [], []
    normed = torch.empty_like(parts)
    for group in range(groups):
        values_CX = parts[:, group].movedim(2, 0).flatten(1)
        means.append(values_CX.mean(1))
        variances.append(values_CX.var(1))
        broad = (-1,) + (1,) * (x.ndim - 2)
        deviation = (values_CX.var(1, unbiased=False) + 1e-3).sqrt()
        of_group = (parts[:, group] - means[-1].view(broad)) / deviation.view(broad)
        normed[:, group] = of_group if weight is None else of_group * weight.view(broad) + bias.view(broad)
    if running_mean is not None:
        running_mean.lerp_(torch.stack(means).mean(0).detach(), 0.3)
        running_var.lerp_(torch.stack(variances).mean(0).detach(), 0.3)
    return normed.flatten(0, 2)


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_running_statistics_follow_the_definition_in_float64(name):
    _, blocks, groups, dtype, mean, _, _ = CASES[name]
    given, dy = inputs(name)
    exact = [None if value is None else value.double() for value in given]
    for values in (given, exact):
        for index in (0, 3, 4):
            if values[index] is not None:
                values[index].requires_grad_()
    y = kernels.GroupedBatchNorm.apply(*given, 0.3, 1e-3, blocks, groups)
    wanted = grouped(*exact, blocks, groups)
    assert (y.dtype, y.stride()) == (dtype, given[0].stride())
    y.backward(dy)
    wanted.backward(dy.double())
    error = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5 + 1e-6 * mean}  # of the last rounding, and of x - mean in float32
    torch.testing.assert_close(y.double(), wanted, **error)
    torch.testing.assert_close(given[0].grad.double(), exact[0].grad, **error)
    for index in (1, 2, 3, 4):
        if given[index] is not None:
            got, want = (values[index] if index < 3 else values[index].grad for values in (given, exact))
            torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-5 + 2e-6 * mean)


def test_results_repeat_and_momentum_0_keeps_running_statistics():
    given, _ = inputs("bf16")
    before = [value.clone() for value in given[1:3]]
    first, again = (kernels.GroupedBatchNorm.apply(*given, 0.0, 1e-3, 2, 2) for _ in range(2))
    assert torch.equal(first, again)
    assert all(map(torch.equal, given[1:3], before))
