"""A small workspace like that of the first stages, written in milliseconds: listing, images, embeddings and bags in clusters."""

from pathlib import Path

import numpy as np

from bingo.bags.builders import build_kmeans, build_knn
from bingo.bags.index import write_bags
from bingo.bags.metrics import bag_metrics
from bingo.datasets.sources import memory_listing
from bingo.embeddings.store import create_embeddings
from bingo.images.images import write_images
from bingo.images.listing import Listing, write_listing
from bingo.runtime.artefacts import write_json

NEAR_COSINE = 0.99
PARAMS = "dataset:\n  root: null\n"


def images_of(labels_N: np.ndarray, side_px: int, seed: int = 0) -> np.ndarray:
    """Noise in one colour for each class, uint8 (N, S, S, 3)."""
    random = np.random.default_rng(seed)
    colors = random.integers(60, 255, (int(labels_N.max()) + 1, 3))
    noise = random.random((len(labels_N), side_px, side_px, 1))
    return (noise * colors[labels_N][:, None, None, :]).astype(np.uint8)


def make_workspace(
    root: Path,
    train_rows: int = 60,
    test_rows: int = 10,
    classes: list[str] | None = None,
    k: int = 4,
    method: str = "knn",
    seed: int = 0,
    labelled: bool = True,
    name: str = "class/image",
) -> Listing:
    """Write data/listing.parquet, images.zarr, embeddings.zarr, bags.zarr and params.yaml under `root`. Features are near one direction for
    each class; a fifth of them are near the direction of another class.
    """
    random = np.random.default_rng(seed + 1)
    classes = ["ant", "bee", "cat"] if classes is None else classes
    rows = train_rows + test_rows
    labels_N = np.arange(rows) % len(classes)
    images = images_of(labels_N, 12)
    paths = [f"{name}_{row:04d}.png" for row in range(rows)]
    shown_N = labels_N.astype(np.int64) if labelled else np.full(rows, -1, np.int64)
    listing = memory_listing("fabricated", paths, shown_N, train_rows, classes if labelled else [], images)
    write_listing(root / "data/listing.parquet", listing)
    write_images(root / "data/images.zarr", listing, images)
    placed_N = np.where(random.random(rows) < 0.2, random.integers(0, len(classes), rows), labels_N)
    features = (np.eye(8)[placed_N % 8] + 0.4 * random.standard_normal((rows, 8))).astype(np.float16)
    keys = features[:train_rows, None, :4] / np.linalg.norm(features[:train_rows, None, :4], axis=2, keepdims=True)
    attrs = {"listing": listing.fingerprint, "teacher": "t", "recipe": {}}
    store = root / "data/embeddings.partial"
    writer = create_embeddings(store, rows, train_rows, 8, 1, 4, 32, attrs)
    for chunk in range(writer.chunks):
        at, train = writer.rows(chunk), writer.train_rows(chunk)
        writer.write_chunk(chunk, features[at.start : at.stop], keys[train.start : train.stop])
    writer.finish(root / "data/embeddings.zarr")
    train_TD = features[:train_rows]
    bags = build_knn(train_TD, k) if method == "knn" else build_kmeans(train_TD, 4, 5, k, seed)
    write_bags(root / "data/bags.zarr", bags, listing.fingerprint, "e")
    write_json(root / "reports/bags.json", bag_metrics(bags, labels_N[:train_rows] if labelled else None, NEAR_COSINE))
    (root / "params.yaml").write_text(PARAMS)
    return listing
