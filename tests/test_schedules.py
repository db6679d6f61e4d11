"""Learning rates and optimizers: the shipped sequences exactly, published ones by explicit formulas, torch's schedulers; and every training
follows them."""

import math
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bingo.evals.finetune import ClassifierTrainer, Protocol
from bingo.evals.linear import linear_on_crops, linear_on_features
from bingo.params import PLAIN_SGD, CachedProbeParams, CropProbeParams, LrSchedule, OptimizerParams, TuneParams, load_params
from bingo.runtime.checkpoints import Checkpoints
from bingo.schedules import learning_rate, make_optimizer, set_rates, update
from tests.evals.test_finetune import Tiny, task
from tests.training.test_train import trainer

CPU = torch.device("cpu")
PARAMS = load_params(Path(__file__).parent.parent / "params.yaml")


def cosine(epochs: int, hold_epochs: int = 0) -> LrSchedule:
    return LrSchedule(epochs=epochs, drop_epochs=None, drop_factor=0.1, hold_epochs=hold_epochs)


def drops(epochs: int, drop_epochs: list[int], drop_factor: float) -> LrSchedule:
    return LrSchedule(epochs=epochs, drop_epochs=drop_epochs, drop_factor=drop_factor, hold_epochs=0)


def by_epoch(base_lr: float, schedule: LrSchedule, steps_per_epoch: int = 3) -> list[float]:
    """The rate at which each epoch begins."""
    return [learning_rate(epoch * steps_per_epoch, steps_per_epoch, base_lr, schedule) for epoch in range(schedule.epochs)]


# Recorded before schedules had drops or holds: {step: rate} of sections that must stay bitwise the same.
SHIPPED = [
    (
        PARAMS.teacher.pretrain.model_copy(update={"lr_warmup_epochs": 1, "epochs": 36}),
        (0.06, 45),
        {0: 0.0013043478260869564, 44: 0.05869565217391304, 45: 0.06, 540: 0.04652690944356307, 1619: 5.968012776302877e-08},
    ),
    (
        PARAMS.distill.model_copy(update={"lr_warmup_epochs": 1, "epochs": 5}),
        (0.06, 90),
        {0: 0.0006593406593406593, 89: 0.05934065934065934, 90: 0.06, 150: 0.055980762113533165, 449: 1.1423080748607095e-06},
    ),
    (
        PARAMS.linear_eval.cached.model_copy(update={"epochs": 60}),
        (0.1, 23),
        {0: 0.1, 22: 0.09993730453020187, 460: 0.07500000000000001, 690: 0.05, 1379: 1.2956311881140437e-07},
    ),
    (
        PARAMS.linear_eval.crops.model_copy(update={"epochs": 10}),
        (30.0, 23),
        {0: 30.0, 22: 29.327828403294724, 76: 22.617978678627093, 115: 15.0, 229: 0.0013992605321688778},
    ),
]


@pytest.mark.parametrize(("schedule", "run", "rates"), SHIPPED)
def test_the_shipped_rates_are_bitwise_unchanged(schedule, run, rates):
    base_lr, steps_per_epoch = run
    assert {step: learning_rate(step, steps_per_epoch, base_lr, schedule) for step in rates} == rates


@pytest.mark.parametrize(
    ("base_lr", "schedule", "spans"),
    [
        (30.0, drops(100, [60, 80], 0.1), [(60, 30.0), (20, 3.0), (20, 0.3)]),  # linear layer of MoCo and SEED
        (0.01, drops(130, [90, 120], 0.2), [(90, 0.01), (30, 0.002), (10, 0.0004)]),  # CompRess
        (0.01, drops(200, [140, 180], 0.2), [(140, 0.01), (40, 0.002), (20, 0.0004)]),  # ISD
        (0.01, drops(40, [15, 30], 0.1), [(15, 0.01), (15, 0.001), (10, 0.0001)]),  # linear layer of CompRess, SimReg and ISD
        (5.0, drops(20, [12, 16], 0.2), [(12, 5.0), (4, 1.0), (4, 0.2)]),  # SwAV's fine-tuning with 1 % of the labels
        (3.0, drops(200, [], 0.1), [(200, 3.0)]),  # DisCo's linear layer on CIFAR
    ],
)
def test_published_steps(base_lr, schedule, spans):
    assert by_epoch(base_lr, schedule) == pytest.approx([rate for epochs, rate in spans for _ in range(epochs)], rel=1e-12)


def test_disco_halves_the_rate_of_its_linear_layer_eleven_times():
    rates = by_epoch(3.0, drops(100, [5, 10, 15, 20, 25, 30, 35, 40, 45, 60, 80], 0.5))
    for epoch, rate in {
        0: 3.0,
        4: 3.0,
        5: 1.5,
        44: 0.01171875,
        45: 0.005859375,
        60: 0.0029296875,
        80: 0.00146484375,
        99: 0.00146484375,
    }.items():
        assert rates[epoch] == rate


