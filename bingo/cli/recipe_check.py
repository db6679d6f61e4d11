"""`bingo recipe check`: build everything that a run builds and try it on fabricated images, before any image is read; and the cost
estimate of a run, which `show` prints too."""

from collections.abc import Callable
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
from bingo.planning.estimates import Estimate, estimate, step_memory
from bingo.planning.limits import absent_weights, check_limits, image_mistakes, list_mistakes, search_mistakes, weights_mistakes
from bingo.planning.recipes import About
from bingo.runtime.errors import UserError
from bingo.runtime.progress import progress_bar
from bingo.teachers.teacher import Teacher

MEGA, GIGA, TERA = 1e6, 1e9, 1e12


def check(params: Params, about: About, say: Callable[[str], None]) -> list[str]:
    """Say a line for each thing that was tried, and return one for each that is missing. Raises UserError for what is wrong, with the
    lines of what is missing behind it."""
    missing = _missing(params, about)
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
    say(f"step: {student.name} on {student.anchors} anchors of fabricated images: {terms}")
    if counts is not None:
        with progress_bar("counting the cost of a step"):
            lines = _cost_lines(params, counts, teacher, student)
        for line in lines:
            say(line)
    return missing


def _images_and_mistakes(params: Params) -> tuple[Counts | None, list[str]]:
    """How many images are there, and a line for each limit that the parameters break, by themselves and on these."""
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


def _missing(params: Params, about: About) -> list[str]:
    """A line for each file, folder or package that the parameters name and that is not there."""
    dataset, teacher = params.dataset, params.teacher
    images = (
        [_missing_images(params, about)] if dataset.source in FILE_SOURCES and not Path(images_folder(str(dataset.root))).is_dir() else []
    )
    checkpoint = [_missing_checkpoint(params, about)] if _names_file(params) and not Path(str(teacher.checkpoint)).is_file() else []
    coco = _missing_coco(params) if params.transfer_coco.runs else []
    return images + checkpoint + search_mistakes(params) + absent_weights(params) + coco + _missing_downstream(params)


def _missing_coco(params: Params) -> list[str]:
    """What of COCO is not there."""
    coco = params.transfer_coco
    parts = (coco.train_images, coco.train_annotations, coco.val_images, coco.val_annotations)
    missing = [part for part in parts if not (Path(str(coco.root)) / part).exists()]
    where = f"transfer_coco.root = {coco.root}: there is no {', no '.join(missing)}"
    return [f"{where}; COCO 2017 is published by cocodataset.org, set transfer_coco.root to its folder"] if missing else []


def _missing_images(params: Params, about: About) -> str:
    line = f"dataset.root = {params.dataset.root}: the folder does not exist"
    if about.images is None:
        return f"{line}, so the costs are not known; set dataset.root to the folder of the images"
    return f"{line}; {about.images.train:,} train and {about.images.test:,} test images are published by {about.images.published_by}"


def _missing_downstream(params: Params) -> list[str]:
    """Missing inputs of semi_eval and transfer_cifar, which run only after the student is trained; torchvision may still download CIFAR."""
    sets = params.transfer.datasets.items()
    folders = {f"transfer.datasets.{name}.root": item.root for name, item in sets if item.source in FILE_SOURCES}
    absent = [
        f"{key} = {root}: the folder does not exist" for key, root in folders.items() if root and not Path(images_folder(root)).is_dir()
    ]
    return list_mistakes(params) + absent


def _names_file(params: Params) -> bool:
    """Whether the teacher is one of a file."""
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


def _missing_checkpoint(params: Params, about: About) -> str:
    line = f"teacher.checkpoint = {params.teacher.checkpoint}: the file does not exist"
    if params.teacher.known is not None:
        return f"{line}; {params.teacher.known.way_in()}"
    return f"{line}; set teacher.checkpoint to it" if about.teacher is None else f"{line}; the {about.teacher.published_by} links it"


