"""The parameters that `bingo init` chooses: those that suit the images and the time, on this machine.

The time of a run is estimated from the floating-point operations of the networks and of the searches for neighbours, and the numbers of
decoded images and of features that linear layers learn, with this machine's measured rates of each (`measure_pace`). The choice is the
first of `_candidates` that fits, with as many epochs as fit.

Letters: T train images, V stored views of each, E epochs, Q test images.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product, takewhile
from typing import Any

import torch

from bingo.bags.ivf import InvertedFile
from bingo.evals.probe import BANK_IMAGES, QUERY_IMAGES
from bingo.images.images import PIXELS_PX
from bingo.nets.backbones import build_backbone, check_images, sizes_near, takes
from bingo.params import CachedProbeParams
from bingo.planning.costs import search_flops
from bingo.planning.look import Look
from bingo.planning.pace import Network, Pace, feature_width, flops_in_a_second, layer_seconds, network_flops, searched_in_a_second
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
_LR = 0.06  # of a batch of 64, and proportional to it
_SMALL_STUDENT_LR = 0.2  # likewise, of a new student on small images: the best in the study on CIFAR-10 (benchmarks/results/study.md)
_NETWORKS = 2  # evaluated networks: the student and the untrained network
_PROBES = 5  # in a training
_LISTS_SEARCHED, _SAMPLED_ANCHORS, _MOST_FAILURES = 64, 1000, 2000  # bagging.probes; of figures of bags; of images whose neighbours differ
_FIXED_SECONDS = 70.0  # for starting all stages

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
    """The choice, and the seconds that it will take, by part of the run: scan, teacher (its training and its pass), bags, student, and
    evaluations."""

    student: Network
    crop_px: int
    teacher_px: int
    views: int
    train_images: int
    test_images: int
    epochs: int
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def minutes(self) -> float:
        """Minutes of the whole run."""
        return (sum(self.seconds.values()) + _FIXED_SECONDS) / 60


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


def least_minutes(look: Look, teacher: ChosenTeacher, student: Network | None, pace: Pace, train_images: int) -> int:
    """The fewest whole minutes for which a run on this many train images, or on more, fits, with a tenth for the next trial to differ."""
    plans = takewhile(lambda plan: plan.train_images >= train_images, _candidates(look, teacher, student))
    return math.ceil(1.1 * min(timed(plan, look, teacher, pace).minutes for plan in plans))


def _candidates(look: Look, teacher: ChosenTeacher, student: Network | None) -> Iterator[Plan]:
    """Plans with the fewest epochs, in order of preference."""
    train, test = split_counts(look)
    sides, stem = crops_for(look, student), stem_for("resnet18", look)
    students = [Network("resnet18", width, stem) for width in _WIDTHS]
    students = [one for one in students if parameters_m(one) < teacher.parameters_m] or students[-1:]
    if teacher.name is None:
        students = [_beside_pretrained(stem)]
    if student is not None:
        students = [student]
    teachers_px = [teacher.crop_px, *([_LEAST_TEACHER_PX] if stem == "small" and teacher.crop_px > _LEAST_TEACHER_PX else [])]
    while True:
        for network, crop_px, teacher_px, views in product(students, sides, teachers_px, (4, 2, 1)):
            yield Plan(network, crop_px, teacher_px, views, train, test, FEWEST_EPOCHS)
        if train <= FEWEST_TRAIN_IMAGES:
            return
        train = max(FEWEST_TRAIN_IMAGES, train // 2)
        test = min(test, max(FEWEST_TEST_IMAGES, train // 5))


def _beside_pretrained(stem: str) -> Network:
    """The student of a teacher that is pretrained on these images."""
    return Network("resnet10t", 0.125, stem)


def timed(plan: Plan, look: Look, teacher: ChosenTeacher, pace: Pace) -> Plan:
    """The plan with the seconds that it takes at this pace."""
    T, V, E, Q = plan.train_images, plan.views, plan.epochs, plan.test_images
    decoding = 0.0 if look.short_px[1] <= SMALL_PX else 1 / pace.images
    student_flops = network_flops(plan.student, plan.crop_px)
    teacher_flops = 1e9 * teacher.gflop * (plan.teacher_px / teacher.crop_px) ** 2 or network_flops(PRETRAINED, plan.crop_px)
    probed = min(T, BANK_IMAGES) + min(Q, QUERY_IMAGES)
    passes = T * (1 + V) + Q + probed  # the last untrained, to compare with
    if teacher.narrowed_for(T):
        passes += min(T, FITTED_IMAGES)
    of_teacher = passes * (teacher_flops / pace.teacher_flops + decoding)
    of_student = student_flops / pace.inference_flops + decoding
    if teacher.name is None:
        of_teacher += PRETRAIN_EPOCHS * E * T * (_PRETRAIN_PASSES * teacher_flops / pace.training_flops + 2 * decoding)
        of_teacher += PRETRAIN_EPOCHS * probed * (teacher_flops / pace.teacher_flops + decoding)
    training = E * T * (_ANCHOR_PASSES * student_flops / pace.training_flops + decoding) + _PROBES * probed * of_student
    bags, searches = _searched_flops(plan, look, teacher)
    evaluations = searches / pace.search_flops + (T + Q) * (_NETWORKS * of_student + decoding)  # pixels are decoded, too
    if look.classes:  # linear_eval makes the same features, and trains a layer on each
        of_image, of_feature = pace.layer_seconds
        evaluations += (T + Q) * (_NETWORKS * of_student + decoding)
        evaluations += sum((T + Q) * (of_image + of_feature * width) for width in _widths(plan, look, teacher))
    seconds = {
        "scan": (T + Q) / pace.images,
        "teacher": of_teacher,
        "bags": bags / pace.search_flops,
        "student": training,
        "evaluations": evaluations if Q else 0.0,
    }
    return replace(plan, seconds=seconds)


def _widths(plan: Plan, look: Look, teacher: ChosenTeacher) -> tuple[int, int, int, int]:
    """The widths of the features that are evaluated: of the student, the untrained network, the pixels and the teacher."""
    student, side_px = feature_width(plan.student), look.short_px[1] if look.short_px[1] <= SMALL_PX else PIXELS_PX
    return student, student, 3 * side_px**2, feature_width(teacher.network)


def _searched_flops(plan: Plan, look: Look, teacher: ChosenTeacher) -> tuple[float, float]:
    """FLOPs of the searches among the train images: for bags and their figures, and for evaluations."""
    T, Q, others = plan.train_images, plan.test_images, _widths(plan, look, teacher)[:3]
    width = feature_width(teacher.network)
    ivf = InvertedFile(None, _LISTS_SEARCHED, 0) if T > MOST_SEARCHED_EXACTLY else None
    sampled = min(T, _SAMPLED_ANCHORS) * (1 + 2 * (plan.views > 1))  # distances, and bags by each of two views
    bags = search_flops(T, width, ivf) + 2.0 * T * width * (sampled + (Q if ivf is None else 0))  # near-duplicates of test images
    compared = 2.0 * T * (sum(others) + len(others) * width)  # for each test image: each network, and the teacher beside it
    return bags, compared * (Q + min(Q, _MOST_FAILURES)) + 2.0 * T * width * Q


@cache
def parameters_m(network: Network) -> float:
    """Millions of parameters of a backbone."""
    return sum(parameter.numel() for parameter in build_backbone(network.arch, network.width, network.stem, 0).parameters()) / 1e6


def measure_pace(
    look: Look, student: Network | None, teacher: ChosenTeacher, device: torch.device, cores: int, layer: CachedProbeParams
) -> Pace:
    """This machine's pace, tried for some seconds with the teacher, the student and linear layers with the settings `layer`."""
    stem, sides = stem_for("resnet18", look), crops_for(look, student)
    network = student or (_beside_pretrained(stem) if teacher.name is None else Network("resnet18", 0.5, stem))
    crop_px = min(sides, key=lambda px: abs(px - 128))
    teacher_px, batch_images = (crop_px, 32) if teacher.name is None else (teacher.crop_px, 8)
    return Pace(
        flops_in_a_second(teacher.network, teacher_px, batch_images, device),
        flops_in_a_second(network, crop_px, 32, device),
        flops_in_a_second(network, crop_px, 32, device, training=True),
        cores / max(look.decode_seconds, 1e-6),
        searched_in_a_second(feature_width(teacher.network), device),
        layer_seconds(layer, max(2, len(look.classes)), device),
    )


