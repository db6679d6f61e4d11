"""Hostile values, and edits that put them into trees of sections, lists and values: parameters, recipes, annotations, metadata."""

import datetime
import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

INTEGERS = (
    0, 1, -1, 2, 3, 7, 31, 33, 255, 256, 1000, 65536, 10**5, 10**6, 10**7, 10**9, 10**9 + 1, -(10**9), 2**31 - 1, 2**31, 2**53 + 1, 2**63,
    -(2**63), 2**64, 10**30,
)  # fmt: skip
FLOATS = (
    0.0, -0.0, 0.05, 0.5, 1.0, -1.0, 1.5, 1e-320, 1e-9, 1e-5, 1e-3, 1e3, 1e5, 1e9, 1e18, 1e38, 1e39, 1e308, -1e308, math.inf, -math.inf,
    math.nan,
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "a\nb", "\r", "\x1b[2J", "\u202egnp", "\u2028", "e\u0301", "\u6570\u5b57", "\U0001f600", "\ud800", "\ufeff", "..",
    "../../etc/passwd", "/etc/passwd", "/dev/zero", "null", "nan", "1e3", "0x10", "${x}", "<b>&", "%s%n{}", "a" * 5000, "/" * 300, "-",
    "__class__", "__metadata__", "student", "teacher", "untrained", "baselines/moco", "moco", "seed", "bingo", "knn", "kmeans", "label",
    "resnet10t", "resnet18", "vit_tiny_patch16_224", "torchvision/resnet18", "folder", "cifar10", "small", "stored", "live", "momentum",
    "bf16", "auto", "skip", "header", "image_id", "counts", "size",
)  # fmt: skip
OF_YAML = (datetime.date(1, 1, 1), datetime.datetime(9999, 12, 31), b"\xff", {1, 2}, (1, 2), {1: 2}, {None: 1}, {(1, 2): 3}, 1j)
KINDS = ("set", "set", "set", "delete", "add", "rename", "move", "repeat")


def leaves(of_json: bool = False) -> st.SearchStrategy:
    """One value that is neither a section nor a list; with `of_json`, one that JSON can represent."""
    numbers = [st.sampled_from(INTEGERS), st.sampled_from(FLOATS), st.integers(), st.floats()]
    drawn = [st.none(), st.booleans(), *numbers, st.sampled_from(TEXTS), st.text(max_size=30)]
    return st.one_of(*drawn, *([] if of_json else [st.sampled_from(OF_YAML)]))


def values(of_json: bool = False) -> st.SearchStrategy:
    """A value, a list or a section of these, or something very deep, long or wide."""
    keys = st.one_of(st.sampled_from(TEXTS), st.text(max_size=8))
    small = st.recursive(
        leaves(of_json), lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=3)), max_leaves=6
    )
    large = st.builds(Large, st.sampled_from(("deep", "deep section", "long", "wide")), leaves(of_json))
    return st.one_of(leaves(of_json), leaves(of_json), small, large)


@dataclass(frozen=True)
class Large:
    """A large value with a small description."""

    kind: str
    leaf: Any

    def made(self) -> Any:
        if self.kind == "long":
            return [self.leaf] * 3000
        if self.kind == "wide":
            return {f"key_{i}": self.leaf for i in range(3000)}
        value = self.leaf
        for _ in range(300):
            value = [value] if self.kind == "deep" else {"a": value}
        return value


@dataclass(frozen=True)
class Edit:
    """A change at one place of a tree. `place` selects one of the tree's places by its remainder, so that it fits every tree."""

    kind: str
    place: int
    value: Any


def edits(of_json: bool = False, most: int = 3) -> st.SearchStrategy:
    """One to `most` edits."""
    edit = st.builds(Edit, st.sampled_from(KINDS), st.integers(0, 2**20), values(of_json))
    return st.lists(edit, min_size=1, max_size=most)


def edited(tree: Any, changes: list[Edit]) -> Any:
    """A copy of a tree after some edits, made one after the other."""
    box = {"": deepcopy(tree)}
    for change in changes:
        if not (places := list(_places(box))):
            return None
        parent, key = places[change.place % len(places)]
        _edit(parent, key, change, places)
    return box.get("")


def _places(parent: Any) -> Iterator[tuple[Any, Any]]:
    """The parent of every value, and its key or index there."""
    for key, value in list(parent.items() if isinstance(parent, dict) else enumerate(parent)):
        yield parent, key
        if isinstance(value, dict | list) and len(value) < 100:
            yield from _places(value)


def _edit(parent: Any, key: Any, change: Edit, places: list[tuple[Any, Any]]) -> None:
    value = change.value.made() if isinstance(change.value, Large) else deepcopy(change.value)
    name = value if isinstance(value, str) else f"key_{change.place}"
    if change.kind == "set":
        parent[key] = value
    elif change.kind == "delete":
        del parent[key]
    elif change.kind == "move":  # copies a value from another place
        elsewhere, other = places[change.place * 7919 % len(places)]
        parent[key] = deepcopy(elsewhere[other])
    elif isinstance(parent, list):  # add, rename, repeat
        parent.insert(key, deepcopy(parent[key]) if change.kind == "repeat" else value)
    elif change.kind == "rename":
        parent[name] = parent.pop(key)
    else:
        parent[name] = deepcopy(parent[key]) if change.kind == "repeat" else value
