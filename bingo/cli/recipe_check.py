"""`bingo recipe check`: build all networks of a run and try them on synthetic images, before any image is read; and the cost estimate of a
run, which `show` also prints."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from bingo.datasets.sources import count_images
from bingo.datasets.subset import Counts
from bingo.params import Params
from bingo.params.data import FILE_SOURCES
from bingo.params.places import images_folder
from bingo.pipeline.launch import expected_processes
from bingo.planning.costs import SUSTAINED_FLOP_PER_SECOND, cpu_flop_per_second, gpu_hours
from bingo.planning.dry_run import DryTraining, dry_baseline, dry_pretraining, dry_student, dry_teacher
from bingo.planning.estimates import estimate, step_memory
from bingo.planning.limits import absent_weights, check_limits, image_mistakes, list_mistakes, search_mistakes, weights_mistakes
from bingo.planning.recipes import About
from bingo.runtime.errors import UserError
from bingo.runtime.progress import progress_bar
from bingo.teachers.teacher import Teacher

MEGA, GIGA, TERA = 1e6, 1e9, 1e12


def check(params: Params, about: About, say: Callable[[str], None]) -> list[str]:
    """Say a line for each thing that was tried, and return one for each that is missing. Raises UserError for what is wrong, with the
    lines of what is missing behind it."""
    missing = list(_missing(params, about))
    found, lines = _images_and_mistakes(params)
    if lines:
        raise UserError([*lines, *missing])
    counts = found.drawn(params.dataset) if found else known_counts(params, about)
    teacher = _teacher(params, say)
    with progress_bar("building the student"):
        student = dry_student(params, teacher)
    network = params.student
    say(f"student: {network.arch} x {network.width:g} at {params.image.crop_px} px, {_millions(student.method.student)}")
    with progress_bar("a step"):
        terms = ", ".join(f"{name} {value:.4g}" for name, value in student.step().items())
    say(f"step: {student.name} on {student.anchors} anchors of synthetic images: {terms}")
    if counts is not None:
        with progress_bar("counting the cost of a step"):
            lines, memory = _cost_lines(params, counts, teacher, student), step_memory(params, student, teacher, counts)
        for line in lines:
            say(line)
        parts = ", ".join(f"{what} {in_bytes(size)}" for what, size in memory.items())
        of_step = f"memory of a step of {params.distill.batch_anchors} anchors on one GPU, in float32"
        say(f"{of_step}: {parts}; in all {in_bytes(sum(memory.values()))}")
    return missing


def _images_and_mistakes(params: Params) -> tuple[Counts | None, list[str]]:
    """The number of images, and a line for each limit that the parameters exceed, by themselves or with these images."""
    lines = [line for line in weights_mistakes(params) if line not in absent_weights(params)]
    try:
        check_limits(params, expected_processes())
    except UserError as error:
        lines += error.lines
    try:
        found = count_images(params.dataset, params.seed)
    except UserError as error:
        return None, lines + error.lines
    return found, lines + (image_mistakes(params, found) if found else [])


def _missing(params: Params, about: About) -> Iterator[str]:
    """A line for each file, folder or package that the parameters name and that is not there; torchvision may still download CIFAR."""
    dataset, teacher, coco = params.dataset, params.teacher, params.transfer_coco
    if dataset.source in FILE_SOURCES and not Path(images_folder(str(dataset.root))).is_dir():
        way_out = ", so the costs are not known; set dataset.root to the folder of the images"
        if (images := about.images) is not None:
            way_out = f"; {images.train:,} train and {images.test:,} test images are published by {images.published_by}"
        yield f"dataset.root = {dataset.root}: the folder does not exist{way_out}"
    if _names_file(params) and not Path(str(teacher.checkpoint)).is_file():
        way_out = "set teacher.checkpoint to it" if about.teacher is None else f"the {about.teacher.published_by} links it"
        way_out = way_out if teacher.known is None else teacher.known.way_in()
        yield f"teacher.checkpoint = {teacher.checkpoint}: the file does not exist; {way_out}"
    yield from search_mistakes(params) + absent_weights(params)
    parts = (coco.train_images, coco.train_annotations, coco.val_images, coco.val_annotations) if coco.runs else ()
    if absent := [part for part in parts if not (Path(str(coco.root)) / part).exists()]:
        where = f"transfer_coco.root = {coco.root}: there is no {', no '.join(absent)}"
        yield f"{where}; COCO 2017 is published by cocodataset.org, set transfer_coco.root to its folder"
    yield from list_mistakes(params)
    for name, item in params.transfer.datasets.items():
        if item.source in FILE_SOURCES and item.root and not Path(images_folder(item.root)).is_dir():
            yield f"transfer.datasets.{name}.root = {item.root}: the folder does not exist"


def _names_file(params: Params) -> bool:
    """Whether the teacher is read from a file."""
    return params.teacher.checkpoint is not None and params.teacher.source not in ("pretrain", "random")


def _teacher(params: Params, say: Callable[[str], None]) -> Teacher:
    """The teacher, read from its checkpoint if that exists."""
    asked = params.teacher
    there = _names_file(params) and Path(str(asked.checkpoint)).is_file()
    with progress_bar("building the teacher"):
        teacher = dry_teacher(params, checkpoint=there)
    if there:
        origin = f"read from {asked.checkpoint}"
    elif _names_file(params):
        origin = "random weights in place of the checkpoint"
    else:
        later = {"pretrain": "which the stage teacher trains", "random": "as asked for"}
        origin = f"random weights here, {later.get(asked.source, f'the stage teacher downloads those of {asked.source}')}"
    features, keys = teacher.metadata["feature_width"], teacher.metadata["key_width"]
    say(f"teacher: {asked.arch} x {asked.width:g}, {_millions(teacher)}, features {features}, keys {keys}; {origin}")
    return teacher


def _millions(network: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.1f} M parameters"


def cost_lines(params: Params, about: About) -> list[str]:
    """The estimate, counted on synthetic data with a randomly initialised teacher."""
    teacher = dry_teacher(params, checkpoint=False)
    counts = known_counts(params, about)
    if counts is None:
        return [f"images: {params.dataset.root} does not exist, so the number of images and the costs are unknown"]
    return _cost_lines(params, counts, teacher, dry_student(params, teacher))


def known_counts(params: Params, about: About) -> Counts | None:
    """Number of images in the dataset: as given in the recipe, or otherwise as found; None if neither is known."""
    if about.images is not None and params.dataset.source in FILE_SOURCES:
        train, test = params.dataset.train_images, params.dataset.test_images
        return Counts(train or about.images.train, test or about.images.test)
    found = count_images(params.dataset, params.seed)
    return found and found.drawn(params.dataset)


def _cost_lines(params: Params, counts: Counts, teacher: Teacher, student: DryTraining) -> list[str]:
    """Location and numbers of the images, and the FLOPs, GPU time (without a GPU also CPU time) and disk space of a whole run, including
    the training of the baselines and, if it is pretrained, of the teacher."""
    baselines = [dry_baseline(params, method) for method in params.baselines]
    pretraining = dry_pretraining(params) if params.teacher.source == "pretrain" else None
    found = estimate(params, counts, teacher, student, baselines, pretraining)
    total, where = sum(found.stage_flops.values()), "" if params.dataset.root is None else f" in {params.dataset.root}"
    stages = ", ".join(f"{stage} {_time(gpu_hours(flops))}" for stage, flops in found.stage_flops.items())
    disk = ", ".join(f"{what} {in_bytes(size)}" for what, size in found.disk_bytes.items())
    networks = f"{_giga(found.teacher_image_flops)} per image in the teacher, {_giga(found.student_image_flops)} in the student"
    lines = [
        f"images: {params.dataset.source}{where}, {counts.train:,} to train on and {counts.test:,} to test on",
        f"FLOPs: {_giga(found.anchor_flops)} per anchor in a training step, {networks} (1 multiply-add = 2)",
        f"time on one GPU, assuming that it sustains {SUSTAINED_FLOP_PER_SECOND / TERA:g} TFLOP/s and never waits for images: {stages};"
        f" in total {_time(gpu_hours(total))}",
        f"disk: {disk}; in total {in_bytes(sum(found.disk_bytes.values()))}",
    ]
    if not torch.cuda.is_available():
        took = f"all of it takes at least {_time(total / (rate := cpu_flop_per_second()) / 3600)}"
        lines.insert(3, f"this machine has no GPU: at {_giga(rate)}/s, which its CPU reaches for a product of matrices, {took}")
    return lines


def _giga(flops: float) -> str:
    return f"{flops / GIGA:.4g} GFLOP"


def _time(hours: float) -> str:
    seconds = 3600 * hours
    if seconds < 1:
        return "under 1 s"
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def in_bytes(count: int) -> str:
    """Bytes as MB or GB."""
    return f"{count / GIGA:.1f} GB" if count >= GIGA else f"{count / MEGA:.1f} MB"
