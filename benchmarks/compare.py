"""A sweep of recipes and seeds as DVC experiments, which can be interrupted and resumed (`make compare`).

python -m benchmarks.compare --variants method-bingo method-moco --seeds 0 1 2        then: bingo experiments

A variant is a recipe applied to params.yaml; its experiment is named VARIANT-sSEED. With `--base RECIPE` (whose images are in `--root`)
each variant is combined with that recipe and named BASE+VARIANT-sSEED. Every experiment is run by `dvc exp run` in a clone of the last
commit that shares the DVC cache. Edits in the workspace therefore do not affect a running sweep, and a failing experiment does not affect
the workspace. All variants of a seed run in one clone, one after the other: the first computes listing, teacher and embeddings, and the
others take them from DVC's run cache. `--jobs` distributes seeds, so no two jobs compute the same.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks.parser import Parser, count
from bingo.pipeline.process import die_with_parent, mistakes_as_lines
from bingo.runtime.errors import UserError

FOLDER = Path(".bingo/compare")
COMMON = {"baselines": [], "linear_eval": {"crops": {"nets": []}}}  # skipped in a comparison unless a variant asks for it
OUTSIDE = {"BINGO_RUNS": ".bingo/runs", "BINGO_STATE_DIR": ".bingo/state"}  # kept when a clone is deleted: records and checkpoints
LINES_SHOWN, POLL_SECONDS, GRACE_SECONDS = 8, 0.2, 60


@dataclass(frozen=True)
class QueuedRun:
    """A recipe with a seed, and its changes to params.yaml in the form that `dvc exp run -S` takes."""

    variant: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.variant}-s{self.seed}"


@dataclass
class Lane:
    """A clone in which the experiments of one seed after another are run."""

    folder: Path
    todo: list[QueuedRun] = field(default_factory=list)
    running: QueuedRun | None = None
    process: subprocess.Popen | None = None
    begun: float = 0.0
    fresh: bool = False

    def start(self, experiment: QueuedRun, commit: str, home: Path) -> None:
        """Start an experiment, in a new clone unless the last one succeeded; records and checkpoints go to `home`."""
        if not self.fresh:
            _clone(self.folder, commit)
        _git("checkout", "--quiet", "--force", "--detach", commit, folder=self.folder)
        _git("clean", "--quiet", "-fd", "--exclude=.dvc", folder=self.folder)
        command = ["dvc", "exp", "run", "--name", experiment.name, *(f"--set-param={override}" for override in experiment.overrides)]
        kept = {name: str(home / os.environ.get(name, default)) for name, default in OUTSIDE.items()}
        with open(log_of(experiment), "w") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=os.environ | kept, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=_before_start,
            )  # fmt: skip
        self.running, self.begun = experiment, time.monotonic()

    def finish(self, commit: str) -> int:
        """Wait for the experiment, fetch it, and return its exit code. After a failure the clone is not used again (`fresh`)."""
        assert self.running is not None
        assert self.process is not None
        code, name = self.process.wait(), self.running.name
        self.running, self.process = None, None
        self.fresh = code == 0 and _bring_home(self.folder, commit, name)
        return code

    def close(self) -> None:
        """End the running experiment, and delete the clone."""
        end([self.process] if self.process else [])
        shutil.rmtree(self.folder, ignore_errors=True)


def main() -> None:
    """The command line."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variants", nargs="+", required=True, metavar="RECIPE", help="recipes; see `bingo recipe list`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--base", metavar="RECIPE", help="a recipe to combine with every variant, for other images")
    parser.add_argument("--root", help="folder of the images of --base; sets dataset.root")
    parser.add_argument("--jobs", type=count, default=1, help="number of seeds run at a time; keep 1 on one GPU")
    given = parser.parse_args()
    with mistakes_as_lines():
        if part := next((name for name in [*given.variants, given.base or ""] if "/" in name), None):
            raise UserError(f"recipe = {part}: is a part of recipes, which cannot be a variant or a base; see: bingo recipe list")
        commit = clean_commit()
        experiments = [
            QueuedRun(f"{given.base}+{variant}" if given.base else variant, seed, overrides(variant, seed, given.base, given.root))
            for seed in dict.fromkeys(given.seeds)
            for variant in dict.fromkeys(given.variants)
        ]
        with only_one():
            failed = Sweep(experiments, commit, given.jobs).run()
    raise SystemExit(1 if failed else 0)


def overrides(
    variant: str, seed: int, base: str | None = None, root: str | None = None, settings: Sequence[dict[str, Any]] = ()
) -> tuple[str, ...]:
    """The changes that a base, a recipe, further `settings` and a seed make to params.yaml, each as `dotted.key=value`, without changes
    that affect only the report. Raises UserError if the result is not allowed."""
    from bingo.params.views import PLACES, numbers_of

    _, changes = laid_over(variant, seed, base, root, settings)
    last = {key: numbers_of(new) if key in PLACES and isinstance(new, dict) else new for key, _, new in changes}
    return tuple(
        f"{'++' if isinstance(value, dict) else ''}{key}={written(value)}" for key, value in last.items() if not key.startswith("report.")
    )


