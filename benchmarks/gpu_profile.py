"""Where a training step's time goes: the largest kernels, launches, the GPU's busy share, and anchors per second of variants of the step.

    python -m benchmarks.gpu_profile                                  the CIFAR-10 recipe's teacher and student on a GPU
    python -m benchmarks.gpu_profile --trainings student --variants eager reduce-overhead

Images, keys and bags are random, of CIFAR-10's number and side. Each variant differs in one thing from `eager`, the step as the recipe runs
it. The first steps, in which networks are compiled and algorithms chosen, are not counted; their seconds are printed. Profiled is `eager`.
On a CPU, operations stand in for kernels.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_host import GOAL_ROWS, HostTraining, trainings
from benchmarks.parser import Parser
from bingo.methods.contract import Progress
from bingo.pipeline.run import make_deterministic
from bingo.training.loop import Trainer

LARGEST, WARM_UP = 15, 5
# Changes of the schedule; `deterministic` is BINGO_DETERMINISTIC.
VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {},
    "one-group": {"batchnorm_groups": 1},
    "not-deterministic": {"deterministic": "0"},
    "default": {"compile": "default"},
    "reduce-overhead": {"compile": "reduce-overhead"},
}


def stepper(trainer: Trainer) -> Callable[[], None]:
    """A function that takes the next step, its views and batch included."""
    trainer.method.train()
    made = itertools.chain.from_iterable(trainer.batches.epoch(epoch, 0) for epoch in itertools.count())

    def step() -> None:
        trainer._train_step(next(made), Progress(trainer.step // trainer.steps_per_epoch, trainer.step))
        trainer.step += 1

    return step


def seconds_of(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Wall seconds of so many steps, to the end of the device's work."""
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def profiled(step: Callable[[], None], steps: int, device: torch.device) -> str:
    """The largest kernels with their share of the steps' time, launches of a step, and the share in which a kernel runs."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        seconds = seconds_of(step, steps, device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    took, launches = Counter[str](), Counter[str]()
    for event in (event for event in found.events() if event.device_type == wanted):
        took[event.name] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
        launches[event.name] += 1
    lines = [f"    {'ms a step':>10} {'%':>6} {'launches':>9}  kernel"]
    for name, microseconds in took.most_common(LARGEST):
        share = microseconds / seconds / 1e4
        lines.append(f"    {microseconds / 1e3 / steps:10.2f} {share:6.1f} {launches[name] / steps:9.1f}  {name[:100]}")
    busy = took.total() / seconds / 1e4
    return "\n".join([f"    profiled: {launches.total() / steps:,.0f} launches a step, a kernel runs {busy:.0f} % of the time", *lines])


def measure(training: HostTraining, variant: str, options: argparse.Namespace) -> None:
    """Print a variant's speed and, of `eager`, its profile."""
    changes, device = dict(VARIANTS[variant]), torch.device(options.device)
    os.environ["BINGO_DETERMINISTIC"] = changes.pop("deterministic", "1")
    make_deterministic(device)
    batch_anchors = options.batch_anchors or training.schedule.batch_anchors
    trainer = training.trainer(options.side_px, batch_anchors, training.arch, max(options.rows, batch_anchors), device, changes)
    step = stepper(trainer)
    first = seconds_of(step, WARM_UP, device)
    seconds = seconds_of(step, options.steps, device) / options.steps
    print(
        f"{training.name}, {variant}: {batch_anchors / seconds:,.0f} anchors/s, {1000 * seconds:.1f} ms a step of {batch_anchors}, "
        f"{trainer.groups} BatchNorm groups, {trainer.schedule.precision}; first {WARM_UP} steps {first:.0f} s",
        flush=True,
    )
    if variant == "eager":
        print(profiled(step, min(options.steps, 5), device), flush=True)


def main() -> None:
    """Measure and print what was asked for."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--trainings", nargs="+", choices=["teacher", "student"], default=["teacher", "student"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-anchors", type=int, help="default: the recipe's")
    parser.add_argument("--rows", type=int, default=GOAL_ROWS, help="train images")
    parser.add_argument("--side-px", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for training in trainings(options.recipe, options.rows, Path(folder)):
            if training.name in options.trainings:
                for variant in options.variants:
                    measure(training, variant, options)


if __name__ == "__main__":
    main()
