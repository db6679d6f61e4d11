"""Random crops of one image file, uint8, as cut by a decoding worker for training. The file is decoded once for all crops.

JPEG files are decoded by simplejpeg, which gives the same pixels as Pillow in four fifths of the time, and crops are resized by PyTorch
on bytes, which equals Pillow's antialiased filter (within 2 of 255 levels) in half of the time.
Shape letters: V views of the image, P side of a view in pixels.
"""

import math

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from bingo.images.decode import DRAFT_MARGIN, PILLOW_FILTERS, Header, decode_rgb
from bingo.params import Interpolation


def decode_crops(
    file_bytes: bytes,
    header: Header,
    boxes_V4: np.ndarray,
    flip_V: np.ndarray,
    out_VPP3: Tensor,
    interpolation: Interpolation = "bilinear",
    gray_bits: int | None = None,
) -> None:
    """Write the boxes (top, left, height, width; int64) of an image, resized and flipped where `flip_V`, to uint8 `out_VPP3`.

    The file is decoded at reduced size if every box is many times larger than the view. Raises BadImage.
    """
    may_shrink = boxes_V4[:, 2:].min() / (DRAFT_MARGIN * out_VPP3.shape[1])
    if header.plain_jpeg and may_shrink < 2:
        try:
            return _crops_of_pixels(simplejpeg.decode_jpeg(file_bytes, "RGB"), boxes_V4, flip_V, out_VPP3, interpolation)
        except ValueError:
            pass  # Pillow tolerates more, and reports why it fails
    image, factor = decode_rgb(file_bytes, lambda height, width: may_shrink, gray_bits)
    if factor > 1:
        return _crops_of_shrunk(image, boxes_V4 / factor, flip_V, out_VPP3, interpolation)
    _crops_of_pixels(np.array(image), boxes_V4, flip_V, out_VPP3, interpolation)


def _crops_of_pixels(
    image_HW3: np.ndarray, boxes_V4: np.ndarray, flip_V: np.ndarray, out_VPP3: Tensor, interpolation: Interpolation
) -> None:
    image_3HW, crop_px = torch.from_numpy(image_HW3).permute(2, 0, 1), out_VPP3.shape[1]
    for v, (top, left, height, width) in enumerate(boxes_V4.tolist()):
        crop_13HW = image_3HW[None, :, top : top + height, left : left + width]
        crop_13HW = crop_13HW.contiguous(memory_format=torch.channels_last)  # otherwise the result is planar, which takes twice as long
        view_PP3 = interpolate(crop_13HW, (crop_px, crop_px), mode=interpolation, antialias=True)[0].permute(1, 2, 0)
        out_VPP3[v] = view_PP3.flip(1) if flip_V[v] else view_PP3


def _crops_of_shrunk(image: Image.Image, boxes_V4: np.ndarray, flip_V: np.ndarray, out_VPP3: Tensor, interpolation: Interpolation) -> None:
    """Boxes with fractions of a pixel, which Pillow's resize supports."""
    crop_px = out_VPP3.shape[1]
    for v, (top, left, height, width) in enumerate(boxes_V4.tolist()):
        whole = (int(left), int(top), math.ceil(left + width), math.ceil(top + height))
        inner = (left - whole[0], top - whole[1], left + width - whole[0], top + height - whole[1])
        view_PP3 = np.asarray(image.crop(whole).resize((crop_px, crop_px), PILLOW_FILTERS[interpolation], box=inner))
        out_VPP3[v] = torch.from_numpy((view_PP3[:, ::-1] if flip_V[v] else view_PP3).copy())
