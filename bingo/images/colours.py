"""The colours of a batch of views on the device: rotation, colour jitter, greyscale, blur, and the normalisation that ends a view.

Every operation equals torchvision's function of the same name on one float image in [0, 1]. Parameters that differ between views are
tensors, so that each operation is one call for all views that have it. Shape letters: B views, P side of a view in pixels, R some of the
views, O colour operations in use, K - 1 distance in pixels that a blur reaches.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import pad

from bingo.images.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, Colours
from bingo.images.uploads import channels
from bingo.params import AugmentParams, ImageParams

_GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma as torchvision rounds it
BLUR_BLOCK_PX = 32
BLUR_SIGMAS = 3  # the blur kernel reaches this many times the largest sigma


class Recolouring:
    """The colours of B views of `side_px`: their parameters `numbers`, which the caller uploads to the device, and their application.

    Views must be passed in the order `order_B`, which differs from their own if `sorts` is true: sorted by the position of the shift of hue
    among their operations, late ones first. Then one shift of hue serves all views; the n-th operation before it applies to the first
    views, the n-th after it to the last ones. An operation that no view has costs nothing.
    """

    def __init__(self, colours: Colours, augment: AugmentParams, side_px: int):
        shifts_BO = colours.operation_BO == HUE
        count, operations = shifts_BO.shape
        self.augment, self.sorts = augment, bool(shifts_BO.any())
        place_B = np.where(shifts_BO.any(axis=1), shifts_BO.argmax(axis=1), -1) if self.sorts else np.full(count, operations)
        self.order_B = np.argsort(-place_B, kind="stable")
        place_B, drawn = place_B[self.order_B], colours[self.order_B]
        self._shifted = int((place_B >= 0).sum()) if self.sorts else 0
        ends = [int((place_B >= n).sum()) for n in range(operations, 0, -1)]
        begins = [int((place_B + n >= operations).sum()) for n in range(1, operations)] if self.sorts else []
        self._before, self._after = [slice(0, end) for end in ends], [slice(begin, self._shifted) for begin in begins]
        away = [*range(-operations, 0), *range(1, operations)]
        shares = [
            _blend_shares(drawn.operation_BO[part], drawn.factor_BO[part], place_B[part] + steps)
            for part, steps in zip(self._before + self._after, away, strict=False)
        ]
        turns_R = np.take_along_axis(drawn.factor_BO[: self._shifted], place_B[: self._shifted, None], axis=1)
        blurred_R = np.flatnonzero(drawn.sigma_B)
        self._any_gray, self._any_blur = bool(drawn.gray_B.any()), len(blurred_R) > 0
        place_B = np.arange(count)
        place_B[blurred_R] = count + np.arange(len(blurred_R))  # blurred views are put behind all others
        kernels_RK = blur_kernels(drawn.sigma_B[blurred_R], augment.blur_sigma_px[1], side_px)
        floats = [turning(drawn.angle_B), turns_R, drawn.gray_B, kernels_RK, *shares]
        self.numbers = [place_B[np.argsort(self.order_B)], blurred_R, *(values.astype(np.float32) for values in floats)]

    def __call__(self, x_B3PP: Tensor, numbers: list[Tensor], image: ImageParams) -> Tensor:
        """Images in [0, 1] in the order `order_B`, which are overwritten, and `numbers` on their device: normalised, channels_last, in
        their own order."""
        place_B, blurred_R, turning_B23, turns_R, gray_B, kernels_RK, *shares = numbers
        if self.augment.rotate_degrees > 0:
            x_B3PP = rotate(x_B3PP, turning_B23)
        blends = [(x_B3PP[part], of_part) for part, of_part in zip(self._before + self._after, shares, strict=True)]
        for blend in blends[: len(self._before)]:
            self._blend(*blend)
        if self._shifted:
            shift_hue(x_B3PP[: self._shifted], turns_R)
        for blend in blends[len(self._before) :]:
            self._blend(*blend)
        if self._any_gray:
            x_B3PP.lerp_(_to_gray_by_red(x_B3PP).mul_(_GRAY_WEIGHTS[0]), gray_B[:, None, None, None])
        if self._any_blur:
            x_B3PP = torch.cat([x_B3PP, blur(x_B3PP.index_select(0, blurred_R), kernels_RK)])
        return normalize(x_B3PP, image, place_B if self.sorts or self._any_blur else None)

    def _blend(self, x_R3PP: Tensor, shares_3R: Tensor) -> None:
        """In place: factor * x + (1 - factor) * other, clamped. Brightness blends with black, contrast with the image's mean grey,
        saturation with each pixel's grey; views with another operation have factor 1."""
        if not len(x_R3PP):
            return
        keep_R111, rest_R111, mean_R111 = shares_3R[..., None, None, None].unbind()
        contrast, saturation = (self.augment.jitter[operation] > 0 for operation in (CONTRAST, SATURATION))
        gray_R1PP = _to_gray_by_red(x_R3PP) if contrast or saturation else None
        x_R3PP.mul_(keep_R111)
        if gray_R1PP is not None:
            average_R111 = gray_R1PP.mean(dim=(2, 3), keepdim=True)
            if saturation:
                x_R3PP.addcmul_(gray_R1PP.lerp_(average_R111, mean_R111), rest_R111)
            else:
                x_R3PP.add_(average_R111.mul_(rest_R111))
        x_R3PP.clamp_(0, 1)


