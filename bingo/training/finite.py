"""Detect a loss that is not finite without waiting for the device at every step."""

import torch
from torch import Tensor

from bingo.runtime import distributed


class LossWatch:
    """Records on the device the first loss that is not finite and its step; the host reads them when `due` says so.

    On a GPU that is every 16th step, so that the host may run ahead of it; on the CPU, where reading costs nothing, every step. Steps
    taken meanwhile damage the weights, so the caller reads the record before saving them.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.every_steps = 1 if device.type == "cpu" else 16
        self._step, self._loss = torch.full((), -1, device=device), torch.zeros((), device=device)

    def due(self, step: int) -> bool:
        """Whether the record is read at this step, including the first one; the same on every process."""
        return step % self.every_steps == 0

    def note(self, loss: Tensor, step: int) -> None:
        """Record this loss, float32 (), and its step if it is the first that is not finite."""
        is_first = ~torch.isfinite(loss.detach()) & (self._step < 0)
        self._step = torch.where(is_first, step, self._step)
        self._loss = torch.where(is_first, loss.detach(), self._loss)

    def first(self, step: int) -> tuple[int, float] | None:
        """Step and value of the first loss that was not finite, or None. Waits for the device; every process must call this.

        If it occurred only on another process, its value is unknown (NaN), and the current `step` is returned as its step.
        """
        noted = int(self._step)
        if not distributed.any_true(noted >= 0, self.device):
            return None
        return (noted, float(self._loss)) if noted >= 0 else (step, float("nan"))
