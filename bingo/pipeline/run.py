"""What every stage does before and after its work: load parameters, report errors in one line each, record the run.

Nothing here can change a stage's output, so no stage depends on this file.
"""

import ctypes
import errno
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bingo.params import Params, Section, load_params, read_yaml
from bingo.pipeline.commands import enter_workspace, run_app
from bingo.pipeline.launch import expected_processes
from bingo.pipeline.paths import LIMITS, RUNS
from bingo.pipeline.state import sweep
from bingo.planning.limits import check_limits
from bingo.runtime.artefacts import file_fingerprint, fingerprint, write_json
from bingo.runtime.errors import (
    FAILED,
    INTERRUPTED,
    USER_MISTAKE,
    GroupLost,
    Interrupted,
    UserError,
    near_matches,
    out_of_memory,
    printable,
)
from bingo.runtime.memory import keep_freed_memory

if TYPE_CHECKING:
    import torch
    import typer

# How long a process of a group waits before it prints an error: meanwhile the launcher, who sees the first one fail, ends the others.
OTHERS_WAIT_SECONDS, LOST_WAIT_SECONDS = 2, 5
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
PACKAGES = ("torch", "torchvision", "timm", "zarr", "numpy", "faiss-gpu", "faiss-cpu", "scikit-learn")


@dataclass
class Run:
    """One run of one stage: its parameters, what is worth noting of it (never part of an output), and the lines of limits that its
    parameters break, where the stage adds others before it raises them."""

    stage: str
    params: Params
    notes: dict[str, Any] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        """Print one line on the first process."""
        if os.environ.get("RANK", "0") == "0":
            print(line, flush=True)


def run_command(app: "typer.Typer") -> None:
    """Run a command line in the workspace that contains the current folder. User errors are printed in one line each, with exit code 2."""
    with mistakes_as_lines():
        enter_workspace()
        run_app(app)


@contextmanager
def stage_run(stage: str, raises_limits: bool = False) -> Iterator[Run]:
    """Load the parameters, do the work in the body, write the run's records. User errors are printed in one line, with exit code 2.

    `raises_limits`: the body raises what `mistakes` of the run holds, with what it finds itself.
    """
    die_with_parent()
    with mistakes_as_lines():
        run = Run(stage, load_params())
        if "RANK" not in os.environ:  # the launcher has done it
            try:
                check_limits(run.params, expected_processes(), Path(os.environ.get("DVC_ROOT", ".")) / LIMITS)
            except UserError as error:
                if not raises_limits:
                    raise
                run.mistakes = error.lines
            sweep()
        begun = time.monotonic()
        yield run
        if os.environ.get("RANK", "0") == "0":
            seconds = round(time.monotonic() - begun, 2)
            ended = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
            record = {"stage": stage, "seconds": seconds, "ended": ended, **_peak_memory(), **run.notes, **_surroundings(run.params)}
            _write_record(record)
            made = ", ".join(_outputs(stage))
            run.say(f"{stage}: {f'wrote {made}' if made else 'done'} in {seconds:,.1f} s")


def _outputs(stage: str) -> list[str]:
    """The existing files among the outputs that dvc.yaml lists for a stage, or for an item of a stage (STAGE-ITEM)."""
    name, _, item = stage.partition("-")
    definition = (read_yaml("dvc.yaml") if Path("dvc.yaml").exists() else {"stages": {}})["stages"].get(name, {})
    definition = definition.get("do", definition)
    listed = [
        path
        for part in ("outs", "metrics", "plots")
        for entry in definition.get(part, [])
        for path in ([entry] if isinstance(entry, str) else entry)
    ]
    return [path for path in (re.sub(r"\$\{(item|key)\}", lambda _: item, path) for path in listed) if Path(path).exists()]


def _write_record(record: dict[str, Any]) -> None:
    """Save the notes on a run. The stage's outputs are complete, so a lack of disk space here is only a warning."""
    for folder in _record_folders():
        try:
            write_json(folder / f"{record['stage']}.json", record)
        except OSError as error:
            if error.errno not in NO_ROOM and error.errno not in NO_RIGHT:
                raise
            _print_lines([f"{error.filename}: {error.strerror}; the outputs are complete, but this run is not recorded"], "warning")