def _blend_shares(operation_RO: np.ndarray, factor_RO: np.ndarray, column_R: np.ndarray) -> np.ndarray:
    """For one blend of each view, the share of the image, the share of a grey (`_to_gray_by_red`), and whether that grey is the image's
    mean: (3, R)."""
    operation_R, factor_R = (np.take_along_axis(x_RO, column_R[:, None], axis=1)[:, 0] for x_RO in (operation_RO, factor_RO))
    keep_R = np.where((operation_R >= 0) & (operation_R < HUE), factor_R, 1.0)
    rest_R = np.where(operation_R == BRIGHTNESS, 0.0, _GRAY_WEIGHTS[0] * (1 - keep_R))
    return np.stack([keep_R, rest_R, operation_R == CONTRAST])


def turning(degrees_B: np.ndarray) -> np.ndarray:
    """Rotations counter-clockwise, as matrices (B, 2, 3)."""
    cos_B, sin_B, zero_B = np.cos(np.deg2rad(degrees_B)), np.sin(np.deg2rad(degrees_B)), np.zeros(len(degrees_B))
    return np.stack([cos_B, -sin_B, zero_B, sin_B, cos_B, zero_B], axis=1).reshape(-1, 2, 3)


def rotate(x_B3PP: Tensor, turning_B23: Tensor) -> Tensor:
    """Each square rotated about its centre by a matrix of `turning`, bilinear, black outside: torchvision's rotate."""
    grid_BPP2 = F.affine_grid(turning_B23, list(x_B3PP.shape), align_corners=False)
    return F.grid_sample(x_B3PP, grid_BPP2, mode="bilinear", padding_mode="zeros", align_corners=False)


def _to_gray_by_red(x_B3PP: Tensor) -> Tensor:
    """Luma divided by the weight of red, which saves an operation, (B, 1, P, P)."""
    red, green, blue = _GRAY_WEIGHTS
    return torch.add(x_B3PP[:, 0:1], x_B3PP[:, 1:2], alpha=green / red).add_(x_B3PP[:, 2:3], alpha=blue / red)


