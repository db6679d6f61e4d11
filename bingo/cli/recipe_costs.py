"""The cost estimate of a run, as printed by `bingo recipe show` and `check`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bingo.datasets.subset import Counts
    from bingo.params import Params
    from bingo.planning.dry_run import DryTraining
    from bingo.planning.estimates import Estimate
    from bingo.planning.recipes import About
    from bingo.teachers.teacher import Teacher

MEGA, GIGA, TERA = 1e6, 1e9, 1e12


def cost_lines(params: "Params", about: "About") -> list[str]:
    """The estimate, counted on fabricated data with a randomly initialised teacher."""
    from bingo.planning.dry_run import dry_student, dry_teacher

    teacher = dry_teacher(params, checkpoint=False)
    counts = known_counts(params, about)
    if counts is None:
        return [f"images: {params.dataset.root} does not exist, so the number of images and the costs are unknown"]
    return [images_line(params, counts), *estimate_lines(whole_estimate(params, counts, teacher, dry_student(params, teacher)))]


def known_counts(params: "Params", about: "About") -> "Counts | None":
    """Number of images in the dataset: as given in the recipe, or else as found; None if neither is known."""
    from bingo.datasets.sources import count_images
    from bingo.datasets.subset import Counts

    if about.images is not None and params.dataset.source == "folder":
        train, test = params.dataset.train_images, params.dataset.test_images
        return Counts(train or about.images.train, test or about.images.test)
    found = count_images(params.dataset, params.seed)
    return found and found.drawn(params.dataset)


def whole_estimate(params: "Params", counts: "Counts", teacher: "Teacher", student: "DryTraining") -> "Estimate":
    """Including the training of the baselines and, if it is pretrained, of the teacher."""
    from bingo.planning.dry_run import dry_baseline, dry_pretraining
    from bingo.planning.estimates import estimate

    baselines = [dry_baseline(params, method) for method in params.baselines]
    return estimate(params, counts, teacher, student, baselines, dry_pretraining(params) if params.teacher.source == "pretrain" else None)


def images_line(params: "Params", counts: "Counts") -> str:
    """Where the images are and how many there are."""
    where = "" if params.dataset.root is None else f" in {params.dataset.root}"
    return f"images: {params.dataset.source}{where}, {counts.train:,} to train on and {counts.test:,} to test on"


def estimate_lines(estimate: "Estimate") -> list[str]:
    """FLOPs, GPU time (or CPU time on a machine without a GPU) and disk space, one line each."""
    from bingo.planning.costs import SUSTAINED_FLOP_PER_SECOND

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
    import torch

    from bingo.planning.costs import cpu_flop_per_second

    if torch.cuda.is_available():
        return []
    rate = cpu_flop_per_second()
    took = f"all of it takes {flops / rate / 3600:,.1f} h at least"
    return [f"this machine has no GPU: at {_giga(rate)}/s, which its CPU reaches in a product of matrices, {took}"]


def _giga(flops: float) -> str:
    return f"{flops / GIGA:.4g} GFLOP"


def _time(flops: float) -> str:
    from bingo.planning.costs import gpu_hours

    seconds = 3600 * gpu_hours(flops)
    if seconds < 1:
        return "under 1 s"
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def in_bytes(count: int) -> str:
    """Bytes as MB or GB."""
    return f"{count / GIGA:.1f} GB" if count >= GIGA else f"{count / MEGA:.1f} MB"
