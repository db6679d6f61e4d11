"""Estimate the cost of a run from the cost of one step and one image: floating-point operations, memory of a step, disk space.

Shape letters: N listed images, T train images, V stored views, P key width, D feature width, K bag size, C clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bingo.bags.ivf import InvertedFile
from bingo.datasets.subset import Counts
from bingo.methods.contract import Progress
from bingo.params import ImageParams, Params
from bingo.planning.costs import forward_flops, saved_bytes, search_flops, step_flops
from bingo.planning.dry_run import DryTraining
from bingo.teachers.teacher import Teacher

_FLOAT, _HALF, _INDEX = 4, 2, 4  # bytes
_PACKED = 0.48  # bytes of a packed photograph, times dataset.pack_px squared: measured on photographs of COCO, 4:3


@dataclass(frozen=True)
class Estimate:
    """FLOPs per anchor of the student's training, per image of teacher and student, and of each stage; bytes of each output."""

    anchor_flops: float
    teacher_image_flops: int
    student_image_flops: int
    stage_flops: dict[str, float]
    disk_bytes: dict[str, int]


def estimate(
    params: Params,
    counts: Counts,
    teacher: Teacher,
    student: DryTraining,
    baselines: Sequence[DryTraining],
    pretraining: DryTraining | None,
) -> Estimate:
    """The estimate for a run with these parameters and numbers of images."""
    teacher_flops = forward_flops(teacher, _zeros(teacher.image))
    student_flops = forward_flops(student.method.student, _zeros(params.image))
    anchor_flops = flops_per_anchor(student)
    stages = {"teacher": _training(pretraining, counts)} if pretraining is not None else {}
    stages["extract"] = (counts.train + counts.test + params.extract.views * counts.train) * teacher_flops
    stages["bag"] = _bag_flops(params, counts.train, teacher.metadata["feature_width"])
    stages["distill"] = params.distill.epochs * counts.train * anchor_flops
    stages |= {f"baseline {training.name}": _training(training, counts) for training in baselines}
    stages["linear_eval, knn_eval"] = _evaluation_flops(params, counts, student_flops)
    return Estimate(anchor_flops, teacher_flops, student_flops, stages, _disk(params, counts, teacher, student))


def _zeros(image: ImageParams) -> torch.Tensor:
    """One image, float32 (1, 3, P, P)."""
    return torch.zeros(1, 3, image.crop_px, image.crop_px)


def flops_per_anchor(training: DryTraining) -> float:
    """FLOPs of one anchor in one step of a training, forward and backward."""
    progress = Progress(training.schedule.epochs - 1, 0)  # after all warm-ups
    return step_flops(training.method, training.batch(training.anchors), progress) / training.anchors


def step_memory(params: Params, training: DryTraining, teacher: Teacher, counts: Counts) -> dict[str, int]:
    """Bytes of memory of one step of the student's training, in float32, by use; they are not divided among GPUs."""
    progress = Progress(training.schedule.epochs - 1, 0)
    fewer, more = (saved_bytes(training.method, training.batch(anchors), progress) for anchors in (training.anchors, training.anchors + 1))
    trained = sum(parameter.numel() for parameter in training.method.parameters() if parameter.requires_grad)
    moments = 2 if training.schedule.optimizer in ("adamw", "lamb") else 1
    state = _bytes(training.method) + (1 + moments) * _FLOAT * trained  # gradients and the optimizer's moments
    if params.distill.student_ema:
        state += _bytes(training.method.student)
    if params.distill.keys == "live":
        state += _bytes(teacher)
    stored = params.extract.views * teacher.metadata["key_width"]
    if training.stored is not None and training.stored.features_TD is not None:
        stored += teacher.metadata["feature_width"]
    return {
        "activations": (more - fewer) * training.schedule.batch_anchors // training.schedule.accumulate_steps,
        "weights and state": state,
        "stored keys and features": counts.train * stored * _HALF,
    }


def _training(training: DryTraining, counts: Counts) -> float:
    return training.schedule.epochs * counts.train * flops_per_anchor(training)


def _bag_flops(params: Params, train: int, feature_width: int) -> float:
    """For knn, all pairs of train rows, or those that the inverted file compares; for kmeans, rows times centroids in each iteration, then
    pairs within clusters."""
    pairs = search_flops(train, feature_width)
    if params.bagging.search != "exact":  # cuVS also builds its graph from an inverted file
        return search_flops(train, feature_width, InvertedFile(params.bagging.lists, params.bagging.probes, params.seed))
    if params.bagging.method == "kmeans":
        return pairs * params.bagging.clusters / train * params.bagging.iterations + pairs / params.bagging.clusters
    return pairs


def _evaluation_flops(params: Params, counts: Counts, student_flops: int) -> float:
    """Features of centre views of every student-like network, twice, and the crops of each epoch of linear_eval.crops."""
    others = [asked for asked in (params.student.weights, params.supervised, params.distill.student_ema) if asked]
    networks, crops = 2 + len(params.baselines) + len(others), params.linear_eval.crops
    centre = 2 * networks * (counts.train + counts.test)
    return (centre + len(crops.nets) * crops.epochs * counts.train) * student_flops


def _disk(params: Params, counts: Counts, teacher: Teacher, student: DryTraining) -> dict[str, int]:
    images, widths = counts.train + counts.test, teacher.metadata
    keys = counts.train * params.extract.views * widths["key_width"]
    found = {
        "embeddings": (images * widths["feature_width"] + keys) * _HALF,
        "bags": counts.train * params.bagging.k * (_INDEX + _HALF),
        "networks": _bytes(teacher) + (1 + len(params.baselines)) * (_bytes(student.method.student) + _bytes(student.method.head)),
    }
    stored = 3 * (params.dataset.store_px or 0) ** 2 + round(_PACKED * (params.dataset.pack_px or 0) ** 2)
    return found | ({"images": images * stored} if stored else {})


def _bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())
