"""Learning rates as pure functions of the step: a plot of them costs no training."""

import math
from collections.abc import Sequence


def cosine_lr(step: int, total_steps: int, base_lr: float, warmup_steps: int = 0, final_lr: float = 0.0) -> float:
    """Linear from 0 over the first `warmup_steps`, then half a cosine from `base_lr` to `final_lr`.

    `step` counts from 0. With no warm-up this is `final + (base - final) (1 + cos(pi step / total)) / 2`, the schedule of
    MoCo-v2 and of BINGO's utils.py:151-161 (there once an epoch, here at every step).
    """
    if step < warmup_steps:
        return base_lr * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final_lr + 0.5 * (base_lr - final_lr) * (1 + math.cos(math.pi * done))


def step_lr(
    step: int, base_lr: float, drops: Sequence[int], factor: float = 0.1, warmup_steps: int = 0, warmup_factor: float = 0.001
) -> float:
    """`base_lr` times `factor` for each of `drops` that has come; linear from `warmup_factor` of it over the first `warmup_steps`.

    `step` and `drops` count from 0, in steps or in epochs. With a warm-up: detectron2's WarmupMultiStepLR
    (solver/lr_scheduler.py), which starts at a thousandth.
    """
    warmed = 1.0 if step >= warmup_steps else warmup_factor + (1 - warmup_factor) * step / warmup_steps
    return base_lr * warmed * factor ** sum(step >= drop for drop in drops)
