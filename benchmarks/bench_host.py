"""Host time per anchor when training from memory, compared with the time that the goal allows.

    python -m benchmarks.bench_host                      the CIFAR-10 recipe's teacher and student: about 20 seconds on one core
    python -m benchmarks.bench_host --rows 1281167       with as many train rows as ImageNet

A GPU computes while the host prepares the next step, so the host costs nothing as long as it is faster than the GPU. The host's work is
done here in full, but on images of 1 pixel, where it takes nearly all of a step: plans, draws, crop boxes, CutMix boxes, the draw of
negatives, and torch calls of the augmentation, each of some microseconds (on a GPU a launch takes 4 to 8). CPU time of this process is
measured. For the whole step, including networks and optimizer, the number of calls is reported. The goals are 200 epochs of 50,000 images
in 10 minutes (teacher) and in 5 (student), on one GPU.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.parser import Parser
from bingo.bags.index import Bags
from bingo.images.images import MemoryImages
from bingo.images.loader import ViewLoader
from bingo.methods.bingo import cutmix
from bingo.methods.contract import Context, Progress, build_method
from bingo.nets.backbones import build_backbone
from bingo.params import Params, read_yaml, validate
from bingo.planning.recipes import lay_over, read_recipe
from bingo.runtime.checkpoints import Checkpoints
from bingo.training.batches import Batches, Stored
from bingo.training.loop import Trainer

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
KEY_WIDTH, VIEWS, BAG = 8, 8, 5
GOAL_EPOCHS, GOAL_ROWS = 200, 50_000
LAUNCH_NOTHING = {
    "alias", "as_strided", "as_strided_", "detach", "empty", "empty_like", "expand", "lift_fresh", "permute", "select", "slice",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


@dataclass
class Calls(TorchDispatchMode):
    """Counts operations that compute; views of a tensor launch nothing and are not counted."""

    count: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function._opname not in LAUNCH_NOTHING
        return function(*args, **(kwargs or {}))


@dataclass
class HostTraining:
    """One of the recipe's two trainings, and the minutes that its 200 epochs may take."""

    name: str
    method: str
    section: Any
    schedule: Any
    arch: str
    minutes: float
    rows: int
    params: Params
    folder: Path

    @property
    def budget_us(self) -> float:
        """Microseconds per anchor that the goal allows."""
        return self.minutes * 60e6 / GOAL_EPOCHS / GOAL_ROWS

    def trainer(
        self, side_px: int, batch_anchors: int, arch: str, rows: int, device: torch.device = CPU, changes: dict[str, Any] | None = None
    ) -> Trainer:
        """A Trainer on random images, keys and bags, with `changes` to the schedule; by default in fp32 and without BatchNorm groups."""
        followed = {"precision": "fp32", "batchnorm_groups": 1} if changes is None else changes
        schedule = self.schedule.model_copy(update={"batch_anchors": batch_anchors, **followed})
        rng = np.random.default_rng(0)
        image = self.params.image.model_copy(update={"crop_px": side_px, "resize_px": side_px})
        images = MemoryImages(rng.integers(0, 256, (rows, side_px, side_px, 3), dtype=np.uint8))
        keys_TVP = F.normalize(torch.from_numpy(rng.standard_normal((rows, VIEWS, KEY_WIDTH), np.float32)).to(device), dim=2).half()
        members_TK = rng.integers(0, rows, (rows, BAG), dtype=np.int32)
        bags = Bags({"method": "knn"}, members_TK, np.ones(members_TK.shape, np.float16))
        student = build_backbone(arch, 1.0, "small", 0)
        keys = "stored" if self.method != "moco" else "momentum"
        context = Context(student, student.feature_width, 0, keys, schedule.precision, device, None, keys_TVP, None, bags)
        method = build_method(self.method, self.section, context).train()
        loader = ViewLoader(images, image, self.schedule.augment, 0, device)
        batches = Batches(method.needs, loader, 0, rows, batch_anchors, bags, Stored(keys_TVP, self.params.extract.augment))
        groups = schedule.groups_for(keys == "momentum", 1)
        return Trainer(method, batches, schedule, device, Checkpoints(self.folder, every_seconds=1e9), batchnorm_groups=groups)