def _cost_lines(params: Params, counts: Counts, teacher: Teacher, student: DryTraining) -> list[str]:
    memory = step_memory(params, student, teacher, counts)
    parts = ", ".join(f"{what} {in_bytes(size)}" for what, size in memory.items())
    batch = params.distill.batch_anchors
    return [
        images_line(params, counts),
        *estimate_lines(whole_estimate(params, counts, teacher, student)),
        f"memory of a step of {batch} anchors on one GPU, in float32: {parts}; in all {in_bytes(sum(memory.values()))}",
    ]


def _millions(network: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.1f} M parameters"


def cost_lines(params: Params, about: About) -> list[str]:
    """The estimate, counted on fabricated data with a randomly initialised teacher."""
    teacher = dry_teacher(params, checkpoint=False)
    counts = known_counts(params, about)
    if counts is None:
        return [f"images: {params.dataset.root} does not exist, so the number of images and the costs are unknown"]
    return [images_line(params, counts), *estimate_lines(whole_estimate(params, counts, teacher, dry_student(params, teacher)))]


def known_counts(params: Params, about: About) -> Counts | None:
    """Number of images in the dataset: as given in the recipe, or else as found; None if neither is known."""
    if about.images is not None and params.dataset.source in FILE_SOURCES:
        train, test = params.dataset.train_images, params.dataset.test_images
        return Counts(train or about.images.train, test or about.images.test)
    found = count_images(params.dataset, params.seed)
    return found and found.drawn(params.dataset)


def whole_estimate(params: Params, counts: Counts, teacher: Teacher, student: DryTraining) -> Estimate:
    """Including the training of the baselines and, if it is pretrained, of the teacher."""
    baselines = [dry_baseline(params, method) for method in params.baselines]
    return estimate(params, counts, teacher, student, baselines, dry_pretraining(params) if params.teacher.source == "pretrain" else None)


def images_line(params: Params, counts: Counts) -> str:
    """Where the images are and how many there are."""
    where = "" if params.dataset.root is None else f" in {params.dataset.root}"
    return f"images: {params.dataset.source}{where}, {counts.train:,} to train on and {counts.test:,} to test on"


def estimate_lines(estimate: Estimate) -> list[str]:
    """FLOPs, GPU time (or CPU time on a machine without a GPU) and disk space, one line each."""
    total = sum(estimate.stage_flops.values())
    stages = ", ".join(f"{stage} {_time(flops)}" for stage, flops in estimate.stage_flops.items())
    disk = ", ".join(f"{what} {in_bytes(size)}" for what, size in estimate.disk_bytes.items())
    networks = f"{_giga(estimate.teacher_image_flops)} an image in the teacher, {_giga(estimate.student_image_flops)} in the student"
    rate = f"{SUSTAINED_FLOP_PER_SECOND / TERA:g} TFLOP/s"
    return [
        f"FLOPs: {_giga(estimate.anchor_flops)} an anchor in a training step, {networks} (1 multiply-add = 2)",
        f"time of one GPU, if it kept up {rate} and never waited for images (both assumed): {stages}; in all {_time(total)}",
        *_cpu_line(total),
        f"disk: {disk}; in all {in_bytes(sum(estimate.disk_bytes.values()))}",
    ]


def _cpu_line(flops: float) -> list[str]:
    """Where this machine has no GPU, how long its CPU takes at least."""
    if torch.cuda.is_available():
        return []
    rate = cpu_flop_per_second()
    took = f"all of it takes {flops / rate / 3600:,.1f} h at least"
    return [f"this machine has no GPU: at {_giga(rate)}/s, which its CPU reaches in a product of matrices, {took}"]


def _giga(flops: float) -> str:
    return f"{flops / GIGA:.4g} GFLOP"


def _time(flops: float) -> str:
    seconds = 3600 * gpu_hours(flops)
    if seconds < 1:
        return "under 1 s"
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def in_bytes(count: int) -> str:
    """Bytes as MB or GB."""
    return f"{count / GIGA:.1f} GB" if count >= GIGA else f"{count / MEGA:.1f} MB"
