"""A classifier trained on labels: every step computed explicitly, a frozen backbone unchanged, and equal results after kills and with
several processes."""

import copy
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from bingo import seeds
from bingo.evals.finetune import WHOLE, ClassifierTrainer, Protocol, Task, random_crops
from bingo.evals.scores import linear_layer
from bingo.images.images import MemoryImages
from bingo.images.loader import Request, ViewLoader, center_views
from bingo.nets.backbones import build_backbone
from bingo.params import PLAIN_SGD, ImageParams, TuneParams
from bingo.runtime import distributed
from bingo.runtime.checkpoints import Checkpoints
from bingo.runtime.errors import Interrupted, UserError
from bingo.schedules import step_lr
from tests.processes import start_two

CPU = torch.device("cpu")
IMAGE = ImageParams(crop_px=10, resize_px=12, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
CROPS = random_crops([0.5, 1.0], 0.5)
TUNE = TuneParams(
    **PLAIN_SGD, epochs=2, batch_images=8, weight_decay=1e-2, nesterov=False, drop_epochs=[1], drop_factor=0.1, hold_epochs=0, init_std=0.02
)
ROWS, TEST, CLASSES, SEED = 27, 21, 3, 5  # whole batches of 8, and a tail of 3


class Tiny(nn.Module):
    """Two convolutions, optionally with BatchNorm between them."""

    feature_width = 4

    def __init__(self, batchnorm: bool):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4) if batchnorm else nn.Identity()

    def forward(self, x):
        return torch.relu(self.second(torch.relu(self.norm(self.first(x))))).mean(dim=(2, 3))


def task(rows: int = ROWS) -> Task:
    """Noise in a colour for each class; the train rows are unordered and do not include all rows."""
    rng = np.random.default_rng(0)
    labels = np.arange(rows + TEST + 5) % CLASSES
    colours = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220]])
    pixels = (colours[labels][:, None, None, :] + rng.normal(0, 60, (len(labels), 12, 12, 3))).clip(0, 255).astype(np.uint8)
    train, test = rng.permutation(rows + 5)[:rows], np.arange(rows + 5, rows + 5 + TEST)
    return Task(MemoryImages(pixels), labels, train, test, CLASSES, IMAGE, CROPS)


def trainer(folder: Path, backbone: nn.Module, tune=TUNE, trunk_lr: float | None = 0.05, head_lr=0.5, rows=ROWS) -> ClassifierTrainer:
    return ClassifierTrainer(backbone, Protocol(task(rows), tune, head_lr, trunk_lr), "fp32", SEED, CPU, Checkpoints(folder, 1e9), "test")


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("drop_epochs", [[1], [], None])
def test_fine_tuning_equals_plain_sgd(tmp_path, nesterov, drop_epochs):
    tune = TUNE.model_copy(update={"nesterov": nesterov, "drop_epochs": drop_epochs})
    trained = trainer(tmp_path, Tiny(True), tune)
    trained.run()

    what, backbone, layer = task(), Tiny(True), linear_layer(4, CLASSES, 0.02, SEED, WHOLE, CPU)
    loader = ViewLoader(what.images, IMAGE, CROPS, SEED, CPU)
    parameters = [*layer.parameters(), *backbone.parameters()]
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    for step in range(6):
        epoch, batch = divmod(step, 3)
        order = what.train_rows_N[seeds.permutation(SEED, WHOLE, epoch, ROWS)]
        rows = order[8 * batch : 8 * batch + 8]
        ((views,),) = loader.views([[Request(rows, rows, WHOLE, epoch, 0)]])
        loss = F.cross_entropy(layer(backbone.train()(views)), torch.tensor(what.labels_N[rows]))
        factor = {0: 1.0, 1: 0.1}[epoch] if drop_epochs == [1] else 1.0 if drop_epochs == [] else (1 + np.cos(np.pi * step / 6)) / 2
        for number, gradient in enumerate(torch.autograd.grad(loss, parameters)):
            parameter, lr = parameters[number], (0.5 if number < 2 else 0.05) * factor
            gradient = gradient + 1e-2 * parameter.detach()
            velocities[number] = 0.9 * velocities[number] + gradient
            move = gradient + 0.9 * velocities[number] if nesterov else velocities[number]
            parameter.data -= lr * move
    for mine, its in ((layer, trained.classifier.layer), (backbone, trained.classifier.backbone)):
        for name, value in mine.state_dict().items():
            torch.testing.assert_close(its.state_dict()[name], value, atol=1e-6, rtol=1e-5)


class Means(nn.Module):
    """The mean of each channel, which is the same in every crop of a uniform image. It has a parameter, as networks do."""

    feature_width = 3

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x.mean(dim=(2, 3)) * self.gain


