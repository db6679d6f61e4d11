"""Agreement with the teacher, which needs no labels: how many of an image's neighbours are the same for the teacher and a network.

Shape letters: Q test images, T train images, K neighbours.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bingo.bags.neighbors import Found, common_rows
from bingo.evals.knn import voted_hits
from bingo.images.listing import Listing
from bingo.params import KnnEvalParams

AGREEMENT = "agreement_"


def usable_ks(params: KnnEvalParams, listing: Listing, say: Callable[[str], None]) -> tuple[list[int], list[int]]:
    """The values of knn_eval.k and knn_eval.agreement_k for which there are enough images and labels; the others are reported with
    `say`."""
    train = listing.train_rows
    if not len(listing.test_rows_N):
        return [], []
    if not listing.labelled:
        say(f"knn_eval: {listing.unjudged}, so only the agreement with the teacher is measured")
    wanted = {"k": params.k if listing.labelled else [], "agreement_k": params.agreement_k}
    for name, ks in wanted.items():
        if left_out := [str(k) for k in ks if k > train]:
            say(f"knn_eval: there are only {train} train images, so knn_eval.{name} {', '.join(left_out)} is left out")
    ks, agreement_ks = ([k for k in ks if k <= train] for ks in wanted.values())
    return ks, agreement_ks


def neighbor_hits(
    found: Found, teacher_rows_QK: np.ndarray | None, listing: Listing, ks: Sequence[int], temperature: float, agreement_ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """For each test image, `voted_hits` for each of `ks` and `agreed_hits` with the teacher (None: without). `found` is what
    `nearest_train` gives for the network."""
    labels_N = listing.labels_N
    hits = voted_hits(found, labels_N[: listing.train_rows], labels_N[listing.test_rows_N], ks, temperature) if ks else {}
    return hits | ({} if teacher_rows_QK is None else agreed_hits(found[0], teacher_rows_QK, agreement_ks))


def neighbor_scores(hits: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each of `neighbor_hits` in percent; for `agreement_K`, percent of K."""
    possible = {name: int(name.removeprefix(AGREEMENT)) if name.startswith(AGREEMENT) else 1 for name in hits}
    return {name: round(100 * int(hits_Q.sum()) / (possible[name] * len(hits_Q)), 6) for name, hits_Q in hits.items()}


def agreed_hits(rows_QK: np.ndarray, teacher_rows_QK: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """`agreement_K` for each k of `ks`: how many of the k train images nearest to each test image are the same for a network and the
    teacher, int32 (Q,). The rows are those of `nearest_train`."""
    return {f"{AGREEMENT}{k}": common_rows(rows_QK[:, :k], teacher_rows_QK[:, :k]) for k in ks}


def neighbor_agreement(rows_QK: np.ndarray, teacher_rows_QK: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """`agreement_K` for each k of `ks`: of the k train images nearest to a test image in the teacher's features, the percentage that is
    also among the k nearest in the network's features, averaged over the test images.

    Both arguments are the rows of a `top_k`, nearest first, of the same queries and the same base, with at least max(ks) columns and
    no padding (-1). A random order of T train images would reach 100 k / T on average.
    """
    return neighbor_scores(agreed_hits(rows_QK, teacher_rows_QK, ks))