def laid_over(
    variant: str, seed: int, base: str | None, root: str | None, settings: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], list[tuple[str, Any, Any]]]:
    """params.yaml of a run, and its changes in order: key, old and new value.

    The folder of the images is made absolute, because runs are in other folders. Raises UserError if the result is not allowed.
    """
    from bingo.params import read_yaml, validate
    from bingo.planning.recipes import lay_over, read_recipe

    if root == "":
        raise UserError("--root is empty: give the folder of the images, or leave it out")
    document = read_yaml("params.yaml")
    validate(document, "params.yaml")
    recipes = {name: read_recipe(Path("recipes"), name).overlay for name in (base, variant) if name}
    overlays = (recipes.get(base or "", {}), COMMON, recipes[variant], *settings, {"seed": seed})
    changes = [change for overlay in overlays for change in lay_over(document, overlay)]
    changes += lay_over(document, {"dataset": {"root": root}} if root else {})
    dataset = validate(document, f"params.yaml with recipe {' and '.join(recipes)}").dataset
    if root and dataset.source == "folder" and not Path(root).expanduser().is_dir():
        raise UserError(f"--root = {root}: the folder does not exist; name the one that holds the images")
    if dataset.root:
        changes += lay_over(document, {"dataset": {"root": str(Path(dataset.root).expanduser().absolute())}})
    return document, changes


def written(value: Any) -> str:
    """A value in Hydra's grammar for `-S`, so that its type is kept: text is always quoted.

    Only backslashes before a quote or at the end need to be escaped.
    """
    if isinstance(value, str):
        return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + (found[2] and "\\'"), value) + "'"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(item)}' for key, item in value.items())}}}"
    return json.dumps(value)


