"""Small trainings of every method, on the CPU or the simulated GPU: a case is a method with its keys, precision and settings."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import torch

from bingo.bags.builders import build_kmeans, build_knn
from bingo.images.images import MemoryImages
from bingo.images.loader import ViewLoader
from bingo.methods.contract import Context, Progress, build_method
from bingo.nets import precision
from bingo.nets.backbones import build_backbone
from bingo.nets.heads import mlp_head
from bingo.nets.precision import resolve_precision
from bingo.params import OptimizerParams, load_params, method_names, method_section
from bingo.runtime.checkpoints import Checkpoints
from bingo.teachers.teacher import Teacher
from bingo.training.batches import Batches, Stored
from bingo.training.loop import Trainer
from tests.pretended_gpu.device import Record, pretended_gpu
from tests.pretended_gpu.streams import GPU

CPU = torch.device("cpu")
PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
IMAGE = PARAMS.image.model_copy(update={"crop_px": 12, "resize_px": 12})
LARGER_IMAGE = IMAGE.model_copy(update={"crop_px": 16, "resize_px": 16})
EVERY_CHANGE = {"jitter": [0.4, 0.4, 0.4, 0.1], "jitter_p": 0.8, "gray_p": 0.2, "blur_p": 0.5, "flip_p": 0.5}
AUGMENT = PARAMS.distill.augment.model_copy(update=EVERY_CHANGE)
SMALL = {"head_hidden": 8, "queue_rows": 24, "negative_rows": 32}  # a queue that wraps in the second step
ROWS, SIDE_PX, WIDTH, KEY_WIDTH, BATCH = 64, 12, 64, 16, 16


@dataclass(frozen=True)
class Case:
    """A method with `keys` from the store, a live teacher or its moving average, in a precision, with `changes` to its settings and to the
    `schedule`."""

    method: str
    keys: str = "stored"
    precision: str = "fp32"
    changes: dict[str, Any] = field(default_factory=dict)
    bags: str = "knn"
    teacher_px: int = SIDE_PX
    schedule: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name in tests and tables."""
        changes = [f"{name}={value}" for name, value in (self.changes | self.schedule).items()]
        others = [self.bags] * (self.bags != "knn") + [f"teacher_px={self.teacher_px}"] * (self.teacher_px != SIDE_PX)
        return " ".join([self.method, self.keys, self.precision, *changes, *others])


def _keys_of(method: str) -> list[str]:
    if not method_section(method).needs_teacher:
        return ["momentum"]
    return ["stored", "live", "momentum"] if method == "bingo" else ["stored", "live"]


_CLIPPED = {"decay_norms_and_biases": False, "clip_grad_norm": 0.1}
_QUEUE, _MIX = {"negatives": "queue"}, {"terms": "symmetric_mix"}
# With the settings of params.yaml, and with settings that these do not cover.
CASES = [
    *(
        Case(method, keys, precision, _QUEUE if keys == "momentum" and method == "bingo" else {})
        for method in method_names()
        for keys in _keys_of(method)
        for precision in ("fp32", "bf16")
    ),
    Case("bingo", changes={"terms": "paper"}),
    Case("bingo", changes={"terms": "expected"}),
    Case("bingo", changes={"relation": "none"}),
    Case("bingo", changes={"view_coupling": "same"}),
    Case("bingo", precision="bf16", changes=_MIX),
    Case("bingo", precision="bf16", changes=_MIX, bags="kmeans"),
    Case("bingo", precision="bf16", changes=_MIX | _QUEUE | {"queue_push": "anchor_and_member"}),
    Case("bingo", "live", "bf16", _MIX, teacher_px=16),
    Case("bingo", "live", "fp32", _MIX | _QUEUE | {"teacher_batchnorm": "batch", "mask_bag": False}),
    Case("seed", precision="bf16", changes=_QUEUE),
    Case("seed", "live", changes=_QUEUE | {"small_crops": 2}),
    Case("compress", changes={"target": "features"}),
    Case("compress", precision="bf16", changes={"queues": 1}),
    Case("disco", "live", changes={"teacher_batchnorm": "batch"}),
    Case("simreg", changes={"target": "features", "head_layers": 2}),
    Case("isd", "momentum", "bf16", {"weak_keys": True, "projection_width": 6}),
    Case("coss", precision="bf16", changes={"target": "features", "companions": 2}),
]  # fmt: skip
OPTIMIZERS = [
    Case("coss", schedule={"optimizer": name} | _CLIPPED) for name in get_args(OptimizerParams.model_fields["optimizer"].annotation)
]
PARTS = [Case(method, keys, "bf16", schedule={"accumulate_steps": 2}) for method, keys in (("moco", "momentum"), ("seed", "stored"))]


def images() -> MemoryImages:
    """64 squares of noise."""
    return MemoryImages(np.random.default_rng(0).integers(0, 256, (ROWS, SIDE_PX, SIDE_PX, 3), dtype=np.uint8))


