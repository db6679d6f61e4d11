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
    means_TP = torch.cat([keys_tVP.float().mean(dim=1).half() for keys_tVP in keys_TVP.split(rows)])
    if bags.cluster_T is not None and not bags.settings.get("draw_temperature"):
        return _others_in_cluster(means_TP, bags)
    members_TK, weights_TK = (torch.from_numpy(x_TK).to(keys_TVP.device) for x_TK in _drawn(bags))
    rows = max(1, rows * keys_TVP.shape[1] // members_TK.shape[1])
    blocks = zip(members_TK.split(rows), weights_TK.split(rows), strict=True)
    return torch.cat([torch.einsum("tk,tkp->tp", weights_tK, means_TP[members_tK].float()).half() for members_tK, weights_tK in blocks])


def _drawn(bags: "Bags") -> tuple[np.ndarray, np.ndarray]:
    """The rows that can be drawn for each anchor, int64 (T, K), and their probabilities, float32 (T, K), 0 for padding."""
    members_TK, listed_TK = bags.members_TK.astype(np.int64), bags.members_TK >= 0
    weights_TK = listed_TK.astype(np.float64)
    if temperature := bags.settings.get("draw_temperature"):
        similarity_TK = np.where(listed_TK, bags.similarity_TK, -np.inf).astype(np.float64)
        weights_TK = np.exp((similarity_TK - similarity_TK.max(axis=1, keepdims=True, initial=-1)) / temperature)
    empty_T = ~listed_TK.any(axis=1)
    members_TK[empty_T], weights_TK[empty_T] = np.flatnonzero(empty_T)[:, None], 1
    return np.maximum(members_TK, 0), (weights_TK / weights_TK.sum(axis=1, keepdims=True)).astype(np.float32)


def _others_in_cluster(means_TP: Tensor, bags: "Bags") -> Tensor:
    """The mean over all other rows of each row's cluster; for a row that is alone, its own key."""
    assert bags.cluster_start is not None
    cluster_T = torch.from_numpy(np.asarray(bags.cluster_T, np.int64)).to(means_TP.device)
    others_T = torch.from_numpy(bags.bag_sizes_T).to(means_TP.device)
    sum_CP = torch.zeros(len(bags.cluster_start) - 1, means_TP.shape[1], device=means_TP.device)
    sum_CP.index_add_(0, cluster_T, means_TP.float())
    parts, rows = [], max(1, NUMBERS_AT_ONCE // means_TP.shape[1])
    for means_tP, cluster_t, others_t in zip(means_TP.split(rows), cluster_T.split(rows), others_T.split(rows), strict=True):
        own_tP = means_tP.float()
        others_tP = (sum_CP[cluster_t] - own_tP) / others_t.clamp(min=1)[:, None]
        parts.append(torch.where((others_t > 0)[:, None], others_tP, own_tP).half())
    return torch.cat(parts)
