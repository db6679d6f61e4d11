"""Parts of methods with a momentum encoder: the queue of its keys, the moving average itself, ShuffleBN.

Shape letters: B anchors, P key width, Q queue rows.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bingo import seeds
from bingo.images.uploads import upload
from bingo.nets.batchnorm import groups as batchnorm
from bingo.runtime import distributed


class Queue(nn.Module):
    """A ring buffer of the last Q keys with their rows. It is initialised with seeded random unit vectors (row -1), as in MoCo.

    Unlike in MoCo, these are negatives only in the first step: a network trained against noise first learns to point away from it. In long
    training this does not matter; on the digits, in 5 epochs, it cost 3 points of k-NN accuracy.
    """

    keys_QP: Tensor
    rows_Q: Tensor
    pointer: Tensor

    def __init__(self, rows: int, key_width: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seeds.torch_seed(seed, "queue"))
        keys_QP = torch.randn(rows, key_width, generator=generator)
        self.register_buffer("keys_QP", nn.functional.normalize(keys_QP, dim=1))
        self.register_buffer("rows_Q", torch.full((rows,), -1, dtype=torch.int64))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self._place = 0  # `pointer` on the host, so that slots need not be computed on the device

    def empty(self) -> Tensor:
        """(1, Q) bool: slots without a key; all false before the first push, when there are only random vectors."""
        empty_Q = self.rows_Q < 0
        return (empty_Q & ~empty_Q.all())[None]

    @torch.no_grad()
    def push(self, keys_BP: Tensor, rows_B: Tensor) -> None:
        """Overwrite the oldest keys with those of all processes; a batch may wrap around the end of the ring."""
        keys_BP, rows_B = distributed.gather(keys_BP.float()), distributed.gather(rows_B)
        keys_BP, rows_B = keys_BP[-len(self.rows_Q) :], rows_B[-len(self.rows_Q) :]
        before_the_end = min(len(rows_B), len(self.rows_Q) - self._place)
        for ring, pushed in ((self.keys_QP, keys_BP), (self.rows_Q, rows_B)):
            ring[self._place :][:before_the_end] = pushed[:before_the_end]
            if before_the_end < len(pushed):
                ring[: len(pushed) - before_the_end] = pushed[before_the_end:]
        self._place = (self._place + len(rows_B)) % len(self.rows_Q)
        self.pointer.fill_(self._place)

    def _load_from_state_dict(self, *args: Any, **more: Any) -> None:
        super()._load_from_state_dict(*args, **more)
        self._place = int(self.pointer)


class MomentumCopy(nn.Module):
    """A moving average of a network's parameters. As in MoCo, buffers are not averaged, and its BatchNorm uses batch statistics."""

    def __init__(self, network: nn.Module, momentum: float):
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.momentum, self._averaged = momentum, [network]  # a list: not a part of this module

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.network(images_BCHW)

    @torch.no_grad()
    def move(self) -> None:
        """own = momentum * own + (1 - momentum) * the network's."""
        own: list[Tensor] = [parameter.detach() for parameter in self.network.parameters()]
        torch._foreach_lerp_(own, [parameter.detach() for parameter in self._averaged[0].parameters()], 1 - self.momentum)


@torch.no_grad()
def average_into(average: nn.Module, network: nn.Module, momentum: float) -> None:
    """average = momentum * average + (1 - momentum) * network, of parameters and buffers; integers, such as counters, are copied."""
    pairs = [*zip(average.state_dict().values(), network.state_dict().values(), strict=True)]
    floats, integers = ([pair for pair in pairs if pair[0].is_floating_point() == kind] for kind in (True, False))
    torch._foreach_lerp_([own for own, _ in floats], [new for _, new in floats], 1 - momentum)
    if integers:
        torch._foreach_copy_([own for own, _ in integers], [new for _, new in integers])


def shuffled(encode: Callable[[Tensor], Tensor], images_BCHW: Tensor, seed: int, step: int) -> Tensor:
    """`encode` with the images shuffled among the BatchNorm groups of all processes, so that a query and its key are normalised
    with different images (MoCo's ShuffleBN).

    Every process draws the same permutation. With one process and one group it is `encode` itself.
    """
    if distributed.world() == 1 and batchnorm.groups() == 1:
        return encode(images_BCHW)
    everything = distributed.gather(images_BCHW)
    order = upload(seeds.permutation(seed, "shuffle batchnorm", step, len(everything)), images_BCHW.device)
    keys = distributed.gather(encode(everything[distributed.own_share(order)].contiguous(memory_format=torch.channels_last)))
    return distributed.own_share(keys[torch.argsort(order)])
