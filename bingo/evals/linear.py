"""Linear evaluation of a frozen network: on stored features of centre views, and on random crops as released.

Both train one linear layer by SGD with momentum 0.9 and a cosine to 0, start it from N(0, 0.01) (0.01 is the deviation) with
bias 0, test it after every epoch, and report the last epoch and the best one. The best one is what the papers report; it is
chosen on the test set (methods.md section 2.1). Shape letters: N rows, B rows of a batch, D feature width, C classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bingo import seeds
from bingo.data.images import Images
from bingo.data.loader import Request, ViewLoader
from bingo.errors import UserError
from bingo.evals.features import backbone_features, evaluation_mode
from bingo.nets.precision import autocast
from bingo.params import AugmentParams, CachedProbeParams, CropProbeParams, ImageParams
from bingo.schedules import cosine_lr

CACHED, CROPS = "linear-cached", "linear-crops"  # purposes of bingo.seeds


def linear_on_features(
    train_X: np.ndarray,
    train_y: np.ndarray,
    test_X: np.ndarray,
    test_y: np.ndarray,
    classes: int,
    params: CachedProbeParams,
    seed: int,
    device: torch.device,
) -> dict[str, float | int]:
    """Train on `train_X` (N, D) and test on `test_X`, both of any float dtype, standardised with the train mean and deviation.

    Everything lies on the device as float32. Returns top1_last, top5_last, top1_best, top5_best (percent; top 5 of fewer
    than 5 classes means all of them) and best_epoch, counted from 1. Raises UserError where a label is not in 0..classes-1 or an
    output is not finite.
    """
    _check_labels(train_y, test_y, classes)
    train_ND, test_ND = _to_device(train_X, device), _to_device(test_X, device)
    train_N, test_N = _labels(train_y, device), _labels(test_y, device)
    mean_D, scale_D = _standardiser(train_ND)
    test_ND = (test_ND - mean_D) * scale_D
    layer = linear_layer(train_ND.shape[1], classes, seed, CACHED, device)
    trainer = _Trainer(layer, params, len(train_ND))
    scores = []
    with _one_thread_if_small(device, layer, params.batch_images):
        for epoch in range(params.epochs):
            order_N = torch.from_numpy(seeds.permutation(seed, CACHED, epoch, len(train_ND))).to(device)
            for rows_B in order_N.split(params.batch_images):
                # Standardised batch by batch, so that no second copy of the features is held.
                trainer.step((train_ND[rows_B] - mean_D) * scale_D, train_N[rows_B])
            scores.append(trainer.test(test_ND, test_N))
    return _report(scores)


def linear_on_crops(
    backbone: nn.Module,
    images: Images,
    labels_N: np.ndarray,
    train_rows_N: np.ndarray,
    test_rows_N: np.ndarray,
    classes: int,
    params: CropProbeParams,
    image: ImageParams,
    precision: str,
    seed: int,
    device: torch.device,
) -> dict[str, float | int]:
    """The released protocol (methods.md section 2.1, column BINGO; main_lincls.py, scripts/lincls/Res.sh).

    At every epoch each train image is seen once as a random crop; the raw pooled features of the frozen backbone, in evaluation
    mode, go to the linear layer. Tested on centre views. Differs in the cosine: it moves at every step and ends at 0 (released:
    once an epoch, ends at 0.01). `labels_N` belongs to the rows of `images`. Returns and raises what `linear_on_features` does.
    """
    _check_labels(labels_N[train_rows_N], labels_N[test_rows_N], classes)
    test_ND = _to_device(backbone_features(backbone, images, test_rows_N, image, device, precision, params.batch_images), device)
    layer = linear_layer(test_ND.shape[1], classes, seed, CROPS, device)
    trainer = _Trainer(layer, params, len(train_rows_N))
    loader = ViewLoader(images, image, _crops_only(params), seed, device)
    scores = []
    for epoch in range(params.epochs):
        requests = _crop_requests(train_rows_N, params.batch_images, epoch, seed)
        with evaluation_mode(backbone):
            for request, (views_B,) in zip(requests, loader.views([request] for request in requests), strict=True):
                features_BD = _frozen_features(backbone, views_B, precision)
                trainer.step(features_BD, _labels(labels_N[request.image_rows_B], device))
        scores.append(trainer.test(test_ND, _labels(labels_N[test_rows_N], device)))
    return _report(scores)


def linear_layer(width: int, classes: int, seed: int, purpose: str, device: torch.device) -> nn.Linear:
    """A linear layer with weights from N(0, 0.01), 0.01 being the deviation, and bias 0; the same on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.torch_seed(seed, purpose))
        layer = nn.Linear(width, classes)
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    return layer.to(device)


