"""The networks of a step, forward and backward, compiled by torch.compile: fewer kernels, and fewer passes over activations.

Only networks are compiled, not the parts of a step that draw random numbers or use the host (views, CutMix, negatives, queues), nor losses,
the optimizer, the moving average, evaluations and probes. A part that torch cannot compile runs uncompiled.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from bingo.runtime.errors import UserError, reason_of


class CompiledNetworks:
    """`networks` with compiled versions of their `forward`, compiled at the first call; `mode` is that of torch.compile (None: not
    compiled).

    With `reduce-overhead` and `max-autotune`, a GPU replays each of them as a CUDA graph, whose results are overwritten in the next step.
    Raises UserError if torch.compile does not work on this machine; `used` does if it cannot compile one of the networks.
    """

    def __init__(self, networks: Sequence[nn.Module], mode: str | None, device: torch.device):
        self.mode, self.forwards = mode, list[tuple[nn.Module, object]]()
        if mode is not None:
            _check(mode, device)
            self.forwards = [(network, _compiled(network.forward, mode)) for network in networks if [*network.parameters()]]

    def __bool__(self) -> bool:
        """Whether any network is compiled."""
        return bool(self.forwards)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Context manager for one step, in which calls of the networks run the compiled versions."""
        if not self.forwards:
            yield
            return
        torch.compiler.cudagraph_mark_step_begin()
        for network, forward in self.forwards:
            network.__dict__["forward"] = forward
        try:
            yield
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise UserError(f"compile = {self.mode}: torch cannot compile a network ({reason_of(error)}); set compile: null") from error
        finally:
            for network, _ in self.forwards:
                del network.__dict__["forward"]


def _compiled(function: object, mode: str) -> object:
    return torch.compile(function, mode=mode, dynamic=False)  # type: ignore[call-overload]


def _check(mode: str, device: torch.device) -> None:
    try:
        _compiled(lambda x: x + 1, mode)(torch.zeros(3, device=device))  # type: ignore[operator]
    except Exception as error:  # a missing C++ compiler, an old GPU and a broken cache raise different errors
        raise UserError(f"compile = {mode}: torch.compile does not work on this machine ({reason_of(error)}); set compile: null") from error
