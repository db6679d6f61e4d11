"""Collective operations that also work in a single process; no other file asks torch whether there is a process group."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bingo.runtime.errors import GroupLost, Interrupted, first_sentence

_Rows = TypeVar("_Rows", np.ndarray, Tensor)


def rank() -> int:
    """This process's number, 0 if there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes, 1 where no group was started."""
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
    """Join the group that the launcher's environment describes (WORLD_SIZE, RANK, MASTER_ADDR), if there is one.

    Raises GroupLost if the body failed because another process is gone. A process that fails by itself keeps its connections open
    until it ends, so that the others notice only after it has reported the reason.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    try:
        yield
    except Interrupted:  # all processes have agreed on it
        dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise GroupLost(f"process {dist.get_rank()} of {dist.get_world_size()} lost the others ({first_sentence(str(error))})") from error
    dist.destroy_process_group()


def gather(x_BD: Tensor) -> Tensor:
    """Rows of all processes in rank order, (world * B, D), without gradient; every process must hold the same number of rows."""
    if world() == 1:
        return x_BD
    parts = [torch.empty_like(x_BD) for _ in range(world())]
    dist.all_gather(parts, x_BD.contiguous())
    return torch.cat(parts)


def mean(x: Tensor) -> Tensor:
    """The mean over processes of a tensor that each of them holds."""
    return total(x) / world() if world() > 1 else x


def total(x: Tensor) -> Tensor:
    """The sum over processes of a tensor that each of them holds."""
    if world() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x


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
    # The argument that leaves buffers alone changed its name in torch 2.15.
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
    """The lists of all processes as one, in rank order; they travel pickled between the processes of this run."""
    if world() == 1:
        return objects
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, objects)
    return [item for part in parts for item in part]
