"""CutMix: a box of one image's view pasted into another's, which then counts by the share of the area that is left.

Shape letter: B images.
"""

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from bingo.images.augment import upload


def cutmix(anchor_BCHW: Tensor, member_BCHW: Tensor, uniform_B3: np.ndarray, alpha: float) -> tuple[Tensor, Tensor]:
    """Paste a box of the member's view into the anchor's view: mixed images, and the anchor's share of the area (B,) float32.

    BINGO utils.py:20-47: share ~ Beta(alpha, alpha), box side sqrt(1 - share) of the image, centre uniform, clipped to the image.
    Here a box for each image (there one for a whole GPU). `uniform_B3` gives share, centre row and centre column.
    """
    height, width = anchor_BCHW.shape[-2:]
    side_B = np.sqrt(1 - betaincinv(alpha, alpha, uniform_B3[:, 0]))
    tops, bottoms = _box_edges(uniform_B3[:, 1], side_B, height)
    lefts, rights = _box_edges(uniform_B3[:, 2], side_B, width)
    share_B = 1 - (bottoms - tops) * (rights - lefts) / (height * width)
    edges_5B = upload(np.stack([tops, bottoms, lefts, rights, share_B]).astype(np.float32), anchor_BCHW.device)
    y_H = torch.arange(height, device=anchor_BCHW.device)
    x_W = torch.arange(width, device=anchor_BCHW.device)
    inside_BH = (y_H >= edges_5B[0][:, None]) & (y_H < edges_5B[1][:, None])
    inside_BW = (x_W >= edges_5B[2][:, None]) & (x_W < edges_5B[3][:, None])
    inside_B1HW = (inside_BH[:, :, None] & inside_BW[:, None, :])[:, None]
    return torch.where(inside_B1HW, member_BCHW, anchor_BCHW), edges_5B[4]


def _box_edges(centre_B: np.ndarray, side_B: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    half_B = (side_B * length).astype(np.int64) // 2
    centre_B = (centre_B * length).astype(np.int64)
    return np.clip(centre_B - half_B, 0, length), np.clip(centre_B + half_B, 0, length)