class Sweep:
    """Runs the experiments that the commit does not have yet, and reports each of them."""

    def __init__(self, experiments: Sequence[QueuedRun], commit: str, jobs: int):
        self.commit, self.home = commit, Path.cwd()
        self.cached = [experiment for experiment in experiments if _exists(commit, experiment.name)]
        self.todo = [experiment for experiment in experiments if experiment not in self.cached]
        self.all, self.done, self.failed = len(experiments), len(self.cached), 0
        self.seconds: dict[bool, list[float]] = {True: [], False: []}  # of a seed's first experiment (True), and of later ones
        self.firsts = {experiment.seed: experiment for experiment in reversed(self.todo)}
        self.lanes = [Lane(FOLDER.resolve() / f"clone-{number}") for number in range(min(jobs, len(self.firsts)))]

    def run(self) -> int:
        """Run all, and return the number of failures. An interrupt ends running experiments, which save a checkpoint, and deletes all
        clones."""
        print(
            f"{self.all} experiments at {self.commit[:7]}, {len(self.cached)} of them cached; what they print: {FOLDER}/*.log", flush=True
        )
        for experiment in self.cached:
            print(f"{experiment.name}: cached", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while self.todo or any(lane.todo or lane.running for lane in self.lanes):
                for lane in self.lanes:
                    self._attend(lane)
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            print(f"interrupted after {self.done} of {self.all}; run the same command again to resume", flush=True)
            raise
        finally:
            end([lane.process for lane in self.lanes if lane.process])
            for lane in self.lanes:
                lane.close()
        print(f"{self.done} of {self.all} done, {self.failed} failed; the table: bingo experiments", flush=True)
        return self.failed

    def _attend(self, lane: Lane) -> None:
        """Finish the lane's experiment if it has ended, and start the next one: of the same seed, or of another."""
        if lane.process and lane.process.poll() is not None:
            self._finish(lane)
        if lane.running:
            return
        if not lane.todo and self.todo:
            seed = self.todo[0].seed
            lane.todo = [experiment for experiment in self.todo if experiment.seed == seed]
            self.todo = [experiment for experiment in self.todo if experiment.seed != seed]
        if lane.todo:
            lane.start(lane.todo.pop(0), self.commit, self.home)

    def _finish(self, lane: Lane) -> None:
        """Fetch the experiment, or print the end of its log."""
        experiment, seconds = lane.running, time.monotonic() - lane.begun
        assert experiment is not None
        code = lane.finish(self.commit)
        self.seconds[self.firsts[experiment.seed] is experiment].append(seconds)
        self.done += lane.fresh
        self.failed += not lane.fresh
        count = f"[{self.done + self.failed}/{self.all}] {experiment.name}:"
        if lane.fresh:
            print(f"{count} {_accuracy(lane.folder)}; {clock(seconds)}{self._left()}", flush=True)
        else:
            print(f"{count} FAILED, exit code {code}; {clock(seconds)}{self._left()}; {log_of(experiment)} ends:", flush=True)
            print("".join(f"    {line}\n" for line in last_lines(log_of(experiment))), end="", flush=True)

    def _left(self) -> str:
        """The remaining time, from the mean times so far; a seed's first experiment computes results that the others take from the
        cache."""
        rest = [*self.todo, *(experiment for lane in self.lanes for experiment in lane.todo)]
        under_way = [(lane.running, time.monotonic() - lane.begun) for lane in self.lanes if lane.running]
        if not rest and not under_way:
            return ""
        mean = {first: sum(known) / len(known) for first, known in self.seconds.items() if known}
        likely = [mean.get(self.firsts[one.seed] is one, next(iter(mean.values()))) for one in rest]
        likely += [max(0, mean.get(self.firsts[one.seed] is one, next(iter(mean.values()))) - spent) for one, spent in under_way]
        return f", about {clock(sum(likely) / len(self.lanes))} left"


def clean_commit(besides: str = "") -> str:
    """The commit to sweep over. Raises UserError if tracked files except `besides` differ from it, because experiments would then not be
    what their names say."""
    try:
        commit = _git("rev-parse", "--verify", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *([f":(exclude){besides}"] if besides else []))
    except subprocess.CalledProcessError as error:
        raise UserError(f"git: {' '.join(error.stderr.split())}; a sweep is of a commit: git add -A && git commit") from None
    if changed:
        names = ", ".join(line[3:] for line in changed.splitlines()[:5])
        raise UserError(f"{names}: not committed, and a sweep is of a commit; git commit -am 'before the sweep', or take it back")
    return commit


@contextmanager
def only_one() -> Iterator[TextIO]:
    """Hold the lock for sweeps of this repository. Raises UserError if another process holds it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{FOLDER / 'lock'}: another sweep of this repository is under way; wait for it or end it") from None
        yield lock


def _clone(folder: Path, commit: str) -> None:
    """A fresh clone at a commit, with this repository's DVC cache and local settings."""
    shutil.rmtree(folder, ignore_errors=True)
    _git("clone", "--quiet", "--no-checkout", ".", str(folder))
    _git("checkout", "--quiet", "--detach", commit, folder=folder)
    for key in ("user.name", "user.email"):
        if value := _git("config", "--get", "--default", "", key):
            _git("config", key, value, folder=folder)
    if Path(".dvc/config.local").exists():
        shutil.copy(".dvc/config.local", folder / ".dvc/config.local")
    cache = Path(_run(["dvc", "cache", "dir"])).resolve()
    _run(["dvc", "config", "--quiet", "--local", "cache.dir", str(cache)], folder)


def _exists(commit: str, name: str) -> bool:
    return bool(_git("for-each-ref", _reference(commit, name)))


def _reference(commit: str, name: str) -> str:
    return f"refs/exps/{commit[:2]}/{commit[2:]}/{name}"  # where DVC keeps an experiment


def _bring_home(folder: Path, commit: str, name: str) -> bool:
    """Fetch an experiment from a clone; returns whether it was there."""
    reference = _reference(commit, name)
    try:
        _git("fetch", "--quiet", str(folder), f"+{reference}:{reference}")
    except subprocess.CalledProcessError:
        return False
    return True


def _before_start() -> None:
    """In the child: end with the parent, and accept SIGINT even if the shell started the parent with SIGINT ignored (`&`)."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(processes: Sequence[subprocess.Popen]) -> None:
    """End process groups as Ctrl-C does, so that trainings save a checkpoint; kill them after a minute."""
    try:
        for process in processes:
            _signal(process, signal.SIGINT)
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end and any(process.poll() is None for process in processes):
            time.sleep(POLL_SECONDS)
    finally:  # a second Ctrl-C jumps here
        for process in processes:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def log_of(experiment: QueuedRun) -> Path:
    return FOLDER / f"{experiment.name}.log"


def last_lines(log: Path) -> list[str]:
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-LINES_SHOWN:]


def _accuracy(folder: Path) -> str:
    figures = json.loads((folder / "reports/results.json").read_text())
    shown = {"linear": figures.get("linear", {}).get("student"), "k-NN (k = 10)": figures.get("knn_10", {}).get("student")}
    return ", ".join(f"{name} {percent:.1f}" for name, percent in shown.items() if percent is not None) or "no accuracy was measured"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _git(*arguments: str, folder: Path | None = None) -> str:
    return _run(["git", *arguments], folder)


def _run(command: Sequence[str], folder: Path | None = None) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.rstrip("\n")


if __name__ == "__main__":
    sys.exit(main())
