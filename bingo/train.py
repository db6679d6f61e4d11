"""The one training loop: batch, terms, finite?, backward, step, after_step, log, checkpoint, resume. It knows no method by name.

Every random choice is a function of (seed, purpose, epoch, row), so a run that was killed and started again from its checkpoint
ends with the same bytes as one that was not.
"""

import inspect
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bingo import distributed, seeds
from bingo.checkpoints import Checkpoints
from bingo.data.loader import Request, ViewLoader
from bingo.errors import Interrupted, UserError
from bingo.methods.contract import Batch, Method, Progress
from bingo.params import ScheduleParams
from bingo.progress import progress_bar
from bingo.schedules import cosine_lr

if TYPE_CHECKING:  # a method without bags does not depend on them
    from bingo.bags import Bags

STORED_VIEWS = "extract"  # the purpose under which the teacher's pass draws its views (bingo/extract.py)


@dataclass
class Plan:
    """One step of this process: rows, the drawn members, the stored view of each key."""

    rows_B: np.ndarray
    member_rows_B: np.ndarray | None
    view_B: np.ndarray
    requests: list[Request]


@dataclass
class Result:
    """What a training leaves behind beside the method's weights: one record an epoch, and how fast it went in this process."""

    history: list[dict[str, float]] = field(default_factory=list)
    anchors: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0


def steps_in_epoch(train_rows: int, batch_anchors: int, name: str = "batch_anchors") -> int:
    """Whole batches in an epoch; the tail is dropped, another one each epoch.

    Raises UserError, which calls the parameter `name`, where there is no whole batch, or no equal share of it for each process.
    """
    if batch_anchors > train_rows:
        raise UserError(f"{name} = {batch_anchors}: there are only {train_rows} train images; lower it to at most that")
    if batch_anchors % distributed.world():
        raise UserError(f"{name} = {batch_anchors}: {distributed.world()} processes cannot share it equally; use a multiple")
    return train_rows // batch_anchors


def plan_epoch(
    method: Method, schedule: ScheduleParams, seed: int, train_rows: int, bags: "Bags | None", views: int, epoch: int, first: int
) -> Iterator[Plan]:
    """The steps of one epoch from step `first` on: this process's share of each global batch."""
    order_N = seeds.permutation(seed, "order", epoch, train_rows)
    for step in range(first, steps_in_epoch(train_rows, schedule.batch_anchors)):
        rows_B = distributed.own_share(order_N[step * schedule.batch_anchors : (step + 1) * schedule.batch_anchors])
        yield plan_step(method, seed, bags, views, epoch, rows_B)


def plan_step(method: Method, seed: int, bags: "Bags | None", views: int, epoch: int, rows_B: np.ndarray) -> Plan:
    """Which rows, members and views one step holds, as the method needs them."""
    needs = method.needs
    view_B = (seeds.uniforms(seed, "stored view", epoch, rows_B)[:, 0] * views).astype(np.int64)
    requests = [Request(rows_B, rows_B, "anchor", epoch, view) for view in range(needs.anchor_views)]
    if needs.same_view:
        requests[0] = Request(rows_B, rows_B, STORED_VIEWS, 0, view_B)
    member_rows_B = None
    if needs.members:
        assert bags is not None, "a method that needs members is given bags"
        member_rows_B = bags.draw(rows_B, seeds.uniforms(seed, "member", epoch, rows_B)[:, 0])
        requests += [Request(member_rows_B, rows_B, "member", epoch, view) for view in range(needs.member_views)]
    return Plan(rows_B, member_rows_B, view_B, requests)


def make_batch(method: Method, plan: Plan, views: list[Tensor], keys_TVP: Tensor | None, device: torch.device) -> Batch:
    """A plan with its views, and the stored keys of its rows."""
    anchors = method.needs.anchor_views
    batch = Batch(torch.from_numpy(plan.rows_B).to(device), views[:anchors], member_views=views[anchors:])
    if plan.member_rows_B is not None:
        batch.member_rows_B = torch.from_numpy(plan.member_rows_B).to(device)
    if method.needs.stored_keys:
        assert keys_TVP is not None, "a method that needs stored keys is given them"
        view_B = torch.from_numpy(plan.view_B).to(keys_TVP.device)
        batch.anchor_keys_BP = keys_TVP[batch.anchor_rows_B, view_B].float()
        if batch.member_rows_B is not None:
            batch.member_keys_BP = keys_TVP[batch.member_rows_B, view_B].float()
    return batch


