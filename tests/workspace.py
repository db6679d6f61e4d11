"""Workspaces for tests of the stages: a folder with params.yaml, dvc.yaml and the code, in which stages run as processes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from bingo.params import read_yaml
from tests.processes import session

ROOT = Path(__file__).parent.parent
# Written by bingo/runtime/progress.py for work of over two seconds, so it depends on how busy the machine is.
PROGRESS = re.compile(r"^(?!error|warning)[^\n]*: [^\n]*(?:/s|/s, \d+:\d\d:\d\d left|\d+:\d\d:\d\d so far)\n", re.MULTILINE)
PATIENCE_SECONDS = 120  # the machine may be busy
# In the order in which each stage finds its inputs.
STAGES = ("scan", "teacher", "extract", "bag", "weights", "distill", "baseline moco", "linear_eval", "knn_eval", "report")
# 36 steps per training and 16 chunks, so that runs can be killed midway.
SHORT = {
    "dataset.train_images": 400,
    "dataset.test_images": 100,
    "teacher.pretrain.epochs": 3,
    "teacher.pretrain.batch_anchors": 32,
    "extract.views": 4,
    "extract.batch_images": 32,
    "extract.chunk_rows": 32,
    "distill.epochs": 3,
    "distill.batch_anchors": 32,
    "distill.student_ema": 0.9,
    "distill.keep_best": True,  # so that every test of a killed training covers it
}
INHERITED = ("HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")


def environment(**variables: str) -> dict[str, str]:
    """A stage's environment: one thread on the CPU, no terminal, `variables`, and no variables of BINGO from outside."""
    kept = {name: os.environ[name] for name in INHERITED if name in os.environ}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "BINGO_DEVICE": "cpu", "DVC_NO_ANALYTICS": "1", **variables}


@dataclass(frozen=True)
class Done:
    """A stage that has ended: its exit status (negative: the signal that ended it), and what it printed, without progress."""

    status: int
    out: str
    err: str


