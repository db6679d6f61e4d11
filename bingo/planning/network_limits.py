"""Constraints of the networks, checked by building and running them: widths, stems, image sizes, method parameters, batches of 1.

Large networks are built on torch's meta device, without memory for their weights, and nothing is read or downloaded.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from bingo.methods.contract import Progress
from bingo.nets.backbones import Backbone, build_backbone, check_images, without_numbers
from bingo.params import Params, image_values
from bingo.planning.dry_run import DryTraining, dry_baseline, dry_pretraining, dry_student, dry_teacher
from bingo.runtime.errors import UserError
from bingo.teachers.teacher import Teacher

_OF_A_NETWORK = re.compile(r"^(arch|width|stem|drop_rate|drop_path_rate|batchnorm_momentum) = ")


def network_mistakes(params: Params, processes: int) -> list[str]:
    """A line for each constraint that the networks violate. `processes` share each batch."""
    lines: list[str] = []
    teacher: Teacher | None = None
    student: Backbone | None = None
    with _noted(lines, "teacher"):
        build_teacher = partial(dry_teacher, params, checkpoint=False)
        teacher = build_teacher() if params.teacher.source == "factory" else without_numbers(build_teacher)  # own code may read weights
    with _noted(lines, "student"):
        built = build_backbone(params.student.arch, params.student.width, params.student.stem, 0, params.student.options)
        check_images(built, params.student.arch, params.image.crop_px)
        student = built
    if student is None:
        return lines
    widths = {"feature_width": 128, "key_width": 128}  # of any teacher, where it cannot be built, so that the student's training is tried
    running = teacher or Teacher(torch.nn.Identity(), None, {**widths, **image_values(params.teacher_image)})
    if teacher is not None and params.distill.keys == "live" and params.distill.batch_anchors // processes == 1:
        running = dry_teacher(params, checkpoint=False)  # it also runs on the test image
    trainings: list[tuple[str, Callable[[], DryTraining], int]] = [
        ("distill", lambda: dry_student(params, running, bank=False), params.distill.batch_anchors),
        *((f"baseline {name}", lambda name=name: dry_baseline(params, name), params.distill.batch_anchors) for name in params.baselines),
    ]
    if params.teacher.source == "pretrain" and teacher is not None:
        trainings.append(("teacher.pretrain", lambda: dry_pretraining(params), params.teacher.pretrain.batch_anchors))
    for name, build, batch_anchors in trainings:
        with _noted(lines, "student"):
            _check_rows(build(), name, batch_anchors, processes)
    _check_small_crops(params, student, teacher, lines)
    _check_downstream(params, student, lines)
    return lines


@contextmanager
def _noted(lines: list[str], network: str) -> Iterator[None]:
    """Collect the UserErrors raised in the body; keys of a network without a section get that of the network."""
    try:
        yield
    except UserError as error:
        lines += [_OF_A_NETWORK.sub(rf"{network}.\1 = ", line) for line in error.lines]


def _check_rows(training: DryTraining, name: str, batch_anchors: int, processes: int) -> None:
    """Raise UserError if a process has one image in a batch, and the training has a BatchNorm that needs two."""
    parts = processes * training.schedule.accumulate_steps
    if batch_anchors // parts != 1 or training.method.needs.companions:
        return
    try:
        training.method.train()(training.batch(1), Progress(0, 0))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        key = "teacher.pretrain" if name == "teacher.pretrain" else "distill"
        shared = f" of {processes} processes" if processes > 1 else ""
        shared += f" with accumulate_steps = {training.schedule.accumulate_steps}" if parts > processes else ""
        line = f"{key}.batch_anchors = {batch_anchors}: BatchNorm in {training.name} needs more than one image"
        raise UserError(f"{line} in each batch{shared}; set {key}.batch_anchors: {2 * parts} or more") from None


def _check_small_crops(params: Params, student: Backbone, teacher: Teacher | None, lines: list[str]) -> None:
    """Requirements of student and teacher on SEED's small crops."""
    seed = params.methods.seed
    if params.distill.method != "seed" or not seed.small_crops:
        return
    networks: dict[str, tuple[Any, str]] = {"student": (student, params.student.arch)}
    if teacher is not None:
        networks["teacher"] = teacher.backbone, params.teacher.arch
    for name, (network, arch) in networks.items():
        with _noted(lines, name):
            check_images(network, arch, seed.small_crop_px, "methods.seed.small_crop_px")


def _check_downstream(params: Params, student: Backbone, lines: list[str]) -> None:
    """Further requirements of the evaluations on the student: images of other sizes, the stages of a detector."""
    if params.transfer.datasets and "linear_resized" in params.transfer.protocols:
        try:
            check_images(student, params.student.arch, params.transfer.resized_px)
        except UserError as error:
            lines += [line.replace("image.crop_px", "transfer.resized_px") for line in error.lines]
    if params.transfer_coco.runs:
        from bingo.detection.detector import check_student

        with _noted(lines, "student"):
            check_student(student)
