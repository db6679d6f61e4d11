"""Several runs of a study at a time and without DVC, for a machine that is available for a short time: each lane is a process with a
folder.

Shared results are computed once, by the first lane that needs them, and linked into the folders of the others. A lane runs the stages one
after the other in its own process, so that torch is imported and the GPU is opened only once.
"""

import fcntl
import importlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.study_plan import Wanted
from bingo.runtime.artefacts import fingerprint
from bingo.runtime.errors import UserError, reason_of
from bingo.runtime.workers import begin_worker

ROOT = Path(__file__).parents[1]
BESIDE = ("teacher", "untrained", "pixels", "start", "supervised")  # other networks, which training does not change
EVALUATIONS = ("linear_eval", "knn_eval")
PREPARED = [("scan",), ("teacher",), ("extract",), ("bag",), ("weights",), *((stage, net) for stage in EVALUATIONS for net in BESIDE)]
SECTIONS = ("seed", "image", "dataset", "teacher", "extract", "bagging", "student", *EVALUATIONS)  # what these stages read


@dataclass(frozen=True)
class LaneRun:
    """A run for a lane: its params.yaml and its splits for few labels."""

    wanted: Wanted
    document: dict[str, Any]

    @property
    def splits(self) -> list[str]:
        return list(self.document["semi_eval"]["splits"])


def run_in_lanes(
    lanes: int, folder: Path, ready: Callable[[Collection[Wanted]], Iterator[LaneRun]], take: Callable[[LaneRun, float | None], None]
) -> None:
    """Run everything that `ready(under way)` yields, `lanes` at a time. `take(run, seconds)` is called when a run ends, with None if a
    stage reported a user error. `folder` is deleted when all runs have succeeded."""
    under_way: dict[Future[float | None], LaneRun] = {}
    failed: dict[str, Wanted] = {}
    context = get_context("spawn")
    with ProcessPoolExecutor(lanes, context, _begin_lane, (context.Value("i", 0),)) as pool, _ended_with(pool):
        while True:
            for run in ready([*(one.wanted for one in under_way.values()), *failed.values()]):
                if len(under_way) == lanes:
                    break
                with _for_the_owner_alone(signal.SIGINT):
                    under_way[pool.submit(run_stages, run, folder)] = run
            if not under_way:
                break
            for ended in wait(under_way, return_when=FIRST_COMPLETED).done:
                run = under_way.pop(ended)
                try:
                    take(run, ended.result())
                except BrokenProcessPool:
                    problem = "a lane was killed, probably because memory ran out"
                    raise UserError(f"{problem}; lower --lanes (now {lanes}), and start again: finished runs are kept") from None
                except Exception as error:  # the others continue
                    failed[f"{run.wanted.name}-s{run.wanted.seed}: {reason_of(error)}; {log_of_run(run, folder)}"] = run.wanted
                shutil.rmtree(place_of(run, folder), ignore_errors=True)
    if failed:
        raise UserError(list(failed))
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _ended_with(pool: ProcessPoolExecutor) -> Iterator[None]:
    """End the lanes' stages as an interrupt does, if the body is interrupted."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for lane in active_children():
            lane.terminate()
        raise


@contextmanager
def _for_the_owner_alone(number: int) -> Iterator[None]:
    """Processes started in the body ignore this signal, which a terminal sends to all: the owner of the pool ends its lanes."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def place_of(run: LaneRun, folder: Path) -> Path:
    """The folder of a run."""
    return folder / f"run-{fingerprint([run.wanted.name, run.wanted.seed, dict(run.wanted.settings)])[:16]}"


def log_of_run(run: LaneRun, folder: Path) -> Path:
    """The output of a run's stages."""
    return place_of(run, folder).with_suffix(".log")


def _begin_lane(lanes_begun: Any) -> None:
    """In a new lane: use one of the pool's cores, so that loaders work in the same process."""
    begin_worker()
    os.environ["OMP_NUM_THREADS"] = "1"
    cores = sorted(os.sched_getaffinity(0))
    with lanes_begun.get_lock():
        os.sched_setaffinity(0, {cores[lanes_begun.value % len(cores)]})
        lanes_begun.value += 1


def run_stages(run: LaneRun, folder: Path) -> float | None:
    """Run the stages of a run in its folder. Returns the seconds of stages that it does not share, or None if a stage reported a user
    error."""
    place = place_of(run, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(log_of_run(run, folder), "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    shutil.rmtree(place, ignore_errors=True)  # left by an interrupted study
    shutil.copytree(_prepared(run, folder), place, symlinks=True, copy_function=os.link)
    begun = time.monotonic()
    judged = [(stage, "student") for stage in EVALUATIONS]
    stages = [("distill",), *judged, *(("semi_eval", split) for split in run.splits), ("report",)]
    with _inside(place, run.document):
        return time.monotonic() - begun if all(_ended_well(*stage) for stage in stages) else None


def _prepared(run: LaneRun, folder: Path) -> Path:
    """The folder in which the stages up to `bag` have been run."""
    place = folder / f"prepared-{fingerprint([run.document[section] for section in SECTIONS])[:16]}"
    place.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{place.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "done").exists():
            with _inside(place, run.document):
                if not all(_ended_well(*stage) for stage in PREPARED):
                    raise UserError(f"{place}: a stage ended with a mistake; see {log_of_run(run, folder)}")
            (place / "done").touch()
    return place


@contextmanager
def _inside(place: Path, document: dict[str, Any]) -> Iterator[None]:
    """Enter a workspace with these parameters. Files linked from other folders are replaced, never written to."""
    for name in ("bingo", "stages", "recipes", "dvc.yaml"):
        if not (place / name).exists():
            (place / name).symlink_to(ROOT / name)
    (place / "params.yaml").unlink(missing_ok=True)
    with open(place / "params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(document, file)
    before = Path.cwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def _ended_well(stage: str, *arguments: str) -> bool:
    try:
        importlib.import_module(f"stages.{stage}").main(*arguments)
    except SystemExit as end:
        return not end.code
    return True
