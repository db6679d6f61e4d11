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
    found = list(feature_blocks(backbone, images, rows_N, image, device, precision, batch_images, [len(rows_N)]))
    return found[0] if found else np.empty((0, 0), np.float32)


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
    """`backbone_features` in consecutive blocks of these numbers of rows, N in all, each of which is allocated when it begins. None is
    referenced here once it has been yielded."""
    backbone, sizes, block_nD, done = backbone.to(device).to(memory_format=torch.channels_last), iter(block_rows), torch.empty(0), 0
    with progress_bar("features", len(rows_N), "images") as bar, evaluation_mode(backbone):
        views = iter(center_views(images, rows_N, image, device, batch_images, 0 if len(rows_N) <= FEW_FILES else None))
        while True:
            whole = list[np.ndarray]()
            with torch.inference_mode(), autocast(precision, device):  # not while the caller has a block
                if (views_B := next(views, None)) is None:
                    return
                found_BD = left_bD = backbone(views_B)
                while len(left_bD):
                    if done == len(block_nD):
                        block_nD, done = torch.empty(next(sizes), found_BD.shape[1]), 0
                    part_bD, left_bD = left_bD[: len(block_nD) - done], left_bD[len(block_nD) - done :]
                    block_nD[done : done + len(part_bD)] = part_bD
                    done += len(part_bD)
                    if done == len(block_nD):
                        whole.append(block_nD.numpy())
                        block_nD, done = torch.empty(0), 0
            bar.advance(len(found_BD))
            while whole:
                yield whole.pop(0)
