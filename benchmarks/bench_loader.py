"""How much of the bare decoding speed the loader keeps: images per second from JPEG files to augmented views on the device.

    python -m benchmarks.bench_loader                              2 minutes on 2 cores
    python -m benchmarks.bench_loader --device cuda --images 8192 --batch-images 256

In one table, on the same files and as many worker processes, in turns:
  bare decode   each file read and decoded to RGB, nothing else                           the limit: the goal is 85 % of it
  this loader   bingo.data.loader: one view of each image, decoded and cropped by the workers, coloured and normalised on the device
  torchvision   the same family of views by torchvision's transforms on each image in the workers, collated, moved to the device
Printed are medians and, in brackets, the smallest and the largest of the repeats. The first batches of each turn are not timed: workers
start in them.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.bench_extract import CASES, MEAN, STD, make_images
from bingo.data.images import FileImages
from bingo.data.loader import Request, ViewLoader
from bingo.data.workers import worker_count
from bingo.params import AugmentParams, ImageParams

CASE = CASES["large"]
UNTIMED_BATCHES = 4


class Decoded(Dataset):
    """Each file decoded, and what `transform` makes of it: a tensor, or nothing at all."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], Tensor] | None):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        with Image.open(self.paths[row]) as image:
            rgb = image.convert("RGB")
        return self.transform(rgb) if self.transform else torch.empty(0)


def torchvision_views(augment: AugmentParams) -> transforms.Compose:
    """The family of views as the released code writes it (main_moco.py): transforms of one image."""
    blur = transforms.GaussianBlur(23, (augment.blur_sigma_px[0], augment.blur_sigma_px[1]))
    steps = [
        transforms.RandomResizedCrop(CASE.crop_px, scale=(augment.crop_scale[0], augment.crop_scale[1])),
        transforms.RandomApply([transforms.ColorJitter(*augment.jitter)], p=augment.jitter_p),
        transforms.RandomGrayscale(p=augment.gray_p),
        transforms.RandomApply([blur], p=augment.blur_p),
        transforms.RandomHorizontalFlip(p=augment.flip_p),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    return transforms.Compose(steps)


def plain_batches(paths: list[Path], transform: Callable | None, batch: int, workers: int, device: torch.device) -> Iterator[Tensor]:
    """Batches of a DataLoader on the device, float32 (B, 3, P, P), or empty ones of a bare decode."""
    loader = DataLoader(Decoded(paths, transform), batch, num_workers=workers, pin_memory=device.type == "cuda", drop_last=True)
    for views in loader:
        yield views.to(device, non_blocking=True)


def our_batches(images: FileImages, batch: int, workers: int, device: torch.device) -> Iterator[Tensor]:
    """Batches of this project's loader, one view of each image."""
    image = ImageParams(crop_px=CASE.crop_px, resize_px=CASE.store_px, mean=MEAN, std=STD)
    rows = np.arange(len(images) // batch * batch).reshape(-1, batch)
    plans = ([Request(rows_B, rows_B, "anchor", 0, 0)] for rows_B in rows)
    for views in ViewLoader(images, image, CASE.augment, 0, device, workers).views(plans):
        yield views[0]


def images_per_second(batches: Iterable[Tensor], batch: int, device: torch.device) -> float:
    """The rate after the first batches."""
    begun, timed = 0.0, -UNTIMED_BATCHES
    for _ in batches:
        timed += 1
        if timed == 0:
            begun = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return timed * batch / (time.perf_counter() - begun)


def main() -> None:
    """Measure and print one table."""
    options = parse()
    device, batch, workers = torch.device(options.device), options.batch_images, options.workers
    if options.images < (UNTIMED_BATCHES + 1) * batch:
        raise SystemExit(f"--images {options.images}: allowed from {(UNTIMED_BATCHES + 1) * batch} on at --batch-images {batch}")
    with tempfile.TemporaryDirectory() as folder:
        images = make_images(Path(folder), CASE, options.images, files=True)
        assert isinstance(images, FileImages)
        paths, views = sorted(Path(folder).glob("*.jpg")), torchvision_views(CASE.augment)
        variants: dict[str, Callable[[], Iterator[Tensor]]] = {
            "bare decode": lambda: plain_batches(paths, None, batch, workers, device),
            "this loader": lambda: our_batches(images, batch, workers, device),
            "torchvision": lambda: plain_batches(paths, views, batch, workers, device),
        }
        rates: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(options.repeats):
            for name, make in variants.items():
                rates[name].append(images_per_second(make(), batch, device))
    print(f"{options.images} JPEG files of 500 x 375, {CASE.crop_px} px, batch {batch}, {workers} workers, {device}")
    for name, values in rates.items():
        percent = [100 * value / bare for value, bare in zip(values, rates["bare decode"], strict=True)]
        print(f"    {name:<13}{spread(values):>34} images/s{spread(percent):>32} % of bare decode")


def spread(values: list[float]) -> str:
    """Median and, in brackets, the least and the most."""
    return f"{statistics.median(values):,.1f} [{min(values):,.1f} .. {max(values):,.1f}]"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--batch-images", type=int, default=32)
    parser.add_argument("--workers", type=int, default=worker_count())
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