@pytest.mark.slow
def test_a_frozen_network_ends_at_the_minimum_that_scikit_learn_finds(tmp_path):
    rng = np.random.default_rng(1)
    colours, labels = rng.integers(0, 256, (60, 3), dtype=np.uint8), rng.integers(0, CLASSES, 60)
    pixels = np.broadcast_to(colours[:, None, None, :], (60, 12, 12, 3)).copy()
    what = Task(MemoryImages(pixels), labels, np.arange(40), np.arange(40, 60), CLASSES, IMAGE, CROPS)
    tune = TUNE.model_copy(update={"epochs": 400, "batch_images": 40, "drop_epochs": []})
    run = ClassifierTrainer(Means(), Protocol(what, tune, 0.5, None), "fp32", SEED, CPU, Checkpoints(tmp_path, 1e9), "test")
    scores = run.run()
    # weight decay includes the bias: a constant feature instead of an intercept
    features = np.c_[(colours / 255 - IMAGE.mean) / IMAGE.std, np.ones(60)]
    reference = LogisticRegression(C=1 / (TUNE.weight_decay * 40), fit_intercept=False, tol=1e-10, max_iter=10000)
    reference.fit(features[:40], labels[:40])
    found = torch.cat([run.classifier.layer.weight, run.classifier.layer.bias[:, None]], dim=1).detach().numpy()
    np.testing.assert_allclose(found, reference.coef_, atol=2e-4)
    assert scores["top1_last"] == pytest.approx(100 * reference.score(features[40:], labels[40:]))


def test_scores_are_those_of_the_trained_network_on_centre_views(tmp_path):
    run = trainer(tmp_path, Tiny(True), TUNE.model_copy(update={"epochs": 4}))
    scores = run.run()
    what = task()
    (views,) = center_views(what.images, what.test_rows_N, IMAGE, CPU, 100)
    with torch.no_grad():
        guesses = run.classifier.eval()(views).argmax(1).numpy()
    assert scores["top1_last"] == pytest.approx(100 * np.mean(guesses == what.labels_N[what.test_rows_N]))
    assert scores["top5_last"] == 100  # of 3 classes
    assert scores["top1_best"] == max(top1 for top1, _ in run.scores)
    assert run.scores[scores["best_epoch"] - 1][0] == scores["top1_best"]
    assert len(run.scores) == 4


@pytest.mark.parametrize("rates", [(None, 0.5), (0.05, 0.5), (1e-9, 0.5)])
def test_a_frozen_backbone_keeps_every_tensor_and_a_trained_one_does_not(tmp_path, rates):
    trunk_lr, head_lr = rates
    backbone = build_backbone("resnet18", 0.125, "small", 0).train()
    before = copy.deepcopy(backbone)
    run = trainer(tmp_path, backbone, trunk_lr=trunk_lr, head_lr=head_lr)
    first = run.classifier.layer.weight.detach().clone()
    modes = []
    run.classifier.backbone.bn1.register_forward_hook(lambda layer, *_: modes.append(layer.training))
    run.run()
    assert not torch.equal(run.classifier.layer.weight, first)
    assert same(backbone, before)  # a copy is trained
    assert all(module.training and parameter.requires_grad for module in backbone.modules() for parameter in module.parameters())
    changed = [name for name, value in run.classifier.backbone.state_dict().items() if not torch.equal(value, before.state_dict()[name])]
    if trunk_lr is None:
        assert changed == []
        assert set(modes) == {False}
    else:
        assert set(modes) == {True, False}
        assert {"bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"} <= set(changed)
        moved = (run.classifier.backbone.conv1.weight - before.conv1.weight).abs().max()
        assert (moved > 1e-4) == (trunk_lr == 0.05)


@pytest.mark.parametrize(("trunk_lr", "rows", "steps"), [(None, 27, 4), (0.1, 27, 3), (0.1, 5, 1), (None, 5, 1), (0.1, 16, 2)])
def test_a_small_last_batch_is_dropped_if_batchnorm_is_trained(tmp_path, trunk_lr, rows, steps):
    assert trainer(tmp_path, Tiny(True), trunk_lr=trunk_lr, rows=rows).steps_per_epoch == steps


