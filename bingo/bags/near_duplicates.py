"""Near-duplicates: images so much closer to each other than usual that they are probably copies of one image, possibly resized, brightened
or cropped a little.

How close different images are depends on the network: the median cosine of an image to its nearest neighbour is 0.74 for CIFAR-10 with
ImageNet's EfficientNet-Lite0, and 0.96 for digits with a small MoCo-v2 teacher. So the limit is a fraction of the median distance, 1 -
cosine, of an image to its tenth-nearest neighbour; the tenth, so that up to nine copies of most images do not make it small. In this unit,
the distance between different images is at least 0.11 (digits), 0.23 (CIFAR-10) and 0.36 (COCO), and that of a JPEG of quality 75 to its
original at most 0.05, 0.05 and 0.08.

Shape letters: T train rows, Q test rows, D feature width.
"""

import numpy as np

from bingo import seeds
from bingo.bags.ivf import InvertedFile, nearest_in_lists
from bingo.bags.rows import Rows
from bingo.bags.sharing import ALONE, Sharing

_SAMPLE_ROWS, _PLACE, _PROBES = 1000, 10, 16


def near_duplicate_cosine(features_TD: Rows, fraction: float, seed: int, sharing: Sharing = ALONE, name: str = "distances") -> float:
    """The cosine above which two images are near-duplicates: 1 - `fraction` times the median distance, 1 - cosine, of a row to its
    tenth-nearest row (with fewer rows, to the farthest), over a seeded sample of at most 1,000 rows. Infinite if `fraction` is 0, or for a
    single row. `name` identifies this search among those that processes share."""
    place = min(_PLACE, len(features_TD) - 1)
    if fraction == 0 or place == 0:
        return float("inf")
    rows = np.sort(seeds.permutation(seed, "near-duplicates", 0, len(features_TD))[:_SAMPLE_ROWS])
    _, cosines = sharing.nearest(name, features_TD[rows], features_TD, place, rows)
    return 1 - fraction * (1 - float(np.median(cosines[:, -1])))


def rows_near(
    features_QD: np.ndarray, features_TD: Rows, cosine: float, sharing: Sharing = ALONE, search_seed: int | None = None
) -> np.ndarray:
    """Those of the Q rows that have a near-duplicate among the T rows, a cosine above `cosine`: int64, rising.

    With `search_seed` the first process alone searches, for each of the Q rows, the 16 nearest of sqrt(T) lists. A near-duplicate is rarely
    in another list, and an exact search among a million rows takes longer than their bags by lists.
    """
    if not len(features_QD) or np.isinf(cosine) or (search_seed is not None and not sharing.first):
        return np.empty(0, np.int64)
    if search_seed is not None:
        lists = InvertedFile(round(len(features_TD) ** 0.5), _PROBES, search_seed)
        return np.flatnonzero(nearest_in_lists(features_QD, features_TD, cosine, lists) > cosine)
    _, cosines = sharing.nearest("near", features_QD, features_TD, 1, floor_Q=np.full(len(features_QD), cosine, np.float32))
    return np.flatnonzero(cosines[:, 0] > cosine)
