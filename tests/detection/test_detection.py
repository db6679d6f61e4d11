"""Mask R-CNN on the student: it contains the student's weights, its steps are correct, and it can be killed and run by two processes."""

import hashlib
import math
import os
import socket
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_data import CATEGORIES, crowd, make_split, write
from faster_coco_eval import mask as rle
from safetensors.torch import load_file
from torch import nn
from torchvision.models.detection import roi_heads
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from bingo.detection import loop as detection
from bingo.detection.coco import Instances, read_instances, run_lengths, training_targets
from bingo.detection.detector import DetectorSettings, build_detector, keep_sampling, student_inside
from bingo.detection.loop import DetectorTrainer, plan_steps, sgd
from bingo.detection.scores import coco_scores, detect
from bingo.nets.backbones import build_backbone
from bingo.nets.checkpoint import weights_sha256
from bingo.nets.students import load_backbone, save_student
from bingo.params import load_params
from bingo.runtime import distributed
from bingo.runtime.checkpoints import Checkpoints
from bingo.runtime.errors import Interrupted, UserError
from bingo.schedules import step_lr
from tests.processes import start_two

CPU = torch.device("cpu")
REAL = Path(__file__).parents[3] / "shared/data/coco-tiny.tar.xz"
PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
SMALL = {
    "batch_images": 2, "lr": 0.02, "lr_warmup_steps": 2, "min_side_px": [64, 80], "max_side_px": 160, "test_min_side_px": 64,
    "precision": "fp32",
}  # fmt: skip
COCO = PARAMS.transfer_coco.model_copy(update=SMALL)
FPN = DetectorSettings(((16,), (32,), (64,), (128,), (256,)), (100, 50), (50, 30), 32, 8, channels=16, hidden=16)
TINY = {"fpn": FPN, "c4": replace(FPN, anchor_px=((16, 32, 64, 128, 256),))}
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.3, 0.35]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Instances:
    root = tmp_path_factory.mktemp("coco")
    make_split(root, "train", 6, 0, empty=(2,))
    return read(root)


def read(root: Path) -> Instances:
    return read_instances(root / "annotations/instances_train.json", root / "train", "key")


def tiny(head: str = "fpn", seed: int = 0, classes: int = 3):
    return build_detector(build_backbone("resnet18", 0.25, "imagenet", seed), head, classes, MEAN, STD, seed, TINY[head])


def trainer(found: Instances, folder: Path, steps: int = 6, head: str = "fpn", **changes) -> DetectorTrainer:
    params = COCO.model_copy(update=changes)
    checkpoints = Checkpoints(folder, every_seconds=1e9)
    schedule = [max(1, steps - 2), steps]
    detector = tiny(head, classes=len(found.category_ids))
    return DetectorTrainer(detector, found.images, training_targets(found), params, schedule, 0, CPU, checkpoints, workers=0)


def batch_of(found: Instances, rows: list[int]) -> tuple[list, list]:
    """Images and targets of some rows, as in a training step."""
    targets = training_targets(found)
    views = [detection.View(row, 64, 160) for row in rows]
    examples = list(detection.CocoLoader(found.images, targets.lines, CPU, 0).examples(views))
    images = [example.image_3HW.float() / 255 for example in examples]
    return images, [{"boxes": e.boxes_I4, "labels": e.labels_I, "masks": e.masks_IHW} for e in examples]


# The network.


@pytest.mark.parametrize(
    ("head", "arch", "width"),
    [("fpn", "resnet18", 0.25), ("c4", "resnet34", 0.125), ("c4", "resnet50", 0.125), ("fpn", "torchvision/resnet18", 1.0)],
)
def test_the_detector_starts_from_the_students_file(tmp_path, head, arch, width):
    network = PARAMS.student.model_copy(update={"arch": arch, "width": width, "stem": "imagenet"})
    trained = build_backbone(arch, width, "imagenet", 5)
    with torch.no_grad():
        for buffer in trained.buffers():
            buffer += 1 if buffer.dtype == torch.int64 else 0.5  # statistics that differ from the initial ones
    save_student(tmp_path / "s.safetensors", tmp_path / "h.safetensors", trained, nn.Identity(), network, PARAMS.image, {})
    student, _ = load_backbone(tmp_path / "s.safetensors", network)
    detector = build_detector(student, head, 3, MEAN, STD, 0, TINY[head])
    assert weights_sha256(student_inside(detector)) == weights_sha256(load_file(tmp_path / "s.safetensors"))
    inside = detector.state_dict()
    prefixes = {"fpn": ("backbone.body.",), "c4": ("backbone.", "roi_heads.box_head.")}[head]
    for name, tensor in trained.state_dict().items():
        (place,) = [prefix + name for prefix in prefixes if prefix + name in inside]
        assert torch.equal(inside[place], tensor), name


