"""Detect a collapsed network: one whose features are nearly equal for all images, or vary in hardly more than one direction.

Both measures use the centre views of a seeded sample of train images, and normalised features. Shape letters: N images, D feature width.
"""

import numpy as np
import torch
from torch import nn

from bingo import seeds
from bingo.evals.features import backbone_features
from bingo.images.images import Images
from bingo.images.listing import Listing
from bingo.params import ImageParams
from bingo.runtime.errors import UserError

IMAGES, BATCH_IMAGES = 1000, 256
LEAST_STD, LEAST_RANK = 0.03, 1.5  # below: collapsed. A feature_std of 0.03 is a mean cosine of 0.999 between two images


def feature_spread(
    backbone: nn.Module, listing: Listing, images: Images, image: ImageParams, seed: int, device: torch.device, precision: str
) -> dict[str, float]:
    """`spread` over at most 1,000 train images; the state of the backbone does not change. Raises UserError if a feature is not finite,
    which can happen before the loss is not finite."""
    rows = np.sort(seeds.permutation(seed, "spread", 0, listing.train_rows)[:IMAGES])
    features_ND = backbone_features(backbone, images, rows, image, device, precision, BATCH_IMAGES)
    if not np.isfinite(features_ND).all():
        raise UserError("the network's features are not finite, so its training has diverged; lower lr")
    return spread(features_ND)


def spread(features_ND: np.ndarray) -> dict[str, float]:
    """`feature_std`: root of the summed variances of unit features, from 0 (all equal) to 1 (uniform), which is SimSiam's measure
    (Chen and He 2021, section 4.1) times the root of D. `effective_rank`: the exponential of the entropy of the centred features'
    singular values over their sum (Roy and Vetterli 2007), from 1 to D; 0 if there are none.
    """
    x_ND = features_ND.astype(np.float64)
    unit_ND = x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)
    centred_ND = unit_ND - unit_ND.mean(axis=0)
    singular_D = np.linalg.svd(centred_ND, compute_uv=False)
    shares = singular_D[singular_D > 1e-12 * max(1, len(x_ND))]
    shares = shares / shares.sum() if len(shares) else shares
    rank = float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0
    return {"feature_std": round(float(np.sqrt((centred_ND**2).mean(axis=0).sum())), 4), "effective_rank": round(rank, 3)}


def collapse_warning(figures: dict[str, float]) -> str | None:
    """A message if the result of `spread` indicates a collapsed network, otherwise None."""
    if figures["feature_std"] >= LEAST_STD and figures["effective_rank"] >= LEAST_RANK:
        return None
    shown = ", ".join(f"{name} {value:g}" for name, value in figures.items())
    return f"the network has collapsed, its features hardly differ ({shown}): lower lr or weight_decay, and check the loss and the bags"
