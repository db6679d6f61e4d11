"""Compare two bag indexes of one listing, anchor by anchor: overlap of the bags, and purity gained or lost.

Shape letters: T train rows, K members listed, n rows of a block.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bingo.bags.index import Bags
from bingo.bags.metrics import purities, rounded
from bingo.runtime.progress import progress_bar

_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class BagDiff:
    """For every anchor: `jaccard_T` float32, the number of rows in both bags over the number in either (1 if both are empty), for whole
    bags (all other rows of a cluster, not only the listed ones); `purity_before_T`, `purity_after_T` float32 of the listed members.
    """

    jaccard_T: np.ndarray
    purity_before_T: np.ndarray
    purity_after_T: np.ndarray

    def most_changed(self, count: int) -> np.ndarray:
        """The rows int64 (count,) with the smallest overlap; ties are ordered by the change of purity, largest first."""
        gain_T = np.nan_to_num(self.purity_after_T - self.purity_before_T)  # 0 if either is unknown
        return np.lexsort((np.arange(len(self.jaccard_T)), -np.abs(gain_T), self.jaccard_T))[:count]

    def summary(self) -> dict[str, Any]:
        """JSON-serialisable figures over all anchors; shares are from 0 to 1, numbers are rounded to 6 digits.

        `same_bags`, `disjoint_bags`, `gained_anchors` and `lost_anchors` are counts. Purity after = before + gained + lost.
        """
        quantiles = {f"p{percent:02d}": rounded(np.quantile(self.jaccard_T, percent / 100)) for percent in (5, 25, 50, 75, 95)}
        figures: dict[str, Any] = {
            "anchors": len(self.jaccard_T),
            "jaccard": {"mean": rounded(self.jaccard_T.mean()), **quantiles},
            "same_bags": int((self.jaccard_T == 1).sum()),
            "disjoint_bags": int((self.jaccard_T == 0).sum()),
        }
        known_T = ~np.isnan(self.purity_before_T) & ~np.isnan(self.purity_after_T)
        if known_T.any():
            gain_n = (self.purity_after_T - self.purity_before_T)[known_T]
            figures["purity"] = {
                "before": rounded(self.purity_before_T[known_T].mean()),
                "after": rounded(self.purity_after_T[known_T].mean()),
                "gained_anchors": int((gain_n > 0).sum()),
                "lost_anchors": int((gain_n < 0).sum()),
                "gained": rounded(gain_n[gain_n > 0].sum() / len(gain_n)),
                "lost": rounded(gain_n[gain_n < 0].sum() / len(gain_n)),
            }
        return figures


@progress_bar("comparing the bags")
def compare_bags(before: Bags, after: Bags, labels_T: np.ndarray) -> BagDiff:
    """Compare two indexes of the same train rows. `labels_T`: their classes, -1 unknown."""
    both_T = _overlap(before, after)
    either_T = before.bag_sizes_T + after.bag_sizes_T - both_T
    jaccard_T = np.where(either_T > 0, both_T / np.maximum(either_T, 1), 1).astype(np.float32)
    return BagDiff(jaccard_T, purities(before.members_TK, labels_T), purities(after.members_TK, labels_T))


def _overlap(before: Bags, after: Bags) -> np.ndarray:
    """Number of rows in both bags of each anchor, int64 (T,): clusters are counted, lists are compared in blocks."""
    if before.cluster_T is not None and after.cluster_T is not None:
        pair_T = before.cluster_T.astype(np.int64) * (int(after.cluster_T.max()) + 1) + after.cluster_T
        _, place_T, counts = np.unique(pair_T, return_inverse=True, return_counts=True)
        return counts[place_T] - 1  # rows that share both clusters with the anchor, which does too
    listed, other = (after, before) if before.cluster_T is not None else (before, after)
    rows = len(listed.members_TK)
    both_T = np.zeros(rows, np.int64)
    for start in range(0, rows, _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        members_nK = listed.members_TK[block]
        if other.cluster_T is None:
            inside_nK = (members_nK[:, :, None] == other.members_TK[block][:, None, :]).any(axis=2)
        else:
            inside_nK = other.cluster_T[members_nK] == other.cluster_T[block][:, None]
        both_T[block] = (inside_nK & (members_nK >= 0)).sum(axis=1)
    return both_T
