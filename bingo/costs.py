"""What a step and a network cost, counted on real tensors: floating-point operations (1 multiply-add = 2) and bytes kept for backward.

Counted are matrix products and convolutions (torch.utils.flop_counter), which are nearly all; normalisations, activations and the
augmentation are not. Shape letter: B images of a batch.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bingo.methods.contract import Batch, Method, Progress

SUSTAINED_FLOP_PER_SECOND = 2e14  # an assumption: what one recent data-centre GPU keeps up in bf16, about a fifth of its peak


def _conv_backward(
    grad_out_shape, x_shape, w_shape, _bias, _stride, _padding, _dilation, transposed, _out_pad, _groups, wanted, **_
) -> int:
    """Each of the two gradients costs as much as the forward. torch 2.15's own formula forgets the groups in the weights' gradient,
    and counts a depthwise convolution's by as many times too much as it has channels."""
    places = (x_shape if transposed else grad_out_shape)[2:]
    return 2 * math.prod(places) * math.prod(w_shape) * x_shape[0] * sum(wanted[:2])


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _conv_backward})


def step_flops(method: Method, batch: Batch, progress: Progress) -> int:
    """FLOPs of one forward and backward of `method` on `batch`, a live teacher's included.

    Nothing is changed: no gradient is written, BatchNorm's statistics, queues and moving averages stay as they are, and so do torch's
    random numbers. Where several processes train, all of them must call it (ShuffleBN and CoSS gather).
    """
    with _unchanged(method) as loss_of, _counter() as counter:
        torch.autograd.grad(loss_of(batch, progress), _trained(method), allow_unused=True)
    return counter.get_total_flops()


def saved_bytes(method: Method, batch: Batch, progress: Progress) -> int:
    """Bytes that a forward of `method` on `batch` keeps for backward: each storage once, no parameters, no buffers. Nothing changes."""
    own = {tensor.untyped_storage().data_ptr() for tensor in method.state_dict().values()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _unchanged(method) as loss_of, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(batch, progress)
        return sum(kept.values())


def forward_flops(network: nn.Module, images_BCHW: Tensor) -> int:
    """FLOPs of one forward pass of `network` in eval mode on images of this shape. Nothing is computed: shapes alone are counted."""
    was_training = network.training
    tensors = {name: tensor.to("meta") for name, tensor in [*network.named_parameters(), *network.named_buffers()]}
    with torch.no_grad(), _counter() as counter:
        torch.func.functional_call(network.eval(), tensors, images_BCHW.to("meta"))
    network.train(was_training)
    return counter.get_total_flops()


def gpu_hours(flops: float) -> float:
    """Hours of one GPU that keeps up SUSTAINED_FLOP_PER_SECOND."""
    return flops / SUSTAINED_FLOP_PER_SECOND / 3600


def _trained(method: Method) -> list[nn.Parameter]:
    return [parameter for parameter in method.parameters() if parameter.requires_grad]


@contextmanager
def _unchanged(method: Method) -> Iterator[Callable[[Batch, Progress], Tensor]]:
    """The method's loss as a function that works on copies of its buffers; its other attributes are put back at the end."""
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
