"""The parameters that `bingo init` chooses: those that suit the images and the time, on this machine.

The time of a run is estimated from the floating-point operations of the networks and the number of decoded images, with this machine's
measured rates of both (`measure_pace`). The choice is the first of `_candidates` that fits, with as many epochs as fit.

Letters: T train images, V stored views of each, E epochs.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch

from bingo.evals.probe import BANK_IMAGES, QUERY_IMAGES
from bingo.nets.backbones import build_backbone, check_images, sizes_near, takes
from bingo.nets.precision import autocast
from bingo.planning.costs import forward_flops
from bingo.planning.look import Look
from bingo.runtime.errors import UserError
from bingo.training.narrow_keys import FITTED_IMAGES

SMALL_PX = 64  # images up to this are kept in memory at their own size, and the student's stem keeps its resolution
FEWEST_EPOCHS, MOST_EPOCHS = 10, 200
FEWEST_TRAIN_IMAGES, FEWEST_TEST_IMAGES = 500, 1000  # the numbers of images are not reduced further to stay within the time
FEWEST_PX = 8  # of a crop: smaller images are enlarged
MOST_DECODED_BY_SCAN, MOST_SEARCHED_EXACTLY = 200_000, 200_000
PRETRAIN_EPOCHS = 3  # of the teacher, for each of the student
_CROPS_PX = (224, 192, 160, 128, 96, 64)
_LEAST_TEACHER_PX = 112  # a whole number of patches of 14 and of 16 px; for small images
_WIDTHS = (1.0, 0.5, 0.25)
_SMALL_STEMS = ("resnet", "efficientnet", "tf_efficientnet", "mobilenetv3")
_ANCHOR_PASSES = 3.3  # cost of a step per anchor, in forward passes: one view, forward and backward, and heads
_KEY_WIDTH = 128  # of a wider teacher, which lost nothing with these terms (benchmarks/results/study.md)
_PRETRAIN_PASSES = 4.2
_NETWORKS, _PASSES = 2, 2  # evaluated networks: the student and the untrained network; by linear_eval and knn_eval
_FIXED_SECONDS = 70.0  # for starting all stages
_TRIAL_SECONDS = 1.5


@dataclass(frozen=True)
class Pace:
    """Rates of this machine, per second: FLOP of the teacher's and of the student's forward pass, FLOP of training (forward and
    backward), decoded images. Narrow networks and depthwise convolutions reach far fewer FLOP/s than others.
    """

    teacher_flops: float
    inference_flops: float
    training_flops: float
    images: float


@dataclass(frozen=True)
class Network:
    """A network as described in the sections teacher and student."""

    arch: str
    width: float
    stem: str


PRETRAINED = Network("resnet10t", 0.25, "small")


@dataclass(frozen=True)
class ChosenTeacher:
    """The teacher of a run: name, network, file (None: the default), crop, GFLOP per image, millions of parameters and key width of a
    known teacher; or, without a name, the network to be pretrained.
    """

    name: str | None
    network: Network = PRETRAINED
    checkpoint: str | None = None
    crop_px: int = 224
    gflop: float = 0.0
    parameters_m: float = math.inf
    key_width: int = _KEY_WIDTH

    def narrowed_for(self, train: int) -> int | None:
        """The number of principal components that are kept of the keys, None if they stay as wide as they are."""
        return _KEY_WIDTH if min(self.key_width, train - 1) > _KEY_WIDTH else None


@dataclass(frozen=True)
class Plan:
    """The choice, and the seconds that it will take: for the teacher (its training and its pass), the student, and the evaluations."""

    student: Network
    crop_px: int
    teacher_px: int
    views: int
    train_images: int
    test_images: int
    epochs: int
    seconds: tuple[float, float, float]

    @property
    def minutes(self) -> float:
        """Minutes of the whole run."""
        return (sum(self.seconds) + _FIXED_SECONDS) / 60


def stem_for(arch: str, look: Look) -> str:
    """The stem that suits the images: for small images a small stem, if the network has one, which keeps their resolution."""
    return "small" if look.short_px[1] <= SMALL_PX and arch.startswith(_SMALL_STEMS) else "imagenet"


def split_counts(look: Look) -> tuple[int, int]:
    """Numbers of train and test images. Without a test split, a fifth of the images is held out, or a tenth if there are more than 1,000,
    at most 5,000; with fewer than 10 images, none."""
    if look.test or look.train < 10:
        return look.train, look.test
    held_out = min(5000, look.train // (5 if look.train <= 1000 else 10))
    return look.train - held_out, held_out


def crops_for(look: Look, student: Network | None) -> list[int]:
    """Sides in pixels of the crops that suit the images and that the student accepts, largest first; if it accepts none of these, the
    nearest that it accepts. Raises UserError for a student that cannot be built or accepts no image.
    """
    median_px = max(FEWEST_PX, look.short_px[1])
    sides = [median_px] if median_px <= SMALL_PX else [px for px in _CROPS_PX if px <= median_px]
    if student is None:
        return sides
    try:
        backbone = build_backbone(student.arch, student.width, student.stem, 0)
        if fitting := [px for px in sides if takes(backbone, px)] or sizes_near(backbone, sides[0])[:1]:
            return fitting
        check_images(backbone, student.arch, sides[0])
    except UserError as error:
        raise UserError([f"--student: {line}" for line in error.lines]) from None
    return sides


def fit(look: Look, teacher: ChosenTeacher, student: Network | None, pace: Pace, minutes: float) -> Plan:
    """The plan that makes the best use of the time: all images and the full student, if it is smaller than the teacher, are preferred to
    more epochs, views or pixels.

    If nothing fits, the cheapest plan, whose `minutes` exceed the time.
    """
    plan = None
    for candidate in _candidates(look, teacher, student):
        fewest = timed(candidate, look, teacher, pace)
        plan = fewest if plan is None or fewest.minutes < plan.minutes else plan
        if fewest.minutes <= minutes:
            more = timed(replace(candidate, epochs=candidate.epochs + 1), look, teacher, pace).minutes - fewest.minutes
            epochs = int(min(MOST_EPOCHS, candidate.epochs + (minutes - fewest.minutes) / max(more, 1e-9)))
            return timed(replace(candidate, epochs=epochs), look, teacher, pace)
    assert plan is not None
    return plan


def _candidates(look: Look, teacher: ChosenTeacher, student: Network | None) -> Iterator[Plan]:
    """Plans with the fewest epochs, in order of preference."""
    train, test = split_counts(look)
    sides, stem = crops_for(look, student), stem_for("resnet18", look)
    students = [Network("resnet18", width, stem) for width in _WIDTHS]
    students = [one for one in students if parameters_m(one) < teacher.parameters_m] or students[-1:]
    if teacher.name is None:
        students = [Network("resnet10t", 0.125, stem)]
    if student is not None:
        students = [student]
    teachers_px = [teacher.crop_px, *([_LEAST_TEACHER_PX] if stem == "small" and teacher.crop_px > _LEAST_TEACHER_PX else [])]
    while True:
        for network, crop_px, teacher_px, views in product(students, sides, teachers_px, (4, 2, 1)):
            yield Plan(network, crop_px, teacher_px, views, train, test, FEWEST_EPOCHS, (0.0, 0.0, 0.0))
        if train <= FEWEST_TRAIN_IMAGES:
            return
        train = max(FEWEST_TRAIN_IMAGES, train // 2)
        test = min(test, max(FEWEST_TEST_IMAGES, train // 5))


def timed(plan: Plan, look: Look, teacher: ChosenTeacher, pace: Pace) -> Plan:
    """The plan with the seconds that it takes at this pace."""
    T, V, E, test = plan.train_images, plan.views, plan.epochs, plan.test_images
    decoding = 0.0 if look.short_px[1] <= SMALL_PX else 1 / pace.images
    student_flops = network_flops(plan.student, plan.crop_px)
    teacher_flops = 1e9 * teacher.gflop * (plan.teacher_px / teacher.crop_px) ** 2 or network_flops(PRETRAINED, plan.crop_px)
    passes = T * (1 + V) + test + min(T, BANK_IMAGES) + min(test, QUERY_IMAGES)  # the last two untrained, to compare with
    if teacher.narrowed_for(T):
        passes += min(T, FITTED_IMAGES)
    of_teacher = passes * (teacher_flops / pace.teacher_flops + decoding)
    if teacher.name is None:
        of_teacher += PRETRAIN_EPOCHS * E * T * (_PRETRAIN_PASSES * teacher_flops / pace.training_flops + 2 * decoding)
    of_student = E * T * (_ANCHOR_PASSES * student_flops / pace.training_flops + decoding)
    evaluations = _NETWORKS * _PASSES * (T + test) * (student_flops / pace.inference_flops + decoding)
    return replace(plan, seconds=(of_teacher, of_student, evaluations))


@cache
def parameters_m(network: Network) -> float:
    """Millions of parameters of a backbone."""
    return sum(parameter.numel() for parameter in build_backbone(network.arch, network.width, network.stem, 0).parameters()) / 1e6


@cache
def network_flops(network: Network, crop_px: int) -> int:
    """FLOP of one forward pass of one image."""
    backbone = build_backbone(network.arch, network.width, network.stem, 0)
    return forward_flops(backbone, torch.zeros(1, 3, crop_px, crop_px))


def measure_pace(look: Look, student: Network | None, teacher: ChosenTeacher, device: torch.device, cores: int) -> Pace:
    """Time the networks on random images: the teacher forward, and the student forward, then forward and backward, each for about 1.5 s."""
    network, sides = student or Network("resnet18", 0.5, stem_for("resnet18", look)), crops_for(look, student)
    crop_px = min(sides, key=lambda px: abs(px - 128))
    if teacher.name is None:
        of_teacher = _flops_in_a_second(teacher.network, crop_px, 32, device, training=False)
    else:
        of_teacher = _flops_in_a_second(teacher.network, teacher.crop_px, 8, device, training=False)
    inference, training = (_flops_in_a_second(network, crop_px, 32, device, training) for training in (False, True))
    return Pace(of_teacher, inference, training, cores / max(look.decode_seconds, 1e-6))


def _flops_in_a_second(network: Network, crop_px: int, batch: int, device: torch.device, training: bool) -> float:
    backbone = build_backbone(network.arch, network.width, network.stem, 0).to(device).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, crop_px, crop_px, device=device).contiguous(memory_format=torch.channels_last)

    def forward() -> None:
        with torch.inference_mode(), autocast("auto", device):
            backbone.eval()(images)

    def step() -> None:
        with autocast("auto", device):
            loss = backbone.train()(images).float().square().mean()
        loss.backward()

    flops = batch * network_flops(network, crop_px) * (3 if training else 1)
    return flops / _seconds_of(step if training else forward, device)


def _seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """Mean seconds of one call, over about 1.5 seconds; the first call, which is slower, does not count."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    begun, calls = time.perf_counter(), 0
    while time.perf_counter() - begun < _TRIAL_SECONDS:
        work()
        wait()
        calls += 1
    return (time.perf_counter() - begun) / calls


