"""BatchNorm in groups of the batch, each normalised with its own statistics, as on several GPUs with unsynchronised BatchNorm.

This is the "SplitBatchNorm" of MoCo's demo for one GPU. Shape letters: B anchors of this process, N rows of a layer's input (a multiple
of B), G groups, C channels.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bingo.runtime import distributed
from bingo.runtime.errors import UserError, reason_of

_GROUPS = ContextVar("groups", default=(1, 0, 1))  # number of groups, index of this batch among the parts of the process, number of parts


def own_groups(batchnorm_groups: int, key: str = "batchnorm_groups", parts: int = 1) -> int:
    """The number of the global batch's groups that belong to one of the `parts` of this process's share: equally many, and at least 1.

    Raises UserError for the parameter `key` if the processes cannot share the groups equally.
    """
    world = distributed.world()
    if batchnorm_groups > world * parts and batchnorm_groups % (world * parts):
        of_parts = f" with accumulate_steps = {parts}" if parts > 1 else ""
        raise UserError(
            f"{key} = {batchnorm_groups}: {world} processes{of_parts} cannot share the groups equally; set it to {parts} (the images that "
            f"a process sees at a time are one group), or to a multiple of {world * parts}"
        )
    return max(1, batchnorm_groups // (world * parts))


def groups() -> int:
    """The current number of BatchNorm groups of this process's batch: 1 outside of `grouped_batchnorm`."""
    return _GROUPS.get()[0]


def group_numbers() -> np.ndarray:
    """The numbers of this batch's groups among those of all processes and parts, int64 (groups(),)."""
    own, part, parts = _GROUPS.get()
    return (distributed.rank() * parts + part) * own + np.arange(own)


