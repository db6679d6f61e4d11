"""Speed of extraction relative to the teacher's forward pass alone, in images per second, including views and writing.

    python -m benchmarks.bench_extract                  two cases from images in memory, about two minutes on 2 cores
    python -m benchmarks.bench_extract --case large --files --images 4096 --views 8 --batch-images 256    for a GPU

Both are measured in the same run, in turns, on batches of the same size. Medians are printed, with the smallest and the largest repeat in
brackets. The goal is a ratio of 90 %. Then the peak memory of extraction from MEMORY_ROWS small files in chunks of MEMORY_CHUNK_ROWS is
measured, each in a separate process; it must not grow with the number of files.
"""

import argparse
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.parser import Parser
from bingo.embeddings.extract import extract_embeddings
from bingo.images.images import FileImages, Images, MemoryImages
from bingo.images.listing import Listing
from bingo.nets.backbones import build_backbone
from bingo.nets.heads import mlp_head
from bingo.nets.precision import autocast, resolve_precision
from bingo.params import AugmentParams, ExtractParams, ImageParams, image_values
from bingo.runtime.memory import keep_freed_memory
from bingo.teachers.teacher import Teacher

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
FILE_WIDTH_PX, FILE_HEIGHT_PX = 500, 375  # ImageNet's most frequent size
MEMORY_ROWS, MEMORY_CHUNK_ROWS = (1024, 4096, 16384), 512


@dataclass(frozen=True)
class ExtractCase:
    """A teacher, the size of its images, and an amount of work that suits 2 cores."""

    arch: str
    width: float
    stem: str
    store_px: int
    crop_px: int
    images: int
    views: int
    batch_images: int
    augment: AugmentParams


def augment(blur_p: float, gray_p: float, jitter: list[float], flip_p: float) -> AugmentParams:
    """MoCo-v2's augmentation, with probabilities that suit the dataset."""
    return AugmentParams(
        crop_scale=[0.2, 1.0], crop_ratio=[3 / 4, 4 / 3], rotate_degrees=0, jitter=jitter, jitter_p=0.8, gray_p=gray_p, blur_p=blur_p,
        blur_sigma_px=[0.1, 2.0], flip_p=flip_p,
    )  # fmt: skip


CASES = {
    "small": ExtractCase("resnet18", 0.5, "small", 20, 20, 384, 8, 512, augment(0.0, 0.0, [0.4, 0.4, 0.0, 0.0], 0.0)),
    "large": ExtractCase("resnet50", 1.0, "imagenet", 256, 224, 16, 2, 16, augment(0.5, 0.2, [0.4, 0.4, 0.4, 0.1], 0.5)),
}


def main() -> None:
    """Run the requested cases and print one line for each."""
    options = parse()
    device = torch.device(options.device)
    if device.type == "cpu":
        keep_freed_memory()  # as in every stage
    for name in CASES if options.case == "all" else [options.case]:
        case = CASES[name]
        images = options.images or case.images
        params = ExtractParams(
            views=options.views or case.views,
            batch_images=options.batch_images or case.batch_images,
            chunk_rows=options.chunk_rows,
            precision=options.precision,
            augment=case.augment,
        )
        with tempfile.TemporaryDirectory() as folder:
            pictures = make_images(Path(folder), case, images, options.files)
            if isinstance(pictures, FileImages):
                pictures.jpeg_decoder = options.jpeg_decoder
            rates = measure(case, pictures, params, Path(folder), device, options.repeats)
        source = f"{images} {f'files decoded by the {options.jpeg_decoder}' if options.files else 'images in memory'}"
        dtype = str(resolve_precision(params.precision, device)).removeprefix("torch.")
        print(f"{name}: {case.arch} x {case.width}, {case.crop_px} px, {source}, {params.views} views, {dtype}, {device}")
        for label, values, unit in rates:
            print(f"    {label:<13}{statistics.median(values):>10,.1f} {unit} [{min(values):,.1f} .. {max(values):,.1f}]")
    if not options.no_memory:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            peaks = list(pool.map(peak_mb, MEMORY_ROWS))
        print("host memory: " + ", ".join(f"{rows:,} files {peak:,.0f} MB" for rows, peak in zip(MEMORY_ROWS, peaks, strict=True)))


