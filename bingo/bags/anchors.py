"""Statistics of every anchor's bag, by which galleries sort and which comparisons subtract.

Shape letters: T train rows, K members listed, C clusters (or classes).
"""

from dataclasses import dataclass

import numpy as np

from bingo.bags.index import Bags
from bingo.bags.metrics import same_and_known


@dataclass(frozen=True)
class AnchorFigures:
    """Of each anchor's listed members: `purity_T` float32, the share with the anchor's label, NaN if no labels are known;
    `similarity_T` float32, the mean cosine, NaN for an empty bag; `in_degree_T` int64, the number of bags that contain the row.
    """

    purity_T: np.ndarray
    similarity_T: np.ndarray
    in_degree_T: np.ndarray


def anchor_figures(bags: Bags, labels_T: np.ndarray) -> AnchorFigures:
    """The figures of every anchor. `labels_T`: classes of the train rows, -1 unknown."""
    listed_TK = bags.members_TK >= 0
    counts_T = listed_TK.sum(axis=1)
    cosines_TK = np.where(listed_TK, bags.similarity_TK, 0).astype(np.float32)
    return AnchorFigures(
        purity_T=purities(bags.members_TK, labels_T),
        similarity_T=_ratio(cosines_TK.sum(axis=1), counts_T),
        in_degree_T=np.bincount(bags.members_TK[listed_TK], minlength=len(listed_TK)),
    )


def purities(members_TK: np.ndarray, labels_T: np.ndarray) -> np.ndarray:
    """Share of labelled members with the anchor's label, float32 (T,); NaN if the anchor or every member has none."""
    return _ratio(*same_and_known(members_TK, labels_T))


def _ratio(part_T: np.ndarray, whole_T: np.ndarray) -> np.ndarray:
    return np.where(whole_T > 0, part_T / np.maximum(whole_T, 1), np.nan).astype(np.float32)
