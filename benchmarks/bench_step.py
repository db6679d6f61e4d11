"""Speed of a distillation step, compared with a plain implementation of the released step and with the student alone.

    python -m benchmarks.bench_step                                 R18 from R50, 224 px, batch 8: some minutes on 2 cores
    python -m benchmarks.bench_step --teacher resnet152 --case small     32 px, batch 64
    python -m benchmarks.bench_step --device cuda --repeats 7       batch 256

This project's Trainer, Batches and method are timed, from the plan of a batch to the optimizer's step, and compared with
  peer          three student forwards, two of a live teacher in train mode, three logits (B, 2, 1 + 65536), all in float32
  student alone the same student and head on as many views: forward and backward in this project's precision, no loss, no optimizer
Views are random numbers on the device for all variants (benchmarks/bench_loader.py measures the dataloader). Weights, keys and bags are
random too. The variants take turns, each in a separate process. Medians are printed, with the smallest and the largest repeat in brackets;
each ratio is of one turn. Peak memory is that of torch's tensors, and on the CPU the growth of the process, including compiled kernels,
their work space, and memory that malloc keeps.
"""

import argparse
import itertools
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen, run

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.parser import Parser
from bingo.bags.index import Bags
from bingo.methods.contract import Context, Progress, build_method
from bingo.nets.backbones import build_backbone
from bingo.nets.heads import mlp_head, unit
from bingo.nets.precision import autocast, resolve_precision
from bingo.params import Params, load_params, method_section
from bingo.runtime.checkpoints import Checkpoints
from bingo.runtime.memory import keep_freed_memory
from bingo.teachers.teacher import Teacher
from bingo.training.batches import Batches, Stored
from bingo.training.loop import Trainer

NEGATIVES, KEY_WIDTH, HEAD_HIDDEN, TEMPERATURE, BAG = 65536, 128, 2048, 0.2, 5
VARIANTS = {  # the switches of methods.bingo, and where the keys come from
    "stored keys": ({"terms": "symmetric_mix"}, "stored"),
    "live keys": ({"terms": "symmetric_mix"}, "live"),
    "paper's terms": ({"terms": "paper"}, "stored"),
    "one view": ({"relation": "none"}, "stored"),
}
VIEWS = {"stored keys": 3, "live keys": 3, "paper's terms": 2, "one view": 1}
Step = Callable[[], None]


@dataclass(frozen=True)
class StepCase:
    """Images, networks and machine of one table."""

    crop_px: int
    stem: str
    batch_anchors: int
    teacher: str
    width: float
    device: torch.device
    train_rows: int
    precision: str
    negatives: int = NEGATIVES
    bag: int = BAG
    stored_views: int = 2

    def views(self, count: int, rows: int) -> list[Tensor]:
        """Random views, float32 (rows, 3, P, P) channels_last on the device."""
        shape = rows, 3, self.crop_px, self.crop_px
        return [torch.randn(shape, device=self.device).to(memory_format=torch.channels_last) for _ in range(count)]

    def student(self) -> nn.Module:
        """An untrained ResNet-18."""
        return build_backbone("resnet18", 1.0, self.stem, 0)

    def frozen(self) -> Teacher:
        """An untrained teacher with MoCo-v2's head, on the device."""
        backbone = build_backbone(self.teacher, self.width, self.stem, 1)
        width = backbone.feature_width
        head = mlp_head([width, HEAD_HIDDEN, KEY_WIDTH], 1)
        return Teacher(backbone, head, {"feature_width": width, "key_width": KEY_WIDTH}).to(self.device)


class ReadyViews:
    """Replaces the loader: always the same views, already on the device."""

    wait_seconds = 0.0
    teacher_image = None

    def __init__(self, case: StepCase, params: Params):
        self.case, self.augment, self.ready = case, params.distill.augment, case.views(4, case.batch_anchors)

    def items_with_views(self, items) -> Iterator[tuple[object, list[Tensor]]]:
        """As the loader's: each item with a tensor for each request."""
        for item, requests in items:
            yield item, self.ready[: len(requests)]