def test_the_checksum_covers_names_dtypes_shapes_and_bytes():
    state = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(3)}
    wanted = hashlib.sha256(b"a torch.int64 []\n" + struct.pack("<q", 3) + b"b torch.float32 [2, 3]\n" + struct.pack("<6f", *range(6)))
    assert weights_sha256(state) == wanted.hexdigest()
    assert weights_sha256({"a": state["a"], "b": state["b"].T.contiguous().T}) == wanted.hexdigest()


@pytest.mark.parametrize("arch", ["resnet18", "resnet10t"])
def test_the_stages_compute_what_the_student_computes(arch):
    student = build_backbone(arch, 0.25, "imagenet", 0).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        wanted = student.forward_features(images)
        c4 = build_detector(student, "c4", 3, MEAN, STD, 0, TINY["c4"]).eval()
        assert torch.equal(c4.roi_heads.box_head.layer4(c4.backbone(images)), wanted)
        fpn = build_detector(student, "fpn", 3, MEAN, STD, 0, TINY["fpn"]).eval()
        assert torch.equal(fpn.backbone.body(images)["3"], wanted)
        assert [tuple(x.shape[2:]) for x in fpn.backbone(images).values()] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]


@pytest.mark.parametrize("head", ["fpn", "c4"])
def test_the_settings_are_detectron2s(head):
    """The figures of Base-RCNN-FPN.yaml, Base-RCNN-C4.yaml and config/defaults.py."""
    net = build_detector(build_backbone("resnet18", 1.0, "imagenet", 0), head, 80, MEAN, STD, 0)
    rpn, regions = net.rpn, net.roi_heads
    tops = {"fpn": (2000, 1000, 1000, 1000), "c4": (12000, 6000, 2000, 1000)}[head]
    before, after = rpn._pre_nms_top_n, rpn._post_nms_top_n
    assert (before["training"], before["testing"], after["training"], after["testing"]) == tops
    assert (rpn.nms_thresh, rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold) == (0.7, 0.7, 0.3)
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
    assert (regions.fg_bg_sampler.batch_size_per_image, regions.fg_bg_sampler.positive_fraction) == (512, 0.25)
    assert (regions.score_thresh, regions.nms_thresh, regions.detections_per_img) == (0.05, 0.5, 100)
    assert (regions.proposal_matcher.high_threshold, regions.box_coder.weights) == (0.5, (10.0, 10.0, 5.0, 5.0))
    sizes = [32, 64, 128, 256, 512]
    assert [list(level) for level in rpn.anchor_generator.sizes] == ([[s] for s in sizes] if head == "fpn" else [sizes])
    assert set(rpn.anchor_generator.aspect_ratios) == {(0.5, 1.0, 2.0)}
    assert regions.box_roi_pool.output_size == ((7, 7) if head == "fpn" else (14, 14))
    assert regions.box_predictor.cls_score.out_features == 81
    assert (net.transform.image_mean, net.transform.image_std) == (MEAN, STD)
    assert all(parameter.requires_grad for parameter in net.parameters())
    if head == "fpn":
        assert all(isinstance(block[1], nn.BatchNorm2d) for block in [*net.backbone.fpn.inner_blocks, *net.backbone.fpn.layer_blocks])
    else:
        assert [type(block).__name__ for block in regions.box_head.layer4] == ["BasicBlock", "BasicBlock"]
        assert isinstance(regions.box_head.norm, nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("arch", "stem", "wanted"),
    [
        (
            "mobilenetv3_small_050",
            "imagenet",
            "student.arch: MobileNetV3 has no four stages that the detector knows; set student.arch: resnet18",
        ),
        ("resnet18", "small", "student.stem = small: its feature maps are too large for the images of COCO; set student.stem: imagenet"),
    ],
)
def test_a_student_that_cannot_be_a_detectors_backbone_is_refused(arch, stem, wanted):
    with pytest.raises(UserError, match=wanted):
        build_detector(build_backbone(arch, 1.0, stem, 0), "fpn", 3, MEAN, STD, 0, FPN)