def overlay(look: Look, plan: Plan, teacher: ChosenTeacher, root: str, on_gpu: bool, processes: int = 1) -> dict[str, Any]:
    """The overlay for params.yaml, in addition to the part `photographs` or `small-photographs`, if `processes` train together."""
    train, test, (all_train, all_test) = plan.train_images, plan.test_images, split_counts(look)
    small, batch = look.short_px[1] <= SMALL_PX, batch_anchors(train, processes)
    lr, store_px = round(0.06 * batch / 64, 4), look.short_px[1] if small else None
    resize_px = plan.crop_px if small else round(plan.crop_px * 256 / 224)
    network = {"arch": plan.student.arch, "width": plan.student.width, "stem": plan.student.stem}
    image, key_width = {"crop_px": plan.teacher_px}, teacher.narrowed_for(train)
    named = {"name": teacher.name, "checkpoint": teacher.checkpoint, "key_width": key_width, "image": image}
    pretrained = {
        "name": "own",
        "source": "pretrain",
        "arch": PRETRAINED.arch,
        "width": PRETRAINED.width,
        "stem": network["stem"],
        "pretrain": {"epochs": PRETRAIN_EPOCHS * plan.epochs, "batch_anchors": batch, "lr": lr, "probe_every_epochs": plan.epochs},
    }
    return {
        "dataset": {
            "root": root,
            "store_px": store_px,
            "train_images": train if train < all_train else None,
            "test_images": test if test and (test < all_test or not look.test) else None,
            "check": "decode" if look.train + look.test <= MOST_DECODED_BY_SCAN else "header",
        },
        "image": {"crop_px": plan.crop_px, "resize_px": resize_px},
        "teacher": named if teacher.name else pretrained,
        "extract": {"views": plan.views, "batch_images": 256 if on_gpu else 64},
        "bagging": {"k": max(1, min(5, train // 10)), "search": "exact" if train <= MOST_SEARCHED_EXACTLY else "ivf"},
        "student": network,
        "distill": {"epochs": plan.epochs, "batch_anchors": batch, "lr": lr, "probe_every_epochs": max(1, plan.epochs // 5)},
        "knn_eval": {"k": [k for k in (1, 10, 20, 200) if k <= train], "agreement_k": [k for k in (1, 10, 100) if k <= train]},
    }


def batch_anchors(train: int, processes: int = 1) -> int:
    """The largest power of two that gives at least three steps per epoch and is at most 64, or 256 from 20,000 images on; lowered to a
    number that `processes` can share equally, at least one image each."""
    batch = 2 ** int(math.log2(max(2, min(64 if train < 20_000 else 256, train // 3))))
    return max(1, batch // processes) * processes
