"""Statistics of a bag index: purity, hubs, orphans, mutual neighbours, similarity, near-duplicates, cluster sizes; and how much bags depend
on the view, which needs the keys of two views.

Shape letters: T train rows, K members listed, P key width, C clusters.
"""

from typing import Any

import numpy as np

from bingo import seeds
from bingo.bags.index import Bags
from bingo.bags.neighbors import common_rows
from bingo.bags.rows import Rows
from bingo.bags.sharing import ALONE, Sharing
from bingo.runtime.progress import progress_bar

_HUBS = _PAIRS = 10
_ANCHORS = 1000
_SHARES = {  # for the log
    "purity": "{} of the members have their anchor's class",
    "mutual_share": "{} have the anchor in their own bag",
    "view_overlap": "{} of the nearest images are the same by the keys of another view",
    "chance_share": "where chance is {}",
    "orphan_share": "{} of the images are in no bag",
    "recall": "{} of the nearest images are found",
}


@progress_bar("bag statistics")
def bag_metrics(bags: Bags, labels_T: np.ndarray | None, near_cosine: float = float("inf")) -> dict[str, Any]:
    """JSON-serialisable metrics; shares are from 0 to 1, numbers are rounded to 6 digits. `labels_T`: classes of the train rows, -1
    unknown. `near_cosine`: the cosine above which images are near-duplicates (see `bingo.bags.near_duplicates`); infinite: not counted.

    For the listed members: `in_degree` (number of bags that contain a row), `hubs` (the rows in most bags), `closest_pairs` (the 10 pairs
    of an anchor and a member with the highest cosines), `orphan_share` (rows in no bag), `mutual_share` (members j of i such that i is a
    member of j), `chance_share` (what that is for members drawn at random, K / (T - 1)), `similarity` (cosines to the anchor),
    `near_duplicates` (rows whose nearest member is one), `empty_bags`, `short_bags` (neither empty nor full), `rows_of_zeros` (rows whose
    features are all zeros, if there are any), `purity` (mean over bags of the share of members with the anchor's label). For whole bags:
    `bag_size` and, for clusters, `cluster_size` and `whole_bag_purity`. For an approximate search: `recall` and, for ivf, `lists` and
    `probes`, as in the settings.
    """
    listed_TK = bags.members_TK >= 0
    counts_T = listed_TK.sum(axis=1)
    degrees_T = in_degrees(bags.members_TK)
    metrics: dict[str, Any] = {
        "in_degree": _spread(degrees_T),
        "hubs": [{"row": int(row), "count": int(degrees_T[row])} for row in np.argsort(-degrees_T, kind="stable")[:_HUBS]],
        "closest_pairs": _closest_pairs(bags),
        "orphan_share": rounded((degrees_T == 0).mean()),
        "mutual_share": _mutual_share(bags.members_TK),
        "chance_share": rounded(min(1.0, listed_TK.shape[1] / max(1, len(listed_TK) - 1))),
        "similarity": _quantiles(bags.similarity_TK[listed_TK].astype(np.float32)),
        "bag_size": _spread(bags.bag_sizes_T),
        "empty_bags": int((counts_T == 0).sum()),
        "short_bags": int(((counts_T > 0) & (counts_T < listed_TK.shape[1])).sum()),
    }
    if "rows_of_zeros" in bags.settings:
        metrics["rows_of_zeros"] = bags.settings["rows_of_zeros"]
    if not np.isinf(near_cosine):
        metrics["near_duplicate_cosine"] = rounded(near_cosine)
        metrics["near_duplicates"] = int((bags.similarity_TK[:, 0].astype(np.float32) > near_cosine).sum())
    if "recall" in bags.settings:
        metrics["recall"] = rounded(bags.settings["recall"])
        metrics |= {name: bags.settings[name] for name in ("lists", "probes") if name in bags.settings}
    if bags.cluster_start is not None:
        metrics["cluster_size"] = _cluster_sizes(np.diff(bags.cluster_start))
    if labels_T is not None and (labels_T >= 0).any():
        metrics["purity"] = _mean_share(*same_and_known(bags.members_TK, labels_T))
        if bags.cluster_T is not None:
            metrics["whole_bag_purity"] = _whole_bag_purity(bags.cluster_T, labels_T)
    return metrics


def _closest_pairs(bags: Bags) -> list[dict[str, Any]]:
    """The pairs with the highest cosines, each once; ties go to the smallest rows."""
    rows = np.argsort(-bags.similarity_TK[:, 0], kind="stable")[
        : 2 * _PAIRS
    ]  # a pair is listed at most twice, and members come nearest first
    found = {
        (min(row, member), max(row, member)): -float(cosine)
        for row in rows.tolist()
        for member, cosine in zip(bags.members_TK[row].tolist(), bags.similarity_TK[row], strict=True)
        if member >= 0
    }
    nearest = sorted(found.items(), key=lambda pair: (pair[1], pair[0]))[:_PAIRS]
    return [{"rows": list(rows), "cosine": rounded(-distance)} for rows, distance in nearest]


