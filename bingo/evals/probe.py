"""A quick measure of a network during training: k-NN accuracy for a part of the test images among a part of the train images."""

import numpy as np
import torch
from torch import nn

from bingo import seeds
from bingo.evals.features import backbone_features
from bingo.evals.knn import knn_accuracies
from bingo.images.images import Images
from bingo.images.listing import Listing
from bingo.params import ImageParams

BANK_IMAGES, QUERY_IMAGES, NEIGHBORS, TEMPERATURE, BATCH_IMAGES = 5000, 1000, 10, 0.07, 256


def probe_rows(listing: Listing, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A seeded draw of at most 5,000 train rows and 1,000 test rows, each sorted; without a test split, both are train rows."""
    bank = seeds.permutation(seed, "probe bank", 0, listing.train_rows)
    test_rows = len(listing) - listing.train_rows
    if test_rows == 0:
        queries = min(QUERY_IMAGES, len(bank) // 5)
        return np.sort(bank[queries : queries + BANK_IMAGES]), np.sort(bank[:queries])
    query = listing.train_rows + seeds.permutation(seed, "probe queries", 0, test_rows)
    return np.sort(bank[:BANK_IMAGES]), np.sort(query[:QUERY_IMAGES])


class KnnProbe:
    """Call it with a backbone: {"knn_10": percent}. It changes neither the backbone's mode nor its buffers."""

    def __init__(self, listing: Listing, images: Images, image: ImageParams, seed: int, device: torch.device, precision: str):
        self.bank_rows, self.query_rows = probe_rows(listing, seed)
        self.labels_N, self.images, self.image = listing.labels_N, images, image
        self.device, self.precision = device, precision

    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        rows = np.concatenate([self.bank_rows, self.query_rows])
        features = backbone_features(backbone, self.images, rows, self.image, self.device, self.precision, BATCH_IMAGES)
        bank, query = features[: len(self.bank_rows)], features[len(self.bank_rows) :]
        neighbors = min(NEIGHBORS, len(bank))
        scores = knn_accuracies(
            bank, self.labels_N[self.bank_rows], query, self.labels_N[self.query_rows], [neighbors], TEMPERATURE
        )  # fmt: skip
        return {"knn_10": scores[f"knn_{neighbors}"]}
