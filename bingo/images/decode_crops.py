"""Random crops of one image file, uint8, made by a decoding worker for training. The file is decoded once for all crops.

JPEG files are decoded by simplejpeg, which gives the same pixels as Pillow in four fifths of the time. Crops are resized by PyTorch
on bytes, which agrees with Pillow's antialiased filter within 2 of 255 levels and takes half of the time.
Shape letters: V views of the image, P side of a view in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from bingo.images.decode import DRAFT_MARGIN, PILLOW_FILTERS, Header, decode_rgb
from bingo.params import Interpolation


@dataclass(frozen=True)
class CropsWanted:
    """V crops of one size of an image: boxes (top, left, height, width; int64), whether each is flipped, bool (V,), and uint8
    `out_VPP3`, to which they are written."""

    boxes_V4: np.ndarray
    flip_V: np.ndarray
    out_VPP3: Tensor
    interpolation: Interpolation = "bilinear"


def may_shrink(wanted: Sequence[CropsWanted]) -> float:
    """The factor by which an image may be decoded smaller for these crops."""
    return min(crops.boxes_V4[:, 2:].min() / (DRAFT_MARGIN * crops.out_VPP3.shape[1]) for crops in wanted)


def decode_crops(file_bytes: bytes, header: Header, wanted: Sequence[CropsWanted], gray_bits: int | None = None) -> None:
    """Write crops of an image, of one or several sizes.

    The file is decoded at reduced size if every box is many times larger than its view. Raises BadImage.
    """
    shrink = may_shrink(wanted)
    if header.plain_jpeg and shrink < 2:
        try:
            image_HW3 = simplejpeg.decode_jpeg(file_bytes, "RGB")
        except ValueError:
            pass  # Pillow tolerates more, and reports why it fails
        else:
            return _crops_of_pixels(image_HW3, wanted)
    image, factor = decode_rgb(file_bytes, lambda height, width: shrink, gray_bits)
    if factor > 1:
        return _crops_of_shrunk(image, factor, wanted)
    _crops_of_pixels(np.array(image), wanted)


def _crops_of_pixels(image_HW3: np.ndarray, wanted: Sequence[CropsWanted]) -> None:
    for crops in wanted:
        crop_px, flip_V = crops.out_VPP3.shape[1], crops.flip_V.tolist()
        for v, (top, left, height, width) in enumerate(crops.boxes_V4.tolist()):
            # Cut by NumPy, whose slices cost less than PyTorch's; as channels_last, because planar bytes take twice as long.
            crop_1HW3 = torch.from_numpy(np.ascontiguousarray(image_HW3[None, top : top + height, left : left + width]))
            resized_13PP = interpolate(crop_1HW3.permute(0, 3, 1, 2), (crop_px, crop_px), mode=crops.interpolation, antialias=True)
            view_PP3 = resized_13PP[0].permute(1, 2, 0)
            crops.out_VPP3[v] = view_PP3.flip(1) if flip_V[v] else view_PP3


def _crops_of_shrunk(image: Image.Image, factor: int, wanted: Sequence[CropsWanted]) -> None:
    """Boxes with fractions of a pixel, which Pillow's resize supports."""
    for crops in wanted:
        crop_px, resampling = crops.out_VPP3.shape[1], PILLOW_FILTERS[crops.interpolation]
        for v, (top, left, height, width) in enumerate((crops.boxes_V4 / factor).tolist()):
            whole = (int(left), int(top), math.ceil(left + width), math.ceil(top + height))
            inner = (left - whole[0], top - whole[1], left + width - whole[0], top + height - whole[1])
            view_PP3 = np.asarray(image.crop(whole).resize((crop_px, crop_px), resampling, box=inner))
            crops.out_VPP3[v] = torch.from_numpy((view_PP3[:, ::-1] if crops.flip_V[v] else view_PP3).copy())