def small_teacher(device: torch.device, precision: str, side_px: int = SIDE_PX) -> Teacher:
    """A teacher with random weights in the dtype of `precision`."""
    seen = {"crop_px": side_px, "resize_px": side_px, "mean": IMAGE.mean, "std": IMAGE.std}
    metadata = {"feature_width": WIDTH, "key_width": KEY_WIDTH, **seen}
    teacher = Teacher(build_backbone("resnet18", 0.125, "small", 1), mlp_head([WIDTH, KEY_WIDTH, KEY_WIDTH], 1), metadata)
    return teacher.weights_for(resolve_precision(precision, device)).to(device, memory_format=torch.channels_last)


def trainer(folder: Path, case: Case, device: torch.device, epochs: int = 2, compiled: str | None = None, **more: Any) -> Trainer:
    """A trainer for this case with checkpoints in `folder`; `compiled` is `compile` of its schedule."""
    torch.manual_seed(0)
    random = np.random.default_rng(1)
    keys = random.standard_normal((ROWS, 3, KEY_WIDTH)).astype(np.float32)
    keys_TVP = torch.from_numpy((keys / np.linalg.norm(keys, axis=2, keepdims=True)).astype(np.float16)).to(device)
    features = random.standard_normal((ROWS, 6)).astype(np.float16)
    features_TD = torch.from_numpy(features).to(device)
    bags = build_knn(features, 3) if case.bags == "knn" else build_kmeans(features, 8, 5, 3, 0)
    teacher = small_teacher(device, case.precision, case.teacher_px) if case.keys == "live" else None
    student = build_backbone("resnet18", 0.125, "small", 0)
    shipped = getattr(PARAMS.methods, case.method).model_dump()
    small = {name: value for name, value in SMALL.items() if name in shipped}
    section = method_section(case.method).model_validate(shipped | small | case.changes)
    stored = (keys_TVP, None if case.keys == "live" else features_TD) if case.keys != "momentum" else (None, None)
    context = Context(student, WIDTH, 0, case.keys, case.precision, device, teacher, *stored, bags)
    method = build_method(case.method, section, context)
    changes = {"epochs": epochs, "batch_anchors": BATCH, "lr": 0.05, "precision": case.precision, "probe_every_epochs": 1}
    schedule = PARAMS.distill.model_copy(update=changes | {"compile": compiled} | case.schedule)
    other = teacher.image if teacher is not None and case.teacher_px != SIDE_PX else None
    loader = ViewLoader(images(), IMAGE, AUGMENT, 0, device, teacher_image=other)
    kept = Stored(keys_TVP, PARAMS.extract.augment, features_TD)
    batches = Batches(method.needs, loader, 0, ROWS, BATCH, bags, kept, schedule.accumulate_steps)
    return Trainer(method, batches, schedule, device, Checkpoints(folder, 1e9), **more)


def steps(run: Trainer, count: int, before_the_last: Callable[[], None] = lambda: None) -> None:
    """Steps of the second epoch, between two reads of the loss watch."""
    run.method.train()
    run.step, batches = run.steps_per_epoch, run.batches.epoch(1, 0)
    for number in range(count):
        run.step += 1
        if number == count - 1:
            before_the_last()
        for _ in range(run.batches.parts):
            run._train_step(next(batches), Progress(1, run.step))


@dataclass
class Outcome:
    """The result of two steps: the summed losses and the state of all networks, on the CPU."""

    sums: dict[str, float]
    state: dict[str, torch.Tensor]


def outcome_of(run: Trainer) -> Outcome:
    """The outcome of the trainer's steps so far."""
    sums = {name: float(value) for name, value in run.sums.items()}
    return Outcome(sums, {name: value.detach().cpu().clone() for name, value in run.method.state_dict().items()})


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms, as in stages."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled, torch.utils.deterministic.fill_uninitialized_memory = torch.utils.deterministic.fill_uninitialized_memory, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def on_cpu(folder: Path, case: Case) -> Outcome:
    """Two steps on the CPU, with similarities in the dtype of a GPU."""
    with mock.patch.object(precision, "HALF_SIMILARITIES", ("cpu",)):
        run = trainer(folder, case, CPU)
        steps(run, 2)
        return outcome_of(run)


def on_gpu(folder: Path, case: Case, change: Callable[[Trainer], None] = lambda run: None) -> tuple[Outcome, Record]:
    """Two steps on the simulated GPU, by a trainer that `change` may have modified, and the record of the second step."""
    with deterministic(), pretended_gpu() as record:
        run = trainer(folder, case, GPU)
        change(run)
        steps(run, 2, record.clear)
        seen = record.copy()
        return outcome_of(run), seen


def launches_by_part(folder: Path, case: Case) -> dict[str, Counter[str]]:
    """Launches of one step: of its views and batch, forward (with BINGO's inner backward passes), backward, optimizer and `after_step`."""
    found: dict[str, Counter[str]] = {}
    with deterministic(), pretended_gpu() as record:
        run = trainer(folder, case, GPU)
        steps(run, 1)
        batches = run.batches.epoch(1, 2)

        def part(name: str, work: Callable[[], Any]) -> Any:
            record.clear()
            result = work()
            found[name] = Counter(record.launches)
            return result

        batch = part("views", lambda: next(batches))
        run.optimizer.zero_grad(set_to_none=True)
        terms = part("forward", lambda: run._terms(batch, Progress(1, run.step + 1)))
        part("backward", terms["loss"].backward)
        part("optimizer", run.optimizer.step)
        part("after_step", run.method.after_step)
    return found
