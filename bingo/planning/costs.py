"""Measure the cost of a step and of a network by running one real step, on copies of the method's buffers, without side effects.

  FLOPs   torch.utils.flop_counter sees each operation: matrix products and convolutions are counted (1 multiply-add = 2), which are
          nearly all; normalisations, activations and the augmentation are not.
  bytes   autograd passes each tensor saved for the backward pass to `_Meter`, and keeps a `_Kept` in its place. A storage counts
          from its first `_Kept` until its last one is deleted; the result is the peak.

Shape letter: B images of a batch.
"""

import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bingo.bags.ivf import InvertedFile
from bingo.methods.contract import Batch, Method, Progress

SUSTAINED_FLOP_PER_SECOND = 2e14  # an assumption: sustained by a recent data-centre GPU in bf16, about a fifth of its peak


def _conv_backward(
    grad_out_shape: Sequence[int],
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _out_pad: object,
    _groups: object,
    wanted: Sequence[bool],
    **_: object,
) -> int:
    """Each of the two gradients costs as much as the forward pass. The formula of torch 2.15 ignores groups in the weight gradient,
    which overestimates that of a depthwise convolution by a factor of its number of channels."""
    places = (x_shape if transposed else grad_out_shape)[2:]
    return 2 * math.prod(places) * math.prod(w_shape) * x_shape[0] * sum(wanted[:2])


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _conv_backward})


def step_flops(method: Method, batch: Batch, progress: Progress) -> int:
    """FLOPs of one forward and backward pass of `method` on `batch`, including a live teacher.

    It has no side effects: gradients, BatchNorm's statistics, queues, moving averages and torch's
    random state do not change. If several processes train, all must call it (ShuffleBN gathers).
    """
    with _unchanged(method) as loss_of, _counter() as counter:
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        torch.autograd.grad(loss_of(batch, progress), trained, allow_unused=True)
    return counter.get_total_flops()


def saved_bytes(method: Method, batch: Batch, progress: Progress) -> int:
    """The largest number of bytes that a forward pass of `method` on `batch` keeps for the backward pass: each storage is counted once,
    without parameters and buffers. The method does not change."""
    own = {tensor.untyped_storage().data_ptr() for tensor in method.state_dict().values()}
    meter = _Meter(own)
    with _unchanged(method) as loss_of, torch.autograd.graph.saved_tensors_hooks(meter.keep, lambda kept: kept.tensor):
        loss_of(batch, progress)
    return meter.most_bytes


@dataclass(eq=False)
class _Kept:
    """The object that autograd keeps in place of a saved tensor."""

    tensor: Tensor


class _Meter:
    """The bytes of the storages that autograd keeps, now and at most; `holders`: how many `_Kept` each storage has, by its address."""

    def __init__(self, uncounted: set[int]):
        self.uncounted, self.holders, self.bytes, self.most_bytes = uncounted, Counter[int](), 0, 0

    def keep(self, tensor: Tensor) -> _Kept:
        """Called when autograd saves a tensor."""
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        if (address := storage.data_ptr()) not in self.uncounted:
            self._count(address, 1, storage.nbytes())
            weakref.finalize(kept, self._count, address, -1, storage.nbytes())
        return kept

    def _count(self, address: int, change: int, storage_bytes: int) -> None:
        """Add (1) or remove (-1) a holder; the first adds the storage's bytes, the last subtracts them."""
        before, after = self.holders[address], self.holders[address] + change
        self.holders[address] = after
        self.bytes += storage_bytes * (bool(after) - bool(before))
        self.most_bytes = max(self.most_bytes, self.bytes)


def search_flops(rows: int, width: int, ivf: InvertedFile | None = None) -> float:
    """FLOPs of the search for the nearest of `rows` rows of `width` numbers to each of them, exact or in an inverted file."""
    return 2 * width * (float(rows) ** 2 if ivf is None else ivf.cosines(rows))


def forward_flops(network: nn.Module, images_BCHW: Tensor) -> int:
    """FLOPs of one forward pass of `network` in eval mode on images of this shape. Nothing is computed: only shapes are used."""
    was_training = network.training
    tensors = {name: tensor.detach().to("meta") for name, tensor in [*network.named_parameters(), *network.named_buffers()]}
    with torch.no_grad(), _counter() as counter:
        torch.func.functional_call(network.eval(), tensors, images_BCHW.to("meta"))
    network.train(was_training)
    return counter.get_total_flops()


def cpu_flop_per_second() -> float:
    """FLOP/s of this machine's CPU for a product of two float32 matrices, the best of three: an upper bound for networks."""
    x_NN = torch.ones(1024, 1024)
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        x_NN @ x_NN
        seconds.append(time.perf_counter() - begun)
    return 2 * len(x_NN) ** 3 / min(seconds)


def gpu_hours(flops: float) -> float:
    """Hours on one GPU that sustains SUSTAINED_FLOP_PER_SECOND."""
    return flops / SUSTAINED_FLOP_PER_SECOND / 3600


@contextmanager
def _unchanged(method: Method) -> Iterator[Callable[[Batch, Progress], Tensor]]:
    """The method's loss as a function on copies of its buffers; its other attributes are restored at the end."""
    attributes = dict(vars(method))
    devices = [buffer.device for buffer in method.buffers() if buffer.device.type == "cuda"][:1]

    def loss_of(batch: Batch, progress: Progress) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in method.named_buffers()}
        return torch.func.functional_call(method, buffers, (batch, progress))["loss"]

    try:
        with torch.random.fork_rng(devices=devices):
            yield loss_of
    finally:
        vars(method).update(attributes)
