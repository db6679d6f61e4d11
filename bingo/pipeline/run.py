"""Common code of all stages before and after their work: load parameters, report errors in one line each, record the run.

Nothing here can change a stage's output, so no stage depends on this file.
"""

import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

from bingo.params import Params, load_params, read_yaml
from bingo.paths import LIMITS, RUNS
from bingo.pipeline.commands import declared_outputs
from bingo.pipeline.launch import expected_processes, launch
from bingo.pipeline.process import NO_RIGHT, NO_ROOM, die_with_parent, is_first, mistakes_as_lines, print_lines
from bingo.pipeline.state import sweep
from bingo.planning.limits import check_limits
from bingo.report.measures import measure_label
from bingo.runtime.artefacts import file_fingerprint, fingerprint, write_json
from bingo.runtime.errors import UserError, first_sentence, near_matches
from bingo.runtime.gpus import unusable_gpu, wanted_device
from bingo.runtime.loggers import wanted_loggers
from bingo.runtime.memory import keep_freed_memory, peak_memory

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "torchvision", "timm", "zarr", "numpy", "faiss-gpu", "faiss-cpu", "scikit-learn")


@dataclass
class Run:
    """One run of a stage, or of one of its items: its parameters, notes on the run (never part of an output), and the lines on limits that
    its parameters exceed, to which a stage may add others before it raises them. `idle`: why there was nothing to do, so that the outputs
    are empty."""

    name: str
    params: Params
    item: str | None = None
    idle: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        """The name of the stage, followed by that of its item: linear_eval-student."""
        return f"{self.name}-{self.item}" if self.item else self.name

    def say(self, line: str) -> None:
        """Print one line on the first process."""
        if is_first():
            print(line, flush=True)

    def warn(self, line: str) -> None:
        """Print one line on standard error, on the first process only."""
        if is_first():
            print(f"warning: {self.stage}: {line}", file=sys.stderr, flush=True)

    def chosen(self, key: str, allowed: Collection[str]) -> list[str]:
        """The run's item, or without one all items that `key` of params.yaml allows. Raises UserError if there is no such item, or none."""
        if not allowed:
            raise UserError(f"{key} is empty: there is nothing to do; add an entry (params.yaml and `bingo recipe list` show how)")
        if self.item is not None and self.item not in allowed:
            raise UserError(f"{key} has no {self.item}: allowed are {', '.join(allowed)}{near_matches(self.item, allowed)}")
        return [self.item] if self.item else list(allowed)

    def networks(self) -> list[str]:
        """The network given by an evaluation's argument, or all. Raises UserError if it does not exist."""
        return self.chosen("net", ["student", "ema", *self.params.baselines, "untrained", "start", "supervised", "teacher", "pixels"])

    def launch(self) -> None:
        """Become the launcher if several processes are wanted; it runs this stage in each of them."""
        launch(self.name, *([self.item] if self.item else []))


def in_words(figures: Mapping[str, float | None], form: str = "g") -> str:
    """Figures as text for the lines that a stage prints: `orphan_share` becomes "orphan share", `knn_10` becomes "k-NN, k = 10"."""
    labels = {key: measure_label(key) if key.startswith(("knn_", "agreement_")) else key.replace("_", " ") for key in figures}
    return "; ".join(f"{labels[key]}: {'none' if value is None else format(value, form)}" for key, value in figures.items())


@contextmanager
def stage_run(name: str, item: str | None = None, raises_limits: bool = False, builds_networks: bool = True) -> Iterator[Run]:
    """Context manager that loads the parameters and, after the work in the body, writes the run's records. User errors are printed in one
    line, with exit code 2.

    `item`: given by a command's argument, or by DVC's STAGE@ITEM, which dvc.yaml passes on. `raises_limits`: the body raises the run's
    `mistakes`, together with its own. `builds_networks`: the networks are also checked, which needs torch.
    """
    die_with_parent()
    with mistakes_as_lines(name):
        run = Run(name, load_params(), item.rpartition("@")[2] if item else None)
        if "RANK" not in os.environ:  # otherwise the launcher has done it
            wanted_loggers()
            try:
                check_limits(run.params, expected_processes(), Path(os.environ.get("DVC_ROOT", ".")) / LIMITS, builds_networks)
            except UserError as error:
                if not raises_limits:
                    raise
                run.mistakes = error.lines
            sweep()
        begun = time.monotonic()
        yield run
        if is_first():
            seconds = round(time.monotonic() - begun, 2)
            ended = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
            record = {"stage": run.stage, "seconds": seconds, "ended": ended, **peak_memory(), **run.notes, **_surroundings(run.params)}
            _write_record(record)
            listed = (re.sub(r"\$\{(item|key)\}", lambda _: run.item or "", path) for path in declared_outputs(Path(), name))
            made = ", ".join(path for path in listed if Path(path).exists())
            done = f"nothing to do, as {run.idle}; empty outputs" if run.idle else f"wrote {made}" if made else "done"
            run.say(f"{run.stage}: {done} in {seconds:,.1f} s")


