"""The report's pictures: bags, hubs, similar pairs, and where the student differs from the teacher; and explained statistics of bags."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bingo.images.listing import Listing
from bingo.report.inputs import Artefacts
from bingo.report.measures import VIEW_OVERLAP_NEEDS
from bingo.report.pictures import Thumbnail, thumbnail
from bingo.runtime.errors import UserError

_MEMBERS_SHOWN, _HUBS_SHOWN, _PAIRS_SHOWN = 10, 8, 8


@dataclass(frozen=True)
class Member:
    """An image similar to another one, such as a bag's member to its anchor: their cosine, and whether both have the same class (None: a
    label is unknown)."""

    thumbnail: Thumbnail
    similarity: float
    same_class: bool | None


def gallery_rows(listing: Listing, anchors: int) -> list[int]:
    """At most `anchors` train rows, evenly spread over the rows sorted by class, so that small and large classes appear."""
    order_T = np.argsort(listing.labels_N[: listing.train_rows], kind="stable")
    count = min(anchors, len(order_T))
    middles = (np.arange(count) + 0.5) * len(order_T) / max(1, count)
    return order_T[middles.astype(np.int64)].tolist()


def gallery(a: Artefacts) -> list[tuple[Thumbnail, list[Member], int]]:
    """`report.gallery_anchors` anchors, each with the members that are shown and the number of further members; empty without images or
    bags."""
    if a.images is None or a.bags is None:
        return []
    return [_bag(a, row) for row in gallery_rows(a.listing, a.params.report.gallery_anchors)]


def hubs(a: Artefacts) -> list[tuple[Thumbnail, int]]:
    """The images that occur in the most bags, with the number of bags; empty without images."""
    if a.images is None:
        return []
    shown = a.bag_metrics.get("hubs", [])[:_HUBS_SHOWN]
    return [(thumbnail(a.images, a.listing, hub["row"]), hub["count"]) for hub in shown]


def closest_pairs(a: Artefacts) -> list[tuple[tuple[Thumbnail, Thumbnail], float, bool]]:
    """The pairs of an anchor and a member with the highest cosines, and whether they are near-duplicates; empty without images."""
    if a.images is None:
        return []
    images, limit, pairs = a.images, a.bag_metrics.get("near_duplicate_cosine", math.inf), []
    for pair in a.bag_metrics.get("closest_pairs", [])[:_PAIRS_SHOWN]:
        one, other = (thumbnail(images, a.listing, row) for row in pair["rows"])
        pairs.append(((one, other), pair["cosine"], pair["cosine"] > limit))
    return pairs


def failures(a: Artefacts) -> list[tuple[Thumbnail, list[Member], list[Member], set[int]]]:
    """The test images of reports/failures/student.json, with their nearest train images by the teacher and by the student (cosines are the
    teacher's) and the rows that both find; images with the fewest common rows come first. Empty without images or teacher.

    Raises UserError if the content of the file is wrong.
    """
    if a.images is None:
        return []
    found = []
    try:
        for one in a.failures.get("images", []):
            teachers, students = ([(int(row), cosine) for row, cosine in one[name]] for name in ("teacher", "network"))
            shown = _members(a, one["row"], teachers), _members(a, one["row"], students)
            found.append((thumbnail(a.images, a.listing, one["row"]), *shown, dict(teachers).keys() & dict(students).keys()))
    except (KeyError, IndexError, TypeError, ValueError):
        raise UserError("reports/failures/student.json: is damaged, or of another listing; delete it and run: dvc repro") from None
    return found


def _bag(a: Artefacts, row: int) -> tuple[Thumbnail, list[Member], int]:
    assert a.images is not None
    assert a.bags is not None
    members_K, similarity_K = a.bags.members(row), a.bags.similarity(row)
    nearest = list(zip(members_K.tolist(), similarity_K.tolist(), strict=True))[:_MEMBERS_SHOWN]
    return thumbnail(a.images, a.listing, row), _members(a, row, nearest), max(0, len(members_K) - _MEMBERS_SHOWN)


def _members(a: Artefacts, row: int, nearest: Sequence[tuple[int, float]]) -> list[Member]:
    """Rows with their cosines to a row."""
    assert a.images is not None
    return [Member(thumbnail(a.images, a.listing, near), cosine, same_class(a.listing, row, near)) for near, cosine in nearest]


def same_class(listing: Listing, row: int, other: int) -> bool | None:
    """Whether two rows have the same class; None if a label is unknown."""
    label, other_label = listing.labels_N[row], listing.labels_N[other]
    return bool(label == other_label) if label >= 0 and other_label >= 0 else None


def statistics(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and meaning of each result of `bag_metrics.bag_metrics`, without those that were not measured; for the overlap of two
    views, what it needs."""
    if not metrics:
        return []
    unmeasured = {"view_overlap": f"It needs {VIEW_OVERLAP_NEEDS}."}
    lines = [
        (name, write(metrics[key]), meaning) if key in metrics else (name, "not measured", unmeasured[key])
        for key, name, write, meaning in _LINES
        if key in metrics or key in unmeasured
    ]
    return [line for line in lines if line[1]]


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _spread(spread: dict[str, float]) -> str:
    if spread["min"] == spread["max"]:
        return f"{spread['min']:,} for all"
    return f"median {spread['median']:,g}, 99 % up to {spread['p99']:,g}, from {spread['min']:,} to {spread['max']:,}"


def _quantiles(quantiles: dict[str, float]) -> str:
    return f"median {quantiles['p50']:.3f}, 90 % in {quantiles['p05']:.3f} to {quantiles['p95']:.3f}" if quantiles else ""


def _clusters(sizes: dict[str, float]) -> str:
    extremes = f"median {sizes['median']:,g}, from {sizes['min']:,} to {sizes['max']:,} ({sizes['max_over_mean']:.1f} times the mean)"
    return f"{extremes}; {sizes['singletons']:,} with one image, {sizes['unused']:,} unused"


_count = "{:,}".format
_LINES: list[tuple[str, str, Callable[[Any], str], str]] = [
    (
        "purity", "Purity", _share,
        "Share of the listed members with the anchor's class, averaged over all bags. Labels are read for this figure,"
        " and never to make bags by knn or kmeans.",
    ),
    (
        "whole_bag_purity", "Purity of whole bags", _share,
        "The same for all images that can be drawn from a bag, not only for its nearest members.",
    ),
    (
        "recall", "Recall of the search", _share,
        "Share of the exact nearest neighbours found by the approximate search, measured on up to 1,000 anchors.",
    ),
    ("bag_size", "Bag size", _spread, "Number of images from which a member is drawn for an anchor."),
    ("similarity", "Cosine to the anchor", _quantiles, "Similarity of the two images in the teacher's features; 1 is the same direction."),
    (
        "mutual_share", "Mutual members", _share,
        "Share of the members whose own bag also contains the anchor. A half or more is usual; near chance, bags carry no information.",
    ),
    (
        "view_overlap", "Overlap of two views", _share,
        "Share of the nearest images by the keys of one random view that are also among the nearest by those of another, measured on up to"
        " 1,000 anchors. Many times chance is good: bags then depend on what the images show, and not on how they were cropped.",
    ),
    ("chance_share", "Chance", lambda share: f"{100 * share:.2g} %", "Expected value of both shares if members were drawn at random."),
    ("in_degree", "Bags that contain an image", _spread, "A long upper tail indicates hubs: few images that are close to very many."),
    ("orphan_share", "Orphans", _share, "Share of images that are in no bag."),
    ("near_duplicates", "Near-duplicates", _count, "Images so close to their nearest member that they are probably copies of one image."),
    (
        "test_near_duplicates", "Test images near train images", _count,
        "Test images with a near-duplicate among the train images, by the teacher's features.",
    ),
    ("empty_bags", "Empty bags", _count, "Anchors without members; such an anchor is used as its own member."),
    ("rows_of_zeros", "Features of zeros", _count, "Images whose features are all zeros, so that no image is similar to them."),
    ("short_bags", "Short bags", _count, "Bags with fewer members than bagging.k, but at least one."),
    ("cluster_size", "Cluster size", _clusters, "Number of images in a cluster; large clusters give imprecise bags."),
]  # fmt: skip
