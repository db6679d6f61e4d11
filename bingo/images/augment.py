"""Random and centre views in batch on the device: crop, resize, flip, colours, grey, blur, normalisation, in float32.

Every operation equals torchvision's function of the same name on one float image in [0, 1]; a batch costs a few dozen kernels
and, on a GPU, no synchronisation. Shape letters: B views, S side of a stored image, P side of a view (both pixels), R chosen rows.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import pad

from bingo.images.draws import CONTRAST, HUE, SATURATION, Colours, Crops, crop_boxes
from bingo.params import AugmentParams, ImageParams, Interpolation

_GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma as torchvision rounds it
BLUR_BLOCK_PX = 32
BLUR_SIGMAS = 3  # the blur kernel reaches this many times the largest sigma


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """A host array on the device; a GPU copies it asynchronously."""
    x = torch.from_numpy(np.ascontiguousarray(values))
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One number for each channel, (3, 1, 1), kept on the device: an upload from a list would wait for the GPU."""
    return torch.tensor(values, device=device)[:, None, None]


def random_views(images_BSS3: Tensor, crops: Crops, colours: Colours, augment: AugmentParams, image: ImageParams) -> Tensor:
    """Views of uint8 squares (B, S, S, 3), drawn by `draw_views`: normalised float32 (B, 3, P, P), channels_last."""
    side_px, device = images_BSS3.shape[1], images_BSS3.device
    boxes_B4 = upload(crop_boxes(crops, side_px, side_px).astype(np.float32), device)
    flip_B = upload(crops.flip_B, device) if augment.flip_p > 0 else None
    x_B3PP = crop_and_resize(images_BSS3, boxes_B4, flip_B, image.crop_px, image.interpolation)
    return normalize(recolour(x_B3PP, colours, augment), image)


def cropped_views(crops_BPP3: Tensor, colours: Colours, augment: AugmentParams, image: ImageParams) -> Tensor:
    """The same from crops that a decoding worker has already cropped, resized and flipped: uint8 (B, P, P, 3)."""
    return normalize(recolour(to_unit(crops_BPP3), colours, augment), image)


def to_unit(images_BPP3: Tensor) -> Tensor:
    """uint8 (B, P, P, 3) as float32 (B, 3, P, P) in [0, 1]."""
    return images_BPP3.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def center_view(images_BSS3: Tensor, image: ImageParams) -> Tensor:
    """Squares resized to `resize_px`, then centre-cropped to `crop_px`: normalised float32 (B, 3, P, P), channels_last."""
    side_px, device = images_BSS3.shape[1], images_BSS3.device
    start = round((image.resize_px - image.crop_px) / 2)
    zero_1, side_1 = torch.zeros(1, device=device), torch.full((1,), float(side_px), device=device)
    weights_1PS = resize_weights(zero_1, side_1, None, side_px, image.resize_px, image.interpolation)
    weights_BPS = weights_1PS[:, start : start + image.crop_px].expand(len(images_BSS3), -1, -1)
    return normalize(_resample(images_BSS3, weights_BPS, weights_BPS), image)