def _write_record(record: dict[str, Any]) -> None:
    """Save the notes on a run, in `.bingo/runs` and, for a DVC experiment, whose folder may be deleted after the run, also in
    `.bingo/runs/EXPERIMENT` in the original repository (or in the folder BINGO_RUNS). The stage's outputs are complete, so a lack of disk
    space here is only a warning."""
    experiment = os.environ.get("DVC_EXP_NAME")
    kept = Path(os.environ.get("BINGO_RUNS") or Path(os.environ.get("DVC_ROOT", ".")) / RUNS)
    for folder in [RUNS, kept / experiment] if experiment else [RUNS]:
        try:
            write_json(folder / f"{record['stage']}.json", record)
        except OSError as error:
            if error.errno not in NO_ROOM and error.errno not in NO_RIGHT:
                raise
            print_lines([f"{error.filename}: {error.strerror}; the outputs are complete, but this run is not recorded"], "warning")


def _surroundings(params: Params) -> dict[str, Any]:
    """Versions, revision, machine and resolved parameters of a run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    describe = ["git", "describe", "--always", "--dirty"]
    revision = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() if which("git") else None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "revision": revision or None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "params": params.model_dump(),
    }


def pick_device() -> "torch.device":
    """The device of this process: BINGO_DEVICE (cpu, cuda or auto), and with several processes the GPU of its local rank.

    For the CPU, freed memory is kept from now on. Raises UserError if there is a GPU that torch cannot use, unless the CPU is requested.
    """
    import torch

    wanted = wanted_device()
    if wanted == "cpu" or not _torch_has_a_gpu():
        if wanted == "cuda":
            raise UserError("BINGO_DEVICE = cuda: torch sees no GPU here; set BINGO_DEVICE=cpu, or fix the driver (nvidia-smi)")
        keep_freed_memory()
        return torch.device("cpu")
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus:
        raise UserError(f"BINGO_PROCESSES = {processes}: each needs a GPU and torch sees {gpus} here; lower it, or set BINGO_DEVICE=cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _torch_has_a_gpu() -> bool:
    """Whether torch can use a GPU. Raises UserError if there is a GPU that torch cannot use; about its driver, torch only warns."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return True
    reasons = [first_sentence(str(warning.message)) for warning in said if "CUDA" in str(warning.message)]
    if line := unusable_gpu("torch", "; ".join(reasons)):
        raise UserError(line)
    return False


def make_deterministic(device: "torch.device") -> bool:
    """Let torch use deterministic algorithms, and return whether it does: always on a CPU, on a GPU unless BINGO_DETERMINISTIC is 0.

    New memory is not filled, as torch does by default in this mode, because no operation here reads uninitialised memory. Raises UserError
    for another value."""
    import torch

    wanted = os.environ.get("BINGO_DETERMINISTIC", "1")
    if wanted not in ("0", "1"):
        raise UserError(f"BINGO_DETERMINISTIC = {wanted}: allowed are 1 and 0; unset it, or set it to 1, for reproducible results")
    deterministic = wanted == "1" or device.type == "cpu"
    torch.use_deterministic_algorithms(deterministic, warn_only=device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return deterministic


@contextmanager
def process_group(run: Run, gloo: bool = False) -> Iterator["torch.device"]:
    """Context manager that chooses the device, makes arithmetic reproducible, and joins the launcher's process group if there is one;
    `gloo`: use a group that exchanges data in the host's memory, also with GPUs."""
    import torch

    from bingo.runtime import distributed

    device = pick_device()
    run.notes["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    if not make_deterministic(device):
        run.notes["device"] += ", not deterministic"
    if gloo and device.type == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(device)
    with distributed.group(torch.device("cpu") if gloo else device):
        run.notes["processes"] = distributed.world()
        if restart := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            run.notes["restarts"] = restart
            run.say(f"{run.stage}: a process ended early; restart {restart} of {os.environ.get('TORCHELASTIC_MAX_RESTARTS')}")
        yield device


def code_fingerprint(stage: str, method: str = "") -> str:
    """A fingerprint of the source files that dvc.yaml lists for a stage, so that checkpoints of other code are not used."""
    stages = read_yaml("dvc.yaml")["stages"]
    chosen = {"distill.method": method, "item": method, "teacher.name": read_yaml("params.yaml")["teacher"]["name"]}
    written = stages[stage].get("do", stages[stage]).get("deps", [])  # a user's own pipeline may list none
    deps = [Path(re.sub(r"\$\{(.+?)\}", lambda key: chosen.get(key[1], key[0]), dep)) for dep in written]
    listed = [path for path in deps if path.parts[0] in ("bingo", "stages")]
    files = {str(file) for path in listed for file in (path.rglob("*.py") if path.is_dir() else [path])}
    return fingerprint({file: file_fingerprint(file) for file in files})
