"""Where the time of a training step goes: the largest kernels, launches, the GPU's utilisation, and anchors per second of variants.

    python -m benchmarks.gpu_profile                                  the CIFAR-10 recipe's teacher and student on a GPU
    python -m benchmarks.gpu_profile --trainings student --variants eager reduce-overhead

Images, keys and bags are random, in CIFAR-10's number and size. Each variant differs in one setting from `eager`, the step of the recipe.
The first steps, in which networks are compiled and algorithms chosen, are not counted; their time is printed. Only `eager` is profiled. On
a CPU, operations are profiled instead of kernels.
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
# Changes to the schedule; `deterministic` is BINGO_DETERMINISTIC.
VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {},
    "one-group": {"batchnorm_groups": 1},
    "not-deterministic": {"deterministic": "0"},
    "default": {"compile": "default"},
    "reduce-overhead": {"compile": "reduce-overhead"},
}


def stepper(trainer: Trainer) -> Callable[[], None]:
    """A function that runs the next step, including its views and batch."""
    trainer.method.train()
    made = itertools.chain.from_iterable(trainer.batches.epoch(epoch, 0) for epoch in itertools.count())

    def step() -> None:
        trainer._train_step(next(made), Progress(trainer.step // trainer.steps_per_epoch, trainer.step))
        trainer.step += 1

    return step


def seconds_of(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Wall seconds of `steps` steps, until the device has finished."""
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def profiled(step: Callable[[], None], steps: int, device: torch.device) -> str:
    """The largest kernels with their share of the time, launches per step, and the share of the time in which a kernel runs."""
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
    """Print a variant's speed and, for `eager`, its profile."""
    changes, device = dict(VARIANTS[variant]), torch.device(options.device)
    os.environ["BINGO_DETERMINISTIC"] = changes.pop("deterministic", "1")
    make_deterministic(device)
    batch_anchors = options.batch_anchors or training.schedule.batch_anchors
    trainer = training.trainer(options.side_px, batch_anchors, training.arch, max(options.rows, batch_anchors), device, changes)
    step = stepper(trainer)
    first = seconds_of(step, WARM_UP, device)
    seconds = seconds_of(step, options.steps, device) / options.steps
    print(
        f"{training.name}, {variant}: {batch_anchors / seconds:,.0f} anchors/s, {1000 * seconds:.1f} ms per step of {batch_anchors}, "
        f"{trainer.groups} BatchNorm groups, {trainer.schedule.precision}; first {WARM_UP} steps {first:.0f} s",
        flush=True,
    )
    if variant == "eager":
        print(profiled(step, min(options.steps, 5), device), flush=True)


def main() -> None:
    """Measure and print the requested variants."""
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