def shift_hue(x_R3PP: Tensor, turns_R1: Tensor) -> None:
    """In place: hue shifted by `turns_R1` of the colour circle, value and chroma kept; images in [0, 1].

    Hue is hexagonal as in torchvision's _rgb2hsv, in turns. The conversion back to RGB, channel = value - chroma * clamp(2 - 6 d, 0, 1),
    avoids the usual six cases: d is the distance on the circle from the hue at which the channel is smallest (cyan, magenta and yellow).
    """
    device = x_R3PP.device
    value_R1PP = x_R3PP.amax(dim=1, keepdim=True)
    chroma_R1PP = value_R1PP - x_R3PP.amin(dim=1, keepdim=True)
    again_R5PP = torch.cat([x_R3PP, x_R3PP[:, :2]], dim=1)
    hue_R3PP = (again_R5PP[:, 1:4] - again_R5PP[:, 2:5]).div_(chroma_R1PP.clamp(min=1e-12))  # grey has no hue, and needs none
    torch.add(channels((0, 1 / 3, 2 / 3), device), hue_R3PP, alpha=1 / 6, out=hue_R3PP)  # if this channel is the largest
    is_value_R3PP = x_R3PP == value_R1PP
    hue_R1PP = torch.where(is_value_R3PP[:, 1:2], hue_R3PP[:, 1:2], hue_R3PP[:, 2:])
    hue_R1PP = torch.where(is_value_R3PP[:, :1], hue_R3PP[:, :1], hue_R1PP).add_(turns_R1[:, :, None, None])
    away_R3PP = hue_R1PP + channels((1 / 2, 1 / 6, -1 / 6), device)
    away_R3PP.sub_(away_R3PP.round()).abs_()
    share_R3PP = torch.add(channels((2.0,), device), away_R3PP, alpha=-6, out=away_R3PP).clamp_(0, 1)
    torch.addcmul(value_R1PP, chroma_R1PP, share_R3PP, value=-1, out=x_R3PP)


def blur(x_R3PP: Tensor, kernel_RK: Tensor) -> Tensor:
    """Gaussian blur by each image's own row of `blur_kernels`, mirrored at the edges.

    Equals torchvision's gaussian_blur with that kernel, as products of a band matrix with blocks of pixels and their surroundings.
    """
    r, _, p, _ = x_R3PP.shape
    reach, block = kernel_RK.shape[1] - 2, min(BLUR_BLOCK_PX, p)
    band_RSb = kernel_RK[:, _band(reach, block, x_R3PP.device)]  # S = block + 2 * reach
    padded = pad(x_R3PP, [reach] * 4, mode="reflect")
    if p % block:
        padded = pad(padded, [0, -p % block] * 2)
    across = padded.unfold(3, band_RSb.shape[1], block).reshape(r, -1, band_RSb.shape[1])
    padded = torch.matmul(across, band_RSb).view(*padded.shape[:3], -1)
    down = padded.unfold(2, band_RSb.shape[1], block).transpose(3, 4)
    return torch.matmul(band_RSb.transpose(1, 2)[:, None, None], down).reshape(r, 3, -1, down.shape[4])[..., :p, :p]


def blur_kernels(sigma_R: np.ndarray, largest_sigma: float, side_px: int) -> np.ndarray:
    """Gaussian weights for each standard deviation in pixels, at distances 0, 1, .. BLUR_SIGMAS * largest_sigma, and a 0 for larger
    distances: float32 (R, K)."""
    reach = min(int(np.ceil(BLUR_SIGMAS * largest_sigma)), side_px - 1)
    distance_K = torch.arange(reach + 1, dtype=torch.float32)
    half_RK = torch.exp(-0.5 * (distance_K / torch.tensor(sigma_R, dtype=torch.float32)[:, None]) ** 2)
    return pad(half_RK / (2 * half_RK.sum(dim=1, keepdim=True) - half_RK[:, :1]), (0, 1)).numpy()


@cache
def _band(reach: int, block: int, device: torch.device) -> Tensor:
    """The band matrix that convolves `block` pixels with a symmetric kernel, as indices into `blur_kernels`, int64 (block + 2 * reach,
    block), kept on the device."""
    source_S1 = torch.arange(block + 2 * reach)[:, None] - reach
    return (source_S1 - torch.arange(block)).abs().clamp(max=reach + 1).to(device)


def normalize(x_B3PP: Tensor, image: ImageParams, rows_R: Tensor | None = None) -> Tensor:
    """(x - mean) / std for each channel, of these rows in this order or of all, in channels_last memory; x is overwritten."""
    mean_311, std_311 = (channels(tuple(values), x_B3PP.device) for values in (image.mean, image.std))
    x_BPP3 = x_B3PP.sub_(mean_311).div_(std_311).permute(0, 2, 3, 1)
    return (x_BPP3.contiguous() if rows_R is None else x_BPP3.index_select(0, rows_R)).permute(0, 3, 1, 2)
