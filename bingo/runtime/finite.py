"""Detect a loss that is not finite without waiting for the device at every step."""

import math

import torch
from torch import Tensor

from bingo.runtime import distributed


class LossWatch:
    """Records losses on the device; the host reads them when `due` says so, and finds the first that is not finite.

    On a GPU this is every 16th step, so that the host may run ahead; on the CPU, where reading costs nothing, every step. Since further
    steps damage the weights, the caller must read the record before saving them.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.every_steps = 1 if device.type == "cpu" else 16
        self._losses, self._steps = list[Tensor](), list[int]()

    def due(self, step: int) -> bool:
        """Whether the record is read at this step, including the first one; the same on every process."""
        return step % self.every_steps == 0

    def note(self, loss: Tensor, step: int) -> None:
        """Record the loss of this step, float32 ()."""
        self._losses.append(loss.detach())
        self._steps.append(step)

    def first(self, step: int) -> tuple[int, float] | None:
        """Step and value of the first loss that was not finite, or None. Waits for the device; every process must call this.

        If it occurred only on another process, its value is unknown (NaN), and the current `step` is returned as its step.
        """
        losses = torch.stack(self._losses).tolist() if self._losses else []
        found = next(((step, loss) for step, loss in zip(self._steps, losses, strict=True) if not math.isfinite(loss)), None)
        if found is None:
            self._losses, self._steps = [], []
        if not distributed.any_true(found is not None, self.device):
            return None
        return found or (step, float("nan"))