class Running:
    """A stage's process, started by the server."""

    def __init__(self, connection: socket.socket, out: Path, err: Path):
        self._answers, self._connection, self._out, self._err = connection.makefile(), connection, out, err
        self.pid = int(self._answers.readline())

    def ended(self) -> bool:
        """Whether the process has ended by itself."""
        stat = Path(f"/proc/{self.pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"

    def session(self) -> list[int]:
        """The running processes in this one's session, including itself."""
        return session(self.pid)

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> Done:
        """Wait for its end."""
        self._connection.settimeout(PATIENCE_SECONDS)
        status = int(self._answers.readline())
        self._answers.close()
        self._connection.close()
        return Done(status, self._out.read_text(), PROGRESS.sub("", self._err.read_text()))

    def kill(self) -> Done:
        """Send SIGKILL unless the process has ended, and wait for its end."""
        if not self.ended():
            self.send(signal.SIGKILL)
        return self.wait()


class Stages:
    """The server that starts stages; see stage_server.py."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        self.socket = str(folder / "socket")
        command = [sys.executable, str(ROOT / "tests/stage_server.py"), self.socket]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), text=True)
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == "ready\n"

    def start(self, stage: str, folder: Path, **variables: str) -> Running:
        """Start `python -m stages.STAGE` in a folder; arguments of the stage follow its name."""
        return self.start_module(f"stages.{stage}", folder, **variables)

    def start_module(self, command: str, folder: Path, **variables: str) -> Running:
        """Start `python -m COMMAND`, a module of the repository or of the tests with its arguments."""
        self.count += 1
        out, err = self.folder / f"{self.count}.out", self.folder / f"{self.count}.err"
        module, *arguments = command.split()
        request = {"module": module, "arguments": arguments, "folder": str(folder), "out": str(out), "err": str(err)}
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.socket)
        connection.sendall((json.dumps({**request, "environment": environment(**variables)}) + "\n").encode())
        return Running(connection, out, err)

    def close(self) -> None:
        """End the server."""
        self.server.kill()
        self.server.communicate()


@contextmanager
def stage_server(folder: Path) -> Iterator[Stages]:
    """A server whose socket and outputs of stages are in `folder`."""
    stages = Stages(folder)
    try:
        yield stages
    finally:
        stages.close()


class Workspace:
    """A folder that looks like a clone of the repository to the stages; its code is the repository's own."""

    def __init__(self, root: Path, stages: Stages):
        self.root, self.stages = root, stages

    def edit(self, changes: dict[str, Any]) -> None:
        """Set parameters by dotted keys."""
        path = self.root / "params.yaml"
        params = read_yaml(path)
        for key, value in changes.items():
            *sections, last = key.split(".")
            section = params
            for name in sections:
                section = section[name]
            section[last] = value
        with open(path, "w") as file:
            YAML(typ="safe", pure=True).dump(params, file)

    def start(self, stage: str, **variables: str) -> Running:
        """Start a stage."""
        return self.stages.start(stage, self.root, **variables)

    def run(self, stage: str, **variables: str) -> Done:
        """Run a stage to its end, whether it succeeds or not."""
        return self.start(stage, **variables).wait()

    def done(self, stage: str, **variables: str) -> Done:
        """Run a stage, which must succeed."""
        done = self.run(stage, **variables)
        assert done.status == 0, f"{stage}: {done}"
        assert not done.err, f"{stage}: {done.err}"
        return done

    def files(self, *outputs: str) -> dict[str, bytes]:
        """The bytes of every file of some outputs (default: all in dvc.yaml), by path."""
        found = {}
        for output in outputs or self.outputs():
            path = self.root / output
            assert path.exists(), f"{output} was not written"
            for file in [path] if path.is_file() else sorted(path.rglob("*")):
                if file.is_file():
                    found[str(file.relative_to(self.root))] = file.read_bytes()
        return found

    def existing_files(self, *outputs: str) -> dict[str, bytes]:
        """`files` of the outputs that exist."""
        existing = [output for output in outputs or self.outputs() if (self.root / output).exists()]
        return self.files(*existing) if existing else {}

    def outputs(self, *stages: str) -> list[str]:
        """The outputs of some stages in dvc.yaml (default: all); for stages with items, those of each item."""
        found = []
        for name, stage in read_yaml(ROOT / "dvc.yaml")["stages"].items():
            definition = stage.get("do", stage)
            for entry in (entry for kind in ("outs", "metrics", "plots") for entry in definition.get(kind, [])):
                path = next(iter(entry)) if isinstance(entry, dict) else entry
                if not stages or name in stages:
                    found += [path.replace("${item}", item).replace("${key}", item) for item in self._items(stage)]
        return found

    def _items(self, stage: dict[str, Any]) -> list[str]:
        """The items or keys of a stage with `foreach`, from dvc.yaml or the parameters; one item without a name for other stages."""
        if isinstance(stage.get("foreach"), dict):
            return list(stage["foreach"])
        value: Any = read_yaml(self.root / "params.yaml")
        for part in stage["foreach"].strip("${}").split(".") if "foreach" in stage else []:
            value = value[part]
        return list(value) if "foreach" in stage else [""]


def new_workspace(root: Path, stages: Stages, changes: dict[str, Any]) -> Workspace:
    """A workspace with the shipped parameters, changed by recipe digits-short and then by `changes`."""
    root.mkdir()
    for name in ("bingo", "stages"):
        (root / name).symlink_to(ROOT / name)
    (root / "recipes").mkdir()
    (root / "recipes/published").symlink_to(ROOT / "recipes/published")
    for name in ("params.yaml", "dvc.yaml", ".dvcignore"):  # .dvcignore: bytecode written by a parallel test must not change a dependency
        (root / name).write_text((ROOT / name).read_text())
    workspace = Workspace(root, stages)
    workspace.edit(dict(_flat(read_yaml(ROOT / "recipes/digits-short.yaml"))) | changes)
    return workspace


def remove(workspace: Workspace, *outputs: str) -> None:
    """Delete some outputs, files or folders."""
    for output in outputs:
        path = workspace.root / output
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def saved_step(workspace: Workspace, stage: str) -> int:
    """The step of the newest checkpoint, or -1 if there is none."""
    steps = [json.loads(path.read_text())["step"] for path in (workspace.root / f".bingo/state/{stage}").glob("*/checkpoints/latest.json")]
    return max(steps, default=-1)


def assert_as_reference(workspace: Workspace, reference: Workspace, stage: str) -> None:
    """A stage's outputs equal those of the reference, and no stage has left any state."""
    outputs = workspace.outputs(stage)
    assert workspace.files(*outputs) == reference.files(*outputs)
    assert not list((workspace.root / ".bingo/state").glob("*/*/*")), "a finished stage leaves no state behind"


def _flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def until(condition: Callable[[], bool], ended: Callable[[], bool] = lambda: False) -> None:
    """Wait until `condition` is true, which must happen before `ended` becomes true."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert not ended(), "ended too early"
        assert time.monotonic() < end, "nothing happened for a long time"
        time.sleep(0.001)
