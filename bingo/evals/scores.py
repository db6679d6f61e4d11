"""Functions for all classifiers trained on labels: the initial layer, checks of the labels, and scores of the outputs.

Shape letters: B rows of a batch, C classes, D feature width, N rows.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bingo import seeds
from bingo.images.uploads import upload
from bingo.runtime.errors import UserError


def linear_layer(width: int, classes: int, init_std: float | None, seed: int, purpose: str, device: torch.device) -> nn.Linear:
    """A linear layer with normal weights of standard deviation `init_std` and bias 0, or with torch's default if it is None; the same on
    every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.torch_seed(seed, purpose))
        layer = nn.Linear(width, classes)
        if init_std is not None:
            nn.init.normal_(layer.weight, std=init_std)
            nn.init.zeros_(layer.bias)
    return layer.to(device)


def check_labels(label: str, train_N: np.ndarray, test_N: np.ndarray, classes: int) -> None:
    """Raise UserError, which begins with `label`, if a split is empty or a label is not in 0..classes-1."""
    for split, labels_N in (("train", train_N), ("test", test_N)):
        if len(labels_N) == 0:
            raise UserError(f"{label}: no {split} images; labelled train and test splits are needed, check the root of its images")
        wrong_N = labels_N[(labels_N < 0) | (labels_N >= classes)]
        if len(wrong_N):
            line = f"{label}: {len(wrong_N)} {split} images have labels such as {wrong_N[0]}"
            raise UserError(f"{line}, allowed are 0..{classes - 1}; give every image a class folder")


def to_labels(y: np.ndarray, device: torch.device) -> Tensor:
    """Labels as int64 (N,) on the device."""
    return upload(np.array(y, np.int64), device)


def right_of(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Number of rows with their label as the largest output, among the min(5, C) largest, and with an output that is nan or inf: int64
    (3,)."""
    right_B5 = logits_BC.topk(min(5, logits_BC.shape[1])).indices == labels_B[:, None]
    broken = (~logits_BC.isfinite()).any(1).sum()
    return torch.stack([right_B5[:, 0].sum(), right_B5.any(1).sum(), broken])


def first_right(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Whether each row has its label as the largest output, as `right_of` counts it: bool (B,)."""
    return logits_BC.topk(min(5, logits_BC.shape[1])).indices[:, 0] == labels_B


def percent(count: float, rows: int) -> float:
    """A share of `rows` in percent, rounded to six places."""
    return round(100 * count / rows, 6)


def last_and_best(scores: Sequence[tuple[float, float]]) -> dict[str, float | int]:
    """Top-1 and top-5 of the last epoch and of the epoch with the best top-1 (in a tie the first), counted from 1.

    The best epoch is what the papers report; it is chosen on the test set.
    """
    best = max(range(len(scores)), key=lambda epoch: scores[epoch][0])
    (top1_last, top5_last), (top1_best, top5_best) = scores[-1], scores[best]
    return {
        "top1_last": top1_last,
        "top5_last": top5_last,
        "top1_best": top1_best,
        "top5_best": top5_best,
        "best_epoch": best + 1,
    }