def host_work(training: HostTraining, batch_anchors: int) -> dict[str, Callable[[], Any]]:
    """The parts of the host's work in a step, each as a function."""
    trainer = training.trainer(1, batch_anchors, "resnet18", training.rows)
    made = itertools.chain.from_iterable(trainer.batches.epoch(epoch, 0) for epoch in itertools.count())
    steps = itertools.count()
    work: dict[str, Callable[[], Any]] = {"views and rows": lambda: next(made)}
    negatives = getattr(trainer.method, "negatives", None)
    if negatives is not None and negatives.kind == "bank":
        work["negatives"] = lambda: negatives._bank_draw(next(steps))
    if getattr(training.section, "terms", None) == "symmetric_mix":
        small_B3PP, uniform_B3 = torch.zeros(batch_anchors, 3, 1, 1), np.random.default_rng(0).random((batch_anchors, 3))
        work["CutMix"] = lambda: cutmix(small_B3PP, small_B3PP, uniform_B3, training.section.cutmix_alpha)
    return work


def microseconds(work: Callable[[], Any], repeats: int) -> float:
    """The smallest CPU time of one call, because other work on the machine only adds to it."""
    taken = []
    for turn in range(-2, repeats):
        begun = time.process_time()
        work()
        if turn >= 0:
            taken.append((time.process_time() - begun) * 1e6)
    return min(taken)


def calls_in_a_step(training: HostTraining) -> int:
    """Number of operations in a whole step: augmentation, forward, backward, optimizer, queues and moving averages."""
    trainer = training.trainer(32, 4, training.arch, 64)
    trainer.watch.every_steps, trainer.step = 1000, 1
    batches = trainer.batches.epoch(0, 1)
    trainer._train_step(next(batches), Progress(0, 1))
    with Calls() as calls:
        trainer._train_step(next(batches), Progress(0, 2))
    return calls.count


def trainings(recipe: str, rows: int, folder: Path) -> list[HostTraining]:
    """The recipe's teacher and student; `folder` would hold checkpoints, but none is written."""
    document = read_yaml(ROOT / "params.yaml")
    lay_over(document, read_recipe(ROOT / "recipes", recipe).overlay)
    params = validate(document, recipe)
    pretrain, distill = params.teacher.pretrain, params.distill
    section = params.methods.section(distill.method)
    return [
        HostTraining("teacher", "moco", pretrain.moco, pretrain, params.teacher.arch, 10, rows, params, folder),
        HostTraining("student", distill.method, section, distill, params.student.arch, 5, rows, params, folder),
    ]


def main() -> None:
    """Print the table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--rows", type=int, default=GOAL_ROWS, help="train images")
    parser.add_argument("--batches", type=int, nargs="+", help="anchors per step (default: the recipe's, and 4096)")
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for training in trainings(options.recipe, options.rows, Path(folder)):
            calls = calls_in_a_step(training)
            for batch_anchors in options.batches or [training.schedule.batch_anchors, 4096]:
                print(as_text(training, batch_anchors, calls, options.repeats))


def as_text(training: HostTraining, batch_anchors: int, calls: int, repeats: int) -> str:
    """One line of the table."""
    parts = {name: microseconds(work, repeats) / batch_anchors for name, work in host_work(training, batch_anchors).items()}
    return (
        f"{training.name} ({training.method}, {training.arch}), batch {batch_anchors}, {training.rows} rows: {sum(parts.values()):.2f} us "
        f"per anchor ({', '.join(f'{name} {us:.2f}' for name, us in parts.items())}) of {training.budget_us:.0f}; "
        f"a step: {calls} calls in {training.budget_us * batch_anchors / 1000:.1f} ms"
    )


if __name__ == "__main__":
    main()
