"""Steps of an epoch, and learning rates as pure functions of the step, so that they can be plotted without training."""

import math
from collections.abc import Sequence

from bingo.params import LrSchedule
from bingo.runtime import distributed
from bingo.runtime.errors import UserError


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
