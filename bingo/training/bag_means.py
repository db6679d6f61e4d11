"""The mean key of each image's bag, over its members, so that no member need be drawn for a loss that is linear in the key.

Shape letters: T train rows, t rows of a block, V stored views, K members listed, P key width, C clusters.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from bingo.bags.index import Bags

NUMBERS_AT_ONCE = 2**24  # 64 MiB in float32


@torch.no_grad()
def bag_means(keys_TVP: Tensor, bags: "Bags") -> Tensor:
    """The expectation of the key of a drawn member (`Bags.draw`) in a random stored view: float16 (T, P), not of unit length.

    For an empty bag, it is the mean of the anchor's own keys, since drawing gives the anchor.
    """
    rows = max(1, NUMBERS_AT_ONCE // keys_TVP[0].numel())
    means_TP = keys_TVP[:, 0]
    if keys_TVP.shape[1] > 1:
        means_TP = torch.empty_like(means_TP, memory_format=torch.contiguous_format)
        for mean_tP, keys_tVP in zip(means_TP.split(rows), keys_TVP.split(rows), strict=True):
            mean_tP[:] = keys_tVP.float().mean(dim=1)
    if bags.cluster_T is not None and not bags.settings.get("draw_temperature"):
        return _others_in_cluster(means_TP, bags)
    bag_means_TP, rows = torch.empty_like(means_TP), max(1, rows * keys_TVP.shape[1] // bags.members_TK.shape[1])
    for first in range(0, len(means_TP), rows):
        members_tK, weights_tK = (torch.from_numpy(x_tK).to(keys_TVP.device) for x_tK in _drawn(bags, first, first + rows))
        bag_means_TP[first : first + rows] = torch.einsum("tk,tkp->tp", weights_tK, means_TP[members_tK].float())
    return bag_means_TP


def _drawn(bags: "Bags", first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that can be drawn for the anchors from `first` to before `end`, int64 (t, K), and their probabilities, float32 (t, K), 0 for
    padding."""
    members_tK = bags.members_TK[first:end].astype(np.int64)
    listed_tK = members_tK >= 0
    weights_tK = listed_tK.astype(np.float64)
    if temperature := bags.settings.get("draw_temperature"):
        similarity_tK = np.where(listed_tK, bags.similarity_TK[first:end], -np.inf).astype(np.float64)
        weights_tK = np.exp((similarity_tK - similarity_tK.max(axis=1, keepdims=True, initial=-1)) / temperature)
    empty_t = ~listed_tK.any(axis=1)
    members_tK[empty_t], weights_tK[empty_t] = first + np.flatnonzero(empty_t)[:, None], 1
    return np.maximum(members_tK, 0), (weights_tK / weights_tK.sum(axis=1, keepdims=True)).astype(np.float32)


def _others_in_cluster(means_TP: Tensor, bags: "Bags") -> Tensor:
    """The mean over all other rows of each row's cluster; for a row that is alone, its own key."""
    assert bags.cluster_start is not None
    cluster_T = torch.from_numpy(np.asarray(bags.cluster_T, np.int64)).to(means_TP.device)
    others_T = torch.from_numpy(bags.bag_sizes_T).to(means_TP.device)
    sum_CP = torch.zeros(len(bags.cluster_start) - 1, means_TP.shape[1], device=means_TP.device)
    sum_CP.index_add_(0, cluster_T, means_TP.float())
    bag_means_TP, rows = torch.empty_like(means_TP), max(1, NUMBERS_AT_ONCE // means_TP.shape[1])
    blocks = (x.split(rows) for x in (bag_means_TP, means_TP, cluster_T, others_T))
    for bag_mean_tP, means_tP, cluster_t, others_t in zip(*blocks, strict=True):
        own_tP = means_tP.float()
        others_tP = (sum_CP[cluster_t] - own_tP) / others_t.clamp(min=1)[:, None]
        bag_mean_tP[:] = torch.where((others_t > 0)[:, None], others_tP, own_tP)
    return bag_means_TP