def product_step(case: StepCase, variant: str, folder: Path) -> Step:
    """One step of this project's Trainer, including the preparation of its batch."""
    params = load_params(Path(__file__).parents[1] / "params.yaml")
    changes, keys = VARIANTS[variant]
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    rows = case.train_rows * case.stored_views
    keys_TVP = unit(torch.randn(rows, KEY_WIDTH, generator=generator)).half().view(case.train_rows, -1, KEY_WIDTH).to(case.device)
    members_TK = rng.integers(0, case.train_rows, (case.train_rows, case.bag), dtype=np.int32)
    bags = Bags({"method": "knn"}, members_TK, np.ones(members_TK.shape, np.float16))
    student = case.student()
    teacher = None
    if keys == "live":
        teacher = case.frozen().weights_for(resolve_precision(case.precision, case.device)).to(memory_format=torch.channels_last)
    context = Context(student, student.feature_width, 0, keys, case.precision, case.device, teacher, keys_TVP, None, bags)  # type: ignore[arg-type]
    released = {"temperature": TEMPERATURE, "negative_rows": case.negatives, "head_hidden": HEAD_HIDDEN, "negatives": "bank"}
    section = method_section("bingo").model_validate(params.methods.bingo.model_dump() | released | changes)
    method = build_method("bingo", section, context)
    schedule = params.distill.model_copy(
        update={"batch_anchors": case.batch_anchors, "precision": case.precision, "lr": 0.03, "epochs": 200}
    )
    stored = Stored(keys_TVP, params.extract.augment)
    batches = Batches(method.needs, ReadyViews(case, params), 0, case.train_rows, case.batch_anchors, bags, stored)  # type: ignore[arg-type]
    trainer = Trainer(method, batches, schedule, case.device, Checkpoints(folder, every_seconds=1e9))
    method.train()
    made = itertools.chain.from_iterable(batches.epoch(epoch, 0) for epoch in itertools.count())

    def step() -> None:
        trainer._train_step(next(made), Progress(trainer.step // trainer.steps_per_epoch, trainer.step))
        trainer.step += 1

    return step


class Peer:
    """A plain implementation of the released step: see `released_loss`. Batches are not shuffled between GPUs, because there is one
    process."""

    def __init__(self, case: StepCase):
        student = case.student()
        self.student = nn.Sequential(student, mlp_head([student.feature_width, HEAD_HIDDEN, KEY_WIDTH], 0)).to(case.device).train()
        frozen = case.frozen()
        assert frozen.head is not None
        self.teacher = nn.Sequential(frozen.backbone, frozen.head).train()
        self.queue_PQ = unit(torch.randn(NEGATIVES, KEY_WIDTH)).T.contiguous().to(case.device)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
        self.views = [view.contiguous() for view in case.views(4, case.batch_anchors)]
        self.pointer = 0

    def step(self) -> None:
        """One step; the loss is read at its end, as the released code's meter does."""
        anchor, anchor_for_key, member, member_for_key = self.views
        top, left, side = anchor.shape[-1] // 4, anchor.shape[-1] // 4, anchor.shape[-1] // 2
        mixed = anchor.clone()
        mixed[:, :, top : top + side, left : left + side] = member[:, :, top : top + side, left : left + side]
        queries = [unit(self.student(view)) for view in (anchor, member, mixed)]
        with torch.no_grad():
            own, other = (unit(self.teacher(view)) for view in (anchor_for_key, member_for_key))
        loss = released_loss(queries, own, other, self.queue_PQ.clone(), (0.5, 0.5), 0.75, TEMPERATURE)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.queue_PQ[:, self.pointer : self.pointer + len(own)] = own.T
        self.pointer = (self.pointer + len(own)) % NEGATIVES
        loss.item()


def released_loss(
    queries: list[Tensor],
    own_BP: Tensor,
    other_BP: Tensor,
    queue_PQ: Tensor,
    weights: tuple[float, float],
    share: float | Tensor,
    temperature: float,
) -> Tensor:
    """The released code's loss (main_moco.py:371-387) with its logits (B, 2, 1 + Q) in float32.

    `queries` are of the anchor, the member and the mixed view, in which the anchor has this `share`. Returns a scalar.
    """

    def term(query_BP: Tensor, keys: list[Tensor], weight_of: tuple[float | Tensor, float | Tensor]) -> Tensor:
        positive_B21 = torch.stack([torch.einsum("nc,nc->n", query_BP, key_BP) for key_BP in keys], dim=1)[:, :, None]
        negative_B2Q = torch.einsum("nc,ck->nk", query_BP, queue_PQ)[:, None].repeat(1, 2, 1)
        logits_B2J = torch.cat([positive_B21, negative_B2Q], dim=2) / temperature
        zeros_B = torch.zeros(len(query_BP), dtype=torch.int64, device=query_BP.device)
        losses = [nn.functional.cross_entropy(logits_B2J[:, i], zeros_B, reduction="none") for i in (0, 1)]
        return (weight_of[0] * losses[0] + weight_of[1] * losses[1]).mean()

    anchor_BP, member_BP, mixed_BP = queries
    pairs = term(anchor_BP, [own_BP, other_BP], weights) + term(member_BP, [other_BP, own_BP], weights)
    return (pairs + term(mixed_BP, [own_BP, other_BP], (share, 1 - share))) / 3


def bare_step(case: StepCase, views: int) -> Step:
    """Forward and backward pass of the student and its head on `views` views."""
    student = case.student()
    network = nn.Sequential(student, mlp_head([student.feature_width, HEAD_HIDDEN, KEY_WIDTH], 0))
    network = network.to(case.device).to(memory_format=torch.channels_last).train()
    seen = case.views(views, case.batch_anchors)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        with autocast(case.precision, case.device):
            outputs = [network(view) for view in seen]
        torch.stack([output.float().square().mean() for output in outputs]).sum().backward()

    return step


def make_step(case: StepCase, name: str, folder: Path) -> Step:
    """The step with this name: the peer's, one of VARIANTS, or the student alone on some number of views."""
    if name == "peer":
        return Peer(case).step
    if name.startswith("student alone"):
        return bare_step(case, int(name.split()[-2]))
    return product_step(case, name, folder / name)


def main() -> None:
    """Measure the requested variants and print the table."""
    options = parse()
    if options.device == "cpu":
        keep_freed_memory()  # as in every stage
    case, names = case_of(options), [name.replace("_", " ") for name in options.variants]
    if options.turns_of:
        return take_turns(case, options.turns_of, options.steps, options.cpu_seconds)
    if options.memory_of:
        return print(peak_mebibytes(case, options.memory_of, options.tensors))
    bare = {name: f"student alone, {VIEWS[name]} views" for name in names}
    order = [*dict.fromkeys([*names, *bare.values()])] + ([] if options.no_peer else ["peer"])
    # This comes first, because the peak of a new process starts from the memory of its parent, which is still small.
    memory = {} if options.no_memory else {name: memory_elsewhere(name, case.device) for name in order}
    seconds = measure_elsewhere(order, options.repeats)
    clock = "CPU seconds" if options.cpu_seconds else "wall seconds"
    precision = str(resolve_precision(case.precision, case.device)).removeprefix("torch.")
    print(
        f"resnet18 from {case.teacher} x {case.width:g}, {case.crop_px} px, batch {case.batch_anchors}, {NEGATIVES} negatives of "
        f"{case.train_rows} rows, {precision}, {case.device}, {torch.get_num_threads()} threads, {clock}"
    )
    print_table(case, seconds, memory, bare)


def print_table(case: StepCase, seconds: dict[str, list[float]], memory: dict[str, list[float]], bare: dict[str, str]) -> None:
    """Print a line for each variant: anchors per second, speed relative to the peer, percent of the student alone, peak memory."""
    kinds = ["tensors", "process"] if case.device.type == "cpu" else ["tensors"]
    heads = "".join(f"{f'{kind} MiB':>14}{'of peer':>9}" for kind in kinds) if memory else ""
    print(f"    {'':<24}{'anchors/s':>24}{'x the peer':>26}{'% of student alone':>28}{heads}")
    for name, taken in seconds.items():
        columns = [spread([case.batch_anchors / second for second in taken])]
        columns.append(spread(ratios(seconds["peer"], taken)) if "peer" in seconds and name != "peer" else "")
        columns.append(spread([100 * ratio for ratio in ratios(seconds[bare[name]], taken)]) if name in bare else "")
        line = f"    {name:<24}{columns[0]:>24}{columns[1]:>26}{columns[2]:>28}"
        for kind, mebibytes in enumerate(memory.get(name, [])):
            share = f"{mebibytes / memory['peer'][kind]:.2f}" if "peer" in memory else ""
            line += f"{mebibytes:>14,.0f}{share:>9}"
        print(line.rstrip())


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    """Speed ratio of each turn."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def spread(values: list[float], digits: int = 2) -> str:
    """Median and, in brackets, the smallest and the largest."""
    return f"{statistics.median(values):,.{digits}f} [{min(values):,.{digits}f} .. {max(values):,.{digits}f}]"


def measure(steps: dict[str, Step], device: torch.device, repeats: int, count: int, cpu_seconds: bool) -> dict[str, list[float]]:
    """Seconds of one step, `repeats` times for each variant, in turns; the first two rounds are not counted."""
    taken = [{name: seconds_of(step, device, count, cpu_seconds) for name, step in steps.items()} for _ in range(2 + repeats)]
    return {name: [turn[name] for turn in taken[2:]] for name in steps}


def seconds_of(step: Step, device: torch.device, count: int, cpu_seconds: bool) -> float:
    """Mean seconds of one step out of `count`."""
    clock = time.process_time if cpu_seconds else time.perf_counter
    begun = clock()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - begun) / count


def measure_elsewhere(names: list[str], repeats: int) -> dict[str, list[float]]:
    """As `measure`, with each variant in a separate process, as in a real training (see `take_turns`)."""
    command = [sys.executable, "-m", "benchmarks.bench_step", *sys.argv[1:], "--turns-of"]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as ends:
        pipes = {name: Popen([*command, name], stdin=PIPE, stdout=PIPE, text=True) for name in names}
        for process in pipes.values():
            ends.enter_context(process)
        for turn in range(-1, repeats):
            for name, process in pipes.items():
                print(file=process.stdin, flush=True)
                if not (taken := process.stdout.readline()):
                    raise SystemExit(f"{name}: its process has ended")
                if turn >= 0:
                    seconds[name].append(float(taken))
    return seconds


def take_turns(case: StepCase, name: str, count: int, cpu_seconds: bool) -> None:
    """For each line of input, run one uncounted step and then `count` timed ones; GPU memory is freed in between."""
    with tempfile.TemporaryDirectory() as folder:
        step = make_step(case, name, Path(folder))
        for _ in sys.stdin:
            seconds_of(step, case.device, 1, cpu_seconds)
            print(seconds_of(step, case.device, count, cpu_seconds), flush=True)
            if case.device.type == "cuda":
                torch.cuda.empty_cache()


def memory_elsewhere(name: str, device: torch.device) -> list[float]:
    """Peak memory of one variant alone in MiB, measured in separate processes: of tensors and, on the CPU, of the process."""
    command = [sys.executable, "-m", "benchmarks.bench_step", *sys.argv[1:], "--memory-of", name]
    kinds = (["--tensors"], []) if device.type == "cpu" else (["--tensors"],)
    return [float(run([*command, *more], check=True, stdout=PIPE, text=True).stdout) for more in kinds]


def peak_mebibytes(case: StepCase, name: str, tensors: bool) -> float:
    """Peak memory of two steps of this variant, including weights, bank or queue: of torch's tensors, or on the CPU of the process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counting = tensors and case.device.type == "cpu"
    counter = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if counting else nullcontext()
    with tempfile.TemporaryDirectory() as folder, counter:
        step = make_step(case, name, Path(folder))
        step(), step()
    if counting:
        events = [event for event in counter.profiler.kineto_results.events() if event.name() == "[memory]"]
        return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))) / 2**20
    if case.device.type == "cuda":
        return torch.cuda.max_memory_allocated(case.device) / 2**20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def case_of(options: argparse.Namespace) -> StepCase:
    """The case that the command line describes."""
    device, small = torch.device(options.device), options.case == "small"
    batch_anchors = options.batch_anchors or (64 if small else 256 if device.type == "cuda" else 8)
    crop_px, stem = (32, "small") if small else (224, "imagenet")
    return StepCase(crop_px, stem, batch_anchors, options.teacher, options.width, device, options.train_rows, options.precision)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["large", "small"], default="large", help="224 px, or 32 px with a stem for small images")
    parser.add_argument("--teacher", default="resnet50", help="a timm name")
    parser.add_argument("--width", type=float, default=1.0, help="width of the teacher; 2 for R50x2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-anchors", type=int, help="default: 8 on the CPU, 256 on a GPU, 64 for the small case")
    parser.add_argument("--train-rows", type=int, default=131072, help="from which negatives are drawn (ImageNet: 1281167)")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--variants", nargs="+", choices=[name.replace(" ", "_") for name in VARIANTS], default=list(VARIANTS))
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--cpu-seconds", action="store_true", help="measure CPU time with 1 thread, for a machine that is shared")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps per turn; use about 10 on a GPU")
    parser.add_argument("--turns-of", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--tensors", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
