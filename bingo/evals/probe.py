"""A quick measure of a network during training, on some of the test and train images: k-NN accuracy, or, without labels, agreement with
the teacher.

Shape letters: Q queries, K neighbours.
"""

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from bingo import seeds
from bingo.evals.agreement import neighbor_agreement
from bingo.evals.features import backbone_features
from bingo.evals.knn import knn_accuracies, nearest_train
from bingo.images.images import Images
from bingo.images.listing import Listing
from bingo.params import ImageParams

if TYPE_CHECKING:  # a training without a teacher does not depend on it
    from bingo.embeddings.store import Embeddings

BANK_IMAGES, QUERY_IMAGES, NEIGHBORS, TEMPERATURE, BATCH_IMAGES = 5000, 1000, 10, 0.07, 256


def probe_rows(listing: Listing, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A seeded sample of at most 5,000 train rows and 1,000 test rows, each sorted; without a test split, both are disjoint sets of train
    rows."""
    bank = seeds.permutation(seed, "probe bank", 0, listing.train_rows)
    test_rows = len(listing) - listing.train_rows
    if test_rows == 0:
        queries = min(QUERY_IMAGES, len(bank) // 5)
        return np.sort(bank[queries : queries + BANK_IMAGES]), np.sort(bank[:queries])
    query = listing.train_rows + seeds.permutation(seed, "probe queries", 0, test_rows)
    return np.sort(bank[:BANK_IMAGES]), np.sort(query[:QUERY_IMAGES])


class Probe:
    """Measures a backbone on `device` when called: {"knn_10": percent} if the listing has labels, otherwise {"agreement_10": percent} if
    the teacher's `embeddings` are given; `measures` is false if neither can be measured. The backbone's mode and buffers do not change.

    knn_10 is by equal votes of the 10 nearest train images (or of all, if there are fewer). agreement_10 is `neighbor_agreement` among the
    T train rows of `probe_rows`, of which there must be more than 10; by chance it is 1000 / T.
    """

    def __init__(
        self,
        listing: Listing,
        images: Images,
        image: ImageParams,
        seed: int,
        device: torch.device,
        precision: str,
        embeddings: "Embeddings | None" = None,
    ):
        self.bank_rows, self.query_rows = probe_rows(listing, seed)
        self.listing, self.images, self.image, self.embeddings = listing, images, image, embeddings
        self.device, self.precision = device, precision

    @property
    def measures(self) -> bool:
        """Whether there are images to measure on, and labels or a teacher to compare with."""
        agrees = self.embeddings is not None and len(self.bank_rows) > NEIGHBORS
        return len(self.query_rows) > 0 and (self.listing.labelled or agrees)

    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        rows = np.concatenate([self.bank_rows, self.query_rows])
        features = backbone_features(backbone, self.images, rows, self.image, self.device, self.precision, BATCH_IMAGES)
        bank, query = np.split(features, [len(self.bank_rows)])
        if not self.listing.labelled:
            return neighbor_agreement(nearest_train(bank, query, NEIGHBORS)[0], self._teacher_rows_QK, [NEIGHBORS])
        neighbors, labels_N = min(NEIGHBORS, len(bank)), self.listing.labels_N
        scores = knn_accuracies(bank, labels_N[self.bank_rows], query, labels_N[self.query_rows], [neighbors], TEMPERATURE)
        return {"knn_10": scores[f"knn_{neighbors}"]}

    @cached_property
    def _teacher_rows_QK(self) -> np.ndarray:
        """The 10 nearest of `bank_rows` to each of `query_rows` in the teacher's features, as places in `bank_rows`: int32 (Q, 10)."""
        assert self.embeddings is not None
        bank, query = self.embeddings.features[self.bank_rows], self.embeddings.features[self.query_rows]
        return nearest_train(bank, query, NEIGHBORS)[0]
