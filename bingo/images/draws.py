"""The random numbers of views, drawn on the host: crop boxes, flips, colour factors, greys, blurs.

A view is a function of (seed, purpose, epoch, seed row, view) and of the image; one call draws a whole batch. Distributions are those
of torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale and RandomHorizontalFlip, and of MoCo-v2's GaussianBlur (sigma in
pixels). Shape letters: B views, O colour operations in use.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike

from bingo import seeds
from bingo.params import AugmentParams

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
CROP_TRIES = 10  # as in torchvision: then the largest box in the centre
# Columns of the uniform numbers of one view. A new number gets a new column at the end, so that existing views do not change.
_AREA, _RATIO = slice(0, CROP_TRIES), slice(CROP_TRIES, 2 * CROP_TRIES)
_TOP, _LEFT, _FLIP, _JITTER, _ORDER = range(2 * CROP_TRIES, 2 * CROP_TRIES + 5)
_FACTORS = slice(_ORDER + 1, _ORDER + 5)
_GRAY, _BLUR, _SIGMA, _ANGLE = range(_ORDER + 5, _ORDER + 9)
_DRAWS = _ORDER + 9
_PERMUTATIONS = np.array(list(permutations(range(4))))


@dataclass(frozen=True)
class Crops:
    """The geometry of B views, given the sizes of their images: uniform numbers and flips, bool (B,).

    ranges_B4: least and largest share of the area, least and largest width over height, of each view's augmentation.
    """

    uniforms_BJ: np.ndarray
    flip_B: np.ndarray
    ranges_B4: np.ndarray

    def __getitem__(self, rows: slice | np.ndarray) -> "Crops":
        return Crops(self.uniforms_BJ[rows], self.flip_B[rows], self.ranges_B4[rows])


def join_crops(parts: Sequence[Crops]) -> Crops:
    """Join several batches into one."""
    return Crops(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Crops)))


@dataclass(frozen=True)
class Colours:
    """The colours of B views. Operations that no view uses are left out: O is 0 to 4.

    operation_BO: which operation (BRIGHTNESS.. HUE) acts o-th, -1 none; factor_BO: its factor (for hue the shift, in turns);
    gray_B: bool; sigma_B: standard deviation of the blur in pixels, 0 for none. angle_B: a rotation in degrees, counter-clockwise; it
    is applied first, on the device like the colours.
    """

    operation_BO: np.ndarray
    factor_BO: np.ndarray
    gray_B: np.ndarray
    sigma_B: np.ndarray
    angle_B: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "Colours":
        return Colours(*(getattr(self, field.name)[rows] for field in fields(Colours)))


def join_colours(parts: Sequence[Colours]) -> Colours:
    """Join several batches with the same augmentation into one."""
    return Colours(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Colours)))


def draw_views(
    augment: AugmentParams, seed: int, purpose: str, epoch: int, seed_rows_B: ArrayLike, view_B: ArrayLike
) -> tuple[Crops, Colours]:
    """Draw B views, each by its seed row and its view (or one view for all)."""
    u_BJ = seeds.uniforms(seed, purpose, epoch, seed_rows_B, view_B, _DRAWS)
    ranges_B4 = np.broadcast_to(np.array([*augment.crop_scale, *augment.crop_ratio]), (len(u_BJ), 4))
    crops = Crops(u_BJ[:, : _LEFT + 1], u_BJ[:, _FLIP] < augment.flip_p, ranges_B4)
    operation_BO, factor_BO = _jitter(augment, u_BJ)
    low, high = augment.blur_sigma_px
    sigma_B = np.where(u_BJ[:, _BLUR] < augment.blur_p, low + (high - low) * u_BJ[:, _SIGMA], 0.0)
    angle_B = augment.rotate_degrees * (2 * u_BJ[:, _ANGLE] - 1)
    return crops, Colours(operation_BO, factor_BO, u_BJ[:, _GRAY] < augment.gray_p, sigma_B, angle_B)


def _jitter(augment: AugmentParams, u_BJ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The operations in use in a random order, and factors uniform in [max(0, 1 - s), 1 + s], for hue in [-s, s]."""
    used_4 = np.array([strength > 0 and augment.jitter_p > 0 for strength in augment.jitter])
    order_B4 = _PERMUTATIONS[(u_BJ[:, _ORDER] * len(_PERMUTATIONS)).astype(np.int64)]
    operation_BO = order_B4[used_4[order_B4]].reshape(len(u_BJ), used_4.sum())
    strength_4 = np.array(augment.jitter)
    low_4, high_4 = np.maximum(0, 1 - strength_4), 1 + strength_4
    low_4[HUE], high_4[HUE] = -strength_4[HUE], strength_4[HUE]
    factor_B4 = low_4 + (high_4 - low_4) * u_BJ[:, _FACTORS]
    factor_BO = np.take_along_axis(factor_B4, operation_BO, axis=1)
    return np.where(u_BJ[:, _JITTER, None] < augment.jitter_p, operation_BO, -1), factor_BO


def crop_boxes(crops: Crops, heights_B: ArrayLike, widths_B: ArrayLike) -> np.ndarray:
    """Boxes (top, left, height, width) in whole pixels, int64 (B, 4), in images of these sizes (arrays or one number for all).

    As torchvision's RandomResizedCrop: the first of 10 boxes, with area and log ratio uniform in the views' ranges, that fits, at a
    uniform position; if none fits, the largest box of an allowed ratio in the centre.
    """
    u_BJ = crops.uniforms_BJ
    heights_B = np.broadcast_to(np.asarray(heights_B, np.int64), len(u_BJ))
    widths_B = np.broadcast_to(np.asarray(widths_B, np.int64), len(u_BJ))
    low_B1, high_B1, least_B1, largest_B1 = np.hsplit(crops.ranges_B4, 4)
    area_BT = (heights_B * widths_B)[:, None] * (low_B1 + (high_B1 - low_B1) * u_BJ[:, _AREA])
    log_low_B1, log_high_B1 = np.log(least_B1), np.log(largest_B1)
    ratio_BT = np.exp(log_low_B1 + (log_high_B1 - log_low_B1) * u_BJ[:, _RATIO])
    width_BT, height_BT = np.rint(np.sqrt(area_BT * ratio_BT)), np.rint(np.sqrt(area_BT / ratio_BT))
    fits_BT = (width_BT > 0) & (width_BT <= widths_B[:, None]) & (height_BT > 0) & (height_BT <= heights_B[:, None])
    first_B, every_B = fits_BT.argmax(axis=1), np.arange(len(u_BJ))
    height_B, width_B = height_BT[every_B, first_B], width_BT[every_B, first_B]
    top_B = np.floor(u_BJ[:, _TOP] * (heights_B - height_B + 1))
    left_B = np.floor(u_BJ[:, _LEFT] * (widths_B - width_B + 1))
    boxes_B4 = np.stack([top_B, left_B, height_B, width_B], axis=1)
    return np.where(fits_BT.any(axis=1)[:, None], boxes_B4, _middle_boxes(heights_B, widths_B, crops.ranges_B4)).astype(np.int64)


def _middle_boxes(heights_B: np.ndarray, widths_B: np.ndarray, ranges_B4: np.ndarray) -> np.ndarray:
    """The largest boxes in the centre whose ratio is allowed."""
    height_B = np.minimum(heights_B, np.rint(widths_B / ranges_B4[:, 2]))
    width_B = np.minimum(widths_B, np.rint(heights_B * ranges_B4[:, 3]))
    return np.stack([(heights_B - height_B) // 2, (widths_B - width_B) // 2, height_B, width_B], axis=1)
