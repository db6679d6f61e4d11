"""Copies of host arrays to the device, without waiting for a GPU."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """A host array on the device; a GPU copies it asynchronously."""
    x = torch.from_numpy(np.ascontiguousarray(values))
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def upload_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Several arrays in one copy, with their dtypes and shapes, because a copy to a GPU costs the host as much as drawing a few hundred
    numbers."""
    if device.type != "cuda":
        return [upload(array, device) for array in arrays]
    words = [-(-array.nbytes // 8) for array in arrays]  # numbers of 8 bytes begin at a multiple of 8
    flat = np.zeros((sum(words), 8), np.uint8)
    for array, part in zip(arrays, np.split(flat, np.cumsum(words)[:-1]), strict=True):
        part.ravel()[: array.nbytes] = np.ascontiguousarray(array).ravel().view(np.uint8)
    parts = upload(flat, device).split(words)
    dtypes = [torch.from_numpy(array[:0].copy()).dtype for array in arrays]
    return [part.flatten()[: array.nbytes].view(dtype).view(array.shape) for part, dtype, array in zip(parts, dtypes, arrays, strict=True)]


@cache
def channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One number for each channel, float32 (C, 1, 1), kept on the device: an upload from a list would wait for the GPU."""
    return torch.tensor(values, device=device)[:, None, None]
