"""How long `bingo bags` takes on an index of ImageNet's length (1.28 M rows, K = 20, made up), and how much memory.

python benchmarks/bench_bags_cli.py [--rows 1281167] [--gallery]      needs about 0.7 GB of disk, 2 GB with --gallery
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bingo.pipeline.commands import Parser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
K, CLASSES, SIDE_PX = 20, 1000, 8
BINGO = [sys.executable, "-c", "from bingo.cli.main import main; main()"]
REPEATS = 5


def make(root: Path, rows: int) -> None:
    """Listing, images and bags of `rows` train rows; members are random rows, similarities fall."""
    from bingo.bags.index import Bags, write_bags
    from bingo.images.images import write_images
    from bingo.images.listing import Listing, write_listing

    random = np.random.default_rng(0)
    labels_N = np.sort(random.integers(0, CLASSES, rows))
    classes = [f"n{1440764 + 37 * label:08d}" for label in range(CLASSES)]
    paths = [f"train/{classes[label]}/{classes[label]}_{row}.JPEG" for row, label in enumerate(labels_N.tolist())]
    listing = Listing("made up", paths, labels_N, rows, classes, [], "0" * 32)
    write_listing(root / "data/listing.parquet", listing)
    write_images(root / "data/images.zarr", listing, random.integers(0, 256, (rows, SIDE_PX, SIDE_PX, 3), np.uint8))
    near = np.arange(rows)[:, None] + random.integers(1, 2000, (rows, K))
    similarity = -np.sort(-random.random((rows, K)).astype(np.float16), axis=1)
    bags = Bags({"method": "knn", "k": K, "metric": "cosine", "search": "made up"}, (near % rows).astype(np.int32), similarity)
    write_bags(root / "data/bags.zarr", bags, listing.fingerprint, "0" * 32)
    (root / "params.yaml").write_text("dataset:\n  root: null\n")


def measure(root: Path, command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak memory in MB of one command, from start to end."""
    begun = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(BINGO + command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.stderr is not None
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}: {process.stderr.read().decode()}")
    process.stderr.close()
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def main() -> None:
    """Print one line a command: the fastest and the median of five runs."""
    parser = Parser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--gallery", action="store_true")
    arguments = parser.parse_args()
    middle = arguments.rows // 2
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        # in a process of its own: a child's peak memory counts what its parent held when it forked
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(root, arguments.rows))
        maker.start()
        maker.join()
        last_path = f"train/n{1440764 + 37 * (CLASSES - 1):08d}/n{1440764 + 37 * (CLASSES - 1):08d}_{arguments.rows - 1}.JPEG"
        commands = [["--help"], ["bags", "show", "5"], ["bags", "show", str(middle)], ["bags", "show", last_path]]
        print(f"{arguments.rows} rows, K = {K}; wall seconds (fastest, median of {REPEATS}), CPU seconds, peak MB")
        for command in commands:
            report(root, command, REPEATS)
        report(root, ["bags", "stats"], 1)
        if arguments.gallery:
            report(root, ["bags", "gallery"], 1)
            files = [path for path in (root / ".bingo/gallery").rglob("*") if path.is_file()]
            print(f"gallery: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.0f} MB")


def report(root: Path, command: list[str], repeats: int) -> None:
    """Run one command `repeats` times and print its line."""
    walls, cpus, peaks = zip(*(measure(root, command) for _ in range(repeats)), strict=True)
    figures = f"{min(walls):.2f} {np.median(walls):.2f} s, CPU {min(cpus):.2f} s, {max(peaks):.0f} MB"
    print(f"bingo {' '.join(command):60} {figures}", flush=True)


if __name__ == "__main__":
    main()