def crop_and_resize(
    images_BSS3: Tensor, boxes_B4: Tensor, flip_B: Tensor | None, out_px: int, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Each image's box (top, left, height, width; float32) at `out_px`, flipped where `flip_B`: float32 (B, 3, P, P) in [0, 1].

    Equals torchvision's resized_crop(antialias=True), and hflip, on float images: resizing is linear, so rows and columns
    are two matrix products, and a flip is a reversed matrix. Values of bicubic resizing outside [0, 1] are clipped.
    """
    top_B, left_B, height_B, width_B = boxes_B4.unbind(1)
    side_px = images_BSS3.shape[1]
    rows_BPS = resize_weights(top_B, height_B, None, side_px, out_px, interpolation)
    columns_BPS = resize_weights(left_B, width_B, flip_B, side_px, out_px, interpolation)
    return _resample(images_BSS3, rows_BPS, columns_BPS)


def resize_weights(
    start_B: Tensor, length_B: Tensor, flip_B: Tensor | None, side_px: int, out_px: int, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Antialiased resize of pixels start..start+length-1 of a line of `side_px` to `out_px`, as matrices (B, P, S).

    The filters of Pillow's and PyTorch's resize, a triangle or Keys' cubic with a = -1/2, stretched by max(1, length / out_px), with
    weights that sum to 1.
    """
    out_P = torch.arange(out_px, dtype=torch.float32, device=start_B.device)
    out_BP = out_P.expand(len(start_B), -1)
    if flip_B is not None:
        out_BP = torch.where(flip_B[:, None], out_px - 1 - out_BP, out_BP)
    scale_B1 = (length_B / out_px)[:, None]
    source_BS = torch.arange(side_px, dtype=torch.float32, device=start_B.device) - start_B[:, None]
    distance_BPS = (source_BS + 0.5)[:, None, :] - (scale_B1 * (out_BP + 0.5))[:, :, None]
    distance_BPS.abs_().div_(scale_B1.clamp(min=1)[:, :, None])
    weights_BPS = distance_BPS.neg_().add_(1).clamp_(min=0) if interpolation == "bilinear" else _keys_cubic(distance_BPS)
    weights_BPS *= ((source_BS >= 0) & (source_BS < length_B[:, None]))[:, None, :]
    return weights_BPS.div_(weights_BPS.sum(dim=2, keepdim=True))


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


def recolour(x_B3PP: Tensor, colours: Colours, augment: AugmentParams) -> Tensor:
    """Rotation, colour jitter, greyscale and blur as drawn, for images in [0, 1] (in place). Operations that `augment` never uses cost
    nothing."""
    device, operation_OB, factor_OB = x_B3PP.device, colours.operation_BO.T, colours.factor_BO.T
    hue_rows = [np.flatnonzero(operation_B == HUE) for operation_B in operation_OB]
    gray_R, blur_R = np.flatnonzero(colours.gray_B), np.flatnonzero(colours.sigma_B)
    turns = [factor_B[rows_R] for factor_B, rows_R in zip(factor_OB, hue_rows, strict=True)]
    numbers = [colours.angle_B, colours.sigma_B[blur_R], _blend_shares(operation_OB, factor_OB), *turns]
    angle_B, sigma_R, shares_3OB, *turns_OR = _upload_together(numbers, np.float32, device)
    gray_rows_R, blur_rows_R, *hue_rows_OR = _upload_together([gray_R, blur_R, *hue_rows], np.int64, device)
    if augment.rotate_degrees > 0:
        x_B3PP = rotate(x_B3PP, angle_B)
    for step, (rows_R, turns_R) in enumerate(zip(hue_rows_OR, turns_OR, strict=True)):
        if any(augment.jitter[:HUE]):
            _blend(x_B3PP, shares_3OB[:, step, :, None, None, None], any(augment.jitter[CONTRAST:HUE]))
        if len(rows_R):
            x_B3PP.index_copy_(0, rows_R, shift_hue(x_B3PP.index_select(0, rows_R), turns_R))
    if len(gray_R):
        gray_R1PP = to_gray(x_B3PP.index_select(0, gray_rows_R))
        x_B3PP.index_copy_(0, gray_rows_R, gray_R1PP.expand(-1, 3, -1, -1))
    if len(blur_R):
        x_B3PP.index_copy_(0, blur_rows_R, blur(x_B3PP.index_select(0, blur_rows_R), sigma_R, augment.blur_sigma_px[1]))
    return x_B3PP


def _upload_together(arrays: list[np.ndarray], dtype: type, device: torch.device) -> list[Tensor]:
    """Several arrays by one copy, each in its shape: on a GPU, a copy costs the host as much as drawing a few hundred numbers."""
    flat = upload(np.concatenate([array.ravel() for array in arrays]).astype(dtype, copy=False), device)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def rotate(x_B3PP: Tensor, degrees_B: Tensor) -> Tensor:
    """Each square rotated counter-clockwise about its centre, bilinear, black outside: torchvision's rotate."""
    cos_B, sin_B = degrees_B.deg2rad().cos(), degrees_B.deg2rad().sin()
    zero_B = torch.zeros_like(cos_B)
    theta_B23 = torch.stack([torch.stack([cos_B, -sin_B, zero_B], 1), torch.stack([sin_B, cos_B, zero_B], 1)], 1)
    grid_BPP2 = F.affine_grid(theta_B23, list(x_B3PP.shape), align_corners=False)
    return F.grid_sample(x_B3PP, grid_BPP2, mode="bilinear", padding_mode="zeros", align_corners=False)


def _blend_shares(operation_OB: np.ndarray, factor_OB: np.ndarray) -> np.ndarray:
    """What each blending operation keeps of the image and takes of its mean grey and of each pixel's grey: (3, O, B)."""
    factor_OB = np.where((operation_OB >= 0) & (operation_OB < HUE), factor_OB, 1.0)
    rest_OB = 1 - factor_OB
    return np.stack([factor_OB, (operation_OB == CONTRAST) * rest_OB, (operation_OB == SATURATION) * rest_OB])


def _blend(x_B3PP: Tensor, shares_3B111: Tensor, needs_gray: bool) -> None:
    """In place: factor * x + (1 - factor) * other, clamped. Brightness blends with black, contrast with the image's mean grey,
    saturation with each pixel's grey; views with another operation have factor 1.
    """
    keep_B111, mean_share_B111, gray_share_B111 = shares_3B111.unbind(0)
    if not needs_gray:
        x_B3PP.mul_(keep_B111).clamp_(0, 1)
        return
    gray_B1PP = to_gray(x_B3PP)
    mean_B111 = gray_B1PP.mean(dim=(2, 3), keepdim=True)
    other_B1PP = gray_B1PP.mul_(gray_share_B111).add_(mean_B111 * mean_share_B111)
    x_B3PP.mul_(keep_B111).add_(other_B1PP).clamp_(0, 1)


def to_gray(x_B3PP: Tensor) -> Tensor:
    """Luma (B, 1, P, P)."""
    red, green, blue = _GRAY_WEIGHTS
    return (x_B3PP[:, 0:1] * red).add_(x_B3PP[:, 1:2], alpha=green).add_(x_B3PP[:, 2:3], alpha=blue)


def shift_hue(x_R3PP: Tensor, turns_R: Tensor) -> Tensor:
    """Hue shifted by `turns_R` of the colour circle, value and chroma kept; images in [0, 1].

    Hexagonal hue h in [0, 6) as in torchvision's _rgb2hsv; back by channel(n) = value - chroma * clamp(min(k, 4 - k), 0, 1),
    k = (n + h) mod 6, n = 5, 3, 1 for red, green, blue, which is HSV to RGB without its six cases.
    """
    red, green, blue = x_R3PP.unbind(1)
    value_RPP = torch.maximum(torch.maximum(red, green), blue)
    chroma_RPP = value_RPP - torch.minimum(torch.minimum(red, green), blue)
    inverse_RPP = chroma_RPP.clamp(min=1e-12).reciprocal_()  # grey has no hue, and needs none
    hue_RPP = torch.where(value_RPP == green, ((blue - red) * inverse_RPP).add_(2), ((red - green) * inverse_RPP).add_(4))
    hue_RPP = torch.where(value_RPP == red, (green - blue) * inverse_RPP, hue_RPP).add_(6 * turns_R[:, None, None])
    shifted_R3PP = torch.empty_like(x_R3PP)
    for channel, n in enumerate((5, 3, 1)):
        k_RPP = hue_RPP + n
        k_RPP.sub_(torch.floor(k_RPP / 6), alpha=6)  # the remainder; faster than torch.remainder
        slope_RPP = torch.minimum(k_RPP, 4 - k_RPP).clamp_(0, 1)
        torch.addcmul(value_RPP, chroma_RPP, slope_RPP, value=-1, out=shifted_R3PP[:, channel])
    return shifted_R3PP


def blur(x_R3PP: Tensor, sigma_R: Tensor, largest_sigma: float) -> Tensor:
    """Gaussian blur with each image's own sigma (pixels), mirrored at the edges; the kernel reaches BLUR_SIGMAS * largest_sigma.

    Equals torchvision's gaussian_blur with that kernel size, as products of a band matrix with blocks of pixels and their surroundings.
    """
    r, _, p, _ = x_R3PP.shape
    reach, block = min(int(np.ceil(BLUR_SIGMAS * largest_sigma)), p - 1), min(BLUR_BLOCK_PX, p)
    band_RSb = _band(_kernel(sigma_R, reach), block)  # S = block + 2 * reach
    padded = pad(pad(x_R3PP, [reach] * 4, mode="reflect"), [0, -p % block] * 2)
    across = padded.unfold(3, band_RSb.shape[1], block).reshape(r, -1, band_RSb.shape[1])
    padded = torch.matmul(across, band_RSb).view(*padded.shape[:3], -1)
    down = padded.unfold(2, band_RSb.shape[1], block).transpose(3, 4)
    return torch.matmul(band_RSb.transpose(1, 2)[:, None, None], down).reshape(r, 3, -1, down.shape[4])[..., :p, :p]


def _kernel(sigma_R: Tensor, reach: int) -> Tensor:
    """Gaussian weights at distances 0..reach, and a 0 for all that is farther: (R, reach + 2)."""
    distance_K = torch.arange(reach + 1, dtype=torch.float32, device=sigma_R.device)
    half_RK = torch.exp(-0.5 * (distance_K / sigma_R[:, None]) ** 2)
    half_RK = half_RK / (2 * half_RK.sum(dim=1, keepdim=True) - half_RK[:, :1])
    return pad(half_RK, (0, 1))


def _band(half_RK: Tensor, block: int) -> Tensor:
    """Convolution of `block` pixels with a symmetric kernel as matrices (R, block + 2 * reach, block)."""
    reach = half_RK.shape[1] - 2
    out_b = torch.arange(block, device=half_RK.device)
    source_S1 = torch.arange(block + 2 * reach, device=half_RK.device)[:, None] - reach
    return half_RK[:, (source_S1 - out_b).abs().clamp(max=reach + 1)]


def normalize(x_B3PP: Tensor, image: ImageParams) -> Tensor:
    """(x - mean) / std for each channel, in channels_last memory."""
    mean_311, std_311 = (_channels(tuple(values), x_B3PP.device) for values in (image.mean, image.std))
    return (x_B3PP - mean_311).div_(std_311).contiguous(memory_format=torch.channels_last)