def test_coss_holds_the_rate_for_5_of_25_epochs_while_its_cosine_continues():
    rates = by_epoch(0.03, cosine(25, hold_epochs=5))
    assert rates[:5] == [0.03] * 5
    assert rates[5] == pytest.approx(0.02713525, abs=1e-8)  # 0.015 (1 + cos 36 degrees), and cos 36 degrees = 0.80901699
    assert rates[15] == pytest.approx(0.01036475, abs=1e-8)  # 0.015 (1 + cos 108 degrees)
    assert rates[20] == pytest.approx(0.00286475, abs=1e-8)  # 0.015 (1 + cos 144 degrees)


@pytest.mark.parametrize("steps_per_epoch", [1, 7])
def test_the_rates_are_those_of_torch_schedulers(steps_per_epoch):
    epochs, falls = 12, [3, 4, 10]
    fall_steps = [epoch * steps_per_epoch for epoch in falls]
    for schedule, build in (
        (cosine(epochs), lambda optimizer: CosineAnnealingLR(optimizer, epochs * steps_per_epoch)),
        (drops(epochs, falls, 0.3), lambda optimizer: MultiStepLR(optimizer, fall_steps, 0.3)),
    ):  # fmt: skip
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
        scheduler = build(optimizer)
        for step in range(epochs * steps_per_epoch):
            assert learning_rate(step, steps_per_epoch, 0.7, schedule) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
            optimizer.step()
            scheduler.step()


def test_a_warm_up_comes_before_a_hold_and_before_drops():
    section = PARAMS.distill.model_copy(update={"epochs": 6, "lr_warmup_epochs": 1})
    held = section.model_copy(update={"hold_epochs": 2})
    assert [learning_rate(step, 2, 0.6, held) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.6, 0.6, 0.6])
    assert learning_rate(6, 2, 0.6, held) == learning_rate(6, 2, 0.6, section) == pytest.approx(0.3 * (1 + math.cos(math.pi * 0.4)))
    dropped = section.model_copy(update={"drop_epochs": [3], "drop_factor": 0.5})
    assert [learning_rate(step, 2, 0.6, dropped) for step in range(8)] == pytest.approx([0.2, 0.4, 0.6, 0.6, 0.6, 0.6, 0.3, 0.3])


@pytest.fixture
def used():
    """The rates of each optimizer step, one list for each parameter group."""
    rates: list[list[float]] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups]))
    yield rates
    hook.remove()


FALLS = {"epochs": 3, "drop_epochs": [1, 2], "drop_factor": 0.5, "hold_epochs": 0}


def test_a_training_follows_its_schedule(tmp_path, used):
    training = trainer(tmp_path, lr=0.1)
    training.schedule = training.schedule.model_copy(update=FALLS)
    history = training.run().history
    # 4 steps per epoch; the first are a warm-up from 1/5 to 4/5 of 0.1
    assert [rate for (rate,) in used] == pytest.approx([0.02, 0.04, 0.06, 0.08, *[0.05] * 4, *[0.025] * 4])
    assert [record["lr"] for record in history] == pytest.approx([0.08, 0.05, 0.025])


def test_evaluations_follow_their_schedules(tmp_path, used):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((10, 3)).astype(np.float32), np.arange(10) % 2
    cached = CachedProbeParams(batch_images=4, lr=0.8, weight_decay=0.0, init_std=0.01, **FALLS)
    linear_on_features(X, y, X, y, 2, cached, 0, CPU)  # 3 steps per epoch
    assert used == [[0.8]] * 3 + [[0.4]] * 3 + [[0.2]] * 3
    used.clear()
    what = task()  # 27 train images
    crops = CropProbeParams(
        final_lr=0.0,
        nets=[],
        standardise=False,
        init_std=0.01,
        batch_images=9,
        lr=0.8,
        weight_decay=0.0,
        crop_scale=[0.5, 1.0],
        flip_p=0.0,
        **FALLS,
    )
    linear_on_crops(Tiny(True), what, crops, "fp32", 0, CPU, Checkpoints(tmp_path / "crops", 1e9))
    assert used == [[0.8]] * 3 + [[0.4]] * 3 + [[0.2]] * 3
    used.clear()
    tune = TuneParams(**PLAIN_SGD, batch_images=9, weight_decay=0.0, nesterov=False, init_std=0.01, **FALLS)
    ClassifierTrainer(Tiny(True), Protocol(what, tune, 0.8, 0.1), "fp32", 0, CPU, Checkpoints(tmp_path / "whole", 1e9), "test").run()
    assert used == [[0.8, 0.1]] * 3 + [[0.4, 0.05]] * 3 + [[0.2, 0.025]] * 3


