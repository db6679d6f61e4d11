"""scikit-learn's 1,797 handwritten digits, each drawn several times at a random position, scale and angle on a larger canvas.

The dataset is small, real and needs no download. The teacher must learn to recognise the same digit at several positions.
"""

import numpy as np
from PIL import Image

from bingo import seeds
from bingo.params import DatasetParams
from bingo.runtime.progress import progress_bar

DATASET = "digits-1"  # change this number when the drawing changes
_SOURCE_PX, _SOURCE_LEVELS = 8, 16
_TEST_SHARE = 0.2


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits as uint8 (1797, 8, 8), 0 the background and 255 full ink, and their labels int64 (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.rint(digits.images * (255 / _SOURCE_LEVELS)).astype(np.uint8), digits.target.astype(np.int64)


def is_test_digit(labels_D: np.ndarray, seed: int) -> np.ndarray:
    """Which digits are for testing, bool (D,): a fifth of each class, drawn by seed. All placements of a digit are in the same split."""
    is_test_D = np.zeros(len(labels_D), bool)
    order_D = seeds.permutation(seed, "digits/split", 0, len(labels_D))
    for label in np.unique(labels_D):
        members = order_D[labels_D[order_D] == label]
        is_test_D[members[: round(_TEST_SHARE * len(members))]] = True
    return is_test_D


def draw_digits(digits_D88: np.ndarray, digits_N: np.ndarray, placements_N: np.ndarray, dataset: DatasetParams, seed: int) -> np.ndarray:
    """Digit `digits_N[n]` in placement `placements_N[n]` on a black canvas: uint8 (N, S, S, 3), S = store_px.

    The side is a share in `placement_scale` of the canvas, the centre any point for which the upright square is inside, and the angle
    within `placement_degrees`; all are uniform and depend on (digit, placement).
    """
    assert dataset.store_px is not None
    canvas_px = dataset.store_px
    u_N4 = seeds.uniforms(seed, "digits/place", 0, digits_N, placements_N, 4)
    low, high = dataset.placement_scale
    side_N = canvas_px * (low + (high - low) * u_N4[:, 0])
    center_N2 = side_N[:, None] / 2 + (canvas_px - side_N)[:, None] * u_N4[:, 1:3]
    angle_N = np.deg2rad(dataset.placement_degrees) * (2 * u_N4[:, 3] - 1)
    images_NSS = np.empty((len(digits_N), canvas_px, canvas_px), np.uint8)
    sources = [Image.fromarray(digit) for digit in digits_D88]
    with progress_bar("drawing the digits", len(digits_N), "images") as bar:
        for n, digit in enumerate(digits_N.tolist()):
            affine = _canvas_to_source(side_N[n], center_N2[n], angle_N[n])
            drawn = sources[digit].transform((canvas_px, canvas_px), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
            images_NSS[n] = np.asarray(drawn)
            bar.advance()
    return np.repeat(images_NSS[..., None], 3, axis=3)


def _canvas_to_source(side: float, center_xy: np.ndarray, angle: float) -> tuple[float, ...]:
    """Pillow's six numbers: the source point of a canvas point, (x', y') = R (x - center) * 8 / side + 4."""
    zoom = _SOURCE_PX / side
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    x, y = center_xy
    half = _SOURCE_PX / 2
    return (cos, sin, half - cos * x - sin * y, -sin, cos, half + sin * x - cos * y)