def overlay(
    look: Look, plan: Plan, teacher: ChosenTeacher, root: str, on_gpu: bool, processes: int = 1, started: bool = False
) -> dict[str, Any]:
    """The overlay for params.yaml, in addition to the part `photographs` or `small-photographs`, if `processes` train together;
    `started`: the student starts from trained weights."""
    train, test, (all_train, all_test) = plan.train_images, plan.test_images, split_counts(look)
    small, batch = look.short_px[1] <= SMALL_PX, batch_anchors(train, processes)
    lr, student_lr = (round(of_64 * batch / 64, 4) for of_64 in (_LR, _SMALL_STUDENT_LR if small and not started else _LR))
    store_px = look.short_px[1] if small else None
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
        "distill": {"epochs": plan.epochs, "batch_anchors": batch, "lr": student_lr, "probe_every_epochs": max(1, plan.epochs // _PROBES)},
        "knn_eval": {"k": [k for k in (1, 10, 20, 200) if k <= train], "agreement_k": [k for k in (1, 10, 100) if k <= train]},
    }


def batch_anchors(train: int, processes: int = 1) -> int:
    """The largest power of two that gives at least three steps per epoch and is at most 64, or 256 from 20,000 images on; lowered to a
    number that `processes` can share equally, at least one image each."""
    batch = 2 ** int(math.log2(max(2, min(64 if train < 20_000 else 256, train // 3))))
    return max(1, batch // processes) * processes
