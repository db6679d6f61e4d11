"""The pace of this machine, measured for some seconds on random images and features: networks, searches for neighbours, linear layers.

Shape letters: N rows, D features of a row.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from bingo.bags.neighbors import top_k
from bingo.evals.linear import linear_on_features
from bingo.nets.backbones import build_backbone
from bingo.nets.precision import autocast
from bingo.params import CachedProbeParams
from bingo.planning.costs import forward_flops

_TRIAL_SECONDS, _SHORT_TRIAL_SECONDS = 1.5, 0.5
_LAYER_WIDTHS, _LAYER_ROWS, _LAYER_EPOCHS = (64, 1024), 2048, 2
_SEARCH = {"cpu": (2**13, 2**18), "cuda": (2**15, 2**22)}  # rows, and numbers in all queries; large enough for FAISS to use a GPU


@dataclass(frozen=True)
class Pace:
    """Rates of this machine, per second: FLOP of the teacher's and of the student's forward pass, FLOP of training (forward and
    backward), decoded images, FLOP of an exact search for neighbours. Narrow networks and depthwise convolutions reach far fewer FLOP/s
    than others. `layer_seconds`: of the whole training of a linear layer, for each image, and for each feature of an image.
    """

    teacher_flops: float
    inference_flops: float
    training_flops: float
    images: float
    search_flops: float
    layer_seconds: tuple[float, float]


@dataclass(frozen=True)
class Network:
    """A network as described in the sections teacher and student."""

    arch: str
    width: float
    stem: str


@cache
def feature_width(network: Network) -> int:
    """The number of features of an image."""
    with torch.device("meta"):
        return build_backbone(network.arch, network.width, network.stem, 0).feature_width


@cache
def network_flops(network: Network, crop_px: int) -> int:
    """FLOP of one forward pass of one image."""
    backbone = build_backbone(network.arch, network.width, network.stem, 0)
    return forward_flops(backbone, torch.zeros(1, 3, crop_px, crop_px))


def flops_in_a_second(network: Network, crop_px: int, batch: int, device: torch.device, training: bool = False) -> float:
    """FLOP/s of the network's forward pass, or of its forward and backward pass, tried for about 1.5 s."""
    backbone = build_backbone(network.arch, network.width, network.stem, 0).to(device).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, crop_px, crop_px, device=device).contiguous(memory_format=torch.channels_last)

    def forward() -> None:
        with torch.inference_mode(), autocast("auto", device):
            backbone.eval()(images)

    def step() -> None:
        with autocast("auto", device):
            loss = backbone.train()(images).float().square().mean()
        loss.backward()

    flops = batch * network_flops(network, crop_px) * (3 if training else 1)
    return flops / _seconds_of(step if training else forward, device)


def searched_in_a_second(width: int, device: torch.device) -> float:
    """FLOP/s of an exact search among features of this width, tried for about 0.5 s."""
    rows, numbers = _SEARCH[device.type]
    features_ND = np.random.default_rng(0).standard_normal((rows, width), np.float32)
    queries = max(1, min(rows, numbers // width))
    seconds = _seconds_of(lambda: top_k(features_ND[:queries], features_ND, 10), device, _SHORT_TRIAL_SECONDS)
    return 2 * rows * queries * width / seconds


def layer_seconds(layer: CachedProbeParams, classes: int, device: torch.device) -> tuple[float, float]:
    """Seconds of the whole training of a linear layer, for each image, and for each feature of an image: those of two widths, each tried
    for about 0.5 s, on a line."""
    narrow, wide = (_layer_seconds(width, layer, classes, device) for width in _LAYER_WIDTHS)
    of_feature = max(0.0, (wide - narrow) / (_LAYER_WIDTHS[1] - _LAYER_WIDTHS[0]))
    return max(0.0, narrow - _LAYER_WIDTHS[0] * of_feature), of_feature


def _layer_seconds(width: int, layer: CachedProbeParams, classes: int, device: torch.device) -> float:
    features_ND = np.random.default_rng(0).standard_normal((_LAYER_ROWS, width), np.float32)
    labels_N, short = np.arange(_LAYER_ROWS) % classes, layer.model_copy(update={"epochs": _LAYER_EPOCHS})
    split = features_ND, labels_N, features_ND[:1], labels_N[:1]
    seconds = _seconds_of(lambda: linear_on_features(*split, classes, short, 0, device), device, _SHORT_TRIAL_SECONDS)
    return seconds / (_LAYER_EPOCHS * _LAYER_ROWS) * layer.epochs


def _seconds_of(work: Callable[[], object], device: torch.device, trial_seconds: float = _TRIAL_SECONDS) -> float:
    """Mean seconds of one call, over about `trial_seconds`; the first call, which is slower, does not count."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    begun, calls = time.perf_counter(), 0
    while time.perf_counter() - begun < trial_seconds:
        work()
        wait()
        calls += 1
    return (time.perf_counter() - begun) / calls
