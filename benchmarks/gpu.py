"""Measurements for a first run on a GPU, in parts of at most 8 minutes, the most important first; results go to one Markdown file.

    python -m benchmarks.gpu                    all parts, 45 minutes at most
    python -m benchmarks.gpu tests step         only these parts
    python -m benchmarks.gpu --rehearse         a small version of every part on the CPU, to check that it works

Each part consists of a few commands, which run in separate processes. The output of each command is written to the file as soon as it ends.
Commands already in the file are not repeated, so an interrupted run can be resumed on the same device with the same versions. A command
that failed or ran out of time is repeated by the next run. A part that needs a missing package is skipped with a line that names the
package.
"""

import argparse
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.parser import Parser
from bingo.pipeline.process import mistakes_as_lines
from bingo.runtime.errors import UserError, reason_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/gpu.md"
PART_SECONDS = 480
STORES = ("ruamel.yaml", "simplejpeg", "zarr")
PACKAGES = ("torch", "torchvision", "timm", "faiss-gpu", "faiss-cpu", "zarr")
_SECTION = re.compile(r"^## (\w+): `([^`]+)`\n\n(.*?)(?=^## \w+: `|\Z)", re.MULTILINE | re.DOTALL)
_DONE = re.compile(r"\d{4}-\d{2}-\d{2}, \d+ s\n")


@dataclass(frozen=True)
class Part:
    """Commands (module and arguments) for a GPU, and small versions for the CPU; and the packages that they import besides torch,
    torchvision, timm, typer, pydantic, pyarrow, pillow, psutil, and the dependencies of these."""

    name: str
    commands: tuple[str, ...]
    rehearsed: tuple[str, ...]
    needs: tuple[str, ...] = STORES


_PYTEST = "pytest tests/gpu -q -s -rs -W default --noconftest -p no:cacheprovider"
_STEP, _LOADER, _EXTRACT = "benchmarks.bench_step --device", "benchmarks.bench_loader --device", "benchmarks.bench_extract --device"
_PROFILE, _BATCHNORM = "benchmarks.gpu_profile", "benchmarks.gpu_batchnorm"
_BRIEFLY = "--case small --teacher resnet18 --batch-anchors 4 --train-rows 256 --steps 1 --repeats 1"
PARTS = (
    Part("tests", (_PYTEST,), (_PYTEST,), (*STORES, "faiss", "scipy", "pytest")),
    Part(
        "step",
        (
            f"{_STEP} cuda --steps 10 --no-memory",
            f"{_STEP} cuda --steps 10 --no-memory --teacher resnet152 --variants stored_keys live_keys",
            f"{_STEP} cuda --steps 10 --no-memory --width 2 --variants stored_keys live_keys",
        ),
        (f"{_STEP} cpu {_BRIEFLY} --no-memory --variants stored_keys",),
        (*STORES, "scipy"),
    ),
    Part(
        "loader",
        (f"{_LOADER} cuda --images 4096 --batch-images 256 --repeats 3",),
        (f"{_LOADER} cpu --images 10 --batch-images 2 --workers 0 --repeats 1 --tables files pixels colours",),
    ),
    Part(
        "extract",
        (
            f"{_EXTRACT} cuda --case large --files --images 2048 --views 8 --batch-images 256 --repeats 3 --no-memory",
            f"{_EXTRACT} cuda --case large --files --images 2048 --views 8 --batch-images 256 --repeats 3 --no-memory --jpeg-decoder gpu",
            f"{_EXTRACT} cuda --case large --images 2048 --views 8 --batch-images 256 --repeats 3 --no-memory",
        ),
        (f"{_EXTRACT} cpu --case small --images 4 --views 2 --batch-images 4 --repeats 1 --no-memory",),
    ),
    Part(
        "knn",
        ("benchmarks.bench_bags --device cuda --searches exact --rows 100000 1281167 --flop 1e16",),
        ("benchmarks.bench_bags --searches exact --rows 300 600 --width 16 --k 3",),
        (*STORES, "faiss"),
    ),
    Part(
        "profile",
        (_PROFILE, _BATCHNORM),
        (
            f"{_PROFILE} --recipe digits-short --device cpu --batch-anchors 8 --rows 64 --side-px 8 --steps 2 --variants eager one-group",
            f"{_BATCHNORM} --device cpu --shapes 32,16,4,4",
        ),
        (*STORES, "scipy"),
    ),
    Part(
        "cifar10",
        ("benchmarks.gpu_goals --epochs 3",),
        ("benchmarks.gpu_goals --cpu --epochs 1 --recipe digits-short",),
        (*STORES, "faiss", "sklearn", "scipy", "matplotlib", "jinja2", "rich"),
    ),
    Part(
        "memory",
        (f"{_STEP} cuda --steps 1 --repeats 1", f"{_STEP} cuda --steps 1 --repeats 1 --width 2 --variants stored_keys live_keys"),
        (f"{_STEP} cpu {_BRIEFLY} --no-peer --variants stored_keys",),
        (*STORES, "scipy"),
    ),
)
NAMES = [part.name for part in PARTS]


