"""How the speed of a distillation step depends on its settings, one at a time: a table for each, and one picture.

    python -m benchmarks.growth --plot benchmarks/plots/growth.svg       some minutes on 2 cores
    python -m benchmarks.growth --device cuda --batch-anchors 256 --steps 10 --plot growth-gpu.svg

The starting point is ResNet-18 at 32 px with stored keys (the small case of bench_step). The expected curves are drawn as dashed lines:
anchors per second do not change with the batch, the images, the stored views or the bag size; the time of a step grows linearly with the
negatives; decoded images per second grow in proportion to the workers as long as there are cores. The points of a curve are measured in
turns; medians are printed, with the smallest and the largest repeat in brackets.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.bench_loader import CASE, IMAGE, images_per_second, made
from benchmarks.bench_step import StepCase, measure, product_step, spread
from benchmarks.parser import Parser
from bingo.images.decoding import DecodePlan, FileDecoder
from bingo.images.draws import draw_views
from bingo.runtime.memory import keep_freed_memory

MIDDLE = StepCase(32, "small", 32, "resnet50", 1.0, torch.device("cpu"), 65536, "auto", negatives=8192)
AXES: dict[str, tuple[str, list[int]]] = {  # the field of StepCase, and its values
    "batch": ("batch_anchors", [8, 16, 32, 64, 128]),
    "train images N": ("train_rows", [16384, 65536, 262144, 1048576]),
    "stored views V": ("stored_views", [1, 2, 4, 8, 16]),
    "bag size K": ("bag", [1, 5, 20, 80]),
    "negatives": ("negatives", [1024, 4096, 16384, 65536]),
}
Points = list[tuple[int, list[float]]]


def step_points(middle: StepCase, field: str, values: list[int], options: argparse.Namespace) -> Points:
    """Anchors per second for each value of one field."""
    with tempfile.TemporaryDirectory() as folder:
        cases = {value: replace(middle, **{field: value}) for value in values}
        steps = {str(value): product_step(case, "stored keys", Path(folder) / str(value)) for value, case in cases.items()}
        seconds = measure(steps, middle.device, options.repeats, options.steps, options.cpu_seconds)
    return [(value, [case.batch_anchors / second for second in seconds[str(value)]]) for value, case in cases.items()]


def worker_points(workers: list[int], repeats: int) -> Points:
    """Images decoded and cropped per second by each number of workers."""
    cpu, batch = torch.device("cpu"), 32
    with tempfile.TemporaryDirectory() as folder:
        images = made(Path(folder), 1024)
        rates: Points = [(count, []) for count in workers]

        def batches(count: int):
            every = np.arange(1024).reshape(-1, batch)
            plans = (DecodePlan(rows, draw_views(CASE.augment, 0, "anchor", 0, rows, 0)[0], [IMAGE]) for rows in every)
            return FileDecoder(images, count, pin=False).batches(plans)

        for _ in range(repeats):
            for count, values in rates:
                values.append(images_per_second(batches(count), batch, cpu))
    return rates


def expected(axis: str, points: Points) -> Callable[[float], float]:
    """The curve expected from the first point: constant, or proportional; for negatives a line through the first and the last point."""
    first, last = ((value, statistics.median(rates)) for value, rates in (points[0], points[-1]))
    if axis == "workers":
        return lambda value: first[1] * value / first[0]
    if axis == "negatives":
        slope = (1 / last[1] - 1 / first[1]) / (last[0] - first[0])
        return lambda value: 1 / (1 / first[1] + slope * (value - first[0]))
    return lambda value: first[1]


def print_axis(axis: str, points: Points) -> None:
    """Print a line for each point: value, rate, and the rate relative to the expected one."""
    line = expected(axis, points)
    print(f"{axis}: {'images' if axis == 'workers' else 'anchors'}/s")
    for value, rates in points:
        print(f"    {value:>9,}{spread(rates):>34}{statistics.median(rates) / line(value):>8.2f} of the expected rate")


def draw(curves: dict[str, Points], path: Path) -> None:
    """One small plot for each axis, with the expected curve as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for ax, (axis, points) in zip(axes.flat, curves.items(), strict=False):
        values = [value for value, _ in points]
        medians = [statistics.median(rates) for _, rates in points]
        low, high = ([abs(m - edge(rates)) for m, (_, rates) in zip(medians, points, strict=True)] for edge in (min, max))
        ax.errorbar(values, medians, yerr=[low, high], marker="o", capsize=3)
        ax.plot(values, [expected(axis, points)(value) for value in values], "--", color="grey")
        ax.set(title=axis, xscale="log", ylabel="images/s" if axis == "workers" else "anchors/s")
        ax.set_xticks(values, [f"{value:,}" for value in values], rotation=30)
        ax.minorticks_off()
        ax.set_ylim(0, 1.15 * max(max(rates) for _, rates in points))
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(curves) :]:
        ax.remove()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Measure, print, and draw."""
    options = parse()
    if options.device == "cpu":
        keep_freed_memory()  # as in every stage
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
    middle = replace(MIDDLE, device=torch.device(options.device), batch_anchors=options.batch_anchors)
    curves = {axis: step_points(middle, field, values, options) for axis, (field, values) in AXES.items() if axis in options.axes}
    if "workers" in options.axes:
        curves["workers"] = worker_points(options.workers, options.repeats)
    print(f"resnet18, 32 px, batch {middle.batch_anchors}, {middle.device}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    for axis, points in curves.items():
        print_axis(axis, points)
    if options.plot:
        draw(curves, options.plot)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=[*AXES, "workers"], default=[*AXES, "workers"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-anchors", type=int, default=MIDDLE.batch_anchors)
    parser.add_argument("--workers", type=int, nargs="+", default=[w for w in (1, 2, 4, 8, 16, 32) if w <= (os.cpu_count() or 1)])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps per turn; use about 10 on a GPU")
    parser.add_argument("--cpu-seconds", action="store_true", help="measure CPU time with 1 thread, for a machine that is shared")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
