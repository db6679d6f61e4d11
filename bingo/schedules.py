"""Steps of an epoch, learning rates as pure functions of the step, so that they can be plotted without training, and optimizers."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bingo.params import LrSchedule, OptimizerParams
from bingo.runtime import distributed
from bingo.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def steps_in_epoch(rows: int, batch: int, name: str = "batch_anchors", images: str = "train images") -> int:
    """Number of complete batches in an epoch; the remaining rows are dropped, different ones in each epoch.

    Raises UserError for the parameter `name` if there is no complete batch of `images`, or it cannot be divided equally among processes.
    """
    if batch > rows:
        raise UserError(f"{name} = {batch}: there are only {rows} {images}; lower it to at most that")
    if batch % (processes := distributed.world()):
        raise UserError(f"{name} = {batch}: {processes} processes cannot share it equally; use a multiple")
    return rows // batch


def learning_rate(step: int, steps_per_epoch: int, base_lr: float, schedule: LrSchedule) -> float:
    """The learning rate at this step, counted from 0, of a training or an evaluation.

    During a warmup of w steps, `base_lr (step + 1) / (w + 1)`. Then, with `drop_epochs`, the step schedule of CompRess, ISD, MoCo's linear
    layer and others; without, a cosine from `base_lr` to `last_lr`,
    `last_lr + (base_lr - last_lr) (1 + cos(pi (step - w) / (total - w))) / 2`, the schedule of MoCo-v2 and of BINGO's
    utils.py:151-161 (there once per epoch, here at every step). While the learning rate is held constant the cosine continues, as in
    SEED's and CoSS's tools/utils.py: after 5 of CoSS's 25 epochs the learning rate drops by a factor of 0.905.
    """
    warmup_steps = schedule.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return base_lr * (step + 1) / (warmup_steps + 1)
    if schedule.drop_epochs is not None:
        return step_lr(step // steps_per_epoch, base_lr, schedule.drop_epochs, schedule.drop_factor)
    if step < warmup_steps + schedule.hold_epochs * steps_per_epoch:
        return base_lr
    done = (step - warmup_steps) / (schedule.epochs * steps_per_epoch - warmup_steps)
    return schedule.last_lr + 0.5 * (base_lr - schedule.last_lr) * (1 + math.cos(math.pi * done))


def step_lr(
    step: int, base_lr: float, drops: Sequence[int], factor: float = 0.1, warmup_steps: int = 0, warmup_factor: float = 0.001
) -> float:
    """`base_lr` times `factor` for each of `drops` that has passed; linear warmup from `warmup_factor` over the first `warmup_steps`.

    `step` and `drops` count from 0, in steps or in epochs. With a warmup, this is detectron2's WarmupMultiStepLR
    (solver/lr_scheduler.py), which starts at a thousandth.
    """
    warmed = 1.0 if step >= warmup_steps else warmup_factor + (1 - warmup_factor) * step / warmup_steps
    return base_lr * warmed * factor ** sum(step >= drop for drop in drops)


def make_optimizer(params: OptimizerParams, rates: "Mapping[nn.Module, float]", momentum: float, **options: bool) -> "Optimizer":
    """timm's optimizer for the trained parameters of these networks, each with its own learning rate, stored as `base_lr` of its groups.

    `momentum` is for sgd and lars; `options`: `nesterov` is for these two, `fused` for sgd.
    """
    from timm.optim import create_optimizer_v2

    name: str = params.optimizer
    nesterov = options.pop("nesterov", False)
    if name in ("sgd", "adamw"):  # torch's; timm calls them sgd with Nesterov's momentum, and momentum without
        name = "momentum" if name == "sgd" and not nesterov else name
        options = {"fused": True} if name == "adamw" else options
    else:
        name, options = f"{'n' * nesterov}{name}", {"foreach": True}
    more: dict[str, Any] = {"betas": tuple(params.betas), **options} if params.betas else options
    groups = [{**group, "base_lr": rate} for network, rate in rates.items() for group in _decay_groups(network, params)]
    return create_optimizer_v2(groups, name, max(rates.values()), params.weight_decay, momentum, **more)


def _decay_groups(network: "nn.Module", params: OptimizerParams) -> list[dict[str, Any]]:
    """The trained parameters: one group, or a group without weight decay (parameters of one dimension, or exempt by timm) and the
    others."""
    if params.decay_norms_and_biases:
        return [{"params": [parameter for parameter in network.parameters() if parameter.requires_grad]}]
    from timm.optim import param_groups_weight_decay

    parts: Any = network.named_modules()
    exempt = [f"{path}.{name}".lstrip(".") for path, part in parts if hasattr(part, "no_weight_decay") for name in part.no_weight_decay()]
    return param_groups_weight_decay(network, params.weight_decay, no_weight_decay_list=exempt)


def set_rates(optimizer: "Optimizer", step: int, steps_per_epoch: int, schedule: LrSchedule) -> None:
    """Set each group's `learning_rate` at this step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps_per_epoch, group["base_lr"], schedule)


def update(optimizer: "Optimizer", params: OptimizerParams) -> None:
    """One step of the optimizer, with gradients scaled down if their norm exceeds `clip_grad_norm`. Does not wait for the device."""
    if params.clip_grad_norm is not None:
        from torch.nn.utils import clip_grad_norm_

        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        clip_grad_norm_(trained, params.clip_grad_norm, foreach=True)
    optimizer.step()
