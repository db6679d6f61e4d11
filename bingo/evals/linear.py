"""Linear evaluation of a frozen network: on stored features of centre views, and on random crops as in the released code.

Both train a linear layer with SGD with momentum 0.9 and a learning rate from `bingo.schedules`, test it after every epoch, and
report the last and the best epoch. The papers report the best epoch, which is chosen on the test set. Shape letters: N rows,
B rows of a batch, D feature width, C classes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bingo import seeds
from bingo.evals.scores import check_labels, first_right, last_and_best, linear_layer, percent, right_of, to_labels
from bingo.images.uploads import upload
from bingo.nets.heads import unit
from bingo.params import PLAIN_SGD, CachedProbeParams, CropProbeParams, CropTuneParams
from bingo.runtime.errors import UserError
from bingo.runtime.progress import progress_bar
from bingo.schedules import learning_rate

if TYPE_CHECKING:
    from bingo.evals.finetune import ClassifierTrainer, Task
    from bingo.nets.backbones import Backbone
    from bingo.runtime.checkpoints import Checkpoints

CACHED = "linear-cached"  # a purpose of bingo.seeds
_LABEL = "linear evaluation"
_TESTED_ROWS = 8192  # at once: 33 MB of outputs for 1,000 classes


def linear_on_features(
    train_X: np.ndarray,
    train_y: np.ndarray,
    test_X: np.ndarray,
    test_y: np.ndarray,
    classes: int,
    params: CachedProbeParams,
    seed: int,
    device: torch.device,
) -> tuple[dict[str, float | int], np.ndarray, dict[str, Tensor]]:
    """Train on `train_X` (N, D) and test on `test_X`, both of any float dtype, standardised with the mean and deviation of the train rows.

    All data are on the device as float32. Returns top1_last, top5_last, top1_best, top5_best (percent; with fewer than 5 classes, top 5
    means all of them) and best_epoch, counted from 1; whether each test row is classified correctly after the last
    epoch, bool; and the layer after the last epoch, see `_folded`. Raises UserError if a label is not in 0..classes-1 or an output is not
    finite.
    """
    check_labels(_LABEL, train_y, test_y, classes)
    train_ND, test_ND = _to_device(train_X, device), _to_device(test_X, device)
    train_N, test_N = to_labels(train_y, device), to_labels(test_y, device)
    mean_D, scale_D = _standardiser(train_ND)
    test_ND = (test_ND - mean_D) * scale_D
    layer = linear_layer(train_ND.shape[1], classes, params.init_std, seed, CACHED, device)
    trainer = _LinearTrainer(layer, params, len(train_ND))
    scores = []
    with _one_thread_if_small(device, layer, params.batch_images), progress_bar("linear layer", params.epochs, "epochs") as bar:
        for epoch in range(params.epochs):
            order_N = upload(seeds.permutation(seed, CACHED, epoch, len(train_ND)), device)
            for rows_B in order_N.split(params.batch_images):
                # Standardised batch by batch, to avoid a second copy of the features.
                trainer.step((train_ND[rows_B] - mean_D) * scale_D, train_N[rows_B])
            scores.append(trainer.test(test_ND, test_N))
            bar.advance()
        return last_and_best(scores), trainer.hits(test_ND, test_N), _folded(layer, mean_D, scale_D)


def linear_on_crops(
    backbone: "Backbone",
    task: "Task",
    params: CropProbeParams,
    precision: str,
    seed: int,
    device: torch.device,
    checkpoints: "Checkpoints",
    logged: "Callable[[ClassifierTrainer], AbstractContextManager[object]]" = nullcontext,
) -> dict[str, float | int]:
    """BINGO's released protocol (main_lincls.py, scripts/lincls/Res.sh).

    In every epoch each train image is seen once as a random crop; the pooled features of the frozen backbone, in evaluation mode, go
    to the linear layer, raw or, with `params.standardise`, as computed by `Standardised`. Tested on centre views. A cosine schedule is
    updated at every step and ends at `params.final_lr` (released: once per epoch, ends at 0.01). Returns the same scores and raises the
    same errors as `linear_on_features`. It uses `finetune.ClassifierTrainer` with a frozen backbone, within its `logged`, so it resumes
    from its checkpoint, and several processes share each batch.
    """
    from bingo.evals.features import backbone_features
    from bingo.evals.finetune import ClassifierTrainer, Protocol  # timm, which is not needed for stored features

    judged: Any = backbone
    if params.standardise:
        seen = task.images, task.train_rows_N, task.image, device, precision, params.batch_images
        judged = Standardised(backbone, torch.from_numpy(backbone_features(backbone, *seen)).to(device))
    tune = CropTuneParams(**params.model_dump(include=set(CropTuneParams.model_fields)), **PLAIN_SGD, nesterov=False)
    trainer = ClassifierTrainer(judged, Protocol(task, tune, params.lr, None), precision, seed, device, checkpoints, _LABEL)
    with logged(trainer):
        return trainer.run()


class Standardised(nn.Module):
    """A backbone whose features are normalised to unit length and then standardised per dimension with the mean and the variance, plus
    1e-5, of `centre_features_TD`, which are also normalised (UMBCvision's eval_linear.py: Normalize, FullBatchNorm): float32 (B, D)."""

    def __init__(self, backbone: "Backbone", centre_features_TD: Tensor):
        super().__init__()
        self.backbone, self.feature_width = backbone, backbone.feature_width
        self.standardise = nn.BatchNorm1d(self.feature_width, affine=False).to(centre_features_TD.device)
        variance_D, mean_D = torch.var_mean(unit(centre_features_TD), dim=0)
        self.standardise.running_mean, self.standardise.running_var = mean_D, variance_D

    def forward(self, images_B3PP: Tensor) -> Tensor:
        return self.standardise(unit(self.backbone(images_B3PP)))


class _LinearTrainer:
    """SGD with momentum 0.9 on one layer, cross-entropy in float32."""

    def __init__(self, layer: nn.Linear, params: CachedProbeParams, rows: int):
        self.layer, self.params = layer, params
        self.steps_per_epoch, self.done_steps = -(-rows // params.batch_images), 0
        self.optimizer = torch.optim.SGD(layer.parameters(), lr=params.lr, momentum=0.9, weight_decay=params.weight_decay)

    def step(self, features_BD: Tensor, labels_B: Tensor) -> None:
        rate = learning_rate(self.done_steps, self.steps_per_epoch, self.params.lr, self.params)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        F.cross_entropy(self.layer(features_BD), labels_B).backward()
        self.optimizer.step()
        self.done_steps += 1

    @torch.inference_mode()
    def test(self, features_ND: Tensor, labels_N: Tensor) -> tuple[float, float]:
        """Percent of rows whose label has the largest output, and whose label is among the min(5, classes) largest."""
        blocks = zip(features_ND.split(_TESTED_ROWS), labels_N.split(_TESTED_ROWS), strict=True)
        right, right_among_5, broken = torch.stack([right_of(self.layer(x_nD), y_n) for x_nD, y_n in blocks]).sum(0).tolist()
        if broken:
            problem = f"{_LABEL}: outputs are nan or inf after {self.done_steps} steps with lr = {self.params.lr}"
            raise UserError(f"{problem}, allowed are finite numbers; lower that lr, or train the network again if its features are not")
        return percent(right, len(labels_N)), percent(right_among_5, len(labels_N))

    @torch.inference_mode()
    def hits(self, features_ND: Tensor, labels_N: Tensor) -> np.ndarray:
        """Whether the label of each row has the largest output, bool (N,)."""
        blocks = zip(features_ND.split(_TESTED_ROWS), labels_N.split(_TESTED_ROWS), strict=True)
        return torch.cat([first_right(self.layer(x_nD), y_n) for x_nD, y_n in blocks]).cpu().numpy()


@contextmanager
def _one_thread_if_small(device: torch.device, layer: nn.Linear, batch_images: int) -> Iterator[None]:
    """Use one CPU thread if a step is too small to divide among threads, which takes longer, on a busy machine 5 times as long."""
    threads = torch.get_num_threads()
    if device.type == "cpu" and layer.weight.numel() * batch_images < 2**24:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _standardiser(train_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of each dimension; a constant dimension (up to rounding) is not scaled up."""
    deviation_D, mean_D = torch.std_mean(train_ND, dim=0, correction=0)
    constant_D = deviation_D <= 1e-6 * mean_D.abs()
    return mean_D, torch.where(constant_D, 0.0, 1 / deviation_D)


def _folded(layer: nn.Linear, mean_D: Tensor, scale_D: Tensor) -> dict[str, Tensor]:
    """`weight` (C, D) and `bias` (C,), float32, of an equivalent layer for features that are not standardised:
    W (x - mean) scale + b = (W scale) x + (b - (W scale) mean)."""
    weight_CD = layer.weight.detach().double() * scale_D.double()
    return {"weight": weight_CD.float(), "bias": (layer.bias.detach().double() - weight_CD @ mean_D.double()).float()}


def _to_device(X: np.ndarray, device: torch.device) -> Tensor:
    # A read-only array (a memory map) is copied, because torch cannot wrap it.
    return torch.from_numpy(np.require(X, requirements=["C", "W"])).to(device, torch.float32)
