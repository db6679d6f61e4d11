"""JPEG files decoded on a GPU by torchvision's decode_jpeg, which uses NVIDIA's nvJPEG, and crops of their pixels.

nvJPEG repeats subsampled chroma where libjpeg interpolates it: `python -m benchmarks.gpu loader` reports the difference in levels of 255
(mean 6.0 as decoded and 1.1 at 224 px, on its files). Shape letters: V views of the image, P side of a view in pixels.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from bingo.images.decode_crops import CropsWanted


def decode_on(device: torch.device, files: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The RGB pixels of JPEG files (uint8 on the host), uint8 (3, H, W) on `device`; None for a file that cannot be decoded there."""
    if not files:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torchvision 0.29 on: torchcodec is to replace it
        try:
            return decode_jpeg(list(files), ImageReadMode.RGB, device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # raised for all files if one fails
            return [None] if len(files) == 1 else [image for file in files for image in decode_on(device, [file])]


def crops_of_pixels(image_3HW: Tensor, wanted: Sequence[CropsWanted]) -> None:
    """Write crops of an image, all on one device. They agree within 2 of 255 levels with those that the CPU makes from bytes."""
    for crops in wanted:
        out_VPP3, crop_px = crops.out_VPP3, crops.out_VPP3.shape[1]
        boxes = [image_3HW[None, :, top : top + high, left : left + wide] for top, left, high, wide in crops.boxes_V4.tolist()]
        views = [interpolate(box.float(), (crop_px, crop_px), mode=crops.interpolation, antialias=True) for box in boxes]
        views_V3PP = torch.cat([view.flip(3) if flip else view for view, flip in zip(views, crops.flip_V.tolist(), strict=True)])
        out_VPP3.copy_(views_V3PP.round_().clamp_(0, 255).permute(0, 2, 3, 1))
