"""Check whether the teacher is worth distilling: its k-NN accuracy compared with the same network untrained and with chance."""

import numpy as np
import torch

from bingo import seeds
from bingo.embeddings.store import Embeddings
from bingo.evals.features import backbone_features
from bingo.evals.knn import knn_accuracies
from bingo.evals.probe import NEIGHBORS, TEMPERATURE, probe_rows
from bingo.images.images import Images
from bingo.images.listing import Listing
from bingo.teachers.teacher import Teacher, untrained_backbone


def teacher_quality(
    embeddings: Embeddings, listing: Listing, images: Images, teacher: Teacher, seed: int, device: torch.device
) -> dict[str, float]:
    """Percent: `teacher_knn`, `random_knn` (the same architecture with initial weights), `chance` (always the most frequent class).

    All three are measured on the same at most 5,000 train rows and 1,000 test rows (without a test split: train rows that are not among
    the former), with equal votes of 10 neighbours. Raises UserError if a label is unknown.
    """
    bank_rows, query_rows = probe_rows(listing, seed)
    labels = listing.labels_N[bank_rows], listing.labels_N[query_rows]
    neighbors = min(NEIGHBORS, len(bank_rows))

    def knn(bank_features: np.ndarray, query_features: np.ndarray) -> float:
        return knn_accuracies(bank_features, labels[0], query_features, labels[1], [neighbors], TEMPERATURE)[f"knn_{neighbors}"]

    untrained = untrained_backbone(teacher.metadata, seeds.torch_seed(seed, "untrained teacher")).to(device)
    recipe = embeddings.attrs["recipe"]["extract"]
    rows = np.concatenate([bank_rows, query_rows])
    features = backbone_features(untrained, images, rows, teacher.image, device, recipe["precision"], recipe["batch_images"])
    return {
        "teacher_knn": knn(embeddings.features_ND[bank_rows], embeddings.features_ND[query_rows]),
        "random_knn": knn(features[: len(bank_rows)], features[len(bank_rows) :]),
        "chance": round(100 * float((labels[1] == np.bincount(labels[0]).argmax()).mean()), 6),
    }
