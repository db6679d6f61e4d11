"""Checkpoints of an unfinished training, written atomically, one file per process; the previous one is kept until the next is complete.

A file is the output of torch.save, preceded by its sha256, because torch does not verify the checksums of zip archives.
"""

import io
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bingo.runtime import distributed
from bingo.runtime.artefacts import fingerprint, read_json, write_bytes, write_json
from bingo.runtime.checksums import Damaged, seal, unseal
from bingo.runtime.errors import Interrupted, UserError, out_of_memory, reason_of
from bingo.runtime.finite import LossWatch
from bingo.runtime.loggers import TrainingLog

SECONDS_VARIABLE = "BINGO_CHECKPOINT_SECONDS"


def seconds_between() -> float:
    """Seconds between two checkpoints: BINGO_CHECKPOINT_SECONDS, by default 120. Raises UserError if it is not a number from 0."""
    wanted = os.environ.get(SECONDS_VARIABLE, "120")
    try:
        seconds = float(wanted)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{SECONDS_VARIABLE} = {wanted}: allowed is a number of seconds from 0 (a checkpoint at every step)")
    return seconds


class Checkpoints:
    """The checkpoints in one folder. Each process keeps its own file, since BatchNorm's statistics differ between processes."""

    def __init__(self, folder: Path, every_seconds: float | None = None):
        self.folder = folder
        self.every_seconds = seconds_between() if every_seconds is None else every_seconds
        self.last_seconds = time.monotonic()
        self.stopping = False
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def stop_requests(self) -> Iterator[None]:
        """Context manager in which SIGTERM and SIGINT do not end the process but set `stopping`; the next `save_if_due` saves and stops."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.signal(number, lambda *_: setattr(self, "stopping", True)) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def due(self) -> bool:
        """Whether the interval has passed since the last save; the first process decides for all."""
        flag = torch.tensor([time.monotonic() - self.last_seconds >= self.every_seconds], dtype=torch.int32)
        if distributed.world() > 1:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else torch.device("cpu")
            flag = flag.to(device)
            torch.distributed.broadcast(flag, src=0)
        return bool(flag.item())

    def save_if_due(self, state: Callable[[], dict[str, Any]], step: int, device: torch.device, label: str) -> None:
        """Save `state()` if the interval has passed or any process was asked to stop. Raises Interrupted in the latter case."""
        stop = distributed.any_true(self.stopping, device)
        if stop or self.due():
            self.save(state(), step)
        if stop:
            raise Interrupted(f"{label}: stopped at step {step} with a checkpoint; start again to resume")

    def save(self, state: dict[str, Any], step: int) -> None:
        """Write this process's state. When all processes have, `latest.json` records the step and older files are removed."""
        content = io.BytesIO()
        torch.save(state, content)
        write_bytes(self._file(step, distributed.rank()), seal(content.getvalue()))
        distributed.barrier()
        if distributed.rank() == 0:
            latest = {"step": step, "processes": distributed.world()}
            write_json(self.folder / "latest.json", {**latest, "checksum": fingerprint(latest)})
            for path in self.folder.glob("step-*.pt"):
                if not path.name.startswith(f"step-{step}."):
                    path.unlink()
        self.last_seconds = time.monotonic()

    def exists(self) -> bool:
        """Whether a complete checkpoint exists."""
        return (self.folder / "latest.json").exists()

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """This process's state at the last complete checkpoint, or None. If the number of processes has changed, all use that of the first
        process."""
        if not self.exists():
            return None
        latest = read_json(self.folder / "latest.json")
        try:
            if latest.pop("checksum") != fingerprint(latest):
                raise Damaged("latest.json does not fit its checksum")
            rank = distributed.rank() if latest["processes"] == distributed.world() else 0
            content = unseal(self._file(latest["step"], rank).read_bytes())
            return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        except Exception as error:  # torch raises many kinds of errors for a damaged file
            if line := out_of_memory(error):
                raise UserError(f"{self.folder}: the checkpoint cannot be loaded: {line}") from None
            reason = reason_of(f"{type(error).__name__}: {error}")
            raise UserError(f"{self.folder}: the checkpoint is damaged ({reason}); delete this folder to start again") from None

    def _file(self, step: int, rank: int) -> Path:
        return self.folder / f"step-{step}.rank-{rank}.pt"


class Resumable:
    """A training that resumes from its last checkpoint: `parts` are its modules and optimizers, `values` names of its own attributes.

    It raises UserError if a loss is not finite; no checkpoint is saved after such a loss. `label` is its name in messages.
    """

    checkpoints: Checkpoints
    device: torch.device
    label: str
    step: int
    watch: LossWatch
    optimizer: torch.optim.Optimizer
    parts: Mapping[str, nn.Module | torch.optim.Optimizer]
    values: tuple[str, ...]
    log = TrainingLog()

    def way_out(self, step: int) -> str:
        """How to fix a loss that is not finite at this step."""
        raise AssertionError(f"{type(self).__name__} has no way out")

    def _watch_loss(self, loss: Tensor) -> None:
        """Record the loss of this step, and read the record if it is due."""
        self.watch.note(loss, self.step)
        if self.watch.due(self.step):
            self._refuse_what_is_not_finite()

    def _refuse_what_is_not_finite(self) -> None:
        """Raise UserError if a loss was not finite since the last call. Waits for the device."""
        found = self.watch.first(self.step)
        self.log.flush()
        if found is not None:
            raise UserError(f"{self.label}: the loss is {found[1]} at step {found[0]}; {self.way_out(found[0])}")

    def _log_step(self, values: Mapping[str, Tensor]) -> None:
        """Keep scalars of this step for the loggers, and the norm of all gradients before clipping. Does not wait for the device."""
        if self.log.due(self.step):
            groups = self.optimizer.param_groups
            gradients = [parameter.grad for group in groups for parameter in group["params"] if parameter.grad is not None]
            seen = {name: value.detach() for name, value in values.items()}
            self.log.keep(self.step + 1, groups[0]["lr"], seen | {"grad_norm": nn.utils.get_total_norm(gradients, foreach=True)})

    def _checkpoint_if_due(self) -> None:
        """Save a checkpoint if it is due. Several processes agree on it only when the loss is also read, because that waits for the
        device."""
        if distributed.world() == 1 or self.watch.due(self.step):
            self.checkpoints.save_if_due(self._state, self.step, self.device, self.label)

    def resumes(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return self.checkpoints.exists()

    def _state(self) -> dict[str, Any]:
        self._refuse_what_is_not_finite()
        return {name: part.state_dict() for name, part in self.parts.items()} | {name: getattr(self, name) for name in self.values}

    def _resume(self) -> None:
        if (state := self.checkpoints.load(self.device)) is not None:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            for name in self.values:
                setattr(self, name, state[name])
