"""Two processes with a simulated GPU each: the same step as on the CPU, waiting only in collective operations."""

import os
import socket
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bingo.runtime import distributed
from tests.pretended_gpu.device import Record, pretended_gpu
from tests.pretended_gpu.steps import CPU, Case, deterministic, steps, trainer
from tests.pretended_gpu.streams import GPU
from tests.processes import start_two

CASES = [
    Case("bingo", changes={"terms": "symmetric_mix"}),
    Case("bingo", "live", changes={"negatives": "queue", "teacher_batchnorm": "batch"}),
    Case("moco", "momentum"),
    Case("coss"),
]
pytestmark = pytest.mark.slow


class AveragedGradients(nn.Module):
    """Does what DistributedDataParallel does, whose reducer needs CUDA memory: equal initial weights, and mean gradients."""

    def __init__(self, module: nn.Module, device_ids: list[torch.device], **_: object):
        super().__init__()
        assert device_ids == [GPU]
        self.module, self.process_group = module, None
        for parameter in module.parameters():
            dist.broadcast(parameter.data, src=0)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._average)

    def forward(self, *arguments: object) -> object:
        return self.module(*arguments)

    def _average(self, parameter: nn.Parameter) -> None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def _join(rank: int, port: int) -> None:
    group = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= group | {"MASTER_PORT": str(port)}


def _trained(folder: Path, device: torch.device, record: Record) -> list[dict]:
    """The state and summed losses after two steps of each case, on the CPU, and the faults of the second step."""
    states = []
    for number, case in enumerate(CASES):
        run = trainer(folder / f"{device.type}-{number}", case, device)
        steps(run, 2, record.clear)
        faults = record.copy().faults
        state = {name: value.detach().cpu().clone() for name, value in run.method.state_dict().items()}
        states.append({"state": state, "sums": {name: value.detach().cpu() for name, value in run.sums.items()}, "faults": faults})
    return states


def on_the_cpu(rank: int, port: int, folder: Path) -> None:
    _join(rank, port)
    with deterministic(), distributed.group(CPU):
        torch.save(_trained(folder, CPU, Record()), folder / f"cpu-{rank}.pt")


def on_gpus(rank: int, port: int, folder: Path) -> None:
    """Collective operations of CUDA tensors are passed to gloo with the host's numbers."""
    _join(rank, port)
    asked, start = [], dist.init_process_group
    with deterministic(), pretended_gpu(2) as record, mock.patch.object(distributed, "DistributedDataParallel", AveragedGradients):
        replaced = lambda backend, device_id, **more: asked.append((backend, device_id)) or start("gloo", **more)  # noqa: E731
        with mock.patch.object(dist, "init_process_group", replaced), distributed.group(GPU):
            states = _trained(folder, GPU, record)
    assert asked == [("nccl", GPU)]
    torch.save(states, folder / f"gpu-{rank}.pt")


def on_both(rank: int, ports: list[int], folder: Path) -> None:
    """One pair of processes for both devices, because starting it takes longer than training."""
    for work, port in zip((on_the_cpu, on_gpus), ports, strict=True):
        work(rank, port, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder to which both processes have written their results."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in (one, other)]
    start_two(on_both, ports, folder)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_two_gpus_train_the_weights_of_two_processes_on_the_cpu(folder, rank):
    on_cpu, on_gpu = (torch.load(folder / f"{name}-{rank}.pt") for name in ("cpu", "gpu"))
    for case, gpu, cpu in zip(CASES, on_gpu, on_cpu, strict=True):
        assert gpu["faults"] == {}, case.name
        for kind in ("sums", "state"):
            for name, value in cpu[kind].items():
                torch.testing.assert_close(gpu[kind][name], value, rtol=1e-5, atol=1e-6, msg=f"{case.name}: {name}")


def test_both_processes_have_the_same_network(folder):
    first, second = (torch.load(folder / f"gpu-{rank}.pt") for rank in (0, 1))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a["state"][name], b["state"][name]) for name in a["state"] if name.endswith("weight"))