def test_new_layers_are_seeded_and_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, other, third = tiny(), tiny(), tiny(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    name = "roi_heads.mask_predictor.mask_fcn_logits.weight"
    assert torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], third.state_dict()[name])


def sampled(net, images, targets, keys, monkeypatch) -> dict[str, list[torch.Tensor]]:
    """Losses, and the regions that a step has sampled in each image."""
    seen: dict = {}
    choose = net.roi_heads.select_training_samples

    def spy(*arguments):
        result = choose(*arguments)
        seen["regions"] = [boxes.clone() for boxes in result[0]]
        return result

    monkeypatch.setattr(net.roi_heads, "select_training_samples", spy)
    keep_sampling(net, keys)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # in train mode, images would depend on each other through the statistics
    net(images, targets)
    monkeypatch.undo()
    return seen


def test_regions_sampled_in_an_image_depend_only_on_its_key(found, monkeypatch):
    images, targets = batch_of(found, [1, 3])
    net = tiny().train()
    both = sampled(net, images, targets, [11, 12], monkeypatch)["regions"]
    torch.rand(5)  # changes the state of the global generator
    again = sampled(net, images, targets, [11, 12], monkeypatch)["regions"]
    alone = sampled(net, images[1:], targets[1:], [12], monkeypatch)["regions"]
    other = sampled(net, images, targets, [11, 13], monkeypatch)["regions"]
    assert all(torch.equal(a, b) for a, b in zip(both, again, strict=True))
    assert torch.equal(both[0], other[0])
    assert not torch.equal(both[1], other[1])
    assert len(alone[0]) == len(both[1])


@pytest.mark.parametrize("head", ["fpn", "c4"])
def test_under_bf16_boxes_and_losses_are_float32(found, head):
    images, targets = batch_of(found, [0, 1])
    net, seen = tiny(head).train(), {}
    net.backbone.register_forward_hook(lambda m, i, o: seen.update(features={x.dtype for x in (o.values() if head == "fpn" else [o])}))
    net.rpn.register_forward_hook(lambda m, i, o: seen.update(proposals={x.dtype for x in o[0]}))
    stage = net.backbone.body.layer1 if head == "fpn" else net.backbone.layer1
    stage.register_forward_hook(lambda m, i, o: seen.update(inside={o.dtype}))
    keep_sampling(net, [0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        losses = net(images, targets)
    assert seen == {"features": {torch.float32}, "proposals": {torch.float32}, "inside": {torch.bfloat16}}
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


@pytest.mark.parametrize("head", ["fpn", "c4"])
def test_losses_and_detections_are_those_of_torchvisions_own_forward(found, head):
    images, targets = batch_of(found, [0, 3])
    net = tiny(head).train()
    keep_sampling(net, [5, 6])
    ours, theirs = net(images, targets), GeneralizedRCNN.forward(net, images, targets)
    assert [*ours.items()] == [*theirs.items()]
    with torch.no_grad():
        ours, theirs = net.eval()(images), GeneralizedRCNN.forward(net, images)
    assert all(len(of_image["scores"]) > 0 for of_image in ours)
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("boxes", "labels", "scores"))


def test_c4_sees_each_region_once_and_learns_masks_of_the_foreground(found, monkeypatch):
    images, targets = batch_of(found, [0, 1])
    net = tiny("c4").train()
    keep_sampling(net, [0, 1])
    rows = {}
    net.roi_heads.box_head.register_forward_hook(lambda m, i, o: rows.update(regions=len(o)))
    net.roi_heads.mask_predictor.register_forward_hook(lambda m, i, o: rows.update(masks=len(o), shape=tuple(o.shape[1:])))
    choose = net.roi_heads.select_training_samples

    def spy(*arguments):
        result = choose(*arguments)
        rows["positive"] = int(sum((labels > 0).sum() for labels in result[2]))
        return result

    monkeypatch.setattr(net.roi_heads, "select_training_samples", spy)
    losses = net(images, targets)
    assert net.roi_heads.box_head.norm.num_batches_tracked == 1
    assert rows["masks"] == rows["positive"] > 0
    assert rows["regions"] == 2 * TINY["c4"].sampled_regions
    assert rows["shape"] == (4, 14, 14)
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}


