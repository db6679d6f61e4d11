"""Random and centre views in batch on the device: crop, resize and flip here, colours in bingo/images/colours.py, in float32.

Every operation equals torchvision's function of the same name on one float image in [0, 1]; a batch costs at most some 100 kernels and,
on a GPU, no synchronisation. Shape letters: B views, S side of a stored image, P side of a view (both pixels), L lines of pixels.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from bingo.images.colours import Recolouring, normalize
from bingo.images.draws import Colours, Crops, crop_boxes
from bingo.images.uploads import channels, upload, upload_together
from bingo.params import AugmentParams, ImageParams, Interpolation

_FAR = 1e6  # factor by which the distance of a pixel outside of its box is multiplied, so that it has no weight


def random_views(
    images_NSS3: Tensor, rows_B: np.ndarray, crops: Crops, colours: Colours, augment: AugmentParams, image: ImageParams
) -> Tensor:
    """Views of these rows of uint8 squares (N, S, S, 3), drawn by `draw_views`: normalised float32 (B, 3, P, P), channels_last."""
    side_px, recolouring = images_NSS3.shape[1], Recolouring(colours, augment, image.crop_px)
    order_B = recolouring.order_B
    lines_6L = crop_lines(crop_boxes(crops, side_px, side_px)[order_B], crops.flip_B[order_B], image.crop_px)
    rows_on_device_B, lines, *numbers = upload_together([rows_B[order_B], lines_6L, *recolouring.numbers], images_NSS3.device)
    x_B3PP = crop_and_resize(images_NSS3.index_select(0, rows_on_device_B), lines, image.crop_px, image.interpolation)
    return recolouring(x_B3PP, numbers, image)


def cropped_views(crops_BPP3: Tensor, colours: Colours, augment: AugmentParams, image: ImageParams) -> Tensor:
    """The same as `random_views`, from views that a decoding worker has already cropped, resized and flipped: uint8 (B, P, P, 3)."""
    recolouring = Recolouring(colours, augment, image.crop_px)
    order_B, *numbers = upload_together([recolouring.order_B, *recolouring.numbers], crops_BPP3.device)
    return recolouring(to_unit(crops_BPP3.index_select(0, order_B) if recolouring.sorts else crops_BPP3), numbers, image)


def to_unit(images_BPP3: Tensor) -> Tensor:
    """uint8 (B, P, P, 3) as float32 (B, 3, P, P) in [0, 1]."""
    return images_BPP3.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def center_view(images_BSS3: Tensor, image: ImageParams) -> Tensor:
    """Squares resized to `resize_px`, then centre-cropped to `crop_px`: normalised float32 (B, 3, P, P), channels_last."""
    side_px, start = images_BSS3.shape[1], round((image.resize_px - image.crop_px) / 2)
    lines_61 = upload(_lines(np.zeros(1), np.full(1, side_px), np.zeros(1, bool), image.resize_px), images_BSS3.device)
    weights_1PS = resize_weights(lines_61, side_px, image.resize_px, image.interpolation)
    weights_BPS = weights_1PS[:, start : start + image.crop_px].expand(len(images_BSS3), -1, -1)
    return normalize(_resample(images_BSS3, weights_BPS, weights_BPS), image)


def crop_and_resize(images_BSS3: Tensor, lines_6L: Tensor, out_px: int, interpolation: Interpolation = "bilinear") -> Tensor:
    """Each image's box at `out_px`, flipped or not, given as `crop_lines`: float32 (B, 3, P, P) in [0, 1].

    Equals torchvision's resized_crop(antialias=True), and hflip, on float images: resizing is linear, so rows and columns
    are two matrix products, and a flip is a reversed matrix. Values of bicubic resizing outside [0, 1] are clipped.
    """
    weights_LPS = resize_weights(lines_6L, images_BSS3.shape[1], out_px, interpolation)
    return _resample(images_BSS3, *weights_LPS.split(len(images_BSS3)))


def crop_lines(boxes_B4: np.ndarray, flip_B: np.ndarray, out_px: int) -> np.ndarray:
    """The rows of all boxes (top, left, height, width in whole pixels), then their columns, flipped where `flip_B`: `_lines`, L = 2 B."""
    starts_2B, lengths_2B = boxes_B4.T.reshape(2, -1)
    return _lines(starts_2B, lengths_2B, np.concatenate([np.zeros_like(flip_B), flip_B]), out_px)


def _lines(start_L: np.ndarray, length_L: np.ndarray, flip_L: np.ndarray, out_px: int) -> np.ndarray:
    """Parts of lines, pixels start..start+length-1, to be resized to `out_px` pixels: float32 (6, L) with the start, the centre of the last
    pixel relative to it, the number of pixels per output pixel, the stretching of the filter, and start and direction of the output."""
    length_L = length_L.astype(np.float32)
    scale_L = length_L / np.float32(out_px)
    rows = [start_L, length_L - 0.5, scale_L, np.maximum(scale_L, 1), out_px * flip_L, 1 - 2 * flip_L.astype(np.float32)]
    return np.stack(rows, dtype=np.float32, casting="same_kind")


@cache
def _centres(px: int, device: torch.device) -> Tensor:
    """The centres of `px` pixels, 1/2, 3/2 and so on, kept on the device."""
    return torch.arange(px, dtype=torch.float32, device=device) + 0.5


def resize_weights(lines_6L: Tensor, side_px: int, out_px: int, interpolation: Interpolation = "bilinear") -> Tensor:
    """Antialiased resize of parts of lines of `side_px` pixels, given as `_lines`, to `out_px`, as matrices (L, P, S).

    The filters of Pillow's and PyTorch's resize, a triangle or Keys' cubic with a = -1/2, stretched by max(1, length / out_px), with
    weights that sum to 1.
    """
    start_L1, last_L1, scale_L1, stretch_L1, begin_L1, direction_L1 = lines_6L[..., None].unbind()
    out_LP = torch.addcmul(begin_L1, direction_L1, _centres(out_px, lines_6L.device)).mul_(scale_L1)
    source_LS = _centres(side_px, lines_6L.device) - start_L1
    inside_LS = source_LS.clamp(channels((0.5,), lines_6L.device)[0], last_L1)
    source_LS = torch.lerp(inside_LS, source_LS, _FAR)
    distance_LPS = (source_LS[:, None, :] - out_LP[:, :, None]).abs_().div_(stretch_L1[..., None])
    if interpolation == "bilinear":
        weights_LPS = torch.add(channels((1.0,), lines_6L.device), distance_LPS, alpha=-1, out=distance_LPS).clamp_(min=0)
    else:
        weights_LPS = _keys_cubic(distance_LPS)
    return weights_LPS.div_(weights_LPS.sum(dim=2, keepdim=True))


def _keys_cubic(x: Tensor) -> Tensor:
    """Cubic convolution (Keys 1981, a = -1/2) at distances x >= 0: 1 at 0, 0 at 1 and from 2 on."""
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _resample(images_BSS3: Tensor, rows_BPS: Tensor, columns_BPS: Tensor) -> Tensor:
    """rows x image x columns^T for each channel, scaled to [0, 1]: (B, 3, P, P)."""
    b, p, s = rows_BPS.shape
    x_BPS3 = torch.bmm(rows_BPS, images_BSS3.reshape(b, s, s * 3).to(torch.float32)).view(b, p, s, 3)
    x_B3PS = x_BPS3.permute(0, 3, 1, 2).reshape(b, 3 * p, s)
    x_B3PP = torch.bmm(x_B3PS, columns_BPS.transpose(1, 2)).view(b, 3, p, p)
    return x_B3PP.div_(255).clamp_(0, 1)  # rounding may pass 1 by an ulp
