"""Groups of two processes: the error of a failed process reaches one that waits for it, limits of waiting, and gathered arrays."""

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bingo.runtime import distributed
from bingo.runtime.errors import GroupLost, Interrupted, UserError, out_of_memory
from tests.processes import start_two

GPU = torch.device("cuda", 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join(rank: int, port: int, folder: Path, end_seconds: float = 0.3, **environment: str) -> None:
    """Join a group of two as process `rank`; standard error goes to a file."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2", **environment}
    os.dup2(os.open(folder / f"err-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    distributed._POLL_SECONDS, distributed._END_SECONDS = 0.1, end_seconds
    gloo = dist.init_process_group
    dist.init_process_group = lambda backend, **given: gloo("gloo", **{**given, "device_id": None})  # instead of NCCL, which needs GPUs
    torch.cuda.set_device = lambda device: None


def fails_and_keeps_its_connections(rank: int, port: int, folder: Path, failing: int, error: Exception, torchrun: dict) -> None:
    """The other process is in a barrier of Gloo, which does not return while the connection exists, as in NCCL."""
    join(rank, port, folder, **{name: values[rank] for name, values in torchrun.items()})
    with suppress(type(error)), distributed.group(GPU):
        if rank == failing:
            raise error
        dist.barrier()
    time.sleep(120)


MISTAKE = UserError(["distill.lr = 9: too high", "another"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "error", "torchrun", "line"),
    [
        (1, MISTAKE, {}, "distill.lr = 9: too high"),
        (0, RuntimeError("a fault\nof the code"), {}, "RuntimeError: a fault of the code"),
        (1, MemoryError("7 GiB"), {}, str(out_of_memory(MemoryError("7 GiB")))),
        (1, FileNotFoundError(2, "No such file", "a\x07b"), {}, r"FileNotFoundError: [Errno 2] No such file: 'a\x07b'"),
        (0, MISTAKE, {"LOCAL_RANK": "00", "GROUP_RANK": "01"}, "distill.lr = 9: too high"),
        (1, MISTAKE, {"LOCAL_RANK": "33", "GROUP_RANK": "01"}, None),  # the first process of that machine reports it
        (1, MISTAKE, {"LOCAL_RANK": "00", "GROUP_RANK": "00"}, None),  # the failed process has reported it on this machine
    ],
)
def test_a_process_that_waits_for_a_failed_one_ends_with_its_line(tmp_path, failing, error, torchrun, line):
    with pytest.raises(torch.multiprocessing.ProcessExitedException) as ended:
        start_two(fails_and_keeps_its_connections, free_port(), tmp_path, failing, error, torchrun)
    assert (ended.value.error_index, ended.value.exit_code) == (1 - failing, 1)
    said = (tmp_path / f"err-{1 - failing}").read_text()
    assert said.count("error: ") == (line is not None)
    assert said.endswith(f"error: process {failing} of 2 failed: {line}; start again to resume\n" if line else "")
    assert "failed: " not in (tmp_path / f"err-{failing}").read_text()


def fails_and_ends(rank: int, port: int, folder: Path) -> None:
    join(rank, port, folder, end_seconds=30)
    try:
        with distributed.group(GPU):
            if rank == 1:
                raise UserError("augment.blur_p = 2: allowed is 0 to 1")
            dist.barrier()
    except GroupLost as lost:
        (folder / "lost").write_text(str(lost))
    except UserError:
        os._exit(0)


def test_a_lost_connection_is_reported_with_the_line_of_the_process_that_failed(tmp_path):
    start_two(fails_and_ends, free_port(), tmp_path)
    assert (tmp_path / "lost").read_text() == "process 1 of 2 failed: augment.blur_p = 2: allowed is 0 to 1"


def ends_well(rank: int, port: int, folder: Path) -> None:
    """The first process, which hosts the store, ends long before the other; both leave several groups, one of them by agreement."""
    join(rank, port, folder)
    with pytest.raises(Interrupted), distributed.group(GPU):
        raise Interrupted("stopped")
    os.environ["MASTER_PORT"] = (folder / "second").read_text()
    with distributed.group(GPU):
        dist.barrier()
        whole = torch.arange(2.0 * 2 * 3 * 4 * 5).view(4, 3, 4, 5)
        own = whole[2 * rank : 2 * rank + 2]
        for x, wanted in (
            (own.contiguous(memory_format=torch.channels_last), whole),
            (own.transpose(1, 2), whole.transpose(1, 2)),
            (own[:, 0, 0], whole[:, 0, 0]),
            (own[:, 1].long(), whole[:, 1].long()),
        ):
            given = []
            real = dist.all_gather
            dist.all_gather = lambda parts, x, given=given, real=real: given.extend([*parts, x]) or real(parts, x)
            assert torch.equal(distributed.gather(x), wanted)
            dist.all_gather = real
            assert {part.stride() for part in given} == {x.contiguous().stride()}  # NCCL copies memory in its layout
        time.sleep(rank)
    (folder / f"well-{rank}").touch()


def test_a_group_that_succeeds_ends_silently_and_gathers_rows_of_any_layout(tmp_path):
    (tmp_path / "second").write_text(str(free_port()))
    start_two(ends_well, free_port(), tmp_path)
    for rank in (0, 1):
        assert (tmp_path / f"well-{rank}").exists()
        assert "error" not in (tmp_path / f"err-{rank}").read_text()


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_processes_wait_for_one_another_longer_than_a_pass_takes(monkeypatch, device, backend):
    asked: dict = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "rendezvous", lambda address: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda name, **given: asked.update(given, backend=name))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: asked.update(left=True))
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: asked.update(set=chosen))
    with distributed.group(torch.device(device)):
        pass
    assert asked["timeout"] >= timedelta(hours=6)
    assert (asked["backend"], asked["rank"], asked["world_size"], asked["left"]) == (backend, 1, 2, True)
    assert (asked.get("set"), asked["device_id"]) == ((torch.device("cuda"),) * 2 if device == "cuda" else (None, None))
