"""Collective operations that also work in a single process; no other file asks torch whether there is a process group."""

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bingo.runtime.errors import FAILED, GroupLost, Interrupted, UserError, first_sentence, out_of_memory, printable, reason_of

# How long to wait for another process that measures, writes or computes its last chunk: NCCL's ten minutes are too short.
_WAIT = timedelta(hours=6)
_POLL_SECONDS, _END_SECONDS = 1.0, 10.0
_Rows = TypeVar("_Rows", np.ndarray, Tensor)


def rank() -> int:
    """This process's number, 0 if there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes, 1 if no group was started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share() -> str:
    """Suffix of a progress label for work that is divided among processes; empty if there is one process."""
    return f" (process {rank() + 1} of {world()})" if world() > 1 else ""


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Context manager that joins the group described by the launcher's environment (WORLD_SIZE, RANK, MASTER_ADDR), if there is one.

    Raises GroupLost if the body failed because another process is gone. A process that fails itself keeps its connections open
    until it ends, so that the others notice only after it has reported the reason. Processes that still wait for it then end and print its
    line.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    store, number, processes = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=number, world_size=processes, timeout=_WAIT, device_id=device_id)
    peers = _peers()
    try:
        with _Failures(store.clone(), f"process {number} of {processes}") if backend == "nccl" else nullcontext():
            yield
    except GroupLost as error:
        error.peers = peers
        raise
    except Interrupted:  # all processes have agreed on it
        dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise GroupLost(f"process {number} of {processes} lost the others ({first_sentence(str(error))})", peers) from error
    dist.destroy_process_group()


def _peers() -> frozenset[int]:
    """The ids of the processes that this process's torchrun has started; none without torchrun, or if the system does not list them."""
    found: list[str] = []
    with suppress(OSError):
        for file in Path(f"/proc/{os.getppid()}/task").glob("*/children") if "TORCHELASTIC_RUN_ID" in os.environ else []:
            found += file.read_text().split()
    return frozenset(map(int, found))


def _is_loss(error: BaseException) -> bool:
    """Whether an operation failed because another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class _Failures:
    """A context in which the first process that fails passes its line to the others, through the group's store.

    Gloo notices that a process has ended. In NCCL, the others would wait until the timeout, and cannot be reached by signals that Python
    handles; therefore a thread checks the store, and ends the process.
    """

    def __init__(self, store: dist.Store, process: str):
        self._store, self._process, self._key = store, process, "failure"
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        try:
            if isinstance(error, Exception) and not isinstance(error, Interrupted):
                (self._pass_on if _is_loss(error) else self._report)(error)
        finally:
            self._left.set()
            self._thread.join(_END_SECONDS)

    def _report(self, error: Exception) -> None:
        line = error.lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {reason_of(error)}"
        line = out_of_memory(error) or line
        with suppress(dist.DistError):
            self._store.compare_set(self._key, "", f"{_machine()} {self._process} failed: {printable(line)}")
        if rank() == 0 and os.environ.get("LOCAL_WORLD_SIZE") != str(
            world()
        ):  # process 0 holds the store; on one machine the launcher acts
            self._left.wait(2 * _POLL_SECONDS)

    def _pass_on(self, error: Exception) -> None:
        with suppress(dist.DistError):
            if found := self._first():
                raise GroupLost(found[1]) from error

    def _first(self) -> list[str]:
        """The machine of the process that failed first, and its line; or None. Raises DistError if the process with the store has ended."""
        return self._store.get(self._key).decode().split(" ", 1) if self._store.check([self._key]) else []

    def _watch(self) -> None:
        with suppress(dist.DistError):
            while not self._left.wait(_POLL_SECONDS):
                found = self._first()
                if found and not self._left.wait(_END_SECONDS):  # in which the launcher or a lost connection ends most of them
                    if os.environ.get("LOCAL_RANK", "0") == "0" and found[0] != _machine():
                        print(f"error: {found[1]}; start again to resume", file=sys.stderr, flush=True)
                    os._exit(FAILED)


def _machine() -> str:
    """The number of this machine in torchrun; without torchrun, each process counts as a machine."""
    return os.environ.get("GROUP_RANK", f"of-{rank()}")


def gather(x_BD: Tensor) -> Tensor:
    """Rows of all processes in rank order, (world * B, D), without gradient; every process must have the same number of rows."""
    if world() == 1:
        return x_BD
    x_BD = x_BD.contiguous()  # first: empty_like keeps strides
    parts = [torch.empty_like(x_BD) for _ in range(world())]
    dist.all_gather(parts, x_BD)
    return torch.cat(parts)


def mean(x: Tensor) -> Tensor:
    """The mean of a tensor over processes."""
    return total(x) / world() if world() > 1 else x


def total(x: Tensor) -> Tensor:
    """The sum of a tensor over processes."""
    if world() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x


def in_turn(x: Tensor, work: Callable[[], None]) -> None:
    """Run `work` on the processes one after the other in rank order. Each receives in `x` the result of the previous process; at the end,
    all have `x` of the last process."""
    if rank() > 0:
        dist.recv(x, rank() - 1)
    work()
    if rank() < world() - 1:
        dist.send(x, rank() + 1)
    dist.broadcast(x, src=world() - 1)


def any_true(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any process."""
    if world() == 1:
        return flag
    x = torch.tensor(float(flag), device=device)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return bool(x.item())


def own_share(rows_N: _Rows) -> _Rows:
    """This process's consecutive share of the rows of a global batch, whose length must be divisible by the number of processes."""
    share = len(rows_N) // world()
    return rows_N[rank() * share : (rank() + 1) * share]


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with its gradients averaged over processes; each process keeps its own buffers, including BatchNorm's statistics."""
    if world() == 1:
        return module
    # The name of the argument that excludes buffers changed in torch 2.15.
    known = inspect.signature(DistributedDataParallel).parameters
    own_buffers: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    parallel = DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None, **own_buffers)
    # Whatever releases the group last waits for its threads to end. torch 2.11's reducer waits while holding the GIL, for which a thread
    # that still releases its tensors waits in turn; this attribute waits without the GIL. Set again, it is released after the reducer.
    parallel.process_group = parallel.__dict__.pop("process_group")
    return parallel


def share_buffers(module: nn.Module) -> None:
    """Copy the buffers of the first process to all others, so that all hold the same network."""
    if world() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gather_objects(objects: list[Any]) -> list[Any]:
    """The lists of all processes, concatenated in rank order; they are pickled to be sent between the processes of this run."""
    if world() == 1:
        return objects
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, objects)
    return [item for part in parts for item in part]
