"""k-nearest-neighbour accuracy of features: an exact search by cosine, used for all k and both kinds of votes.

Shape letters: Q queries, K neighbours, C classes; q queries of a block.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from bingo.bags.neighbors import Blocks, Found, best_of, cut, nothing_found, search_blocks
from bingo.bags.rows import unit_rows
from bingo.runtime.errors import UserError
from bingo.runtime.memory import release_freed_memory

_QUERIES_AT_ONCE = 4096  # of which neighbours are merged and votes counted, which bounds the memory


def knn_accuracies(
    train_features_TD: np.ndarray,
    train_labels_T: np.ndarray,
    test_features_QD: np.ndarray,
    test_labels_Q: np.ndarray,
    ks: Sequence[int],
    temperature: float,
) -> dict[str, float]:
    """Top-1 accuracy in percent, the mean of each of `voted_hits`, of features of any float type, not normalised. Raises UserError as
    `nearest_train` does."""
    found = nearest_train(train_features_TD, test_features_QD, max(ks))
    hits = voted_hits(found, train_labels_T, test_labels_Q, ks, temperature)
    return {name: round(100 * float(hits_Q.mean()), 6) for name, hits_Q in hits.items()}


def nearest_train(train_features_TD: np.ndarray, test_features_QD: np.ndarray, k: int) -> Found:
    """The k train rows with the highest cosine to each test row, nearest first: (rows int32 (Q, k), cosines float32 (Q, k)).

    Features are of any float type, not normalised. Raises UserError if there are fewer than k train rows or no test rows, or if a
    feature is not finite.
    """
    if not len(test_features_QD):
        raise UserError("k-NN evaluation: the listing has no test rows; add val/CLASS/*.jpg, or leave this stage out")
    if k > len(train_features_TD):
        raise UserError(f"knn_eval.k = {k}: there are only {len(train_features_TD)} train rows; allowed are 1 to {len(train_features_TD)}")
    return nearest_in_blocks(iter([test_features_QD, train_features_TD]), k)


def nearest_in_blocks(blocks: Iterator[np.ndarray], k: int) -> Found:
    """`nearest_train` for features in blocks, of which only one is held at a time: all test rows, then consecutive train rows."""
    found, first, where = nothing_found(0, k), 0, "the test images"
    release_freed_memory()  # of an earlier search
    try:
        unit_QD = unit_rows(next(blocks))
        found = nothing_found(len(unit_QD), k)
        for block_nD in blocks:
            where = f"the train images from row {first}"
            release_freed_memory()  # of the forward passes
            search_blocks(_Merged(found, first), unit_QD, block_nD, k, floor_Q=found[1][:, -1], unit_queries=True)
            first += len(block_nD)
            del block_nD  # before the next one is allocated
            release_freed_memory()
    except ValueError as error:
        way_out = "the network is broken: check the training curves and lower distill.lr"
        raise UserError(f"k-NN evaluation: {where}: {error}; {way_out}") from None
    return found


class _Merged(Blocks):
    """A search of a block of train rows, the first of which is the train row `first`; the nearest rows are merged into `found`, (Q, k)."""

    def __init__(self, found: Found, first: int):
        super().__init__(0, 0)
        self.found, self._first = found, np.int32(first)

    def keep(self, block: slice, found: tuple[np.ndarray, ...]) -> None:
        """Merge the results of some queries, a few at a time to save memory."""
        for part in cut(block, _QUERIES_AT_ONCE):
            rows_qK, cosines_qK = (of_block_qK[part.start - block.start : part.stop - block.start] for of_block_qK in found)
            rows_qK = np.where(rows_qK >= 0, rows_qK + self._first, -1)
            both = np.concatenate([self.found[0][part], rows_qK], axis=1), np.concatenate([self.found[1][part], cosines_qK], axis=1)
            self.found[0][part], self.found[1][part] = best_of(*both, self.found[0].shape[1])


def voted_hits(
    found: Found, train_labels_T: np.ndarray, test_labels_Q: np.ndarray, ks: Sequence[int], temperature: float
) -> dict[str, np.ndarray]:
    """Whether each test image is classified correctly, bool (Q,), for each k: `knn_K` with equal votes, `knn_K_weighted` with weighted
    ones. `found` is what `nearest_train` gives; see `votes`."""
    hits = dict[str, np.ndarray]()
    for k, (plain_Q, weighted_Q) in votes(train_labels_T, *found, ks, temperature).items():
        hits |= {f"knn_{k}": plain_Q == test_labels_Q, f"knn_{k}_weighted": weighted_Q == test_labels_Q}
    return hits


def votes(labels_N: np.ndarray, rows_QK: np.ndarray, cosines_QK: np.ndarray, ks: Sequence[int], temperature: float) -> dict[int, Found]:
    """For each k of `ks`, the classes int64 (Q,) that the first k neighbours of a `top_k` vote for: (with equal votes, with votes of
    weight exp(cosine / temperature)).

    `labels_N` are the classes of the base from 0, none unknown. Of classes with equally many votes the one with the nearest member wins
    (Wu et al. 2018, arXiv:1805.01978, section 3.4).
    """
    classes = int(labels_N.max()) + 1
    winners = {k: (np.empty(len(rows_QK), np.int64), np.empty(len(rows_QK), np.int64)) for k in ks}
    for part in cut(slice(0, len(rows_QK)), _QUERIES_AT_ONCE):
        rows_qK, cosines_qK = rows_QK[part], cosines_QK[part].astype(np.float64)
        labels_qK, plain_qK = np.where(rows_qK >= 0, labels_N[rows_qK], 0), (rows_qK >= 0).astype(np.float64)
        # relative to the nearest neighbour: the winner is the same and no exponential overflows; exp(-inf) = 0 for padding
        weight_qK = np.exp((cosines_qK - cosines_qK[:, :1]) / temperature)
        for k, (plain_Q, weighted_Q) in winners.items():
            plain_Q[part] = _winners(labels_qK[:, :k], plain_qK[:, :k], classes)
            weighted_Q[part] = _winners(labels_qK[:, :k], weight_qK[:, :k], classes)
    return winners


def _winners(labels_qK: np.ndarray, weight_qK: np.ndarray, classes: int) -> np.ndarray:
    """The class with the largest sum of weights for each query, (q,); in a tie, the one with the nearest neighbour."""
    queries_q1 = np.arange(len(labels_qK))[:, None]
    flat = np.bincount((queries_q1 * classes + labels_qK).ravel(), weight_qK.ravel(), minlength=len(labels_qK) * classes)
    sums_qC = flat.reshape(len(labels_qK), classes)
    first_q = (sums_qC[queries_q1, labels_qK] == sums_qC.max(axis=1, keepdims=True)).argmax(axis=1)
    return labels_qK[queries_q1[:, 0], first_q]
