"""Several processes and machines: stages under torchrun, messages when a process dies, and the same bytes after a restart."""

import os
import shutil
import signal
import socket
import sys
import time

import pytest
import torch
from workspace import Running, Workspace, new_workspace, saved_step, until

from bingo.pipeline.launch import run_torchrun
from bingo.pipeline.process import mistakes_as_lines
from bingo.pipeline.run import pick_device
from bingo.runtime.artefacts import read_json
from bingo.runtime.errors import GroupLost, Interrupted, UserError

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")]
SHORT = {
    "dataset.train_images": 160,
    "dataset.test_images": 40,
    "teacher.source": "random",
    "extract.views": 4,
    "extract.batch_images": 32,
    "extract.chunk_rows": 16,
    "distill.epochs": 3,
    "distill.batch_anchors": 32,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, stages) -> Workspace:
    """The pipeline up to the bags, run by one process."""
    workspace = new_workspace(tmp_path_factory.mktemp("many") / "bingo", stages, SHORT)
    for stage in ("scan", "teacher", "extract", "bag"):
        workspace.done(stage)
    return workspace


@pytest.fixture(autouse=True)
def no_state(workspace) -> None:
    shutil.rmtree(workspace.root / ".bingo/state", ignore_errors=True)
    for file in workspace.root.glob("rank-*.pid"):
        file.unlink()


def launcher(workspace: Workspace, stage: str, *arguments: str, **variables: str) -> Running:
    """torchrun with a stage that saves a checkpoint at every step."""
    command = " ".join(["forking_launcher", *arguments, "-m", f"stages.{stage}"])
    return workspace.stages.start_module(command, workspace.root, BINGO_CHECKPOINT_SECONDS="0", **variables)