def regions_by_torchvision(found: Instances, train: bool) -> tuple[list, list]:
    """The outputs of our region heads of the pyramid for some features and proposals, and those of torchvision's heads."""
    images, targets = batch_of(found, [0, 1])
    net = tiny().train(train)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    net.roi_heads.score_thresh = 0.0
    batch, _ = net.transform(images)
    with torch.no_grad():
        features = net.backbone(batch.tensors)
        keep_sampling(net, [5, 6])
        proposals, _ = net.rpn(batch, features, targets)
        arguments = (features, proposals, batch.image_sizes, targets)
        return net.roi_heads(*arguments), roi_heads.RoIHeads.forward(net.roi_heads, *arguments)


def test_the_pyramids_heads_detect_as_torchvisions_own(found):
    (ours, _), (wanted, _) = regions_by_torchvision(found, train=False)
    assert min(len(of_image["boxes"]) for of_image in ours) > 20
    for one, other in zip(ours, wanted, strict=True):
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_pyramids_losses_are_torchvisions_except_plain_l1_for_boxes(found, monkeypatch):
    bends = []
    smooth = roi_heads.F.smooth_l1_loss

    def spy(own, wanted, **settings):
        bends.append((own - wanted).abs().sum())
        return smooth(own, wanted, **settings)

    monkeypatch.setattr(roi_heads.F, "smooth_l1_loss", spy)
    (_, ours), (_, wanted) = regions_by_torchvision(found, train=True)
    assert torch.equal(ours["loss_classifier"], wanted["loss_classifier"])
    assert torch.equal(ours["loss_mask"], wanted["loss_mask"])
    assert ours["loss_box_reg"].item() == pytest.approx(bends[0].item() / (2 * FPN.sampled_regions))


def test_the_proposals_losses_are_detectron2s():
    """Sums over the sampled anchors, divided by the 256 (here 32) anchors requested for each image, even if it has fewer."""
    net = tiny()
    keep_sampling(net, [1, 2])
    labels = [torch.tensor([1.0, 0.0, -1.0, 0.0]), torch.tensor([0.0, -1.0, 1.0, 1.0])]
    scores, deltas, wanted = torch.randn(8, 1), torch.randn(8, 4), torch.randn(8, 4)
    score_loss, box_loss = net.rpn.compute_loss(scores, deltas, labels, [wanted[:4], wanted[4:]])
    truth, values = torch.cat(labels).tolist(), scores[:, 0].tolist()
    entropies = [math.log1p(math.exp(-x if label else x)) for x, label in zip(values, truth, strict=True) if label >= 0]
    offsets = [abs(deltas[i, k].item() - wanted[i, k].item()) for i in range(8) if truth[i] == 1 for k in range(4)]
    assert score_loss.item() == pytest.approx(sum(entropies) / 64, rel=1e-5)
    assert box_loss.item() == pytest.approx(sum(offsets) / 64, rel=1e-5)


# Training steps.


def test_the_learning_rate_warms_up_and_drops():
    """detectron2: a thousandth at step 0, linear to 1 over the warm-up, a tenth from each drop on."""
    rates = [step_lr(step, 0.02, [60000, 80000], warmup_steps=1000) for step in (0, 500, 999, 1000, 59999, 60000, 79999, 80000)]
    assert rates == pytest.approx([2e-5, 0.02 * 0.5005, 0.02 * 0.999001, 0.02, 0.02, 0.002, 0.002, 0.0002])
    assert step_lr(0, 0.02, [5]) == 0.02


def test_normalisation_has_no_weight_decay():
    net = tiny()
    others, norms = sgd(net, COCO).param_groups
    assert (others["weight_decay"], norms["weight_decay"]) == (COCO.weight_decay, 0)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert all("bn" in names[id(p)] or "norm" in names[id(p)] or ".1." in names[id(p)] for p in norms["params"])
    assert len(others["params"]) + len(norms["params"]) == len(names)
    assert all(p.ndim == 1 for p in norms["params"])