def rows_by_group(x_NX: Tensor, anchors: int) -> Tensor:
    """The rows of each group, (G, N / G, X): those of its anchors and the rows that follow the anchors, as in `grouped_batchnorm`."""
    return x_NX.unflatten(0, (-1, groups(), anchors // groups())).transpose(0, 1).flatten(1, 2)


@contextmanager
def grouped_batchnorm(groups: int, anchors: int, part: int = 0, parts: int = 1) -> Iterator[None]:
    """Context manager in which BatchNorm with batch statistics normalises each of `groups` equal consecutive parts of the `anchors` of a
    batch separately. The batch is number `part` of the `parts` of this process's share.

    Rows after the anchors, such as companions, come in blocks of the same number of rows, and row i of a block is in the group of anchor
    i. An input whose rows do not divide into such blocks is not a batch of images but weights being standardised, and is not grouped. The
    running statistics are updated with the mean over groups. With 1 group nothing changes; layers and their names never change.
    """
    token = _GROUPS.set((groups, part, parts))
    try:
        with _GroupingMode(groups, anchors) if groups > 1 else nullcontext():
            yield
    finally:
        _GROUPS.reset(token)


@contextmanager
def counted_together(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Context manager in which these BatchNorm layers (`counting_layers`) count their batches on the host. At the end, all their counters
    on the device are updated by one operation, instead of one for each layer and pass."""
    counters: Any = [layer._buffers["num_batches_tracked"] for layer in layers]
    counts_N = np.zeros(len(layers), np.int64)
    for layer, count in zip(layers, torch.from_numpy(counts_N), strict=True):
        layer._buffers["num_batches_tracked"] = count
    try:
        yield
    finally:
        for layer, counter in zip(layers, counters, strict=True):
            layer._buffers["num_batches_tracked"] = counter
        if layers:
            torch._foreach_add_(counters, counts_N.tolist())


def counting_layers(network: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers that count batches but do not use the count themselves (unlike those with momentum None)."""
    norms = (module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [layer for layer in norms if layer.num_batches_tracked is not None and layer.momentum is not None]


class _GroupingMode(TorchFunctionMode):
    """Intercepts every call of `torch.nn.functional.batch_norm`, which all layers of torch, torchvision and timm use."""

    def __init__(self, groups: int, anchors: int):
        super().__init__()
        self.groups, self.anchors = groups, anchors

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return (self._batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """A replacement of `torch.nn.functional.batch_norm`, with the same argument names."""
        if not training or len(input) % self.anchors:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        blocks = len(input) // self.anchors
        if _in_place(input, self.groups) and (kernels := _kernels()):
            return kernels(input, running_mean, running_var, weight, bias, momentum, eps, blocks, self.groups)
        means_GC, vars_GC = _copies(running_mean, self.groups), _copies(running_var, self.groups)
        norm = _one_by_one if input.device.type == "cpu" and not torch.compiler.is_compiling() else _side_by_side
        normed = norm(input, blocks, self.groups, means_GC, vars_GC, weight, bias, momentum, eps)
        _move_to_mean(running_mean, means_GC)
        _move_to_mean(running_var, vars_GC)
        return normed


def _in_place(input: Tensor, groups: int) -> bool:
    """Whether kernels can read the input without a copy: it is an eager, plain GPU tensor in channels_last memory, with more than one value
    per group."""
    plain = type(input) is Tensor and input.is_cuda and input.dtype in (torch.float32, torch.bfloat16, torch.float16)
    dense = plain and not torch.compiler.is_compiling() and input.movedim(1, -1).is_contiguous()
    return dense and input.numel() > groups * input.shape[1]


@cache
def _kernels() -> Any:
    """The function that calls the kernels, or None, after a line on stderr, if Triton does not work."""
    try:
        from bingo.nets.batchnorm.kernels import GroupedBatchNorm

        GroupedBatchNorm.apply(torch.zeros(4, 16, device="cuda"), None, None, None, None, 0.0, 1.0, 1, 2)
    except Exception as error:  # a missing package or C compiler, an old GPU and a broken cache raise different errors
        if distributed.rank() == 0:
            line = f"batchnorm_groups: activations are copied, since Triton does not work here ({reason_of(error)}); expect longer steps"
            print(line, file=sys.stderr, flush=True)
        return None
    return GroupedBatchNorm.apply


def _one_by_one(input: Tensor, blocks: int, groups: int, means_GC: Any, vars_GC: Any, *others: Any) -> Tensor:
    """One call for each group, on views of the input; `others` is weight, bias, momentum, eps."""
    weight, bias, momentum, eps = others
    pieces = input.chunk(blocks * groups)
    parts = pieces if blocks == 1 else [torch.cat(pieces[group::groups]) for group in range(groups)]
    normed = [F.batch_norm(*of_group, weight, bias, True, momentum, eps) for of_group in zip(parts, means_GC, vars_GC, strict=True)]
    return torch.cat([piece for block in zip(*(part.chunk(blocks) for part in normed), strict=True) for piece in block])


def _side_by_side(input: Tensor, blocks: int, groups: int, means_GC: Any, vars_GC: Any, *others: Any) -> Tensor:
    """One call, with the groups as additional channels: two copies of a channels_last input, and as few kernels as without groups."""
    weight, bias, momentum, eps = others
    x_XGC = input.movedim(1, -1).unflatten(0, (blocks, groups, -1)).movedim(1, -2)  # X: blocks, images of a group, height and width
    means, variances = (None if of_groups[0] is None else of_groups.view(-1) for of_groups in (means_GC, vars_GC))
    weights, biases = (None if of_channels is None else of_channels.repeat(groups) for of_channels in (weight, bias))
    folded = x_XGC.flatten(-2).flatten(0, 1).movedim(-1, 1)
    normed = F.batch_norm(folded, means, variances, weights, biases, True, momentum, eps)
    return normed.movedim(1, -1).reshape(x_XGC.shape).movedim(-2, 1).flatten(0, 2).movedim(-1, 1)


def _copies(running_C: Tensor | None, groups: int) -> Any:
    return [None] * groups if running_C is None else running_C.expand(groups, -1).clone()


def _move_to_mean(running_C: Tensor | None, moved_GC: Any) -> None:
    """A mean of differences, so that statistics with momentum 0 keep their exact values."""
    if running_C is not None:
        with torch.no_grad():
            running_C.add_((moved_GC - running_C).mean(dim=0))