class Results:
    """The Markdown file: a heading with the machine, and a section for each command."""

    def __init__(self, path: Path, machine: str):
        self.path, self.machine = path, machine
        try:
            text = path.read_text() if path.exists() else ""
        except (OSError, ValueError) as error:
            raise UserError(f"--out = {path}: cannot be read ({reason_of(error)}); give another file") from None
        self.sections = {(part, command): body for part, command, body in _SECTION.findall(text) if part in NAMES}
        found = re.search(r"^Machine: (.*)$", text, re.MULTILINE)
        if text and (found is None or found[1] != machine):
            here = f"was measured on {found[1] if found else 'an unknown machine'}; here is {machine}"
            raise UserError(f"--out = {path}: {here}; give another file, or delete this one")
        self._write()  # fails now rather than after the first command

    def has(self, part: str, command: str) -> bool:
        """Whether the command has succeeded."""
        return bool(_DONE.match(self.sections.get((part, command), "")))

    def add(self, part: str, command: str, how: str, output: str) -> None:
        """Write the file with this section; an earlier section for the command is replaced."""
        self.sections[part, command] = f"{time.strftime('%Y-%m-%d')}, {how}\n\n```\n{output.replace('```', '` ` `').rstrip()}\n```\n\n"
        self._write()

    def _write(self) -> None:
        sections = sorted(self.sections.items(), key=lambda section: NAMES.index(section[0][0]))
        body = "".join(f"## {part}: `{command}`\n\n{text}" for (part, command), text in sections)
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            partial.write_text(f"# Measured by `python -m benchmarks.gpu`\n\nMachine: {self.machine}\n\n{body}".rstrip() + "\n")
            partial.replace(self.path)
        except OSError as error:
            raise UserError(f"--out = {self.path}: cannot be written ({reason_of(error)}); give another file") from None


def machine(rehearse: bool) -> str:
    """Device, driver and versions, in one line."""
    versions = [f"Python {platform.python_version()}", f"CUDA {torch.version.cuda}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if rehearse:
        return f"rehearsed on a CPU ({platform.machine()}); {', '.join(versions)}"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    named = f"{len(gpus)} x {gpus[0].name}, {gpus[0].total_memory / 2**30:.0f} GiB each; {len(os.sched_getaffinity(0))} cores"
    return f"{named}; {', '.join(versions)}"


def missing(needs: Sequence[str]) -> list[str]:
    """The packages of `needs` that are not installed."""

    def is_there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # the package before the dot is not installed
            return False

    return [name for name in needs if not is_there(name)]


def run(command: str, seconds: float) -> tuple[int | None, str]:
    """Run `python -m COMMAND` and return its exit code (None: out of time) and output. All its processes have ended afterwards."""
    python = [sys.executable, "-u", "-m", *command.split()]
    pipe = subprocess.PIPE
    process = subprocess.Popen(python, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace", process_group=0)
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    except BaseException:  # Ctrl-C and SIGTERM
        os.killpg(process.pid, signal.SIGKILL)
        raise


def measure(part: Part, commands: Sequence[str], results: Results, seconds: float) -> bool:
    """Run the commands of a part that are not in the file yet. Returns whether all of them are now."""
    if absent := missing(part.needs):
        print(f"{part.name}: left out: {', '.join(absent)} not installed", flush=True)
        return False
    end = time.monotonic() + seconds
    for command in commands:
        if results.has(part.name, command):
            print(f"{part.name}: {command}: measured already", flush=True)
            continue
        print(f"{part.name}: {command}", flush=True)
        begun = time.monotonic()
        code, output = run(command, max(1.0, end - begun))
        print(output, end="", flush=True)
        took = f"{time.monotonic() - begun:.0f} s"
        how = took if code == 0 else f"stopped unfinished after {took}" if code is None else f"failed with exit code {code} after {took}"
        results.add(part.name, command, how, output)
        print(f"{part.name}: {how}", flush=True)
    return all(results.has(part.name, command) for command in commands)


def main() -> None:
    """Run the requested parts; the exit code is 1 if something remains to be done."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with mistakes_as_lines():
        if not options.rehearse and not torch.cuda.is_available():
            raise UserError("torch sees no GPU here; --rehearse runs a small version of every part on the CPU")
        if options.rehearse:
            os.environ |= {"BINGO_TEST_DEVICE": "cpu", "BINGO_DEVICE": "cpu"}
        results = Results(options.out or (RESULTS if not options.rehearse else Path("gpu-rehearsed.md")), machine(options.rehearse))
        left = []
        for part in (part for part in PARTS if part.name in (options.parts or NAMES)):
            commands = part.rehearsed if options.rehearse else part.commands
            left += [] if measure(part, commands, results, options.part_seconds) else [part.name]
        print(f"results: {results.path}{'; left: python -m benchmarks.gpu ' + ' '.join(left) if left else ''}")
    sys.exit(1 if left else 0)


def part_name(name: str) -> str:
    """Check that `name` is one of NAMES. With argparse's own `choices`, an empty list would be refused."""
    if name not in NAMES:
        raise argparse.ArgumentTypeError(f"invalid choice: '{name}' (choose from {', '.join(NAMES)})")  # the form that `Parser` recognises
    return name


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", type=part_name, metavar="PART", help=f"{', '.join(NAMES)} (default: all)")
    parser.add_argument("--out", type=Path, help=f"the Markdown file (default: {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--rehearse", action="store_true", help="small versions, on the CPU")
    parser.add_argument("--part-seconds", type=float, default=PART_SECONDS, help="time limit of a part")
    return parser.parse_args()


if __name__ == "__main__":
    main()
