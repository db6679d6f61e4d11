"""Kills at random moments: long stages are run by `dvc repro` and killed repeatedly; nothing may be lost, left over or changed.

python -m tests.stress.chaos --kills 100       # small digits; two runs of the pipeline in a temporary folder, one of them undisturbed
python -m tests.stress.chaos --kills 10 --images 100000 --stages scan extract bag     # files written by benchmarks.scale, tiny networks

A kill is a signal (SIGKILL, SIGTERM, SIGINT) to the stage, to dvc or to both, at a random moment within the duration of the undisturbed
stage; the next `dvc repro STAGE` resumes. Checks: the outputs have the bytes of the undisturbed run; data/, models/ and reports/ contain no
other files; no state is left; repeated steps are within one checkpoint interval (for `extract`: within the two chunks that it holds); a
training that was asked to stop has exit code 75 and loses nothing. The exit code is 1 if one of these fails. A kill may truncate two files
of dvc itself, its lock and an entry of its run cache; they are repaired as in docs/troubleshooting.md.

The progress of a stage is read from its progress bar: the workspace's copy of bingo/runtime/progress.py also writes it to a file.
"""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks import scale
from benchmarks.parser import Parser
from bingo.params import read_yaml
from bingo.planning.recipes import lay_over, read_recipe
from bingo.runtime.errors import INTERRUPTED
from bingo.runtime.progress import progress_bar
from tests.processes import session

ROOT = Path(__file__).parents[2]
STAGES = ("scan", "teacher", "extract", "bag", "distill", "baseline@moco", "linear_eval@student", "semi_eval@half")
BEGIN_ANEW = ("bag",)  # these keep nothing while they run
RESUMED = re.compile(r"extract|linear evaluation|.+: .+")  # labels of bars of chunks or trainings, which continue where a killed run ended
OUTPUTS = ("data", "models", "reports")
# Signal and receiver. DVC ignores SIGINT while a stage runs, because a terminal sends it to both.
WAYS = (
    ("SIGKILL", "both"),
    ("SIGKILL", "stage"),
    ("SIGKILL", "dvc"),
    ("SIGTERM", "stage"),
    ("SIGTERM", "both"),
    ("SIGINT", "both"),
)
# Files that dvc does not write atomically, and its message if it was killed while writing them.
CUT_LOCK = "Unable to read RWLock-file '.dvc/tmp/rwlock'. JSON structure is corrupted"
CUT_RUN = "join() argument must be str, bytes, or os.PathLike object, not 'NoneType'"  # a folder of the run cache without an entry
PATIENCE_SECONDS = 1800
STOPPED = INTERRUPTED
INTERVAL_SECONDS = 0.5
# 1,438 train images; each training takes a few seconds, and extract has 9 chunks.
SMALL = {
    "dataset": {"placements": 1},
    "teacher": {"pretrain": {"epochs": 4, "batch_anchors": 32}},
    "extract": {"views": 8, "batch_images": 128, "chunk_rows": 200},
    "bagging": {"method": "kmeans", "clusters": 20},
    "distill": {"epochs": 4, "batch_anchors": 32},
    "linear_eval": {"crops": {"epochs": 8, "batch_images": 32}},
    "semi_eval": {
        "splits": {"half": {"percent": 50, "list_file": None, "trunk_lr": 0.01, "head_lr": 0.1, "linear_lr": 1.0}},
        "finetune": {"epochs": 4, "drop_epochs": [2, 3], "batch_images": 32},
        "linear": {"epochs": 4, "drop_epochs": [2, 3], "batch_images": 32},
    },
}
LARGE = {**scale.PARAMS, "extract": {**scale.PARAMS["extract"], "chunk_rows": 4096}}
# Appended to the copy of bingo/runtime/progress.py: writes a line for each move of a bar, to compare a kill with the next run.
RECORDER = """

def _recorded(move):
    def moved(self, *arguments):
        move(self, *arguments)
        line = f"{time.monotonic()} {move.__name__} {self._total} {self._done} {self._label}\\n"
        with open(os.environ["CHAOS_LOG"], "a") as log:
            log.write(line)

    return moved


for _name in ("resume_at", "advance_to", "advance", "close"):
    setattr(Bar, _name, _recorded(getattr(Bar, _name)))
_bar = Bar.__init__
Bar.__init__ = lambda self, *arguments: (_bar(self, *arguments), self.resume_at(0))[0]
"""