def _record_folders() -> list[Path]:
    """Folders of a run's record: `.bingo/runs` and, for a DVC experiment, whose folder may be deleted after the run, also
    `.bingo/runs/EXPERIMENT` in the original repository (or in the folder BINGO_RUNS)."""
    experiment = os.environ.get("DVC_EXP_NAME")
    kept = Path(os.environ.get("BINGO_RUNS") or Path(os.environ.get("DVC_ROOT", ".")) / RUNS)
    return [RUNS, kept / experiment] if experiment else [RUNS]


def _peak_memory() -> dict[str, float]:
    """Peak memory of this process, in MB of 2^20 bytes: on the host and, if one was used, on the GPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes on Linux
    peaks = {"peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peaks["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return peaks


@contextmanager
def mistakes_as_lines() -> Iterator[None]:
    """Print a UserError's lines and exit with code 2; exit with 75 if the stage was stopped with a checkpoint.

    Of several processes, only the one that failed first reports the error; the others usually fail because of it, or find the same error.
    """
    try:
        yield
    except UserError as error:
        _print_lines([_with_the_way_in(line) for line in error.lines])
        raise SystemExit(USER_MISTAKE) from None
    except OSError as error:
        if error.errno not in NO_ROOM and error.errno not in NO_RIGHT:
            raise
        way_out = "free some space" if error.errno in NO_ROOM else "fix the permissions"
        _print_lines([f"{error.filename or Path.cwd()}: {os.strerror(error.errno)}; {way_out}, and start again: finished work is kept"])
        raise SystemExit(USER_MISTAKE) from None
    except Interrupted as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except GroupLost as error:
        time.sleep(LOST_WAIT_SECONDS)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}; start again to resume", file=sys.stderr, flush=True)
        raise SystemExit(FAILED) from None
    except Exception as error:
        if line := out_of_memory(error):
            _print_lines([line])
            raise SystemExit(USER_MISTAKE) from None
        _let_the_first_speak()
        raise


def _with_the_way_in(line: str) -> str:
    """A line that reports a missing artefact; if this folder is not in a workspace, the line says so."""
    if Path("params.yaml").exists() or not re.match(r"(data|models|reports)/\S+: .*does not exist", line):
        return line
    return f"{line}, but first change into the project's folder: {Path.cwd()} is not in a folder with params.yaml"


def _let_the_first_speak() -> None:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(OTHERS_WAIT_SECONDS)


def _print_lines(lines: Sequence[str], word: str = "error") -> None:
    """Print errors, which are usually the same on all processes."""
    _let_the_first_speak()
    print("\n".join(f"{word}: {printable(line)}" for line in lines), file=sys.stderr, flush=True)


def in_words(figures: Mapping[str, float | None], form: str = "g") -> str:
    """Figures for the lines that a stage prints, by name and value: `orphan_share` is "orphan share", `knn_10` "k-NN, k = 10"."""
    from bingo.report.measures import measure_label

    labels = {key: measure_label(key) if key.startswith(("knn_", "agreement_")) else key.replace("_", " ") for key in figures}
    return "; ".join(f"{labels[key]}: {'none' if value is None else format(value, form)}" for key, value in figures.items())


def check_output(option: str, path: Path, suffixes: Sequence[str], force: bool) -> None:
    """Raises UserError for an output with another suffix, in a folder that does not exist, or that exists already, unless `force` is
    set."""
    if path.suffix not in suffixes:
        raise UserError(f"{option} = {path}: allowed are names that end in {', '.join(suffixes)}")
    if nearest := next((folder for folder in path.parents if folder.exists() and not folder.is_dir()), None):
        raise UserError(f"{option} = {path}: {nearest} is a file, not a folder; give another name")
    if path.is_symlink() or path.exists():
        if not force:
            raise UserError(f"{option} = {path}: exists already; give another name, or --force to replace it")
        if path.is_symlink() or path.is_dir() != (path.suffix == ".zarr") or (path.is_dir() and not (path / "zarr.json").is_file()):
            raise UserError(f"{option} = {path}: is not a file of this kind, so --force does not replace it; give another name")


def chosen_items(key: str, items: Mapping[str, Section], name: str | None) -> list[str]:
    """The item of a mapping in params.yaml given by a command, or all. Raises UserError if it does not exist, or the mapping is empty."""
    allowed = list(items)
    if not allowed:
        raise UserError(f"{key} = {{}}: there is nothing to evaluate; add an entry (params.yaml and `bingo recipe list` show how)")
    if name is not None and name not in allowed:
        raise UserError(f"{key} has no {name}: allowed are {', '.join(allowed)}{near_matches(name, allowed)}")
    return [name] if name else allowed


def check_item(argument: str, name: str, params: Params, key: str) -> None:
    """Raises UserError if a command's argument is not in a list of params.yaml, which is called `key`."""
    section, _, last = key.rpartition(".")
    allowed = getattr(getattr(params, section) if section else params, last)
    if name not in allowed:
        raise UserError(f"{argument} = {name}: params.yaml's {key} allow {', '.join(allowed) or 'none'}{near_matches(name, allowed)}")


