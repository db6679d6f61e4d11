"""The bag of an image that is not in the dataset: its feature through the teacher, and the train rows nearest to it.

The image is processed as in extraction: packed to the stored size if the dataset is, then cropped to the centre view.
Shape letters: D feature width, K neighbours, n rows of a block.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bingo.runtime.chunks import open_array, open_group, read_rows
from bingo.runtime.errors import UserError
from bingo.runtime.progress import progress_bar

if TYPE_CHECKING:
    import torch

_WAY_OUT = "dvc repro extract"


class StoredFeatures:
    """The features of the train rows, read block by block: the whole matrix may be larger than the memory."""

    def __init__(self, store: Any, name: str, listing: str, train_rows: int):
        """`store` is embeddings.zarr as zarr takes it. Raises UserError if it is absent, damaged or another listing's."""
        group = open_group(store, name, _WAY_OUT)
        if (made_from := group.attrs.get("listing")) != listing:
            raise UserError(f"{name}: was made from listing {made_from}, the bags from listing {listing}; run: {_WAY_OUT}")
        self.name, self.train_rows = name, train_rows
        self.attrs: dict[str, Any] = dict(group.attrs)
        self._features = open_array(group, "features", name, np.float16, 2, _WAY_OUT)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, features float32 (n, D)) of each chunk. Raises UserError if one is damaged or missing."""
        step = self._features.chunks[0]
        with progress_bar("neighbours", self.train_rows, "images") as bar:
            for start in range(0, self.train_rows, step):
                rows = slice(start, min(start + step, self.train_rows))
                yield start, read_rows(self._features, rows, self.name, _WAY_OUT).astype(np.float32)
                bar.advance_to(rows.stop)

    def nearest(self, feature_D: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k train rows with the highest cosine to a feature: rows int64, cosines float32, nearest first, ties by row."""
        rows_n, cosines_n = np.zeros(0, np.int64), np.zeros(0, np.float32)
        unit_D = feature_D / max(float(np.linalg.norm(feature_D)), 1e-12)
        for start, features_nD in self.blocks():
            cosines = features_nD @ unit_D / np.maximum(np.linalg.norm(features_nD, axis=1), 1e-12)
            rows_n = np.concatenate([rows_n, np.arange(start, start + len(cosines))])
            cosines_n = np.concatenate([cosines_n, cosines.astype(np.float32)])
            best = np.lexsort((rows_n, -cosines_n))[:k]
            rows_n, cosines_n = rows_n[best], cosines_n[best]
        return rows_n, cosines_n


def image_feature(
    image_file: Path, teacher_file: Path, recipe: Mapping[str, Any], stored_px: int, device: "torch.device", gray_bits: int | None = None
) -> np.ndarray:
    """The teacher's feature of one image file, float32 (D,). `recipe` is that of the stored features; `stored_px` is 0 where
    the dataset's images are files, `gray_bits` as in its Listing.

    Raises UserError if the teacher cannot be read, BadImage if the image cannot.
    """
    import torch

    from bingo.images.decode import decode_square
    from bingo.images.images import FileImages, Images, MemoryImages
    from bingo.images.loader import center_views
    from bingo.nets.precision import autocast
    from bingo.params import ImageParams
    from bingo.teachers.teacher import load_teacher

    images: Images
    if stored_px:
        images = MemoryImages(np.stack([decode_square(image_file.read_bytes(), stored_px, stored_px, gray_bits=gray_bits)]))
    else:
        image_file = image_file.resolve()  # the user's own links may lead anywhere
        images = FileImages(str(image_file.parent), [image_file.name], gray_bits=gray_bits)
    teacher = load_teacher(teacher_file).to(device).to(memory_format=torch.channels_last)
    view_13PP = next(iter(center_views(images, [0], ImageParams(**recipe["image"]), device, 1, workers=0)))
    with torch.inference_mode(), autocast(recipe["extract"]["precision"], device):
        feature_1D = teacher.features(view_13PP)
    return feature_1D[0].float().cpu().numpy()