def peak_mb(rows: int) -> float:
    """This process's peak memory after an extraction from `rows` files, in MB of 10^6 bytes."""
    keep_freed_memory()
    case = CASES["small"]
    params = ExtractParams(views=1, batch_images=256, chunk_rows=MEMORY_CHUNK_ROWS, precision="auto", augment=case.augment)
    with tempfile.TemporaryDirectory() as folder:
        for row, image_SS3 in enumerate(np.random.default_rng(0).integers(0, 256, (64, case.store_px, case.store_px, 3), dtype=np.uint8)):
            Image.fromarray(image_SS3).save(f"{folder}/{row}.png")
        images = FileImages(folder, [f"{row % 64}.png" for row in range(rows)])
        extract(make_teacher(case), case, images, params, Path(folder), torch.device("cpu"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--files", action="store_true", help="decode JPEG files on every access instead of reading an array in memory")
    parser.add_argument("--jpeg-decoder", choices=["cpu", "gpu"], default="cpu", help="decoder for the random views of files")
    parser.add_argument("--images", type=int, help="train images (default: enough for 2 cores)")
    parser.add_argument("--views", type=int, help="stored views of each image")
    parser.add_argument("--batch-images", type=int)
    parser.add_argument("--chunk-rows", type=int, default=8192)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="do not measure host memory")
    return parser.parse_args()


def make_images(folder: Path, case: ExtractCase, images: int, files: bool) -> Images:
    """Smooth noise, so that decoding a JPEG costs about as much as for a photograph."""
    rng = np.random.default_rng(0)
    if not files:
        return MemoryImages(rng.integers(0, 256, (images, case.store_px, case.store_px, 3), dtype=np.uint8))
    for row in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        coarse.resize((FILE_WIDTH_PX, FILE_HEIGHT_PX), Image.Resampling.BICUBIC).save(folder / f"{row}.jpg", quality=90)
    return FileImages(str(folder), [f"{row}.jpg" for row in range(images)])


def measure(
    case: ExtractCase, images: Images, params: ExtractParams, folder: Path, device: torch.device, repeats: int
) -> list[tuple[str, list[float], str]]:
    """Rates of extraction and of the forward pass, measured in turns after one untimed round, and their ratio in percent."""
    rows = len(images)
    teacher = make_teacher(case).to(device).to(memory_format=torch.channels_last)
    total = rows * (1 + params.views)

    def extraction() -> None:
        extract(teacher, case, images, params, folder, device)

    def forward() -> None:
        bare_forward(teacher, case.crop_px, rows, params, device)

    extraction(), forward()
    rates: dict[str, list[float]] = {"extraction": [], "bare forward": []}
    for _ in range(repeats):
        rates["extraction"].append(total / seconds_of(extraction, device))
        rates["bare forward"].append(total / seconds_of(forward, device))
    ratios = [100 * whole / bare for whole, bare in zip(*rates.values(), strict=True)]
    return [*((label, values, "images/s") for label, values in rates.items()), ("ratio", ratios, "%")]


def extract(teacher: Teacher, case: ExtractCase, images: Images, params: ExtractParams, folder: Path, device: torch.device) -> None:
    """Extract all images once, as train rows."""
    rows = len(images)
    listing = Listing("made", [f"{row}.jpg" for row in range(rows)], np.zeros(rows, np.int64), rows, ["one"], [], "benchmark")
    state, out = folder / "state", folder / "embeddings.zarr"
    shutil.rmtree(state, ignore_errors=True)  # otherwise finished chunks would be skipped
    extract_embeddings(teacher, listing, images, params, 0, state, out, device, {"teacher": "benchmark"})


def make_teacher(case: ExtractCase) -> Teacher:
    """An untrained teacher with MoCo-v2's head."""
    backbone = build_backbone(case.arch, case.width, case.stem, 0)
    width = backbone.feature_width
    image = ImageParams(crop_px=case.crop_px, resize_px=case.store_px, mean=MEAN, std=STD)
    return Teacher(backbone, mlp_head([width, width, 128], 0), {"feature_width": width, "key_width": 128, **image_values(image)})


@torch.inference_mode()
def bare_forward(teacher: Teacher, crop_px: int, rows: int, params: ExtractParams, device: torch.device) -> None:
    """The forward passes of one extraction, on random numbers already on the device."""
    views_B = torch.randn(params.batch_images, 3, crop_px, crop_px, device=device).to(memory_format=torch.channels_last)
    with autocast(params.precision, device):
        for images, network in ((rows, teacher.features), (rows * params.views, teacher.keys)):
            for start in range(0, images, params.batch_images):
                network(views_B[: images - start])


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """Wall time of one call, including work that it left on the GPU."""
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
