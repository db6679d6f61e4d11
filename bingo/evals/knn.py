"""k-nearest-neighbour accuracy of features: exact search by cosine, all k and both votes from one search.

Shape letters: Q queries, K neighbours, C classes; q queries of a block.
"""

from collections.abc import Sequence

import numpy as np

from bingo.bags.neighbors import Found, top_k
from bingo.runtime.errors import UserError


def knn_accuracies(
    train_features_TD: np.ndarray,
    train_labels_T: np.ndarray,
    test_features_QD: np.ndarray,
    test_labels_Q: np.ndarray,
    ks: Sequence[int],
    temperature: float,
) -> dict[str, float]:
    """Top-1 accuracy in percent, the mean of each of `voted_hits`, of features of any float type, not normalised. Raises UserError as that
    and `nearest_train` do."""
    found = nearest_train(train_features_TD, test_features_QD, max(ks))
    return {name: percent_of(hits_Q) for name, hits_Q in voted_hits(found, train_labels_T, test_labels_Q, ks, temperature).items()}


def nearest_train(train_features_TD: np.ndarray, test_features_QD: np.ndarray, k: int) -> Found:
    """The k train rows with the highest cosine to each test row, nearest first: (rows int32 (Q, k), cosines float32 (Q, k)).

    Features are of any float type, not normalised. Raises UserError if there are fewer than k train rows or no test rows, or if a
    feature is not finite.
    """
    if not len(test_features_QD):
        raise UserError("k-NN evaluation: the listing has no test rows; add val/CLASS/*.jpg, or leave this stage out")
    if k > len(train_features_TD):
        raise UserError(f"knn_eval.k = {k}: there are only {len(train_features_TD)} train rows; allowed are 1 to {len(train_features_TD)}")
    try:
        return top_k(test_features_QD, train_features_TD, k)
    except ValueError as error:
        raise UserError(f"k-NN evaluation: {error}; the network is broken: check the training curves and lower distill.lr") from None


def voted_hits(
    found: Found, train_labels_T: np.ndarray, test_labels_Q: np.ndarray, ks: Sequence[int], temperature: float
) -> dict[str, np.ndarray]:
    """Whether each test image is classified correctly, bool (Q,): `knn_K` by one vote each, `knn_K_weighted` by votes of
    exp(cosine / temperature), for each k.

    `found` is what `nearest_train` gives; labels are classes from 0. Of classes with equally many votes the one with the nearest member
    wins. Raises UserError if a label is unknown (-1).
    """
    for name, labels in (("train", train_labels_T), ("test", test_labels_Q)):
        if (labels < 0).any():
            problem = f"{int((labels < 0).sum())} of {len(labels)} {name} rows have no label"
            raise UserError(f"k-NN evaluation: {problem}; sort the images into class folders, or leave this stage out")
    hits = {}
    for k, (plain_Q, weighted_Q) in votes(train_labels_T, *found, ks, temperature).items():
        hits[f"knn_{k}"] = plain_Q == test_labels_Q
        hits[f"knn_{k}_weighted"] = weighted_Q == test_labels_Q
    return hits


def votes(labels_N: np.ndarray, rows_QK: np.ndarray, cosines_QK: np.ndarray, ks: Sequence[int], temperature: float) -> dict[int, Found]:
    """For each k of `ks`, the classes int64 (Q,) that the first k neighbours of a `top_k` vote for: (one vote each, weighted).

    The weight is exp(cosine / temperature) (Wu et al. 2018, arXiv:1805.01978, section 3.4). Of classes with equally many votes
    the one with the nearest member wins. `labels_N` are the classes of the base, none negative.
    """
    classes = int(labels_N.max()) + 1
    labels_QK = np.where(rows_QK >= 0, labels_N[rows_QK], 0)
    plain_QK = (rows_QK >= 0).astype(np.float64)
    # relative to the nearest neighbour: the winner is the same and no exponential overflows; exp(-inf) = 0 for padding
    weight_QK = np.exp((cosines_QK.astype(np.float64) - cosines_QK[:, :1]) / temperature)

    def both(k: int) -> Found:
        nearest_QK = labels_QK[:, :k]
        return _winners(nearest_QK, plain_QK[:, :k], classes), _winners(nearest_QK, weight_QK[:, :k], classes)

    return {k: both(k) for k in ks}


def _winners(labels_QK: np.ndarray, weight_QK: np.ndarray, classes: int, block_rows: int = 4096) -> np.ndarray:
    """The class with the largest sum of weights for each query; of equal ones that with the nearest neighbour."""
    winners_Q = np.empty(len(labels_QK), np.int64)
    for start in range(0, len(labels_QK), block_rows):
        labels_qK, weight_qK = labels_QK[start : start + block_rows], weight_QK[start : start + block_rows]
        queries_q1 = np.arange(len(labels_qK))[:, None]
        flat = np.bincount((queries_q1 * classes + labels_qK).ravel(), weight_qK.ravel(), minlength=len(labels_qK) * classes)
        sums_qC = flat.reshape(len(labels_qK), classes)
        first_q = (sums_qC[queries_q1, labels_qK] == sums_qC.max(axis=1, keepdims=True)).argmax(axis=1)
        winners_Q[start : start + block_rows] = labels_qK[queries_q1[:, 0], first_q]
    return winners_Q


def percent_of(hits_Q: np.ndarray) -> float:
    """The share of hits in percent, rounded to six places."""
    return round(100 * float(hits_Q.mean()), 6)