@progress_bar("bags by two views")
def view_overlap(keys_TP: Rows, other_keys_TP: Rows, k: int, seed: int, sharing: Sharing = ALONE) -> float:
    """How much bags depend on the view from which they are made: the share of the k nearest rows by the keys of one stored view that are
    also among the k nearest by those of another, averaged over a seeded sample of at most 1,000 anchors without those whose keys are all
    zeros. By chance: k / (T - 1).
    """
    rows = np.sort(seeds.permutation(seed, "bags by two views", 0, len(keys_TP))[:_ANCHORS])
    rows = rows[(keys_TP[rows] != 0).any(axis=1) & (other_keys_TP[rows] != 0).any(axis=1)]
    views = {"one view": keys_TP, "another view": other_keys_TP}
    one, other = (sharing.nearest(name, keys[rows], keys, k, rows)[0] for name, keys in views.items())
    return rounded(int(common_rows(one, other).sum()) / (k * max(1, len(rows))))


def shares_in_words(metrics: dict[str, Any]) -> str:
    """The shares in `bag_metrics`, as text for the log."""
    return ", ".join(words.format(f"{100 * metrics[key]:.3g} %") for key, words in _SHARES.items() if key in metrics)


def in_degrees(members_TK: np.ndarray) -> np.ndarray:
    """Number of bags that list each row, int64 (T,)."""
    degrees_T = np.zeros(len(members_TK), np.int64)
    for members_T in members_TK.T:  # a column at a time bounds the memory
        degrees_T += np.bincount(members_T[members_T >= 0], minlength=len(degrees_T))
    return degrees_T


def same_and_known(members_TK: np.ndarray, labels_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of listed members with the anchor's label, and with any label if the anchor has one: two int64 arrays (T,)."""
    same_T, known_T = np.zeros(len(members_TK), np.int64), np.zeros(len(members_TK), np.int64)
    for members_T in members_TK.T:  # a column at a time bounds the memory
        member_labels_T = np.where(members_T >= 0, labels_T[members_T], -1)
        both_T = (member_labels_T >= 0) & (labels_T >= 0)
        same_T += both_T & (member_labels_T == labels_T)
        known_T += both_T
    return same_T, known_T


def purities(members_TK: np.ndarray, labels_T: np.ndarray) -> np.ndarray:
    """Share of labelled members with the anchor's label, float32 (T,); NaN if the anchor or every member has none."""
    return ratio(*same_and_known(members_TK, labels_T))


def ratio(part_T: np.ndarray, whole_T: np.ndarray) -> np.ndarray:
    """part / whole, float32 (T,); NaN where the whole is 0."""
    return np.where(whole_T > 0, part_T / np.maximum(whole_T, 1), np.nan).astype(np.float32)


def _whole_bag_purity(cluster_T: np.ndarray, labels_T: np.ndarray) -> float:
    """Like purity, over all other rows of the anchor's cluster."""
    known = labels_T >= 0
    cluster_n, labels_n = cluster_T[known].astype(np.int64), labels_T[known].astype(np.int64)
    pair_n = cluster_n * (labels_n.max() + 1) + labels_n
    _, place_n, pair_counts = np.unique(pair_n, return_inverse=True, return_counts=True)
    return _mean_share(pair_counts[place_n] - 1, np.bincount(cluster_n)[cluster_n] - 1)


def _mean_share(part_T: np.ndarray, whole_T: np.ndarray) -> float:
    """The mean of part / whole over the anchors whose whole is not empty."""
    counted = whole_T > 0
    return rounded((part_T[counted] / whole_T[counted]).mean()) if counted.any() else 0.0


def _mutual_share(members_TK: np.ndarray) -> float:
    listed, mutual, rows_T1 = 0, 0, np.arange(len(members_TK))[:, None]
    for members_T in members_TK.T:  # a column at a time bounds the memory
        back_T = (members_TK[members_T] == rows_T1).any(axis=1) & (members_T >= 0)
        listed, mutual = listed + int((members_T >= 0).sum()), mutual + int(back_T.sum())
    return rounded(mutual / listed) if listed else 0.0


def _cluster_sizes(sizes_C: np.ndarray) -> dict[str, float]:
    return {
        "min": int(sizes_C.min()),
        "median": rounded(np.median(sizes_C)),
        "mean": rounded(sizes_C.mean()),
        "max": int(sizes_C.max()),
        "max_over_mean": rounded(sizes_C.max() / sizes_C.mean()),
        "singletons": int((sizes_C == 1).sum()),
        "unused": int((sizes_C == 0).sum()),
    }


def _spread(counts: np.ndarray) -> dict[str, float]:
    median, p90, p99 = np.quantile(counts, [0.5, 0.9, 0.99])
    return {"min": int(counts.min()), "median": rounded(median), "p90": rounded(p90), "p99": rounded(p99), "max": int(counts.max())}


def _quantiles(cosines: np.ndarray) -> dict[str, float]:
    if not len(cosines):
        return {}
    percents = (1, 5, 25, 50, 75, 95, 99)
    found = np.quantile(cosines, (np.array(percents) / 100).astype(cosines.dtype), overwrite_input=True)
    return {f"p{percent:02d}": rounded(x) for percent, x in zip(percents, found, strict=True)}


def rounded(x: Any) -> float:
    """A number with 6 digits behind the point."""
    return round(float(x), 6)
