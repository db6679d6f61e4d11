"""The training loop for all methods: batch, loss terms, check for finite loss, backward, step, after_step, log, checkpoint, resume.
Nothing in a step waits for the device.

Every random choice is a function of (seed, purpose, epoch, row), so a run that is resumed from its checkpoint
ends with the same bytes as an uninterrupted one.
"""

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bingo import seeds
from bingo.methods.contract import Batch, Method, Progress
from bingo.methods.parts.momentum import MomentumCopy, average_into
from bingo.nets.batchnorm.groups import counted_together, counting_layers, grouped_batchnorm, own_groups
from bingo.nets.checkpoint import on_host
from bingo.nets.precision import casts_kept
from bingo.params import ScheduleParams
from bingo.runtime import distributed
from bingo.runtime.checkpoints import Checkpoints, Resumable
from bingo.runtime.errors import UserError
from bingo.runtime.finite import LossWatch
from bingo.runtime.progress import progress_bar
from bingo.schedules import make_optimizer, set_rates, update
from bingo.training.batches import Batches
from bingo.training.compiled import CompiledNetworks


@dataclass
class TrainingResult:
    """Results of a training in addition to the method's weights: one record per epoch, the best epoch if it was kept, the spread of
    the network's features, and the times in this process: of all, of waiting for data, of the probe.

    `best` is {"epoch": from 1 (0: before training), "probe": its figures, "weights": the student's state dict at that epoch, on the CPU} on
    process 0; {} if none was kept. `average` is the state dict of the student's moving average, likewise.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    anchors: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    probe_seconds: float = 0.0


class Trainer(Resumable):
    """Trains one method on one process group. `probe` measures the student as {name: percent} on process 0; with `measure_start`, also
    before the first step, as epoch 0.

    `batchnorm_groups` of the global batch have separate BatchNorm statistics; None: as set in `schedule`, without a momentum encoder.
    `keep_best`: keep the student's weights of the epoch with the highest first figure of the probe, the earliest in a tie. They are
    part of the checkpoint, so a resumed run keeps them. A step has as many parts as `batches` has; their gradients are added.
    `student_ema`: decay of a moving average of the student, including its BatchNorm statistics; lower at first: 1 - t^(-2/3) in step t, as
    in timm; 0: no moving average.
    """

    def __init__(
        self,
        method: Method,
        batches: Batches,
        schedule: ScheduleParams,
        device: torch.device,
        checkpoints: Checkpoints,
        probe: Callable[[nn.Module], dict[str, float]] | None = None,
        label: str = "train",
        batchnorm_groups: int | None = None,
        keep_best: bool = False,
        measure_start: bool = False,
        student_ema: float = 0.0,
    ):
        self.method = method.to(device).to(memory_format=torch.channels_last)
        self.batches, self.schedule, self.device = batches, schedule, device
        self.steps_per_epoch = batches.steps_per_epoch
        self.part, self.seen = 0, (dict[str, Tensor](), list[Any]())  # of a step, and the parts' terms and keys so far
        self.groups = own_groups(batchnorm_groups or schedule.groups_for(False, distributed.world()), parts=batches.parts)
        self.own_anchors = schedule.batch_anchors // distributed.world() // batches.parts
        self.checkpoints, self.probe, self.label = checkpoints, probe, label
        self.keep_best, self.measure_start = keep_best, measure_start
        self.optimizer = make_optimizer(schedule, {method: schedule.lr}, schedule.sgd_momentum, fused=True)
        self.network = distributed.data_parallel(self.method, device)
        moving = [part.network for part in method.children() if isinstance(part, MomentumCopy)]
        self.compiled = CompiledNetworks([method.student, method.head, *moving, *method.frozen], schedule.compile, device)
        self.watch, self.counting = LossWatch(device), [] if self.compiled else counting_layers(method)
        self.sums: dict[str, Tensor] = {}
        self.step, self.history, self.best, self.result = 0, list[dict[str, float]](), dict[str, Any](), TrainingResult()
        self.parts, self.values = {"method": self.method, "optimizer": self.optimizer}, ("step", "sums", "history", "best")
        self.student_ema, self.average = student_ema, copy.deepcopy(method.student) if student_ema else None
        if self.average is not None:
            self.parts = {**self.parts, "average": self.average}

    def run(self) -> TrainingResult:
        """Train to the end, from the last checkpoint if there is one. On SIGTERM or SIGINT, saves a checkpoint and raises Interrupted."""
        self._resume()
        total, anchors = self.schedule.epochs * self.steps_per_epoch, self.schedule.batch_anchors
        self.log.begin(self.step, total, anchors, "anchors", lambda: self.batches.loader.wait_seconds)
        if self.measure_start and not self.history and self.probe is not None and self.schedule.probe_every_epochs:
            self._record({"epoch": 0, **self._probed(0)})
        begun = time.monotonic()
        with self.checkpoints.stop_requests(), progress_bar(self.label, total * anchors, "anchors") as bar:
            bar.resume_at(self.step * anchors)
            while self.step < total:
                self._epoch(bar)
        self.result.history, self.result.best = self.history, self.best
        self.result.average = on_host(self.average.state_dict()) if self.average is not None else {}
        self.result.seconds, self.result.wait_seconds = time.monotonic() - begun, self.batches.loader.wait_seconds
        return self.result

    def _epoch(self, bar: Any) -> None:
        epoch, first = divmod(self.step, self.steps_per_epoch)
        self.method.train()
        for batch in self.batches.epoch(epoch, first):
            self._train_step(batch, Progress(epoch, self.step))
            if self.part:
                continue
            self.step += 1
            self.result.anchors += self.schedule.batch_anchors
            bar.advance_to(self.step * self.schedule.batch_anchors)
            if self.step % self.steps_per_epoch == 0:
                self._end_epoch(epoch, bar)
            self._checkpoint_if_due()

    def _train_step(self, batch: Batch, progress: Progress) -> None:
        """One part of a step; the last one updates the weights."""
        parts, last = self.batches.parts, self.part + 1 == self.batches.parts
        if self.part == 0:
            set_rates(self.optimizer, self.step, self.steps_per_epoch, self.schedule)
            self.optimizer.zero_grad(set_to_none=True)  # before the forward pass, whose activations can reuse the memory
            self._seed_draws()
        with nullcontext() if last else getattr(self.network, "no_sync", nullcontext)():  # processes share gradients once in a step
            terms = self._terms(batch, progress)
            self._watch_loss(terms["loss"])
            (terms["loss"] / parts if parts > 1 else terms["loss"]).backward()
        if parts > 1:
            terms = self._joined(terms, last)
        if last:
            self._log_step(terms)
            update(self.optimizer, self.schedule)
            self.method.after_step()
            if self.average is not None:
                average_into(self.average, self.method.student, min(self.student_ema, 1 - (self.step + 1) ** (-2 / 3)))
            for name, value in terms.items():
                self.sums[name] = self.sums[name].add_(value.detach()) if name in self.sums else value.detach().double()
        self.part = 0 if last else self.part + 1

    def _joined(self, terms: dict[str, Tensor], last: bool) -> dict[str, Tensor]:
        """The terms' means over the parts so far; after the last part, the method's `pushed` has the keys of all parts."""
        means = {name: value.detach() / self.batches.parts for name, value in terms.items()}
        pushed = [(queue, keys_BP.clone(), rows_B) for queue, keys_BP, rows_B in self.method.pushed]  # CUDA graphs may overwrite keys
        if self.part:
            means = {name: self.seen[0][name] + value for name, value in means.items()}
            both = zip(self.seen[1], pushed, strict=True)
            pushed = [(queue, torch.cat([one, two]), torch.cat([rows, more])) for (queue, one, rows), (_, two, more) in both]
        self.seen = means, pushed
        if last:
            self.method.pushed = pushed
        return means

    def _terms(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        grouped = grouped_batchnorm(self.groups, self.own_anchors, self.part, self.batches.parts)
        with counted_together(self.counting), grouped, self._casts(), self.compiled.used():
            return self.network(batch, progress)

    def _casts(self) -> AbstractContextManager:
        """Cast all weights together, except if other processes wait for gradients during the backward pass; compiled networks do their own
        casts."""
        if self.compiled or (distributed.world() > 1 and not self.method.gradients_come_together):
            return nullcontext()
        return casts_kept(self.method, self.schedule.precision, self.device)

    def _seed_draws(self) -> None:
        """Seed the network's own random draws (dropout, stochastic depth) by seed, step and process."""
        purpose = f"dropout of process {distributed.rank()}"
        seed_generator = torch.cuda.manual_seed if self.device.type == "cuda" else torch.default_generator.manual_seed
        seed_generator(seeds.torch_seed(self.batches.seed, purpose, self.step))  # only the device's: torch.manual_seed takes 0.2 ms

    def way_out(self, step: int) -> str:
        if step == 0:
            return "no step was taken yet, so check the method's temperature, image.std and augment"
        return f"lower lr (now {self.schedule.lr})"

    def _check_weights(self) -> None:
        """Check the weights after the last step, since the loss is checked only before a step."""
        tensors = [tensor for tensor in self.method.state_dict().values() if tensor.is_floating_point() and tensor.numel()]
        largest = torch.stack([norm.float() for norm in torch._foreach_norm(tensors, float("inf"))])
        if distributed.any_true(not bool(largest.isfinite().all()), self.device):
            raise UserError(f"{self.label}: weights are nan or inf after {self.step} steps; lower lr (now {self.schedule.lr})")

    def _end_epoch(self, epoch: int, bar: Any) -> None:
        """Write the epoch's record: mean of each term over all processes, and the probe's figures when it is due."""
        self._refuse_what_is_not_finite()
        self._check_weights()
        record = {"epoch": epoch + 1, "lr": self.optimizer.param_groups[0]["lr"]}
        for name, value in self.sums.items():
            record[name] = round(float(distributed.mean(value / self.steps_per_epoch)), 6)
        every = self.schedule.probe_every_epochs
        last = epoch + 1 == self.schedule.epochs
        if self.probe is not None and every and ((epoch + 1) % every == 0 or last):
            record |= (probed := self._probed(epoch + 1))
            bar.remark = ", ".join(f"{name} {percent:.1f}" for name, percent in probed.items())
        self.sums = {}
        self._record(record)

    def _record(self, record: dict[str, float]) -> None:
        self.history.append(record)
        self.log.summary(self.step, "epoch", record)

    def _probed(self, epoch: int) -> dict[str, float]:
        """The probe's figures after this many epochs, on process 0, which also keeps the best weights; the others wait."""
        figures = dict[str, float]()
        if self.probe is not None and distributed.rank() == 0:
            begun = time.monotonic()
            figures = self.probe(self.method.student)
            self.result.probe_seconds += time.monotonic() - begun
            if self.keep_best:
                name, value = next(iter(figures.items()))
                if not self.best or value > self.best["probe"][name]:
                    self.best = {"epoch": epoch, "probe": figures, "weights": on_host(self.method.student.state_dict())}
            self.log.measure(self.method.student)
        distributed.barrier()
        return figures