def plans_of(found: Instances, rank: int, world: int, monkeypatch, steps: int = 12, **changes) -> list:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world", lambda: world)
    rows = training_targets(found).rows
    return list(plan_steps(found.images, rows, COCO.model_copy(update=changes), 3, 0, steps))


def test_processes_share_the_batches_of_one_process(found, monkeypatch):
    whole = plans_of(found, 0, 1, monkeypatch, batch_images=4)
    halves = [plans_of(found, rank, 2, monkeypatch, batch_images=4) for rank in (0, 1)]
    for one, first, second in zip(whole, *halves, strict=True):
        assert one.views == first.views + second.views
        assert one.sampling_B == first.sampling_B + second.sampling_B
        aspects = [found.images.entries[view.row]["width"] / found.images.entries[view.row]["height"] for view in one.views]
        assert aspects == sorted(aspects), "images of the same shape are together"


def test_an_epoch_shows_each_image_once_with_drawn_sides_and_flips(found, monkeypatch):
    plans = plans_of(found, 0, 1, monkeypatch, steps=40, batch_images=1)
    epochs = [[view.row for plan in plans[start : start + 5] for view in plan.views] for start in range(0, 40, 5)]
    rows = training_targets(found).rows.tolist()
    assert all(sorted(epoch) == rows for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4
    views = [view for plan in plans for view in plan.views]
    assert {view.min_side_px for view in views} == {64, 80}
    assert {view.flip for view in views} == {True, False}
    assert len({key for plan in plans for key in plan.sampling_B}) == 40
    assert not any(view.flip for plan in plans_of(found, 0, 1, monkeypatch, flip_p=0.0) for view in plan.views)


def test_a_resumed_plan_is_the_rest_of_the_plan(found, monkeypatch):
    plans = plans_of(found, 0, 1, monkeypatch)
    rows = training_targets(found).rows
    for first in (1, 2, 3, 7):
        assert list(plan_steps(found.images, rows, COCO, 3, first, 12)) == plans[first:]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["fpn", "c4"])
def test_a_few_steps_lower_the_loss(found, tmp_path, head):
    history = trainer(found, tmp_path, 16, head, batch_images=4, lr=0.03).run().history
    assert [record["step"] for record in history] == list(range(1, 17))
    losses = [record["loss"] for record in history]
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])
    for record in history:
        terms = [value for name, value in record.items() if name.startswith("loss_")]
        assert len(terms) == 5
        assert sum(terms) == pytest.approx(record["loss"], abs=1e-4)


@pytest.mark.skipif(not REAL.exists(), reason="needs shared/data/coco-tiny.tar.xz beside the repository")
def test_real_images_are_trained_on_and_measured(tmp_path):
    with tarfile.open(REAL) as file:
        file.extractall(tmp_path, filter="data")
    found = read_instances(tmp_path / "annotations/instances_val2017.json", tmp_path / "images/val2017", "key")
    run = trainer(found, tmp_path / "run", 6, batch_images=4, lr=0.01)
    losses = [record["loss"] for record in run.run().history]
    assert np.mean(losses[-2:]) < losses[0]
    few = Instances(replace(found.images, entries=found.images.entries[:3]), found.annotations, found.category_ids, found.fingerprint)
    assert {one["category_id"] for one in detect(run.detector, few, run.params, CPU, "test", 0)} <= set(found.category_ids)


@pytest.mark.parametrize(("head", "stop_step"), [("fpn", 3), ("c4", 2)])
def test_an_interrupted_training_ends_like_an_uninterrupted_one(found, tmp_path, head, stop_step, monkeypatch):
    monkeypatch.setattr(detection, "CURVE_POINTS", 2)
    whole = trainer(found, tmp_path / "whole", 4, head)
    wanted = whole.run().history
    assert [record["step"] for record in wanted] == [2, 4]
    first = trainer(found, tmp_path / "parts", 4, head)
    step = first._train_step

    def stop_at(plan, batch):
        step(plan, batch)
        first.checkpoints.stopping = first.step + 1 == stop_step

    monkeypatch.setattr(first, "_train_step", stop_at)
    with pytest.raises(Interrupted, match=f"stopped at step {stop_step} with a checkpoint"):
        first.run()
    torch.rand(3)
    second = trainer(found, tmp_path / "parts", 4, head)
    assert second.resumes()
    assert second.run().history == wanted
    assert all(torch.equal(a, b) for a, b in zip(whole.detector.state_dict().values(), second.detector.state_dict().values(), strict=True))


