"""The test images whose neighbours differ most from the teacher's, which show what a network has not learned.

Shape letters: N rows of the listing, T train rows, Q test images, K neighbours, D width of a network's features, E of the teacher's.
"""

from typing import Any

import numpy as np

from bingo.bags.neighbors import common_rows
from bingo.evals.knn import nearest_train

_NEIGHBORS, _LISTED, _MOST_QUERIES = 5, 10, 2000


def least_agreement(features_ND: np.ndarray, teacher_NE: np.ndarray, train_rows: int, test_rows_Q: np.ndarray) -> dict[str, Any]:
    """The images of `test_rows_Q` with the fewest of the teacher's 5 nearest train images among the network's 5 nearest. Ties are ordered
    by how much less similar the network's neighbours are than the teacher's, in the teacher's features.

    JSON-serialisable: `k` (5, or the number of train rows if smaller), `queries` (the number of images compared: at most 2,000, evenly
    spread over `test_rows_Q`) and `images`, at most 10, only those with fewer than k in common: each {"row", "common": of k, "teacher" and
    "network": their k nearest rows, nearest first, each as [row, cosine to the image in the teacher's features]}. {} without train or test
    rows.
    """
    k, queries = min(_NEIGHBORS, train_rows), min(_MOST_QUERIES, len(test_rows_Q))
    if not k or not queries:
        return {}
    rows_Q = test_rows_Q[np.arange(queries) * len(test_rows_Q) // queries]
    network_QK, teacher_QK = (nearest_train(x[:train_rows], x[rows_Q], k)[0] for x in (features_ND, teacher_NE))
    common_Q = common_rows(network_QK, teacher_QK)
    cosines = {name: _cosines(teacher_NE, rows_Q, found_QK) for name, found_QK in (("teacher", teacher_QK), ("network", network_QK))}
    lost_Q = cosines["teacher"].mean(axis=1) - cosines["network"].mean(axis=1)
    worst = [q for q in np.lexsort((rows_Q, -lost_Q, common_Q)) if common_Q[q] < k][:_LISTED]
    images = [
        {
            "row": int(rows_Q[q]),
            "common": int(common_Q[q]),
            "teacher": _listed(teacher_QK[q], cosines["teacher"][q]),
            "network": _listed(network_QK[q], cosines["network"][q]),
        }
        for q in worst
    ]
    return {"k": k, "queries": queries, "images": images}


def _cosines(features_NE: np.ndarray, rows_Q: np.ndarray, found_QK: np.ndarray) -> np.ndarray:
    """The cosine of each row to the rows found for it, float32 (Q, K); 0 to a row of zeros."""
    query_QE = _unit(features_NE[rows_Q])
    return np.stack([np.einsum("qe,qe->q", query_QE, _unit(features_NE[found_Q])) for found_Q in found_QK.T], axis=1)


def _unit(x_QE: np.ndarray) -> np.ndarray:
    x_QE = x_QE.astype(np.float32)
    return x_QE / np.maximum(np.linalg.norm(x_QE, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _listed(rows_K: np.ndarray, cosines_K: np.ndarray) -> list[list[float]]:
    return [[int(row), round(float(cosine), 4)] for row, cosine in zip(rows_K, cosines_K, strict=True)]