def chosen_networks(params: Params, name: str | None) -> list[str]:
    """The network given by an evaluation's argument, or all. Raises UserError if it does not exist."""
    allowed = ["student", *params.baselines, "untrained", "teacher", "pixels"]
    if name is not None and name not in allowed:
        raise UserError(f"net = {name}: allowed are {', '.join(allowed)}{near_matches(name, allowed)}")
    return [name] if name else allowed


def item_name(argument: str) -> str:
    """The item given by a command's argument: the argument itself, or the part after @ of DVC's STAGE@ITEM, which dvc.yaml passes."""
    return argument.rpartition("@")[2]


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends: a killed `dvc` must not leave a training behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if _is_orphan():  # the parent was killed before this line
            print("error: the dvc that started this stage has ended; start again", file=sys.stderr, flush=True)
            raise SystemExit(INTERRUPTED)


def _is_orphan() -> bool:
    """Whether DVC started this process and its parent is now process 1, which in a container may be DVC itself."""
    if "DVC_STAGE" not in os.environ or "RANK" in os.environ or os.getppid() != 1:  # a rank's parent is torchrun
        return False
    try:
        name = Path("/proc/1/comm").read_text().strip()
    except OSError:  # hidden: another user's
        return True
    return name != "dvc" and not name.startswith("python")


def _surroundings(params: Params) -> dict[str, Any]:
    """Versions, revision, machine and resolved parameters of a run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "versions": versions,
        "python": platform.python_version(),
        "revision": git.stdout.strip() or None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "params": params.model_dump(),
    }


def pick_device() -> "torch.device":
    """The device of this process: BINGO_DEVICE (cpu, cuda or auto), and with several processes the GPU of its local rank.

    For the CPU, freed memory is kept from now on."""
    import torch

    wanted = os.environ.get("BINGO_DEVICE", "auto")
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"BINGO_DEVICE = {wanted}: allowed are auto, cpu, cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("BINGO_DEVICE = cuda: torch sees no GPU here; set BINGO_DEVICE=cpu, or fix the driver (nvidia-smi)")
    if wanted == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > gpus:
        raise UserError(f"BINGO_PROCESSES = {processes}: each needs a GPU and torch sees {gpus} here; lower it, or set BINGO_DEVICE=cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(run: Run) -> Iterator["torch.device"]:
    """Choose the device, make arithmetic repeatable, and join the launcher's process group if there is one."""
    import torch

    from bingo.runtime import distributed

    device = pick_device()
    torch.backends.cudnn.benchmark = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    run.notes["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    with distributed.group(device):
        run.notes["processes"] = distributed.world()
        if restart := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            run.notes["restarts"] = restart
            run.say(f"{run.stage}: a process ended early; restart {restart} of {os.environ.get('TORCHELASTIC_MAX_RESTARTS')}")
        yield device


def code_fingerprint(stage: str, method: str = "") -> str:
    """A fingerprint of the source files that dvc.yaml lists for a stage, so that checkpoints of other code are not resumed."""
    stages = read_yaml("dvc.yaml")["stages"]
    definition = stages[stage].get("do", stages[stage])
    params = read_yaml("params.yaml")
    chosen = {"distill.method": method, "item": method, "teacher.format": params["teacher"]["format"]}
    paths = [Path(re.sub(r"\$\{(.+?)\}", lambda key: chosen.get(key[1], key[0]), dep)) for dep in definition["deps"]]
    listed = [path for path in paths if path.parts[0] in ("bingo", "stages")]
    files = {str(file) for path in listed for file in (path.rglob("*.py") if path.is_dir() else [path])}
    return fingerprint({file: file_fingerprint(file) for file in files})
