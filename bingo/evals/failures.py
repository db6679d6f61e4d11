"""The test images whose neighbours differ most from the teacher's, which show what a network has not learned.

Shape letters: N rows of the listing, Q test images, q those that are compared, K neighbours, E width of the teacher's features.
"""

from typing import Any

import numpy as np

from bingo.bags.neighbors import common_rows
from bingo.bags.rows import Rows

COMPARED = 5  # nearest train images
_LISTED, _MOST_QUERIES = 10, 2000


def least_agreement(network_QK: np.ndarray, teacher_QK: np.ndarray, teacher_NE: Rows, test_rows_Q: np.ndarray) -> dict[str, Any]:
    """The images of `test_rows_Q` with the fewest of the teacher's 5 nearest train images among the network's 5 nearest. Ties are ordered
    by how much less similar the network's neighbours are than the teacher's, in the teacher's features. `network_QK` and `teacher_QK` are
    the rows of `nearest_train`, 5 at least, or all train rows.

    JSON-serialisable: `k` (5, or the number of train rows if smaller), `queries` (the number of images compared: at most 2,000, evenly
    spread over `test_rows_Q`) and `images`, at most 10, only those with fewer than k in common: each {"row", "common": of k, "teacher" and
    "network": their k nearest rows, nearest first, each as [row, cosine to the image in the teacher's features]}. {} without test rows.
    """
    k, queries = min(COMPARED, network_QK.shape[1]), min(_MOST_QUERIES, len(test_rows_Q))
    if not queries:
        return {}
    compared_q = np.arange(queries) * len(test_rows_Q) // queries
    rows_q, network_qK, teacher_qK = test_rows_Q[compared_q], network_QK[compared_q, :k], teacher_QK[compared_q, :k]
    common_q = common_rows(network_qK, teacher_qK)
    cosines = dict(zip(("teacher", "network"), _cosines(teacher_NE, rows_q, (teacher_qK, network_qK)), strict=True))
    lost_q = cosines["teacher"].mean(axis=1) - cosines["network"].mean(axis=1)
    worst = [q for q in np.lexsort((rows_q, -lost_q, common_q)) if common_q[q] < k][:_LISTED]
    images = [
        {
            "row": int(rows_q[q]),
            "common": int(common_q[q]),
            "teacher": _listed(teacher_qK[q], cosines["teacher"][q]),
            "network": _listed(network_qK[q], cosines["network"][q]),
        }
        for q in worst
    ]
    return {"k": k, "queries": queries, "images": images}


def _cosines(features_NE: Rows, rows_q: np.ndarray, found: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """The cosines of each row to the rows of each (q, K) found for it, float32; 0 to a row of zeros. Each row is read once."""
    rows_n, place = np.unique(np.concatenate([rows_q, *(found_qK.ravel() for found_qK in found)]), return_inverse=True)
    unit_nE = _unit(features_NE[rows_n])
    query_qE, others = unit_nE[place[: len(rows_q)]], np.split(place[len(rows_q) :], len(found))
    return [
        np.stack([np.einsum("qe,qe->q", query_qE, unit_nE[place_q]) for place_q in places.reshape(found_qK.shape).T], axis=1)
        for places, found_qK in zip(others, found, strict=True)
    ]


def _unit(x_QE: np.ndarray) -> np.ndarray:
    x_QE = x_QE.astype(np.float32)
    return x_QE / np.maximum(np.linalg.norm(x_QE, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _listed(rows_K: np.ndarray, cosines_K: np.ndarray) -> list[list[float]]:
    return [[int(row), round(float(cosine), 4)] for row, cosine in zip(rows_K, cosines_K, strict=True)]
