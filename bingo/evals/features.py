"""Features of any backbone for evaluation: pooled outputs of centre views, in evaluation mode, without gradient."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from bingo.images.images import Images
from bingo.images.loader import center_views
from bingo.nets.precision import autocast
from bingo.params import ImageParams
from bingo.runtime.progress import progress_bar

FEW_FILES = 256  # so few are decoded before worker processes would have started


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put every module of `network` into evaluation mode, and restore each one's mode afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def backbone_features(
    backbone: nn.Module,
    images: Images,
    rows_N: Sequence[int] | np.ndarray,
    image: ImageParams,
    device: torch.device,
    precision: str,
    batch_images: int,
) -> np.ndarray:
    """Features of the images `rows_N` in that order, float32 (N, D). The backbone is moved to `device`; its mode does not change.
    Up to FEW_FILES files are decoded in this process."""
    (features_ND,) = feature_blocks(backbone, images, rows_N, image, device, precision, batch_images, [len(rows_N)])
    return features_ND


def feature_blocks(
    backbone: nn.Module,
    images: Images,
    rows_N: Sequence[int] | np.ndarray,
    image: ImageParams,
    device: torch.device,
    precision: str,
    batch_images: int,
    block_rows: Sequence[int],
) -> Iterator[np.ndarray]:
    """`backbone_features` in consecutive blocks of these numbers of rows, N in all. While the caller has a block, it is not referenced
    here, and there are no worker processes."""
    backbone, begun = backbone.to(device).to(memory_format=torch.channels_last), 0

    def block(rows_n: np.ndarray) -> np.ndarray:
        features_nD, done = torch.empty(0, 0), 0
        with torch.inference_mode(), autocast(precision, device):
            for views_B in center_views(images, rows_n, image, device, batch_images, 0 if len(rows_n) <= FEW_FILES else None):
                found_BD = backbone(views_B)
                features_nD = features_nD if done else torch.empty(len(rows_n), found_BD.shape[1])
                features_nD[done : done + len(found_BD)] = found_BD
                done += len(found_BD)
                bar.advance(len(found_BD))
        return features_nD.numpy()

    with progress_bar("features", len(rows_N), "images") as bar, evaluation_mode(backbone):
        for rows in block_rows:
            yield block(np.asarray(rows_N)[begun : begun + rows])
            begun += rows
