"""The feature of an image that is not in the dataset, through the teacher.

The image is processed as in extraction: packed to the stored size if the dataset is, then cropped to the centre view.
Shape letter: D feature width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bingo.images.decode import decode_square
from bingo.images.images import FileImages, Images, MemoryImages
from bingo.images.loader import center_views
from bingo.nets.precision import autocast
from bingo.params import seen_image
from bingo.teachers.teacher import load_teacher


def image_feature(
    image_file: Path, teacher_file: Path, recipe: Mapping[str, Any], stored_px: int, device: torch.device, gray_bits: int | None = None
) -> np.ndarray:
    """The teacher's feature of one image file, float32 (D,). `recipe` is that of the stored features; `stored_px` is 0 where
    the dataset's images are files, `gray_bits` as in its Listing.

    Raises UserError if the teacher cannot be read, BadImage if the image cannot.
    """
    images: Images
    if stored_px:
        images = MemoryImages(np.stack([decode_square(image_file.read_bytes(), stored_px, stored_px, gray_bits=gray_bits)]))
    else:
        image_file = image_file.resolve()  # the user's own links may lead anywhere
        images = FileImages(str(image_file.parent), [image_file.name], gray_bits=gray_bits)
    teacher = load_teacher(teacher_file).to(device).to(memory_format=torch.channels_last)
    view_13PP = next(iter(center_views(images, [0], seen_image(recipe["image"]), device, 1, workers=0)))
    with torch.inference_mode(), autocast(recipe["extract"]["precision"], device):
        feature_1D = teacher.features(view_13PP)
    return feature_1D[0].float().cpu().numpy()
