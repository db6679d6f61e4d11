"""Fuzzed COCO annotations: edited trees, damaged bytes, run lengths and polygons of any kind; and their use."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval import mask as rle
from hypothesis import strategies as st

from bingo.detection.coco import read_instances, training_targets
from bingo.detection.loader import CocoLoader, View
from bingo.detection.scores import coco_scores
from tests.coco_data import crowd, make_split
from tests.stress.fuzz.damage import Damage, damaged, damages
from tests.stress.fuzz.harness import Surface
from tests.stress.fuzz.values import FLOATS, INTEGERS, TEXTS, Edit, edited, edits

NUMBERS = st.one_of(st.sampled_from(INTEGERS), st.sampled_from(FLOATS), st.integers(-5, 120), st.floats(-5, 120))
PIXELS = 72 * 96  # in the last image
IMAGES = 4


@cache
def _split(root: Path) -> dict[str, Any]:
    """A small COCO under `root`, with a crowd."""
    content = make_split(root, "train", IMAGES, seed=0)
    content["annotations"].append(crowd(content["images"][1], 3, left_px=20))
    return content


def segmentations() -> st.SearchStrategy:
    """Polygons with any numbers; run lengths that fit the image or not, also as text; for images of any dimensions."""
    lengths = st.lists(st.integers(0, PIXELS), max_size=6).map(lambda counts: [*counts, max(0, PIXELS - sum(counts))])
    counts = st.one_of(
        lengths, st.lists(NUMBERS, max_size=6), st.text(max_size=12), st.from_regex(r"[0-o]{0,40}", fullmatch=True), st.sampled_from(TEXTS)
    )
    sides = st.one_of(st.just([72, 96]), st.lists(NUMBERS, min_size=2, max_size=2))
    polygons = st.lists(st.lists(NUMBERS, max_size=12), max_size=3)
    whole = st.lists(st.lists(st.floats(-200, 200), min_size=6, max_size=8), min_size=1, max_size=2)
    return st.one_of(polygons, whole, st.fixed_dictionaries({"counts": counts, "size": sides}))


def annotations() -> st.SearchStrategy:
    """Changes to some annotations: number, key, and new value."""
    boxes = st.one_of(st.lists(NUMBERS, min_size=4, max_size=4), st.lists(NUMBERS, max_size=6))
    other = st.tuples(st.sampled_from(("image_id", "category_id", "area", "iscrowd", "id")), NUMBERS)
    change = st.one_of(
        st.tuples(st.just("segmentation"), segmentations()),
        st.tuples(st.just("segmentation"), segmentations()),
        st.tuples(st.just("bbox"), boxes),
        other,
    )
    return st.lists(st.tuples(st.integers(0, 2 * IMAGES), change), min_size=1, max_size=4)


def _look(raw: bytes, root: Path) -> None:
    """Read the annotations, then every image as in a training, and score the instances against themselves."""
    path = root / "annotations/fuzzed.json"
    path.write_bytes(raw)
    found = read_instances(path, root / "train", "transfer_coco.train_annotations")
    views = [View(row, 64, 96, flip=row % 2 == 1) for row in range(len(found.images))]
    list(CocoLoader(found.images, training_targets(found).lines, torch.device("cpu"), 0).examples(views))
    whole = {image["id"]: rle.encode(np.ones((image["height"], image["width"]), np.uint8, order="F")) for image in found.images.entries}
    keys = ("image_id", "category_id", "bbox")
    detected = [one for one in found.annotations if not one["iscrowd"]]
    coco_scores(found, [{key: one[key] for key in keys} | {"score": 0.5, "segmentation": whole[one["image_id"]]} for one in detected])


def _tree(changes: list[Edit], folder: Path) -> None:
    _look(json.dumps(edited(_split(folder), changes), skipkeys=True).encode(), folder)


def _instances(changes: list[tuple[int, tuple[str, Any]]], folder: Path) -> None:
    content = edited(_split(folder), [])
    last = [one for one in content["annotations"] if one["image_id"] == content["images"][-1]["id"]]
    for number, (key, value) in changes:
        own = last if key == "segmentation" else content["annotations"]  # of an image with PIXELS
        own[number % len(own)][key] = value
    _look(json.dumps(content).encode(), folder)


def _bytes(case: tuple[list[Damage], str], folder: Path) -> None:
    changes, encoding = case
    _look(damaged(json.dumps(_split(folder)).encode(encoding), changes), folder)


EDITED = Surface("COCO json, edited", 15, edits(of_json=True), _tree)
INSTANCES = Surface("COCO json, instances", 15, annotations(), _instances)
DAMAGED = Surface("COCO json, damaged", 5, st.tuples(damages(4), st.sampled_from(("utf-8", "utf-8", "utf-16", "utf-8-sig"))), _bytes)