class _Trainer:
    """SGD with momentum 0.9 on one layer, a cosine over all steps, cross-entropy in float32."""

    def __init__(self, layer: nn.Linear, params: CachedProbeParams, rows: int):
        self.layer, self.base_lr = layer, params.lr
        self.total_steps, self.done_steps = params.epochs * -(-rows // params.batch_images), 0
        self.optimizer = torch.optim.SGD(layer.parameters(), lr=params.lr, momentum=0.9, weight_decay=params.weight_decay)

    def step(self, features_BD: Tensor, labels_B: Tensor) -> None:
        self.optimizer.param_groups[0]["lr"] = cosine_lr(self.done_steps, self.total_steps, self.base_lr)
        self.optimizer.zero_grad()
        F.cross_entropy(self.layer(features_BD), labels_B).backward()
        self.optimizer.step()
        self.done_steps += 1

    @torch.inference_mode()
    def test(self, features_ND: Tensor, labels_N: Tensor) -> tuple[float, float]:
        """Percent of rows whose label has the largest output, and is among the min(5, classes) largest."""
        logits_NC = self.layer(features_ND)
        if not logits_NC.isfinite().all():
            problem = f"linear evaluation: outputs are nan or inf after {self.done_steps} steps with lr = {self.base_lr}"
            raise UserError(f"{problem}, allowed are finite numbers; lower that lr, or train the network again if its features are not")
        right_N5 = logits_NC.topk(min(5, self.layer.out_features)).indices == labels_N[:, None]
        return _percent(right_N5[:, 0]), _percent(right_N5.any(1))


def _percent(hits_N: Tensor) -> float:
    return round(100 * hits_N.double().mean().item(), 6)


@contextmanager
def _one_thread_if_small(device: torch.device, layer: nn.Linear, batch_images: int) -> Iterator[None]:
    """One CPU thread where a step is too small to share: handing it to others costs more, 5 times so on a busy machine."""
    threads = torch.get_num_threads()
    if device.type == "cpu" and layer.weight.numel() * batch_images < 2**24:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _standardiser(train_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation of each dimension; a constant dimension (up to rounding) is not scaled up."""
    deviation_D, mean_D = torch.std_mean(train_ND, dim=0, correction=0)
    constant_D = deviation_D <= 1e-6 * mean_D.abs()
    return mean_D, torch.where(constant_D, 0.0, 1 / deviation_D)


def _crop_requests(train_rows_N: np.ndarray, batch_images: int, epoch: int, seed: int) -> list[Request]:
    """One request for each step of an epoch: the rows in a seeded order, each row's crop its own."""
    order_N = train_rows_N[seeds.permutation(seed, CROPS, epoch, len(train_rows_N))]
    batches = (order_N[start : start + batch_images] for start in range(0, len(order_N), batch_images))
    return [Request(image_rows_B=rows_B, key_rows_B=rows_B, purpose=CROPS, epoch=epoch, view_B=0) for rows_B in batches]


def _crops_only(params: CropProbeParams) -> AugmentParams:
    """The family A-weak: a random crop and a flip, nothing else."""
    return AugmentParams(
        crop_scale=params.crop_scale,
        crop_ratio=[3 / 4, 4 / 3],
        rotate_degrees=0.0,
        jitter=[0.0, 0.0, 0.0, 0.0],
        jitter_p=0.0,
        gray_p=0.0,
        blur_p=0.0,
        blur_sigma_px=[0.1, 2.0],
        flip_p=params.flip_p,
    )


def _frozen_features(backbone: nn.Module, views_B: Tensor, precision: str) -> Tensor:
    with torch.no_grad(), autocast(precision, views_B.device):
        return backbone(views_B).float()


def _report(scores: Sequence[tuple[float, float]]) -> dict[str, float | int]:
    """The last epoch and the one with the best top-1 (the first of several), counted from 1."""
    best = max(range(len(scores)), key=lambda epoch: scores[epoch][0])
    (top1_last, top5_last), (top1_best, top5_best) = scores[-1], scores[best]
    return {
        "top1_last": top1_last,
        "top5_last": top5_last,
        "top1_best": top1_best,
        "top5_best": top5_best,
        "best_epoch": best + 1,
    }


def _to_device(X: np.ndarray, device: torch.device) -> Tensor:
    # A read-only array (a memory map) is copied, because torch cannot wrap it.
    return torch.from_numpy(np.require(X, requirements=["C", "W"])).to(device, torch.float32)


def _labels(y: np.ndarray, device: torch.device) -> Tensor:
    return torch.tensor(np.asarray(y), dtype=torch.int64, device=device)


def _check_labels(train_N: np.ndarray, test_N: np.ndarray, classes: int) -> None:
    for split, labels_N in (("train", train_N), ("test", test_N)):
        if len(labels_N) == 0:
            raise UserError(f"linear evaluation: no {split} images; it needs a labelled train and test split, see dataset.root")
        wrong_N = labels_N[(labels_N < 0) | (labels_N >= classes)]
        if len(wrong_N):
            line = f"linear evaluation: {len(wrong_N)} {split} images have labels such as {wrong_N[0]}"
            raise UserError(f"{line}, allowed are 0..{classes - 1}; give every image a class folder (dataset.root)")