@dataclass(frozen=True)
class Move:
    """A line of the record: the time (seconds of the monotonic clock), the call that moved the bar, and its progress."""

    seconds: float
    call: str
    total: int
    done: int

    @property
    def left(self) -> int:
        """Units still to be done, which can be compared with a later run's bar even if that counts only the rest."""
        return self.total - self.done


@dataclass
class Ended:
    """A `dvc repro` that has ended: its exit status, the output of dvc and the stage, and the moves of each bar by label."""

    status: int
    text: str
    bars: dict[str, list[Move]]
    struck: float | None  # the moment of the kill, None if dvc had already ended

    @property
    def stage_status(self) -> int | None:
        """The stage's exit status as reported by dvc, or None."""
        ended_with = re.search(r"exited with (-?\d+)", self.text)
        return int(ended_with[1]) if ended_with else None


@dataclass(frozen=True)
class Kill:
    """A signal, its receiver (stage, dvc or both) and the seconds after the start of dvc."""

    signal: str
    receiver: str
    seconds: float


@dataclass
class Tally:
    """The results of the kills of one stage."""

    kills: Counter = field(default_factory=Counter)
    most_lost: int = 0
    resumed: int = 0
    finished: int = 0
    cut_off: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


class ChaosWorkspace:
    """A copy of the repository's code with DVC and without git, in which stages run and are killed."""

    def __init__(self, root: Path, chunk_views: int = 0):
        self.root, self.runs, self.chunk_views = root, 0, chunk_views
        self.records = root.parent / f"{root.name}-records"
        self.records.mkdir(exist_ok=True)

    def start(self, *arguments: str) -> subprocess.Popen:
        """Start a dvc command in a new session; its output and the moves of bars are written to the next record."""
        self.runs += 1
        variables = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.root),
            "DVC_NO_ANALYTICS": "1",
            "BINGO_DEVICE": "cpu",
            "BINGO_CHECKPOINT_SECONDS": str(INTERVAL_SECONDS),
            "CHAOS_LOG": str(self._record("bars")),
        }
        variables.pop("BINGO_STATE_DIR", None)
        with self._record("out").open("w") as out:
            command = [sys.executable, "-m", "dvc", *arguments]
            return subprocess.Popen(command, cwd=self.root, env=variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)

    def run(self, *arguments: str) -> Ended:
        """Run a dvc command to its end; it must succeed."""
        ended = self.ended(self.start(*arguments))
        if ended.status:
            raise SystemExit(f"dvc {' '.join(arguments)} failed:\n{ended.text}")
        return ended

    def ended(self, dvc: subprocess.Popen, struck: float | None = None) -> Ended:
        """Wait for the end of dvc and of every process that it started. Raises TimeoutError if one keeps running for long."""
        try:
            status = dvc.wait(PATIENCE_SECONDS)
        except BaseException:  # Ctrl-C
            os.killpg(dvc.pid, signal.SIGKILL)
            raise
        end = time.monotonic() + PATIENCE_SECONDS
        while others := session(dvc.pid):
            if time.monotonic() > end:
                for pid in others:
                    os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"processes {others} went on for {PATIENCE_SECONDS} s after dvc had ended")
            time.sleep(0.01)
        return Ended(status, self._record("out").read_text(), bars_in(self._record("bars")), struck)

    def strike(self, dvc: subprocess.Popen, kill: Kill) -> float | None:
        """Wait, and send the signal. Returns the moment, or None if dvc had ended before. If the stage does not run yet, dvc gets the
        signal."""
        try:
            dvc.wait(kill.seconds)
            return None
        except subprocess.TimeoutExpired:
            pass
        stage = [pid for pid in session(dvc.pid) if pid != dvc.pid]
        number = signal.Signals[kill.signal]
        struck = time.monotonic()
        try:
            if kill.receiver == "stage" and stage:
                for pid in stage:
                    os.kill(pid, number)
            elif kill.receiver == "dvc":
                os.kill(dvc.pid, number)
            else:
                os.killpg(dvc.pid, number)
        except ProcessLookupError:
            return None
        return struck

    def files(self) -> dict[str, str]:
        """sha256 of every file that the stages have written, by path."""
        found = (file for folder in OUTPUTS for file in (self.root / folder).rglob("*") if file.is_file() and file.name != ".gitkeep")
        return {str(file.relative_to(self.root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(found)}

    def state(self) -> list[str]:
        """The content of the folder of unfinished stages, except states that wait until DVC has committed the outputs, and the scan's
        results."""
        found = (path for path in (self.root / ".bingo/state").glob("*/*") if path.name != "committed.json" and path.parent.name != "scan")
        return sorted(str(path.relative_to(self.root)) for path in found if not (path / "finished.json").exists())

    def mend_dvc(self, text: str) -> bool:
        """Follow docs/troubleshooting.md if dvc reports that an earlier kill has truncated one of its files. Returns whether it did."""
        if CUT_LOCK in text:
            (self.root / ".dvc/tmp/rwlock").unlink()
        elif CUT_RUN in text:
            for folder in (self.root / ".dvc/cache/runs").glob("*/*"):
                if not any(folder.iterdir()):
                    folder.rmdir()
        return CUT_LOCK in text or CUT_RUN in text

    def forget(self, before: Path) -> None:
        """Reset a stage: restore outputs, dvc.lock and DVC's cache from `before`, a copy of the workspace."""
        for name in (*OUTPUTS, ".dvc", "dvc.lock", ".bingo"):
            path = self.root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            source = before / name
            if source.is_dir():
                shutil.copytree(source, path, symlinks=True)
            elif source.exists():
                shutil.copy(source, path)

    def _record(self, suffix: str) -> Path:
        return self.records / f"{self.runs}.{suffix}"


def bars_in(record: Path) -> dict[str, list[Move]]:
    """The moves written by RECORDER, by label, of bars that continue after a kill."""
    bars: dict[str, list[Move]] = {}
    for line in record.read_text().splitlines() if record.exists() else []:
        seconds, call, total, done, label = line.split(" ", 4)
        if RESUMED.fullmatch(label):
            bars.setdefault(label, []).append(Move(float(seconds), call, int(total), int(done)))
    return bars


def new_workspace(root: Path, overlay: dict[str, Any]) -> ChaosWorkspace:
    """Copy the files that `dvc repro` needs, with recipe digits-short and `overlay` applied to the parameters."""
    shutil.copytree(ROOT / "bingo", root / "bingo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "stages", root / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes/published", root / "recipes/published")
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, root)
    for folder in ("data", "models/baselines", "reports/baselines", "reports/semi", "reports/transfer", "reports/coco", "reports/plots"):
        (root / folder).mkdir(parents=True)
    with (root / "bingo/runtime/progress.py").open("a") as progress:
        progress.write(RECORDER)
    params = read_yaml(ROOT / "params.yaml")
    lay_over(params, read_recipe(ROOT / "recipes", "digits-short").overlay)
    lay_over(params, overlay)
    with (root / "params.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(params, file)
    workspace = ChaosWorkspace(root, params["extract"]["chunk_rows"] * (1 + params["extract"]["views"]))
    workspace.run("init", "--no-scm", "--quiet")
    return workspace


def open_at(moves: Sequence[Move], seconds: float) -> bool:
    """Whether a bar was open at a moment, so that the stage was in its loop."""
    return moves[0].seconds < seconds and all(move.call != "close" or move.seconds > seconds for move in moves)


def lost_moves(before: Sequence[Move], after: Sequence[Move]) -> list[Move]:
    """The moves of a killed run's bar that the next run's bar shows as not done."""
    left = [move for move in after if move.call == "resume_at"][-1].left
    return [move for move in before if move.call.startswith("advance") and move.left < left]


def loss_problem(stage: str, lost: Sequence[Move], chunk_views: int) -> str | None:
    """The problem if more was lost than is allowed, otherwise None.

    A training saves after the first step that ends an interval or more after the last save. So of the steps after that save, all except the
    last one, which may have ended while it was being saved, are within an interval. `extract` holds at most two chunks.
    """
    if stage == "extract":
        views = lost[-1].done - lost[0].done if lost else 0  # all except the first batch
        return f"{views} views were done twice, two chunks have {2 * chunk_views}" if views > 2 * chunk_views else None
    span = lost[-2].seconds - lost[0].seconds if len(lost) > 1 else 0.0
    return f"{len(lost)} steps in {span:.2f} s were done twice, saves are {INTERVAL_SECONDS} s apart" if span >= INTERVAL_SECONDS else None


class Harassment:
    """One stage, killed and restarted until it succeeds."""

    def __init__(self, workspace: ChaosWorkspace, stage: str, tally: Tally):
        self.workspace, self.stage, self.tally = workspace, stage, tally
        self.bars: dict[str, list[Move]] = {}  # of the last run that had a bar with that label
        self.saved: set[str] = set()  # labels of bars whose last run was asked to stop and reported that it had saved

    def run(self, kills: Iterator[Kill]) -> None:
        """Run `dvc repro STAGE` with one kill after the other, and then without kills until it succeeds."""
        while True:
            kill = next(kills, None)
            dvc = self.workspace.start("repro", self.stage)
            ended = self.workspace.ended(dvc, self.workspace.strike(dvc, kill) if kill else None)
            self._compare(ended)
            if ended.status == 0:
                self.tally.finished += 1
                return
            if self.workspace.mend_dvc(ended.text):
                self.tally.cut_off += 1
                continue
            if kill is None or ended.struck is None:
                self._problem(kill, ended, f"dvc repro failed with {ended.status}, undisturbed")
                raise SystemExit(f"{self.tally.problems[-1]}\n{ended.text}")
            self.tally.kills[kill.signal, kill.receiver] += 1
            self._check_way_out(kill, ended)

    def _compare(self, ended: Ended) -> None:
        """Compare each bar with that of the last run, to find what was lost in between."""
        for label, moves in ended.bars.items():
            before = self.bars.get(label)
            if before and self.stage not in BEGIN_ANEW:
                lost = lost_moves(before, moves)
                self.tally.most_lost = max(self.tally.most_lost, len(lost))
                self.tally.resumed += 1
                if problem := loss_problem(self.stage, lost, self.workspace.chunk_views):
                    self._problem(None, ended, problem)
                if lost and label in self.saved:
                    self._problem(None, ended, f"{len(lost)} steps before a checkpoint on the way out were done twice")
            self.bars[label] = moves
            self.saved.discard(label)

    def _check_way_out(self, kill: Kill, ended: Ended) -> None:
        """A stage that was asked to stop in its loop reports that it has saved, with exit code 75; a kill never prints a traceback
        there."""
        struck = ended.struck or 0.0
        labels = [label for label, moves in ended.bars.items() if open_at(moves, struck)]
        if not labels:
            return
        if "Traceback" in ended.text:
            self._problem(kill, ended, "a traceback")
        asked = kill.signal != "SIGKILL" or kill.receiver == "dvc"  # Linux sends the stage SIGTERM when dvc dies
        if not asked or (self.stage == "extract" and kill.signal != "SIGINT"):
            return
        if ended.stage_status not in (STOPPED, None) or (kill.receiver == "stage" and ended.stage_status is None):
            self._problem(kill, ended, f"exit code {ended.stage_status}, not {STOPPED}")
        if self.stage != "extract":
            if "with a checkpoint; start again" not in ended.text:
                self._problem(kill, ended, "no word of a checkpoint")
            self.saved |= set(labels)

    def _problem(self, kill: Kill | None, ended: Ended, what: str) -> None:
        how = f" after {kill.signal} to {kill.receiver} at {kill.seconds:.2f} s" if kill else ""
        self.tally.problems.append(f"{self.stage}, run {self.workspace.runs}{how}: {what}")
        print(f"{self.tally.problems[-1]}\n{ended.text}", flush=True)


def drawn_kills(draw: random.Random, count: int, longest_seconds: float) -> Iterator[Kill]:
    """Random kills in any of WAYS, at moments from 0 to `longest_seconds`."""
    for _ in range(count):
        name, receiver = draw.choice(WAYS)
        yield Kill(name, receiver, draw.uniform(0, longest_seconds))


def undisturbed(root: Path, overlay: dict[str, Any], stages: Sequence[str]) -> tuple[dict[str, float], dict[str, dict[str, str]]]:
    """Run the stages once; returns the seconds of each `dvc repro STAGE`, and all files after it."""
    workspace = new_workspace(root, overlay)
    seconds, files = {}, {}
    for stage in stages:
        begun = time.monotonic()
        workspace.run("repro", stage)
        seconds[stage], files[stage] = time.monotonic() - begun, workspace.files()
        print(f"{stage}: {seconds[stage]:.1f} s undisturbed", flush=True)
    return seconds, files


def harass(workspace: ChaosWorkspace, stage: str, kills: int, longest_seconds: float, wanted: dict[str, str], draw: random.Random) -> Tally:
    """Kill one stage this often, over as many complete runs as necessary, and compare each with the expected files."""
    tally, begun = Tally(), time.monotonic()
    before = workspace.root.with_name(f"{workspace.root.name}-before")
    shutil.copytree(workspace.root, before, symlinks=True)
    with progress_bar(stage, kills, "kills") as bar:
        while (given := sum(tally.kills.values())) < kills:
            if tally.finished:
                workspace.forget(before)
            Harassment(workspace, stage, tally).run(drawn_kills(draw, kills - given, longest_seconds))
            found = workspace.files()
            if differing := sorted(path for path in {*found, *wanted} if found.get(path) != wanted.get(path)):
                tally.problems.append(f"{stage}, run {workspace.runs}: not as undisturbed: {', '.join(differing)}")
            if state := workspace.state():
                tally.problems.append(f"{stage}, run {workspace.runs}: left behind: {', '.join(state)}")
            bar.advance_to(sum(tally.kills.values()))
    shutil.rmtree(before)
    tally.seconds = time.monotonic() - begun
    return tally


def table(tallies: dict[str, Tally]) -> str:
    """The result in Markdown: kills by stage and signal, the number of resumed runs, and the most work that was repeated."""
    heads = [f"{name[3:]} to {receiver}" for name, receiver in WAYS]
    lines = [
        f"| stage | kills | {' | '.join(heads)} | gone on | most lost | finished | DVC's files cut off | seconds | problems |",
        f"|---|{'--:|' * (len(WAYS) + 7)}",
    ]
    for stage, tally in tallies.items():
        kills = [tally.kills[way] for way in WAYS]
        result = [tally.resumed, tally.most_lost, tally.finished, tally.cut_off, f"{tally.seconds:.0f}", len(tally.problems)]
        lines.append(f"| {' | '.join(map(str, [stage, sum(kills), *kills, *result]))} |")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="total for all stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages to kill; earlier ones are only run")
    parser.add_argument("--images", type=int, help="number of tiny photographs that replace the digits")
    parser.add_argument("--folder", type=Path, help="folder for them, which is kept")
    given = parser.parse_args()
    draw, tallies = random.Random(given.seed), {}
    needed = STAGES[: max(STAGES.index(stage) for stage in given.stages) + 1]
    with tempfile.TemporaryDirectory() as folder:
        overlay = SMALL
        if given.images:
            root = given.folder or Path(folder) / "images"
            scale.make_images(root, given.images, classes=1000)
            overlay = {**LARGE, "dataset": {**LARGE["dataset"], "root": str(root.resolve())}}
        seconds, files = undisturbed(Path(folder) / "undisturbed", overlay, needed)
        workspace = new_workspace(Path(folder) / "killed", overlay)
        for stage in needed:
            place = given.stages.index(stage) if stage in given.stages else -1
            kills = len(range(place, given.kills, len(given.stages))) if place >= 0 else 0
            if kills == 0:
                workspace.run("repro", stage)
                continue
            tallies[stage] = harass(workspace, stage, kills, seconds[stage], files[stage], draw)
            print(f"{stage}: {sum(tallies[stage].kills.values())} kills, {len(tallies[stage].problems)} problems", flush=True)
    problems = [problem for tally in tallies.values() for problem in tally.problems]
    print("\n".join(["", table(tallies), *problems]))
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
