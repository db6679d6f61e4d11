"""Sweeps with a quick replacement for DVC: which experiments are run and in which order, repeated runs, failures, and interrupts."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import compare

ROOT = Path(__file__).parents[2]
# Leaves behind what `dvc exp run` does. Experiments named in FAILS fail; those in SLOW start a child and take a minute.
STAND_IN = """
import json, os, subprocess, sys
from pathlib import Path

given = sys.argv[1:]
if given[:2] == ["cache", "dir"]:
    print(Path("the-cache").resolve())
elif given[0] == "config":
    Path(".dvc").mkdir(exist_ok=True)
    Path(".dvc/given").write_text(given[-1])
else:
    name = given[given.index("--name") + 1]
    with open(os.environ["JOURNAL"], "a") as journal:
        said = [Path.cwd().name, name, os.environ["BINGO_RUNS"], os.environ["BINGO_STATE_DIR"], Path(".dvc/given").read_text()]
        said += [os.getpid(), Path("edited").exists(), Path("left-over").exists()]
        journal.write(json.dumps([*said, given[3:]]) + "\\n")
    Path("left-over").touch()
    if name in os.environ.get("SLOW", "").split():
        sys.exit(subprocess.run(["sleep", "60"]).returncode)
    if name in os.environ.get("FAILS", "").split():
        print("".join(f"line {number}\\n" for number in range(20)) + "error: gone.pth: cannot be read", file=sys.stderr)
        sys.exit(255)
    Path("reports").mkdir(exist_ok=True)
    Path("reports/results.json").write_text(json.dumps({"linear": {"student": 94.46}, "knn_10": {"student": 93.0}}))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(["git", "update-ref", f"refs/exps/{commit[:2]}/{commit[2:]}/{name}", commit], check=True)