@pytest.mark.parametrize("trunk_lr", [None, 0.05])
@pytest.mark.parametrize("stop_step", [1, 3, 4, 5])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, trunk_lr, stop_step, monkeypatch):
    whole = trainer(tmp_path / "whole", Tiny(True), trunk_lr=trunk_lr)
    scores = whole.run()
    first = trainer(tmp_path / "parts", Tiny(True), trunk_lr=trunk_lr)
    step = first._train_step

    def stop_at(*args):
        step(*args)
        first.checkpoints.stopping = first.step + 1 == stop_step

    monkeypatch.setattr(first, "_train_step", stop_at)
    with pytest.raises(Interrupted, match=f"stopped at step {stop_step} with a checkpoint"):
        first.run()
    second = trainer(tmp_path / "parts", Tiny(True), trunk_lr=trunk_lr)
    assert second.run() == scores
    assert second.scores == whole.scores
    assert same(second.classifier, whole.classifier)
    third = trainer(tmp_path / "parts", Tiny(True), trunk_lr=trunk_lr)
    assert third.run() == scores  # a finished run is read from its checkpoint


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    run = trainer(tmp_path, Tiny(True), head_lr=1e9)
    with pytest.raises(UserError, match=r"^test: (the loss is (nan|inf) at|outputs are nan or inf after \d) step.*; lower its lr"):
        run.run()
    broken = Tiny(True)
    with torch.no_grad():
        broken.first.weight[0] = torch.nan
    for trunk_lr in (None, 0.1):
        run = trainer(tmp_path / str(trunk_lr), broken, trunk_lr=trunk_lr)
        layer = copy.deepcopy(run.classifier.layer)
        with pytest.raises(UserError, match="the loss is nan at step 0"):
            run.run()
        assert same(run.classifier.layer, layer)


def test_labels_that_are_missing_are_one_line(tmp_path):
    what = task()
    unlabelled = Task(what.images, np.full_like(what.labels_N, -1), what.train_rows_N, what.test_rows_N, CLASSES, IMAGE, CROPS)
    with pytest.raises(UserError, match=r"^test: 27 train images have labels such as -1, allowed are 0..2"):
        ClassifierTrainer(Tiny(True), Protocol(unlabelled, TUNE, 0.1, 0.1), "fp32", SEED, CPU, Checkpoints(tmp_path), "test")


def test_drops_of_the_learning_rate():
    rates = [step_lr(epoch, 5.0, [12, 16], 0.2) for epoch in range(20)]
    assert rates == pytest.approx([5.0] * 12 + [1.0] * 4 + [0.2] * 4)
    assert [step_lr(epoch, 3.0, [], 0.5) for epoch in (0, 199)] == [3.0, 3.0]


# Several processes. A batch of 7 is shared as 4 and 3. When frozen, 27 = 3 x 7 + 6, and 22 = 3 x 7 + 1, of which the second process has
# no share.
SHARED = TUNE.model_copy(update={"batch_images": 7})


def _two_processes(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    with distributed.group(CPU):
        for name, batchnorm, trunk_lr, rows in _CASES:
            run = trainer(folder / name, Tiny(batchnorm), SHARED, trunk_lr, rows=rows)
            scores = run.run()
            torch.save({"state": run.classifier.state_dict(), "scores": scores}, folder / f"{name}-{rank}.pt")
        with pytest.raises(UserError, match=r"2 processes on the CPU would each have their own .*set BINGO_PROCESSES=1"):
            trainer(folder / "refused", Tiny(True), SHARED)


_CASES = [("frozen", True, None, 27), ("tail", True, None, 22), ("whole", False, 0.05, 27)]


@pytest.mark.slow
def test_two_processes_train_the_same_weights_as_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_two(_two_processes, port, tmp_path)
    for name, batchnorm, trunk_lr, rows in _CASES:
        one = trainer(tmp_path / f"{name}-one", Tiny(batchnorm), SHARED, trunk_lr, rows=rows)
        scores = one.run()
        for rank in (0, 1):
            two = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert two["scores"] == scores
            for key, value in one.classifier.state_dict().items():
                torch.testing.assert_close(two["state"][key], value, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "efficientnet_b0"])
def test_on_several_gpus_batchnorm_uses_the_whole_batch(tmp_path, monkeypatch, arch):
    run = trainer(tmp_path, build_backbone(arch, 1.0, "small", 0))
    before = copy.deepcopy(run.classifier.state_dict())
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in run.classifier.modules())
    monkeypatch.setattr(distributed, "world", lambda: 2)
    run.device = torch.device("cuda")
    shared = run._with_shared_statistics(run.classifier)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in shared.modules()) == norms > 0
    assert all(torch.equal(value, before[name]) for name, value in shared.state_dict().items())
    monkeypatch.setattr(distributed, "world", lambda: 9)
    with pytest.raises(UserError, match="a batch of 8 images, BatchNorm on 9 processes needs 9; raise batch_images"):
        run._with_shared_statistics(run.classifier)