class Trainer:
    """Trains one method on one process group. `probe` measures the student in words of {name: percent}; it runs on process 0."""

    def __init__(
        self,
        method: Method,
        loader: ViewLoader,
        schedule: ScheduleParams,
        seed: int,
        train_rows: int,
        device: torch.device,
        checkpoints: Checkpoints,
        bags: "Bags | None" = None,
        keys_TVP: Tensor | None = None,
        probe: Callable[[nn.Module], dict[str, float]] | None = None,
        label: str = "train",
    ):
        self.method = method.to(device).to(memory_format=torch.channels_last)
        self.loader, self.schedule, self.seed, self.device = loader, schedule, seed, device
        self.train_rows, self.bags, self.keys_TVP, self.probe, self.label = train_rows, bags, keys_TVP, probe, label
        self.checkpoints = checkpoints
        self.steps_per_epoch = steps_in_epoch(train_rows, schedule.batch_anchors)
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(
            trained, lr=schedule.lr, momentum=schedule.sgd_momentum, weight_decay=schedule.weight_decay, fused=True
        )
        self.network: nn.Module = self.method
        if distributed.world() > 1:
            ids = [device] if device.type == "cuda" else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the argument's new name is unknown to older versions of torch
                # Each process keeps its own BatchNorm statistics; the argument that says so changed its name in torch 2.15.
            names = inspect.signature(DistributedDataParallel).parameters
            own_buffers: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
            self.network = DistributedDataParallel(self.method, device_ids=ids, **own_buffers)
        self.sums: dict[str, Tensor] = {}
        self.step, self.result = 0, Result()
        self.stopping = False

    def resumes(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.checkpoints.exists()

    def run(self) -> Result:
        """Train to the end, from the last checkpoint if there is one. Raises Interrupted after SIGTERM or SIGINT, with a checkpoint."""
        self._resume()
        total = self.schedule.epochs * self.steps_per_epoch
        previous = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        begun = time.monotonic()
        try:
            with progress_bar(self.label, total * self.schedule.batch_anchors, "anchors") as bar:
                bar.resume_at(self.step * self.schedule.batch_anchors)
                while self.step < total:
                    self._epoch(bar)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self.result.seconds, self.result.wait_seconds = time.monotonic() - begun, self.loader.wait_seconds
        return self.result

    def _epoch(self, bar: Any) -> None:
        epoch, first = divmod(self.step, self.steps_per_epoch)
        views = self.keys_TVP.shape[1] if self.keys_TVP is not None else 1
        plans: list[Plan] = []

        def requests() -> Iterator[list[Request]]:
            for plan in plan_epoch(self.method, self.schedule, self.seed, self.train_rows, self.bags, views, epoch, first):
                plans.append(plan)
                yield plan.requests

        self.method.train()
        for position, tensors in enumerate(self.loader.views(requests())):
            batch = make_batch(self.method, plans[position], tensors, self.keys_TVP, self.device)
            self._train_step(batch, Progress(epoch, self.step))
            self.step += 1
            self.result.anchors += self.schedule.batch_anchors
            bar.advance_to(self.step * self.schedule.batch_anchors)
            if self.step % self.steps_per_epoch == 0:
                self._end_epoch(epoch)
            self._checkpoint_if_due()

    def _train_step(self, batch: Batch, progress: Progress) -> None:
        warmup_steps = self.schedule.lr_warmup_epochs * self.steps_per_epoch
        total = self.schedule.epochs * self.steps_per_epoch
        self.optimizer.param_groups[0]["lr"] = cosine_lr(self.step, total, self.schedule.lr, warmup_steps)
        terms = self.network(batch, progress)
        if distributed.any_true(not bool(torch.isfinite(terms["loss"])), self.device):
            raise UserError(f"{self.label}: the loss is {terms['loss'].item()} at step {self.step}; {self._way_out()}")
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        self.optimizer.step()
        self.method.after_step()
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def _way_out(self) -> str:
        if self.step == 0:
            return "no step was taken yet, so look at the method's temperature, image.std and augment"
        return f"lower lr (now {self.schedule.lr})"

    def _end_epoch(self, epoch: int) -> None:
        """Write the epoch's record: mean of each term over all processes, and the probe's figures when it is due."""
        record = {"epoch": epoch + 1, "lr": self.optimizer.param_groups[0]["lr"]}
        for name, value in self.sums.items():
            record[name] = round(float(distributed.mean(value / self.steps_per_epoch)), 6)
        every = self.schedule.probe_every_epochs
        last = epoch + 1 == self.schedule.epochs
        if self.probe is not None and every and ((epoch + 1) % every == 0 or last) and distributed.rank() == 0:
            record |= self.probe(self.method.student)
        distributed.barrier()
        self.sums = {}
        self.result.history.append(record)

    def _ask_to_stop(self, *_: Any) -> None:
        self.stopping = True

    def _checkpoint_if_due(self) -> None:
        stop = distributed.any_true(self.stopping, self.device)
        if stop or self.checkpoints.due():
            state = {
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "sums": self.sums,
                "history": self.result.history,
            }
            self.checkpoints.save(state, self.step)
        if stop:
            raise Interrupted(f"{self.label}: stopped at step {self.step} with a checkpoint; start again to go on from there")

    def _resume(self) -> None:
        state = self.checkpoints.load(self.device)
        if state is None:
            return
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.sums, self.result.history = state["step"], state["sums"], state["history"]
