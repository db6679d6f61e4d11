"""Nearest-neighbour accuracy of features: cosine, exact, every k and both votes from one search."""

from collections.abc import Sequence

import numpy as np

from bingo.bags.neighbors import top_k, votes
from bingo.runtime.errors import UserError


def knn_accuracies(
    train_features_TD: np.ndarray,
    train_labels_T: np.ndarray,
    test_features_QD: np.ndarray,
    test_labels_Q: np.ndarray,
    ks: Sequence[int],
    temperature: float,
) -> dict[str, float]:
    """Top-1 accuracy in percent: `knn_K` by one vote each, `knn_K_weighted` by votes of exp(cosine / temperature), for each k.

    Features of any float type, not normalised; labels are classes from 0. Of classes with equally many votes the one with the
    nearest member wins. Raises UserError where a k exceeds the train rows, a label is unknown (-1), there is nothing to test on,
    or a feature is not finite.
    """
    _check(len(train_labels_T), len(test_labels_Q), ks)
    for name, labels in (("train", train_labels_T), ("test", test_labels_Q)):
        if (labels < 0).any():
            problem = f"{int((labels < 0).sum())} of {len(labels)} {name} rows have no label"
            raise UserError(f"kNN evaluation: {problem}; sort the images into class folders, or leave this stage out")
    try:
        rows_QK, cosines_QK = top_k(test_features_QD, train_features_TD, max(ks))
    except ValueError as error:
        raise UserError(f"kNN evaluation: {error}; the network is broken: check the training curves and lower distill.lr") from None
    accuracies = {}
    for k, (plain_Q, weighted_Q) in votes(train_labels_T, rows_QK, cosines_QK, ks, temperature).items():
        accuracies[f"knn_{k}"] = _percent(plain_Q == test_labels_Q)
        accuracies[f"knn_{k}_weighted"] = _percent(weighted_Q == test_labels_Q)
    return accuracies


def _check(train_rows: int, test_rows: int, ks: Sequence[int]) -> None:
    if not test_rows:
        raise UserError("kNN evaluation: the listing has no test rows; add val/CLASS/*.jpg, or leave this stage out")
    if max(ks) > train_rows:
        raise UserError(f"knn_eval.k = {max(ks)}: there are only {train_rows} train rows; allowed are 1 to {train_rows}")


def _percent(hits_Q: np.ndarray) -> float:
    return round(100 * float(hits_Q.mean()), 6)
