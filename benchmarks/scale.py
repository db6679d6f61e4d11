"""The pipeline at the size of ImageNet: time, memory and files of every stage and command, and how they grow with the number of images.

    python -m benchmarks.scale --folder /tmp/scale                        10^4 and 10^5 images: half an hour on 2 cores
    python -m benchmarks.scale --folder /tmp/scale --images 1281167       hours, and 16 GB of disk

For each number N, --folder receives N train and N/25 test JPEGs of 32 px in --classes classes, all different, and a clone of the last
commit. The networks are tiny, so that the measurements show the pipeline and not the networks. `distill` trains for --train-seconds and is
then stopped; instead of its student, an untrained network is evaluated. Pages are opened in a running Chromium: seconds are from navigation
to the load event, and CPU seconds are those of the page's process. Measurements are kept in --results, one JSON line each, and not
repeated. All other CPU seconds and memory (proportional set sizes) are sampled over all processes together; files and bytes are those
written and kept.
"""

import argparse
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.parser import Parser
from bingo import seeds
from bingo.runtime.artefacts import write_bytes

ROOT = Path(__file__).resolve().parent.parent
PYTHON, SAMPLE_SECONDS, STOPPED = sys.executable, 0.3, 75
SIDE_PX, NOISE_PX, FOLDER_IMAGES = 32, 4, 4096
BINGO = [PYTHON, "-c", "from bingo.cli.main import main; main()"]
DVC = [PYTHON, "-m", "dvc"]
PARAMS = {
    "dataset": {"source": "folder", "store_px": None},
    "image": {"crop_px": 16, "resize_px": 18},
    "teacher": {"source": "random"},
    "extract": {"views": 1, "augment": "small_photographs"},
    "bagging": {"k": 10, "search": "ivf"},
    "distill": {"epochs": 1, "lr_warmup_epochs": 0, "probe_every_epochs": 0, "augment": "small_photographs"},
    "methods": {"bingo": {"negative_rows": 1024}},
    "linear_eval": {"cached": {"epochs": 1}, "crops": {"nets": []}},
}
STAGE_COMMANDS = {
    "scan": "stages.scan", "scan, nothing changed": "stages.scan", "teacher": "stages.teacher", "extract": "stages.extract",
    "bag": "stages.bag", "weights": "stages.weights", "distill": "stages.distill", "linear_eval untrained": "stages.linear_eval untrained",
    "linear_eval teacher": "stages.linear_eval teacher", "knn_eval untrained": "stages.knn_eval untrained", "report": "stages.report",
}  # fmt: skip
COMMANDS = {
    "bags show": [*BINGO, "bags", "show", "5"],
    "bags stats": [*BINGO, "bags", "stats"],
    "bags diff": [*BINGO, "bags", "diff", "workspace", "workspace"],
    "bags gallery": [*BINGO, "bags", "gallery"],
    "gallery opens": [PYTHON, "-m", "tests.chromium", ".bingo/gallery/index.html"],
    "report opens": [PYTHON, "-m", "tests.chromium", "reports/index.html"],
    "dvc commit": [*DVC, "commit", "--force", "scan", "teacher", "extract", "bag", "weights"],
    "dvc repro bag, nothing to do": [*DVC, "repro", "bag"],
    "dvc exp run -S bagging.k=9 bag": [*DVC, "exp", "run", "-S", "bagging.k=9", "bag"],
}
EACH_IMAGE = ("scan", "extract", "bag", "distill", "linear_eval untrained", "linear_eval teacher", "knn_eval untrained")


@dataclass(frozen=True)
class Measured:
    """Cost of one step with one number of train images: wall seconds, CPU seconds, peak memory, files and bytes written, and number of
    images processed (anchors of `distill`). `outside_seconds`: for an experiment, the seconds outside its stages."""

    step: str
    images: int
    seconds: float
    cpu_seconds: float
    peak_mb: float
    files: int
    written_mb: float
    seen: int
    load: float
    date: str
    outside_seconds: float | None = None


