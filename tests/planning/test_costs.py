"""Costs: FLOPs and bytes compared with manual counts; counting has no side effects on a method."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bingo.datasets.sources import count_images, scan
from bingo.datasets.subset import Counts
from bingo.methods.contract import Batch, Method, Needs, Progress
from bingo.nets.backbones import build_backbone
from bingo.params import load_params
from bingo.planning.costs import forward_flops, gpu_hours, saved_bytes, step_flops
from bingo.planning.dry_run import dry_baseline, dry_pretraining, dry_student, dry_teacher
from bingo.planning.estimates import estimate, flops_per_anchor, step_memory
from bingo.runtime.errors import UserError

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
B, PX = 3, 8
PROGRESS = Progress(0, 0)


class Tiny(Method):
    """conv 3 -> 4 (3x3, padded), depthwise conv, conv with stride 2 to 6 in 2 groups, pooling, dropout, linear to 5; and a frozen linear to
    7."""

    needs = Needs(anchor_views=1)

    def __init__(self):
        super().__init__()
        convolutions = [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 6, 1, stride=2, groups=2)]
        self.student = nn.Sequential(*convolutions, nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 5)
        self.fixed = nn.Linear(5, 7).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))
        self.pushed = None

    def forward(self, batch, progress):
        self.pushed = batch.anchor_views[0]
        self.seen += 1
        with torch.no_grad():
            target = self.fixed(torch.ones(len(batch.anchor_rows_B), 5))
        return {"loss": (self.fixed(self.head(self.student(batch.anchor_views[0]))) - target).square().mean()}


def batch() -> Batch:
    return Batch(torch.arange(B), [torch.randn(B, 3, PX, PX)])


def test_step_flops_are_those_counted_by_hand():
    pixels, quarter = B * PX * PX, B * PX * PX // 4
    first, depthwise, grouped, head, frozen = 3 * 4 * 9 * pixels, 4 * 9 * pixels, 4 * 6 // 2 * quarter, B * 6 * 5, B * 5 * 7
    forward = first + depthwise + grouped + head + 2 * frozen
    backward = first + 2 * (depthwise + grouped + head) + frozen  # the images and the frozen weights need no gradient
    assert step_flops(Tiny(), batch(), PROGRESS) == 2 * (forward + backward)


def test_counting_does_not_change_the_network():
    method = Tiny().train()
    method(batch(), PROGRESS)["loss"].backward()
    other = batch()
    state = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    gradients = {name: parameter.grad.clone() for name, parameter in method.named_parameters() if parameter.grad is not None}
    pushed, random = method.pushed, torch.get_rng_state()
    step_flops(method, other, PROGRESS)
    saved_bytes(method, other, PROGRESS)
    assert all(torch.equal(tensor, state[name]) for name, tensor in method.state_dict().items())
    assert {name for name, parameter in method.named_parameters() if parameter.grad is not None} == set(gradients)
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in method.named_parameters() if name in gradients)
    assert method.pushed is pushed
    assert torch.equal(torch.get_rng_state(), random)
    assert method.training
    method.student.requires_grad_(False)
    method.zero_grad(set_to_none=True)
    step_flops(method, other, PROGRESS)
    assert all(parameter.grad is None for parameter in method.parameters())


def test_counting_does_not_change_queue_and_moving_average():
    training = dry_baseline(PARAMS, "moco")
    state = {name: tensor.clone() for name, tensor in training.method.state_dict().items()}
    assert step_flops(training.method.train(), training.batch(2), PROGRESS) > 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in training.method.state_dict().items())


class Layer(Method):
    """relu(x W); backward needs x and the output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(10, 20, bias=False)

    def forward(self, batch, progress):
        return {"loss": torch.relu(self.layer(batch.anchor_views[0])).sum()}


def test_saved_bytes_are_those_needed_by_backward():
    assert saved_bytes(Layer(), Batch(torch.arange(B), [torch.randn(B, 10)]), PROGRESS) == 4 * B * (10 + 20)


# GFLOP of the forward pass for an image of 224 px, without the head; the two small ones are from published tables.
@pytest.mark.parametrize(
    ("arch", "width", "gflop"),
    [
        ("resnet18", 1.0, 3.63), ("resnet34", 1.0, 7.33), ("resnet50", 1.0, 8.18), ("resnet152", 1.0, 23.0), ("resnet50", 2.0, 32.2),
        ("efficientnet_b0", 1.0, 0.78), ("mobilenetv3_large_100", 1.0, 0.438),
    ],
)  # fmt: skip
def test_forward_flops_of_known_networks(arch, width, gflop):
    with torch.device("meta"):
        network = build_backbone(arch, width, "imagenet", 0)
    assert forward_flops(network, torch.zeros(1, 3, 224, 224)) / 1e9 == pytest.approx(gflop, rel=0.02)