def test_a_cosine_to_a_last_rate_is_that_of_torch():
    """BINGO's linear layer: 120 epochs from 30 to 0.01, here at every step, with one step per epoch."""
    crops = load_params().linear_eval.crops.model_copy(update={"epochs": 120, "drop_epochs": None, "lr": 30.0, "final_lr": 0.01})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=30.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120, eta_min=0.01)
    for epoch in range(120):
        assert learning_rate(epoch, 1, crops.lr, crops) == pytest.approx(cosine.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        cosine.step()


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()


def optimizer_params(**changes) -> OptimizerParams:
    return OptimizerParams.model_validate(PLAIN_SGD | {"weight_decay": 0.1} | changes)


def plain_step(optimizer: str, p, g, decay: float, state: dict, step: int):
    """The step of one parameter by the papers' formulas; `state` contains its averages."""
    m, v = state.get("m", torch.zeros_like(p)), state.get("v", torch.zeros_like(p))
    if optimizer in ("sgd", "lars"):
        g = g + decay * p
        if optimizer == "lars" and decay and p.norm():  # You et al. 2017
            g *= 1e-3 * p.norm() / ((g - decay * p).norm() + decay * p.norm() + 1e-8)
        m = 0.9 * m + g
        change = m
    elif optimizer == "lion":  # Chen et al. 2023
        change, m = (0.9 * m + 0.1 * g).sign() + decay * p, 0.99 * m + 0.01 * g
    else:
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        epsilon = {"adamw": 1e-8, "lamb": 1e-6}[optimizer]
        change = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + epsilon) + decay * p
        if optimizer == "lamb" and decay and p.norm():  # You et al. 2020
            change *= p.norm() / change.norm()
    state |= {"m": m, "v": v}
    return p - RATE * change


RATE, ROWS_OF_X = 0.05, torch.linspace(-1, 1, 30).double().view(6, 5)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("all_decay", [True, False])
@pytest.mark.parametrize("optimizer", get_args(OptimizerParams.model_fields["optimizer"].annotation))
def test_three_steps_of_each_optimizer_follow_its_paper(optimizer, all_decay, clip):
    """With the norm of all gradients clipped, and weight decay on all weights or only on matrices."""
    params = optimizer_params(optimizer=optimizer, decay_norms_and_biases=all_decay, clip_grad_norm=clip)
    network, expected = small_network(), list(small_network().parameters())
    found, states = make_optimizer(params, {network: RATE}, 0.9), [{} for _ in expected]
    for step in (1, 2, 3):
        set_rates(found, step, 10, drops(1, [], 0.1))
        network.zero_grad()
        network(ROWS_OF_X).square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in network.parameters()]
        update(found, params)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        gradients = [g * min(1.0, clip / (norm + 1e-6)) if clip else g for g in gradients]
        if optimizer == "lamb":  # timm's LAMB clips the norm to 1 itself
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            gradients = [g / max(1.0, norm) for g in gradients]
        decays = [0.1 if all_decay or p.ndim > 1 else 0.0 for p in expected]
        with torch.no_grad():
            expected = [plain_step(optimizer, *each, step) for each in zip(expected, gradients, decays, states, strict=True)]
        for ours, plain in zip(network.parameters(), expected, strict=True):
            torch.testing.assert_close(ours.detach(), plain.detach(), rtol=1e-6, atol=1e-9)


def test_tokens_positions_norms_and_biases_can_be_exempt_from_decay():
    network = nn.ModuleDict({"student": timm.create_model("test_vit", num_classes=0)})
    groups = make_optimizer(optimizer_params(optimizer="adamw", decay_norms_and_biases=False), {network: 1.0}, 0.9).param_groups
    names = {parameter: name for name, parameter in network.named_parameters()}
    spared = {names[parameter] for group in groups if not group["weight_decay"] for parameter in group["params"]}
    assert spared == {name for name in names.values() if name.endswith((".bias", "pos_embed", "cls_token")) or "norm" in name}
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_each_network_follows_the_schedule_from_its_own_rate():
    trunk, layer = nn.Linear(2, 2), nn.Linear(2, 2)
    found = make_optimizer(optimizer_params(optimizer="lars"), {trunk: 0.5, layer: 2.0}, 0.9, nesterov=True)
    schedule = PARAMS.semi_eval.finetune
    set_rates(found, 14 * 7, 7, schedule)
    assert [group["lr"] for group in found.param_groups] == [learning_rate(98, 7, base, schedule) for base in (0.5, 2.0)]
    assert all(group["nesterov"] for group in found.param_groups)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"betas": [0.9, 0.95]}, "betas: [0.9, 0.95]"),
        ({"betas": [0.9, 0.95], "optimizer": "lars"}, "lars has none"),
        ({"betas": [0.9]}, "betas"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm"),
        ({"nesterov": True, "optimizer": "adamw"}, "nesterov: true"),
    ],
)
def test_settings_that_an_optimizer_does_not_use_are_refused(changes, said):
    values = PARAMS.semi_eval.finetune.model_dump()
    with pytest.raises(ValueError, match=re.escape(said)):
        TuneParams.model_validate(values | changes)