"""
EVERYTHING = ("--variants", "method-bingo", "method-moco", "--seeds", "0", "1")


class Repository:
    """A repository with params.yaml and recipes, in which sweeps can be run."""

    def __init__(self, folder: Path):
        self.home, self.journal, binaries = folder / "home", folder / "journal", folder / "bin"
        binaries.mkdir()
        (binaries / "dvc").write_text(f"#!{sys.executable}\n{STAND_IN}")
        (binaries / "dvc").chmod(0o755)
        self.home.mkdir()
        shutil.copy(ROOT / "params.yaml", self.home)
        shutil.copytree(ROOT / "recipes", self.home / "recipes")
        (self.home / ".gitignore").write_text("/.bingo/\n/reports/\n")
        path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("BINGO_", "DVC_", "GIT_"))}
        self.environment = kept | {"PATH": path, "PYTHONPATH": str(ROOT), "JOURNAL": str(self.journal), "GIT_CONFIG_GLOBAL": os.devnull}
        self.git("init", "--quiet")
        self.git("config", "user.name", "someone")
        self.git("config", "user.email", "someone@example.invalid")
        self.commit()

    def git(self, *arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=self.home, env=self.environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "so")

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "benchmarks.compare", *arguments]
        return subprocess.Popen(
            command, cwd=self.home, env=self.environment | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell would ignore SIGINT
        )  # fmt: skip

    def sweep(self, *arguments: str, **variables: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def ran(self) -> list[list]:
        """The commands that the replacement was asked to run since the last call."""
        import json

        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        self.journal.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def wait_for(self, experiments: int) -> list[list]:
        """Wait until a number of experiments have started."""
        end = time.monotonic() + 60
        while not self.journal.exists() or len(self.journal.read_text().splitlines()) < experiments:
            assert time.monotonic() < end
            time.sleep(0.05)
        return self.ran()


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_sweep_goes_seed_by_seed_and_is_not_run_again(repository):
    status, out, err = repository.sweep(*EVERYTHING, BINGO_RUNS="records")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("4 experiments at ")
    assert "[1/4] method-bingo-s0: linear 94.5, k-NN (k = 10) 93.0; " in lines[1]
    assert lines[1].endswith(" left")
    assert lines[-1].startswith("4 of 4 done, 0 failed")
    runs = repository.ran()
    assert [run[1] for run in runs] == ["method-bingo-s0", "method-moco-s0", "method-bingo-s1", "method-moco-s1"]
    home = repository.home
    for _, _, records, state, cache, _, _, left_over, _ in runs:
        assert (records, state) == (f"{home}/records", f"{home}/.bingo/state")
        assert cache == f"{home}/the-cache"
        assert not left_over
    assert "--set-param=seed=1" in runs[3][-1]
    assert "--set-param=baselines=[]" in runs[3][-1]
    assert "--set-param=distill.method='moco'" in runs[3][-1]
    assert len(repository.git("for-each-ref", "refs/exps").splitlines()) == 4
    assert not list((home / ".bingo/compare").glob("clone*"))
    assert repository.git("status", "--porcelain") == "", "the workspace is as it was"
    status, out, _ = repository.sweep(*EVERYTHING, "--jobs", "2")
    assert (status, repository.ran()) == (0, [])
    assert "method-moco-s1: cached" in out.splitlines()
    repository.commit()
    assert repository.sweep("--variants", "method-seed", "--seeds", "5")[0] == 0
    assert [run[1] for run in repository.ran()] == ["method-seed-s5"]


def test_two_jobs_never_share_a_seed_and_see_no_edits(repository):
    process = repository.start(*EVERYTHING, "--jobs", "2", SLOW="method-bingo-s0")
    first = repository.wait_for(2)
    (repository.home / "edited").touch()
    repository.commit()  # while the sweep is under way
    end = time.monotonic() + 60
    while len(repository.git("for-each-ref", "refs/exps").splitlines()) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    runs = [*first, *repository.ran()]
    by_clone = {clone: [run[1] for run in runs if run[0] == clone] for clone in {run[0] for run in runs}}
    assert sorted(by_clone.values()) == [["method-bingo-s0"], ["method-bingo-s1", "method-moco-s1"]]
    assert not any(run[6] for run in runs), "the commit is that of the start"


def test_a_failure_is_reported_and_the_others_continue(repository):
    status, out, _ = repository.sweep(*EVERYTHING, FAILS="method-bingo-s0")
    assert status == 1
    shown = out[out.index("method-bingo-s0: FAILED, exit code 255") :].splitlines()
    assert shown[1:9] == [*(f"    line {number}" for number in range(13, 20)), "    error: gone.pth: cannot be read"]
    assert "3 of 4 done, 1 failed" in out
    assert len(repository.ran()) == 4
    assert repository.sweep(*EVERYTHING)[0] == 0
    assert [run[1] for run in repository.ran()] == ["method-bingo-s0"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_nothing_running_and_a_second_start_resumes(repository, number):
    process = repository.start(*EVERYTHING, "--jobs", "2", SLOW="method-moco-s0 method-bingo-s1")
    runs = repository.wait_for(3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert (process.returncode, err) == (common_interrupted(), "")
        assert "interrupted after 1 of 4; run the same command again to resume" in out
    end = time.monotonic() + 20
    while any(alive(run[5]) for run in runs):
        assert time.monotonic() < end, "a job is still running"
        time.sleep(0.05)
    assert repository.sweep(*EVERYTHING)[0] == 0
    assert [run[1] for run in repository.ran()] == ["method-moco-s0", "method-bingo-s1", "method-moco-s1"]


def common_interrupted() -> int:
    from bingo.runtime.errors import INTERRUPTED

    return INTERRUPTED


def test_mistakes_are_one_line_before_anything_runs(repository):
    def mistake(*arguments: str) -> str:
        status, out, err = repository.sweep(*arguments)
        assert (status, out, repository.ran()) == (2, "", [])
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    assert "recipe = method-mocco: " in mistake("--variants", "method-bingo", "method-mocco")
    assert "--jobs = 0: allowed" in mistake("--variants", "method-bingo", "--jobs", "0")
    assert "--root is empty: give the folder" in mistake("--variants", "method-bingo", "--root", "")
    assert "recipe = parts/imagenet: is a part" in mistake("--variants", "method-bingo", "--base", "parts/imagenet")
    missing = mistake("--variants", "method-bingo", "--base", "cifar10-cpu-smoke", "--root", "nowhere")
    assert "--root = nowhere: the folder does not exist" in missing
    (repository.home / "params.yaml").write_text((repository.home / "params.yaml").read_text() + "# edited\n")
    assert "params.yaml: not committed" in mistake("--variants", "method-bingo")
    repository.commit()
    process = repository.start("--variants", "method-bingo", "--seeds", "0", SLOW="method-bingo-s0")
    repository.wait_for(1)
    assert "another sweep of this repository is under way" in mistake("--variants", "method-bingo")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    shutil.rmtree(repository.home / ".git")
    assert "a sweep is of a commit" in mistake("--variants", "method-bingo")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.7, "1 min 0 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")])
def test_clock(seconds, text):
    assert compare.clock(seconds) == text


def test_a_base_is_applied_before_the_variants_and_in_their_names(tmp_path, monkeypatch):
    repository = Repository(tmp_path)
    monkeypatch.chdir(repository.home)
    Path("images").mkdir()
    changes = compare.overrides("method-simreg", 4, "cifar10-cpu-smoke", "images")
    said = dict(change.split("=", 1) for change in changes)
    assert said["dataset.root"] == f"'{repository.home / 'images'}'"  # experiments run in other folders
    assert f"dataset.root='{repository.home / 'data/cifar10'}'" in compare.overrides("method-simreg", 4, "cifar10")
    assert (said["teacher.pretrain.epochs"], said["distill.method"], said["seed"]) == ("30", "'simreg'", "4")
    assert (said["distill.epochs"], said["distill.lr"]) == ("10", "0.2")  # the base's, the variant's
    assert said["linear_eval.crops.nets"] == "[]"