@pytest.mark.slow
def test_a_depthwise_network_costs_three_forwards_a_step():
    """torch's own count for the backward pass of a depthwise convolution is many times too large."""
    params = PARAMS.model_copy(update={"student": PARAMS.student.model_copy(update={"arch": "mobilenetv3_small_050", "width": 1.0})})
    training = dry_baseline(params, "moco")
    forward = forward_flops(training.method.student, torch.zeros(1, 3, PARAMS.image.crop_px, PARAMS.image.crop_px))
    step = step_flops(training.method, training.batch(2), PROGRESS) / 2
    assert 3.5 * forward < step < 4.5 * forward + 1e7  # three for the student, one for the moving average; heads and queue


def test_an_estimate_is_the_sum_of_its_parts():
    counts, widths = Counts(1000, 100), (128, 128)
    teacher = dry_teacher(PARAMS, checkpoint=False)
    student, moco, pretraining = dry_student(PARAMS, teacher), dry_baseline(PARAMS, "moco"), dry_pretraining(PARAMS)
    found = estimate(PARAMS, counts, teacher, student, [moco], pretraining)
    assert (teacher.metadata["feature_width"], teacher.metadata["key_width"]) == widths
    image = torch.zeros(1, 3, PARAMS.image.crop_px, PARAMS.image.crop_px)
    of_teacher, of_student = forward_flops(teacher, image), forward_flops(student.method.student, image)
    stages, views = found.stage_flops, PARAMS.extract.views
    assert stages["teacher"] == PARAMS.teacher.pretrain.epochs * 1000 * step_flops(pretraining.method, pretraining.batch(2), PROGRESS) / 2
    assert stages["extract"] == (1100 + views * 1000) * of_teacher
    assert stages["bag"] == 2 * 1000 * 1000 * 128
    bagging = PARAMS.bagging.model_copy(update={"search": "ivf", "lists": 40, "probes": 8})
    approximate = estimate(PARAMS.model_copy(update={"bagging": bagging}), counts, teacher, student, [moco], pretraining)
    # K-means with ten iterations, two assignments, eight lists of 25 rows for each row, and recall over all of them
    assert approximate.stage_flops["bag"] == 2 * 128 * 1000 * (10 * 40 + 2 * 40 + 8 * 25 + 1000)
    assert stages["distill"] == PARAMS.distill.epochs * 1000 * found.anchor_flops
    assert stages["baseline moco"] == PARAMS.distill.epochs * 1000 * step_flops(moco.method, moco.batch(2), PROGRESS) / 2
    # student, moco and untrained, for linear_eval and knn_eval; then the student's crops
    assert stages["linear_eval, knn_eval"] == (6 * 1100 + PARAMS.linear_eval.crops.epochs * 1000) * of_student
    assert found.disk_bytes["embeddings"] == (1100 * 128 + 1000 * views * 128) * 2
    assert found.disk_bytes["bags"] == 1000 * PARAMS.bagging.k * 6
    assert found.disk_bytes["images"] == 1100 * 3 * PARAMS.dataset.store_px**2
    assert step_memory(PARAMS, student, teacher, counts)["stored keys and features"] == 1000 * views * 128 * 2
    assert gpu_hours(2e14 * 3600) == 1


@pytest.mark.parametrize("changes", [{}, {"train_images": 100, "test_images": 50}, {"placements": 1}])
def test_images_are_counted_as_scan_lists_them(changes):
    dataset = PARAMS.dataset.model_copy(update=changes)
    listing, _ = scan(dataset, 3)
    found = count_images(dataset, 3)
    assert found is not None
    assert found.drawn(dataset) == Counts(listing.train_rows, len(listing) - listing.train_rows)


def test_images_of_a_folder_are_counted_and_a_missing_folder_has_no_count(tmp_path):
    dataset = PARAMS.dataset.model_copy(update={"source": "folder", "root": str(tmp_path / "no")})
    assert count_images(dataset, 0) is None
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="no train/"):
        count_images(dataset.model_copy(update={"root": str(tmp_path)}), 0)


def test_a_bank_of_negatives_is_counted():
    """With stored keys: queries of three views times the number of drawn rows, forward and for the gradient of the queries."""
    flops = {}
    for rows in (1024, 4096):
        section = PARAMS.methods.bingo.model_copy(update={"negative_rows": rows, "terms": "symmetric_mix"})
        distill = PARAMS.distill.model_copy(update={"method": "bingo"})
        params = PARAMS.model_copy(update={"methods": PARAMS.methods.model_copy(update={"bingo": section}), "distill": distill})
        training = dry_student(params, dry_teacher(params, checkpoint=False))
        flops[rows] = step_flops(training.method, training.batch(2), PROGRESS) / 2
    assert flops[4096] - flops[1024] == 3 * 2 * 2 * 128 * (4096 - 1024)


def test_small_crops_cost_as_much_as_views_of_their_size():
    flops = []
    for small_crops in (0, 2):
        changes = {"negatives": "queue", "small_crops": small_crops, "small_crop_px": PARAMS.image.crop_px}
        section = PARAMS.methods.seed.model_copy(update=changes)
        distill = PARAMS.distill.model_copy(update={"method": "seed", "keys": "live"})
        params = PARAMS.model_copy(update={"methods": PARAMS.methods.model_copy(update={"seed": section}), "distill": distill})
        flops.append(flops_per_anchor(dry_student(params, dry_teacher(params, checkpoint=False))))
    assert flops[1] == 3 * flops[0]