def kill_rank(workspace: Workspace, rank: int) -> None:
    os.kill(int((workspace.root / f"rank-{rank}.pid").read_text()), signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def by_two_machines(workspace) -> dict[str, bytes]:
    """The student trained by two launchers with one process each, which are connected only by their address.

    The launcher that serves the address may end first, of which PyTorch warns in the other one; the warning is switched off.
    """
    meeting = f"--nnodes=2 --rdzv-id=distill --rdzv-backend=c10d --rdzv-endpoint=localhost:{free_port()}".split()
    variables = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    machines = [launcher(workspace, "distill", *meeting, "--nproc-per-node=1", **variables) for _ in range(2)]
    done = [machine.wait() for machine in machines]
    assert [(machine.status, machine.err) for machine in done] == [(0, "")] * 2
    assert sorted(machine.out.count("distill: bingo") for machine in done) == [0, 1]
    return workspace.files(*workspace.outputs("distill"))


def test_a_group_that_lost_a_process_restarts_and_trains_the_same_student(workspace, by_two_machines):
    training = launcher(workspace, "distill", "--standalone", "--max-restarts=2", "--nproc-per-node=2")
    until(lambda: saved_step(workspace, "distill") >= 6, training.ended)
    kill_rank(workspace, 0)
    done = training.wait()
    assert (done.status, done.err) == (0, "")
    assert "distill: a process ended early; restart 1 of 2\ndistill: resuming from a checkpoint\n" in done.out
    assert workspace.files(*workspace.outputs("distill")) == by_two_machines
    assert not list((workspace.root / ".bingo/state").glob("*/*"))


def test_a_teacher_pass_that_lost_a_process_has_the_bytes_of_one_process(workspace):
    whole = workspace.files("data/embeddings.zarr")
    extract = launcher(workspace, "extract", "--standalone", "--max-restarts=2", "--nproc-per-node=2")
    until(lambda: len(list(workspace.root.glob(".bingo/state/extract/*/store/done/[0-9]*"))) >= 2, extract.ended)
    kill_rank(workspace, 1)
    done = extract.wait()
    assert (done.status, done.err) == (0, "")
    assert "extract: a process ended early; restart 1 of 2" in done.out
    assert workspace.files("data/embeddings.zarr") == whole


@pytest.mark.parametrize("processes", [2, 3])
def test_bags_of_several_processes_equal_those_of_one(workspace, processes):
    outputs = workspace.outputs("bag")
    whole = workspace.files(*outputs)
    done = launcher(workspace, "bag", "--standalone", f"--nproc-per-node={processes}").wait()
    assert (done.status, done.err) == (0, "")
    assert workspace.files(*outputs) == whole
    assert read_json(workspace.root / ".bingo/runs/bag.json")["processes"] == processes
    assert not list((workspace.root / ".bingo/state").glob("*/*"))


def test_bags_of_a_group_that_lost_a_process_resume_with_the_missing_blocks(workspace):
    outputs = workspace.outputs("bag")
    whole = workspace.files(*outputs)
    variables = {"SLOW_RANK": "1"}
    bag = launcher(workspace, "bag", "--standalone", "--max-restarts=2", "--nproc-per-node=2", **variables)
    until(lambda: len(list(workspace.root.glob(".bingo/state/bag/*/members/[0-9]*"))) >= 2, bag.ended)
    kill_rank(workspace, 1)
    done = bag.wait()
    assert (done.status, done.err) == (0, "")
    assert "bag: a process ended early; restart 1 of 2" in done.out
    assert workspace.files(*outputs) == whole


def test_a_killed_process_ends_the_others_and_is_named(workspace):
    training = launcher(workspace, "distill", "--standalone", "--nproc-per-node=2")
    until(lambda: saved_step(workspace, "distill") >= 3, training.ended)
    session = training.session()
    kill_rank(workspace, 1)
    done = training.wait()
    assert (done.status, done.err) == (1, "error: process 1 was killed by SIGKILL; start again to resume\n")
    assert len(session) == 3
    until(lambda: not training.session())


@pytest.mark.parametrize("stage", ["distill", "bag"])
def test_a_mistake_found_by_one_process_is_reported_once(workspace, stage):
    done = launcher(workspace, stage, "--standalone", "--nproc-per-node=2", FAIL_ON_RANK="1").wait()
    assert (done.status, done.err) == (2, "error: a mistake that process 1 found\n")


def test_a_group_that_is_asked_to_stop_saves_and_reports_it_once(workspace):
    training = launcher(workspace, "distill", "--standalone", "--nproc-per-node=2")
    until(lambda: saved_step(workspace, "distill") >= 1, training.ended)
    training.send(signal.SIGTERM)
    done = training.wait()
    assert (done.status, done.out) == (75, "")
    step = saved_step(workspace, "distill")
    assert done.err == f"distill: bingo: stopped at step {step} with a checkpoint; start again to resume\n"


def test_the_prefix_runs_the_launcher_on_every_machine(workspace, tmp_path):
    """srun is replaced by a script that prints its arguments."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$BINGO_PROCESSES" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    meeting = "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=node0:29400"
    variables = {"BINGO_LAUNCH": meeting, "BINGO_LAUNCH_PREFIX": f"{tmp_path}/srun --ntasks-per-node=1", "BINGO_PROCESSES": "4"}
    done = workspace.done("distill", **variables)
    launched = f"{sys.executable} -m bingo.pipeline.launch --rdzv-id=distill {meeting} --nproc-per-node=4 -m stages.distill"
    assert done.out == f"4 --ntasks-per-node=1 {launched}\n"


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        (
            {"BINGO_LAUNCH_PREFIX": "srun"},
            "BINGO_LAUNCH_PREFIX = srun: ",
        ),
        (
            {"BINGO_LAUNCH_PREFIX": "no-such", "BINGO_LAUNCH": "--nnodes=2"},
            "BINGO_LAUNCH_PREFIX = no-such: cannot be started (No such file",
        ),
        ({"BINGO_LAUNCH": "--rdzv-conf='a"}, "BINGO_LAUNCH = --rdzv-conf='a: No closing quotation; give arguments of torchrun"),
    ],
)
def test_an_impossible_launch(workspace, variables, wanted):
    done = workspace.run("distill", **variables)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"error: {wanted}")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--nnodez=2", "unrecognized arguments: --nnodez=2"),
        ("nnodes=2", "nnodes=2 is none"),
        ("--standalone bingo.pipeline.launch", "bingo.pipeline.launch is none"),
        ("--standalone --event-log-handler=none", "'none'"),
        ("--nnodes=two", "invalid literal for int() with base 10: 'two'"),
        ("--nnodes=1:2:3", "nnodes=1:2:3 is not in"),
        ("--standalone --max-restarts=-1", "max_restarts must be >= 0"),
        ("--nnodes=2 --rdzv-backend=c11d --rdzv-endpoint=node0:29400", "The rendezvous backend 'c11d' is not registered"),
        ("--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=node0:port", "The port number of the rendezvous endpoint 'node0:port' must be"),
    ],
)
def test_arguments_that_torchrun_does_not_accept(workspace, arguments, reason):
    done = launcher(workspace, "distill", *arguments.split(), BINGO_LAUNCH=arguments).wait()
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"error: BINGO_LAUNCH = {arguments}: {reason}"), done.err
    assert done.err.endswith("; give arguments of torchrun\n")
    assert done.err.count("\n") == 1


def test_more_processes_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("BINGO_DEVICE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert pick_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # all of them find the mistake, so that the first one reports it
    with pytest.raises(UserError, match="BINGO_PROCESSES = 2: each needs a GPU and torch sees 1 here"):
        pick_device()


@pytest.mark.parametrize(
    ("rank", "error", "waits", "left", "said"),
    [
        ("0", RuntimeError("a fault"), [], RuntimeError, ""),
        ("1", RuntimeError("a fault"), [2], RuntimeError, ""),
        ("0", GroupLost("lost"), [5], SystemExit, "error: lost; start again to resume\n"),
        ("1", GroupLost("lost"), [5], SystemExit, ""),
        ("0", Interrupted("stopped"), [], SystemExit, "stopped\n"),
        ("1", Interrupted("stopped"), [], SystemExit, ""),
    ],
)
def test_which_process_reports_and_how_long_it_waits(monkeypatch, capsys, rank, error, waits, left, said):
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, rank)
    with pytest.raises(left), mistakes_as_lines():
        raise error
    assert waited == waits
    assert capsys.readouterr().err == said


def test_a_process_that_lost_another_waits_until_their_launcher_acts(monkeypatch, capsys):
    """However long the launcher takes: here it ends this process at the fourth check of a process that has ended and was not waited for."""
    ended = os.fork()
    if ended == 0:
        os._exit(0)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 1:
            os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
        if len(waited) == 4:
            raise SystemExit

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(SystemExit), mistakes_as_lines():
        raise GroupLost("lost", frozenset({os.getpid(), ended}))
    os.waitpid(ended, 0)
    assert (len(waited), capsys.readouterr().err) == (4, "")
    with pytest.raises(SystemExit), mistakes_as_lines():
        raise GroupLost("lost", frozenset({os.getpid()}))
    assert capsys.readouterr().err == "error: lost; start again to resume\n"


def test_lack_of_memory_is_an_error_in_one_line(capsys):
    with pytest.raises(SystemExit) as left, mistakes_as_lines():
        raise MemoryError("Unable to allocate\n7 GiB")
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: out of memory (Unable to allocate 7 GiB); lower the batch, ")


@pytest.mark.parametrize(
    ("error", "where", "argument"),
    [
        (ValueError("no such backend"), ("main",), True),
        (FileNotFoundError("no such folder"), ("main", "_invoke_run", "_start_workers", "reify"), True),
        (OSError("No space left on device"), ("main", "_invoke_run", "_start_workers", "start"), False),
        (KeyError("a fault of torch's"), ("main", "_invoke_run", "_monitor_workers"), False),
        (ConnectionResetError("the store is gone"), ("main", "_invoke_run", "_restart_workers", "barrier"), False),
    ],
)
def test_a_late_error_of_torchrun_is_not_a_wrong_argument(monkeypatch, capsys, error, where, argument):
    """torchrun is replaced by functions with the same names."""
    from torch.distributed import run

    def raised(names: tuple[str, ...]) -> None:
        if not names:
            raise error
        scope: dict = {"inner": lambda: raised(names[1:])}
        exec(f"def {names[0]}(*given): inner()", scope)
        scope[names[0]]()

    monkeypatch.setattr(run, "main", lambda arguments: raised(where))
    monkeypatch.setattr("logging.disable", lambda level: None)
    arguments = ["--standalone", "--nproc-per-node=1", "-m", "stages.scan"]
    if argument:
        assert run_torchrun(arguments) == 2
        assert capsys.readouterr().err.endswith("; give arguments of torchrun\n")
    else:
        with pytest.raises(type(error)):
            run_torchrun(arguments)