def main() -> None:
    """Make the images, measure, and write the table and the plot."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for images and clones")
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--train-seconds", type=float, default=120)
    parser.add_argument("--steps", nargs="+", choices=[*STAGE_COMMANDS, *COMMANDS], default=[*STAGE_COMMANDS, *COMMANDS])
    parser.add_argument("--again", action="store_true", help="measure the steps again, ignoring earlier results")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/scale.jsonl"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    known = [Measured(**json.loads(line)) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    for images in options.images:
        root = options.folder / str(images)
        make_images(root / "images", images, options.classes)
        clone = cloned(root, options.classes)
        for step in options.steps:
            if options.again or not any((one.step, one.images) == (step, images) for one in known):
                one = measure_step(clone, step, images, test_images(images, options.classes), options.train_seconds)
                known = [*(old for old in known if (old.step, old.images) != (step, images)), one]
                write_bytes(options.results, "".join(f"{json.dumps(asdict(found))}\n" for found in known).encode())
                print(one, flush=True)
    print(table(known))
    if options.plot:
        draw(known, options.plot)


def make_images(root: Path, images: int, classes: int) -> None:
    """Write train/CLASS/*.jpg and val/CLASS/*.jpg, `images` and a 25th of them; files from an interrupted run are kept."""
    if (root / "complete").exists():
        return
    with ProcessPoolExecutor() as pool:
        for split, count in (("train", images), ("val", test_images(images, classes))):
            for name in range(classes):
                (root / split / f"c{name:05d}").mkdir(parents=True, exist_ok=True)
            starts = range(0, count, FOLDER_IMAGES)
            list(pool.map(partial(_write_block, root / split, split, count, classes), starts))
    (root / "complete").touch()


def test_images(images: int, classes: int) -> int:
    """A 25th of the train images, and at least one of each class."""
    return max(classes, images // 25)


def _write_block(folder: Path, split: str, count: int, classes: int, start: int) -> None:
    """Write a block of images: half of each colour is that of the class, half is noise."""
    numbers_n = np.arange(start, min(start + FOLDER_IMAGES, count))
    colours_C = seeds.uniforms(0, "scale/class", 0, np.arange(classes), draws=12)
    noise_n = seeds.uniforms(0, f"scale/{split}", 0, numbers_n, draws=3 * NOISE_PX**2)
    for number, noise in zip(numbers_n.tolist(), noise_n, strict=True):
        colours = colours_C[number % classes].reshape(2, 2, 3).repeat(2, 0).repeat(2, 1)
        pixels = (127 * (colours + noise.reshape(NOISE_PX, NOISE_PX, 3))).astype(np.uint8)
        image = Image.fromarray(pixels).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
        content = io.BytesIO()
        image.save(content, "JPEG", quality=80)
        (folder / f"c{number % classes:05d}" / f"{number:08d}.jpg").write_bytes(content.getvalue())


def cloned(root: Path, classes: int) -> Path:
    """A clone of the last commit beside the images, with `PARAMS` applied to its params.yaml; an older clone is updated to the last
    commit."""
    from ruamel.yaml import YAML

    from bingo.params import read_yaml
    from bingo.planning.recipes import lay_over

    clone = root / "clone"
    if not clone.exists():
        run(["git", "clone", "-q", "--no-local", str(ROOT), str(clone)], root)  # packed, because DVC would pack many loose objects
    run(["git", "fetch", "-q", str(ROOT), "HEAD"], clone)
    run(["git", "reset", "-q", "--hard", "FETCH_HEAD"], clone)
    params = read_yaml(clone / "params.yaml")
    lay_over(params, PARAMS)
    params |= {"baselines": []}
    params["dataset"]["root"] = str(root / "images")
    with (clone / "params.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(params, file)
    run(["git", "-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost", "commit", "-qam", f"{classes} classes"], clone)
    return clone


def run(command: Sequence[str], folder: Path) -> None:
    """Run a command, which must succeed."""
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def measure_step(clone: Path, step: str, images: int, tests: int, train_seconds: float) -> Measured:
    """Run one step, and measure it with all its processes."""
    command = COMMANDS.get(step) or [PYTHON, "-m", *STAGE_COMMANDS[step].split()]
    begun = time.time()
    found = watched(command, clone, clone / ".bingo/state/distill" if step == "distill" else None, train_seconds)
    new = [file.stat() for file in _files(clone) if file.stat().st_ctime >= begun]
    seen = _anchors(clone, images) if step == "distill" else images + tests if step in EACH_IMAGE else 0
    one = Measured(step, images, *found, len(new), sum(file.st_size for file in new) / 2**20, seen, os.getloadavg()[1], time.strftime("%F"))
    if step.endswith("opens"):
        seconds, cpu_seconds = map(float, (clone.parent / "log").read_text().splitlines()[-1].split())
        return replace(one, seconds=seconds, cpu_seconds=cpu_seconds)
    if step.startswith("dvc exp"):
        record = max((clone / ".bingo/runs").glob("*/bag.json"), key=lambda path: path.stat().st_mtime)
        return replace(one, outside_seconds=one.seconds - json.loads(record.read_text())["seconds"])
    return one


