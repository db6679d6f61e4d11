"""Overhead of the pipeline: nothing to do, a changed parameter, hashing of a large store, the start of every command.

    python -m benchmarks.bench_pipeline                     about 6 minutes on 2 cores, 11 GB of disk
    python -m benchmarks.bench_pipeline --store-gb 0.2      a check

The last commit is cloned into a temporary folder with its own cache, and recipe digits-short is run there once, untimed. Then the following
are measured; medians of --repeats are printed with the smallest and the largest: `dvc repro` with nothing to do, compared with a repository
of as many stages that only copy a file; `dvc exp run -S bagging.k=K`, minus the seconds in the records of its stages; `dvc add` of a folder
of chunks, compared with md5 of the same bytes in one thread; and `--help` of every command, compared with a Python process that does
nothing. Goals: 1.5 s for nothing to do, 0.5 s for `--help`.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.parser import Parser

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["commands", "hashing", "pipeline"]
RECIPE = "digits-short"
BINGO = [sys.executable, "-c", "from bingo.cli.main import main; main()"]
DVC = [sys.executable, "-m", "dvc"]
CHUNK_BYTES = 32 << 20  # a chunk of 8,192 rows of 2,048 float16
READ_BYTES = 1 << 20


def main() -> None:
    """Measure, and print each result as soon as it is known."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--store-gb", type=float, default=5.0, help="bytes to hash, in 10^9")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder (default: the system's)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        if "commands" in options.parts:
            commands(options.repeats)
        if "hashing" in options.parts:
            hashing(root / "store", options.store_gb, options.repeats)
        if "pipeline" in options.parts:
            clone = cloned(root)
            nothing_to_do(clone, root / "copies", options.repeats)
            changed_parameter(clone, options.repeats)


def run(command: Sequence[str], folder: Path) -> str:
    """The output of a command. Raises SystemExit with the output if the command fails."""
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": binaries, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(folder / ".dvc/site")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def seconds_of(command: Sequence[str], folder: Path) -> float:
    """Wall seconds of one command."""
    begun = time.perf_counter()
    run(command, folder)
    return time.perf_counter() - begun


def in_turns(commands: dict[str, Sequence[str]], folder: Path, repeats: int) -> dict[str, list[float]]:
    """Wall seconds of each command, measured in turns after one untimed round."""
    for command in commands.values():
        run(command, folder)
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            found[name].append(seconds_of(command, folder))
    return found


def say(label: str, seconds: Sequence[float], note: str = "") -> None:
    """Print one line: median, smallest and largest."""
    print(f"{label:44}{statistics.median(seconds):>9.2f} s [{min(seconds):.2f} .. {max(seconds):.2f}]  {note}".rstrip(), flush=True)


def commands(repeats: int) -> None:
    """Time `--help` of every `bingo` command."""
    import typer

    from bingo.cli.main import app

    names: list[list[str]] = [[]]
    top = typer.main.get_command(app)
    for name, command in getattr(top, "commands").items():  # noqa: B009 (of click's Group, which typer does not show)
        names += [[name], *([name, below] for below in getattr(command, "commands", {}))]
    bare = {"python -c pass": [sys.executable, "-c", "pass"], "python -c 'import typer'": [sys.executable, "-c", "import typer"]}
    helps = {" ".join(["bingo", *name, "--help"]): [*BINGO, *name, "--help"] for name in names}
    found = in_turns(bare | helps, ROOT, repeats)
    print("start of a command")
    for label, seconds in sorted(found.items(), key=lambda item: statistics.median(item[1])):
        say(f"    {label}", seconds)


def hashing(folder: Path, gigabytes: float, repeats: int) -> None:
    """Time `dvc add` of a folder of chunks, first and again, in a new repository with this one's DVC settings."""
    new_repository(folder)
    store = folder / "store"
    store.mkdir()
    chunks = max(1, round(gigabytes * 1e9 / CHUNK_BYTES))
    for chunk in range(chunks):
        (store / str(chunk)).write_bytes(os.urandom(CHUNK_BYTES))
    print(f"\nhashing of {chunks * CHUNK_BYTES / 1e9:.1f} GB in {chunks} files")
    bare = [bare_md5(store) for _ in range(min(3, repeats))]
    say("    md5 of a bare read, one thread", bare, f"{chunks * CHUNK_BYTES / statistics.median(bare) / 1e9:.2f} GB/s")
    say("    dvc add, the first time", [seconds_of([*DVC, "add", "-q", "store"], folder)])
    again = in_turns({"dvc add": [*DVC, "add", "-q", "store"], "dvc status": [*DVC, "status", "-q"]}, folder, repeats)
    for name, seconds in again.items():
        say(f"    {name}, nothing changed", seconds)


def bare_md5(store: Path) -> float:
    """Seconds to read every file of a folder and compute its md5."""
    begun = time.perf_counter()
    for path in sorted(store.iterdir()):
        digest = hashlib.md5(usedforsecurity=False)
        with path.open("rb", buffering=0) as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
        digest.hexdigest()
    return time.perf_counter() - begun


def new_repository(folder: Path) -> None:
    """An empty Git and DVC repository with this project's DVC settings."""
    folder.mkdir()
    run(["git", "init", "-q"], folder)
    run([*DVC, "init", "-q"], folder)
    (folder / ".dvc/config").write_text((ROOT / ".dvc/config").read_text())


def cloned(root: Path) -> Path:
    """A clone of the last commit in which recipe digits-short has been run."""
    clone = root / "clone"
    run(["git", "clone", "-q", str(ROOT), str(clone)], root)
    run([*BINGO, "recipe", "use", RECIPE], clone)
    run(["git", *identity(), "commit", "-qam", f"Recipe {RECIPE}"], clone)
    begun = time.perf_counter()
    run([*DVC, "repro", "-q"], clone)
    run(["git", *identity(), "add", "dvc.lock"], clone)
    run(["git", *identity(), "commit", "-qm", "What was run"], clone)
    print(f"\nrecipe {RECIPE} run in {time.perf_counter() - begun:.0f} s")
    return clone


def identity() -> list[str]:
    """Git options that set an identity for commits in temporary repositories."""
    return ["-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost"]


def nothing_to_do(clone: Path, copies: Path, repeats: int) -> None:
    """Time `dvc repro` with nothing to do, compared with a repository of as many stages that copy one file each."""
    stages = len(run([*DVC, "stage", "list", "--name-only"], clone).split())
    new_repository(copies)
    (copies / "params.yaml").write_text("".join(f"p{stage}: 1\n" for stage in range(stages)))
    (copies / "0.txt").write_text("0")
    copying = {
        f"s{stage}": {
            "cmd": f"cp {stage}.txt {stage + 1}.txt",
            "deps": [f"{stage}.txt"],
            "params": [f"p{stage}"],
            "outs": [f"{stage + 1}.txt"],
        }
        for stage in range(stages)
    }
    (copies / "dvc.yaml").write_text(json.dumps({"stages": copying}))  # JSON is YAML too
    run([*DVC, "repro", "-q"], copies)
    command = [*DVC, "repro"]
    run(command, clone)
    if "didn't change" not in run(command, clone):
        raise SystemExit("dvc repro still has something to do after a whole run")
    found: dict[Path, list[float]] = {clone: [], copies: []}
    for _ in range(repeats):
        for folder, seconds in found.items():
            seconds.append(seconds_of(command, folder))
    print("\nnothing to do")
    say(f"    dvc repro, {stages} stages", found[clone])
    say(f"    dvc repro, {stages} stages that copy a file", found[copies])


def changed_parameter(clone: Path, repeats: int) -> None:
    """Time `dvc exp run -S bagging.k=K` without the work of its stages: DVC, Git, and the start of Python in each stage."""
    outside, whole, stages = [], [], 0
    for k in range(10, 10 + min(3, repeats)):
        name = f"k{k}"
        whole.append(seconds_of([*DVC, "exp", "run", "-q", "-n", name, "-S", f"bagging.k={k}"], clone))
        records = [json.loads(path.read_text()) for path in (clone / ".bingo/runs" / name).glob("*.json")]
        stages = len(records)
        outside.append(whole[-1] - sum(record["seconds"] for record in records))
    print("\na changed parameter")
    say("    dvc exp run -S bagging.k=K", whole)
    say(f"    of that outside its {stages} stages", outside, f"{statistics.median(outside) / max(1, stages):.2f} s a stage")


if __name__ == "__main__":
    main()