def test_a_loss_that_is_not_finite_stops_before_the_update(found, tmp_path):
    run = trainer(found, tmp_path)
    with torch.no_grad():
        run.detector.roi_heads.box_predictor.cls_score.bias[0] = float("nan")
    before = [value.clone() for value in run.detector.parameters()]
    with pytest.raises(UserError, match=r"the loss is nan at step 0; look at image\.std and at the student's weights"):
        run.run()
    assert all(torch.equal(a, b) or b.isnan().any() for a, b in zip(run.detector.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("batch", "world", "wanted"), [(6, 1, "only 5 images with usable instances"), (3, 2, "2 processes cannot share it")]
)
def test_an_impossible_batch_is_refused(found, monkeypatch, batch, world, wanted):
    monkeypatch.setattr(distributed, "world", lambda: world)
    with pytest.raises(UserError, match=f"transfer_coco.batch_images = {batch}: .*{wanted}"):
        detection.steps_per_epoch(5, batch)


# Two processes.


def _two_processes(rank: int, port: int, coco: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    with distributed.group(CPU):
        run = trainer(read(coco), folder / "two", 1, batch_images=4)
        own = {name: buffer.clone() for name, buffer in run.detector.named_buffers()}
        run.run()
        detections = detect(run.detector, read(coco), run.params, CPU, "test", 0)
        state = {name: value.clone() for name, value in run.detector.state_dict().items()}
        torch.save({"state": state, "detections": detections, "buffers": own}, folder / f"two-{rank}.pt")


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_their_halves(tmp_path):
    make_split(tmp_path, "train", 6, 0, empty=(2,))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_two(_two_processes, port, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / f"two-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    assert first["detections"] == second["detections"]

    found = read(tmp_path)
    run = trainer(found, tmp_path / "one", 1, batch_images=4)
    (plan,) = plan_steps(found.images, run.rows_N, run.params, 0, 0, 1)
    gradients: dict[str, torch.Tensor] = {}
    for half in (slice(0, 2), slice(2, 4)):
        net = tiny().train()
        examples = list(run.loader.examples(plan.views[half]))
        keep_sampling(net, plan.sampling_B[half])
        targets = [{"boxes": e.boxes_I4, "labels": e.labels_I, "masks": e.masks_IHW} for e in examples]
        sum(net([e.image_3HW.float() / 255 for e in examples], targets).values()).backward()
        for name, parameter in net.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad / 2
        if half.start == 0:  # all processes end with the statistics of the first one
            assert all(torch.equal(first["state"][name], buffer) for name, buffer in net.named_buffers())
    rate = step_lr(0, COCO.lr, [1], warmup_steps=COCO.lr_warmup_steps)
    norms = {id(p) for p in sgd(run.detector, run.params).param_groups[1]["params"]}
    for name, parameter in run.detector.named_parameters():
        decay = 0 if id(parameter) in norms else COCO.weight_decay
        wanted = parameter.detach() - rate * (gradients[name] + decay * parameter.detach())
        assert torch.allclose(first["state"][name], wanted, atol=1e-7), name
    with_state = tiny()
    with_state.load_state_dict(first["state"])
    assert detect(with_state, found, run.params, CPU, "test", 0) == first["detections"], "the shares of the processes are the images of one"


# Scores.


def perfect(found: Instances) -> list[dict]:
    sides = {image["id"]: (image["height"], image["width"]) for image in found.images.entries}
    return [
        {key: a[key] for key in ("image_id", "category_id", "bbox")}
        | {"score": 0.9, "segmentation": run_lengths(a["segmentation"], *sides[a["image_id"]])}
        for a in found.annotations
        if not a["iscrowd"]
    ]


def figures(found: Instances, detections: list[dict]) -> dict[str, float | None]:
    scores = coco_scores(found, detections)
    return {f"{kind} {measure}": value for kind, of_kind in scores.items() for measure, value in of_kind.items()}


def test_perfect_detections_score_100_and_absent_sizes_have_no_score(found):
    scored = figures(found, perfect(found))
    areas = [a["area"] for a in found.annotations]
    assert min(areas) < 32**2 < max(areas) < 96**2
    assert scored.pop("box AP_large") is scored.pop("mask AP_large") is None
    assert set(scored.values()) == {100.0}


@pytest.mark.parametrize(("share", "thresholds"), [(0.52, 1), (0.77, 6), (0.97, 10), (0.4, 0)])
def test_boxes_that_overlap_by_a_share_score_the_thresholds_below_it(found, share, thresholds):
    """The left part of every box: its intersection over union is `share`, and COCO's ten thresholds are 0.5, 0.55 .. 0.95."""
    narrowed = [one | {"bbox": [*one["bbox"][:2], one["bbox"][2] * share, one["bbox"][3]]} for one in perfect(found)]
    scored = figures(found, narrowed)
    assert scored["box AP"] == 10.0 * thresholds
    assert scored["box AP50"] == (100.0 if share >= 0.5 else 0.0)
    assert scored["box AP75"] == (100.0 if share >= 0.75 else 0.0)
    assert scored["mask AP"] == 100.0


def test_no_detections_and_wrong_categories_score_0(found):
    wrong = [one | {"category_id": CATEGORIES[CATEGORIES.index(one["category_id"]) - 1]} for one in perfect(found)]
    empty = figures(found, [])
    assert {value for value in empty.values() if value is not None} == {0.0}
    assert figures(found, wrong)["box AP"] < 5


def test_detections_in_a_crowd_are_ignored(tmp_path):
    content = make_split(tmp_path, "train", 2, 0)
    image = content["images"][0]
    free = {a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]}
    category = next(a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"])
    in_crowd = {"image_id": image["id"], "category_id": category, "score": 0.95, "bbox": [1, 1, 5, 9]}
    block = np.zeros((image["height"], image["width"]), np.uint8)
    block[1:10, 1:6] = 1
    in_crowd["segmentation"] = rle.encode(np.asfortranarray(block))
    without = figures(read(tmp_path), [*perfect(read(tmp_path)), in_crowd])
    content["annotations"].append(crowd(image, category, 20))
    write(tmp_path, "train", content)
    within = figures(read(tmp_path), [*perfect(read(tmp_path)), in_crowd])
    assert free
    assert without["box AP"] < 100
    assert within["box AP"] == within["mask AP"] == 100


class Oracle(nn.Module):
    """Detects a box in the middle with a full mask, one for each image, in the frame of the resized image."""

    def forward(self, images):
        self.seen = [tuple(image.shape) for image in images]
        height, width = images[0].shape[1:]
        box = torch.tensor([[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]])
        return [{"boxes": box, "labels": torch.tensor([2]), "scores": torch.tensor([0.5]), "masks": torch.ones(1, 1, 28, 28)}]


def test_detections_are_in_the_frame_and_the_categories_of_the_file(found):
    detections = detect(Oracle(), found, COCO, CPU, "test", 0)
    assert [one["image_id"] for one in detections] == [image["id"] for image in found.images.entries], "images without instances too"
    for one, image in zip(detections, found.images.entries, strict=True):
        height, width = image["height"], image["width"]
        assert one["category_id"] == CATEGORIES[1]
        assert one["bbox"] == pytest.approx([width / 4, height / 4, width / 2, height / 2], abs=1e-3)
        mask = rle.decode(one["segmentation"])
        assert mask.shape == (height, width)
        assert mask.sum() == pytest.approx(width * height / 4, rel=0.15)
    assert all(set(one) == {"image_id", "category_id", "score", "bbox", "segmentation"} for one in detections)


def test_on_a_gpu_roi_align_stays_compiled(monkeypatch):
    """torchvision uses its slow implementation if determinism is requested; the setting is restored afterwards."""
    torch.use_deterministic_algorithms(True)
    try:
        with detection.compiled_roi_align(torch.device("cuda")):
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        with detection.compiled_roi_align(CPU):
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