def _files(clone: Path) -> Iterator[Path]:
    """The files that stages and commands write, without DVC's cache and temporary files."""
    for folder in ("data", "models", "reports", ".bingo"):
        yield from (path for path in (clone / folder).rglob("*") if path.is_file())


def _anchors(clone: Path, images: int) -> int:
    """The number of anchors that the training has seen until it was stopped, or in its epoch."""
    found = [json.loads(path.read_text()) for path in (clone / ".bingo/state/distill").glob("*/checkpoints/latest.json")]
    return found[0]["step"] * 64 if found else images


def watched(command: Sequence[str], folder: Path, state: Path | None, train_seconds: float) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak memory (MB of 2^20 bytes) of a command with its processes, which is stopped `train_seconds` after
    `state` appears."""
    environment = os.environ | {"PATH": f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    environment |= {"DVC_SITE_CACHE_DIR": str(folder / ".dvc/site")}
    begun, peak, cpu, training = time.monotonic(), 0.0, dict[int, float](), math.inf
    with (folder.parent / "log").open("a") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                busy = time.thread_time()
                peak = max(peak, _sample(process.pid, cpu))
                if state is not None and state.exists():
                    training, state = time.monotonic(), None
                if time.monotonic() - training > train_seconds:
                    process.terminate()
                    training = math.inf
                time.sleep(max(SAMPLE_SECONDS, 30 * (time.thread_time() - busy)))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
    if process.returncode not in (0, STOPPED):
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}; see {folder.parent / 'log'}")
    return time.monotonic() - begun, sum(cpu.values()), peak


def _sample(leader: int, cpu: dict[int, float]) -> float:
    """The proportional memory of all processes of a session, in MB; the CPU time of each process is written to `cpu`."""
    total_kb, tick = 0, os.sysconf("SC_CLK_TCK")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:
                cpu[int(stat.parent.name)] = (int(fields[11]) + int(fields[12])) / tick
                total_kb += int((stat.parent / "smaps_rollup").read_text().split("Pss:")[1].split()[0])
        except (OSError, IndexError):  # the process has ended
            continue
    return total_kb / 1024


def table(known: Sequence[Measured]) -> str:
    """A line for each step and number of images in Markdown, with the powers of the number of images by which CPU seconds and memory
    grow."""
    lines = ["| step | images | s | CPU s | images/s | peak MB | files | MB written | CPU grows as | memory as |", f"|---|{'--:|' * 9}"]
    for step in (step for step in [*STAGE_COMMANDS, *COMMANDS] if any(one.step == step for one in known)):
        before: Measured | None = None
        for one in sorted((one for one in known if one.step == step), key=lambda one: one.images):
            rate = f"{one.seen / one.seconds:,.0f}" if one.seen else ""
            growth = [_power(one, before, kind) for kind in ("cpu_seconds", "peak_mb")]
            seconds = f"{one.seconds:,.1f}" + (f" ({one.outside_seconds:.1f} outside)" if one.outside_seconds is not None else "")
            cells = [step, f"{one.images:,}", seconds, f"{one.cpu_seconds:,.1f}", rate, f"{one.peak_mb:,.0f}", f"{one.files:,}"]
            lines.append(f"| {' | '.join([*cells, f'{one.written_mb:,.1f}', *growth])} |")
            before = one
    return "\n".join(lines)


def _power(one: Measured, before: Measured | None, kind: str) -> str:
    """p if the figure grows as N^p between two numbers of images; empty for the first number, and for training, which is stopped."""
    if before is None or (one.step == "distill" and kind == "cpu_seconds"):
        return ""
    return f"N^{math.log(getattr(one, kind) / getattr(before, kind)) / math.log(one.images / before.images):.2f}"


def draw(known: Sequence[Measured], path: Path) -> None:
    """Plot CPU seconds and peak memory over the number of images, a line for each step; dashed lines show proportional growth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained")
    for axis, (kind, label) in zip(axes, {"cpu_seconds": "CPU seconds", "peak_mb": "peak memory, MB"}.items(), strict=True):
        for number, step in enumerate([*STAGE_COMMANDS, *COMMANDS]):
            points = sorted((one.images, getattr(one, kind)) for one in known if one.step == step)
            if points and (step, kind) != ("distill", "cpu_seconds"):
                axis.plot(*zip(*points, strict=True), color=f"C{number % 10}", marker="os^D"[number // 10], label=step)
        sizes = sorted({one.images for one in known})
        axis.plot(
            sizes, [sizes_n / sizes[-1] * max(getattr(one, kind) for one in known) for sizes_n in sizes], "--", color="grey", label="N"
        )
        axis.set(xscale="log", yscale="log", xlabel="train images", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
