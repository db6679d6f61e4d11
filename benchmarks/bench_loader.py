"""Speed of the dataloader compared with plain decoding, cost of its colour operations compared with libraries, its share of a step.

    python -m benchmarks.bench_loader                              3 minutes on 2 cores
    python -m benchmarks.bench_loader --device cuda --images 8192 --batch-images 256
    python -m benchmarks.bench_loader --folder ~/imagenet/val      photographs instead of synthetic images

The variants of each table take turns. Medians are printed, with the smallest and the largest repeat in brackets.
  files     from JPEG files to views, with the same number of workers: bare decode by Pillow and by simplejpeg (each file is read and
            decoded to RGB: the limit), this project's workers (uint8 crops, one and three per decoded image, also from a tar shard of the
            same files), the whole loader (coloured, normalised, on the device), on a GPU also with nvJPEG, and torchvision's transforms
            on each image in the workers. The goal is 85 % of a bare decode. CPU time is that of this process (all of it with --workers 0).
  stores    the same images in a folder, in tar shards, and in packs of photographs at each --pack-px (dataset.pack_px): microseconds
            of CPU time per image, and the resulting images/s of one core (other work on the machine matters only through its use of
            caches): bare decode by simplejpeg, which is the limit; one and three crops per decoded image in this process; and three
            from a worker, including the time in which both processes pass them on. The goal is 1,000 images/s with three crops each
            from the pack.
  pixels    difference of the device's decoder (nvJPEG; on the CPU torchvision's libjpeg) from simplejpeg, in levels of 255
  colours   from uint8 crops on the device to coloured, normalised views: this project, kornia (if installed; it is not a dependency of
            this project) and torchvision on each image
  memory    images in memory: the views of a step compared with the student's forward and backward on them, 32 px. The goal is 10 %.
The first batches of each turn are not timed, because workers are starting.
"""

import argparse
import importlib.util
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import simplejpeg
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.bench_extract import CASES, MEAN, STD, make_images
from benchmarks.bench_step import StepCase, bare_step, spread
from benchmarks.parser import Parser
from bingo.datasets.packing import pack_images
from bingo.datasets.shards import read_shards
from bingo.images.augment import cropped_views
from bingo.images.decoding import DecodePlan, FileDecoder
from bingo.images.draws import draw_views
from bingo.images.images import FileImages, MemoryImages
from bingo.images.loader import Request, ViewLoader
from bingo.images.nvjpeg import decode_on
from bingo.params import AugmentParams, ImageParams
from bingo.runtime.workers import worker_count

CASE = CASES["large"]
IMAGE = ImageParams(crop_px=CASE.crop_px, resize_px=CASE.store_px, mean=MEAN, std=STD)
UNTIMED_BATCHES = 4
SMALL = StepCase(32, "small", 64, "resnet50", 1.0, torch.device("cpu"), 0, "auto")
Batches = Callable[[], Iterable[object]]


class DecodedFiles(Dataset):
    """The result of `read` for each file."""

    def __init__(self, paths: list[Path], read: Callable[[Path], Tensor]):
        self.paths, self.read = paths, read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        return self.read(self.paths[row])


def by_pillow(path: Path) -> Tensor:
    """Decode a file, and discard the pixels."""
    with Image.open(path) as image:
        image.convert("RGB")
    return torch.empty(0)


def by_simplejpeg(path: Path) -> Tensor:
    """Decode a file, and discard the pixels."""
    simplejpeg.decode_jpeg(path.read_bytes(), "RGB")
    return torch.empty(0)


class ByTorchvision:
    """The same augmentation as in the released code (main_moco.py): transforms of one image."""

    def __init__(self, augment: AugmentParams):
        blur = transforms.GaussianBlur(23, (augment.blur_sigma_px[0], augment.blur_sigma_px[1]))
        self.crop = transforms.RandomResizedCrop(CASE.crop_px, scale=(augment.crop_scale[0], augment.crop_scale[1]))
        self.colours = transforms.Compose(
            [
                transforms.RandomApply([transforms.ColorJitter(*augment.jitter)], p=augment.jitter_p),
                transforms.RandomGrayscale(p=augment.gray_p),
                transforms.RandomApply([blur], p=augment.blur_p),
                transforms.RandomHorizontalFlip(p=augment.flip_p),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __call__(self, path: Path) -> Tensor:
        with Image.open(path) as image:
            return self.colours(self.crop(image.convert("RGB")))


def by_kornia(augment: AugmentParams, device: torch.device) -> nn.Module:
    """The same colour augmentation as a kornia module for batches."""
    import kornia.augmentation as K

    return nn.Sequential(
        K.ColorJitter(*augment.jitter, p=augment.jitter_p),
        K.RandomGrayscale(p=augment.gray_p),
        K.RandomGaussianBlur((13, 13), (augment.blur_sigma_px[0], augment.blur_sigma_px[1]), p=augment.blur_p),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ).to(device)


def plain_batches(paths: list[Path], read: Callable[[Path], Tensor], options: argparse.Namespace) -> Iterator[Tensor]:
    """Batches of a DataLoader on the device."""
    device = torch.device(options.device)
    pin = device.type == "cuda"
    loader = DataLoader(DecodedFiles(paths, read), options.batch_images, num_workers=options.workers, pin_memory=pin, drop_last=True)
    for views in loader:
        yield views.to(device, non_blocking=True)


def packed(images: FileImages, shard: Path) -> FileImages:
    """Write a tar shard of the images, and open it."""
    with tarfile.open(shard, "w") as tar:
        for path in dict.fromkeys(images.paths):
            tar.add(Path(images.root, path), path)
    members = read_shards(str(shard), False, "shard")
    return FileImages(str(shard.parent), images.paths, positions=members.positions.part(members.rows.of(images.paths)))


def file_variants(images: FileImages, shard: FileImages, paths: list[Path], options: argparse.Namespace) -> dict[str, Batches]:
    """The variants of the first table."""
    batch, device = options.batch_images, torch.device(options.device)
    rows_NB = np.arange(len(images) // batch * batch).reshape(-1, batch)

    def workers_part(views: int, images: FileImages = images) -> Iterator[object]:
        decoder = FileDecoder(images, options.workers, pin=device.type == "cuda")
        rows_NT = np.tile(rows_NB, (1, views))
        view_T = np.repeat(np.arange(views), batch)
        plans = (DecodePlan(rows_T, draw_views(CASE.augment, 0, "anchor", 0, rows_T, view_T)[0], [IMAGE]) for rows_T in rows_NT)
        return decoder.batches(plans)

    def whole(views: int, jpeg_decoder: str) -> Iterator[list[Tensor]]:
        files = FileImages(images.root, images.paths, jpeg_decoder=jpeg_decoder)
        loader = ViewLoader(files, IMAGE, CASE.augment, 0, device, options.workers)
        return loader.views([Request(rows_B, rows_B, "anchor", 0, view) for view in range(views)] for rows_B in rows_NB)

    on_gpu: dict[str, Batches] = {}
    if device.type == "cuda":
        on_gpu = {f"whole loader, nvJPEG, {views} view{'s' * (views > 1)}": partial(whole, views, "gpu") for views in (1, 3)}
    return {
        "bare decode, Pillow": lambda: plain_batches(paths, by_pillow, options),
        "bare decode, simplejpeg": lambda: plain_batches(paths, by_simplejpeg, options),
        "workers' part, 1 view": lambda: workers_part(1),
        "workers' part, 1 view, shard": lambda: workers_part(1, shard),
        "workers' part, 3 views": lambda: workers_part(3),
        "whole loader, 1 view": lambda: whole(1, "cpu"),
        "whole loader, 3 views": lambda: whole(3, "cpu"),
        **on_gpu,
        "torchvision, 1 view": lambda: plain_batches(paths, ByTorchvision(CASE.augment), options),
    }


def stores_table(options: argparse.Namespace) -> None:
    """Print the table `stores`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        images = photographs(Path(options.folder), options.images) if options.folder else made(Path(folder), options.images)
        stores = {"folder": images, "shard": packed(images, Path(folder, "shard.tar"))}
        stores |= {f"pack, {px} px": packed_images(images, px, Path(folder, str(px))) for px in options.pack_px}
        alone, handing = ({name: FileDecoder(store, workers, pin=False) for name, store in stores.items()} for workers in (0, 1))
        variants: dict[str, Callable[[str], object]] = {
            "bare decode": lambda name: [simplejpeg.decode_jpeg(stores[name].read(row), "RGB") for row in range(len(images))],
            "1 view": lambda name: decoded(alone[name], len(images), 1),
            "3 views": lambda name: decoded(alone[name], len(images), 3),
            "3 views from a worker": lambda name: decoded(handing[name], len(images), 3),
        }
        microseconds: dict[tuple[str, str], list[float]] = {}
        for turn in range(-1, options.repeats):
            for name in stores:
                for what, act in variants.items():
                    begun = cpu_seconds_of_all()
                    act(name)
                    if turn >= 0:
                        microseconds.setdefault((name, what), []).append(1e6 * (cpu_seconds_of_all() - begun) / len(images))
        kilobytes = {name: sum(len(store.read(row)) for row in range(len(store))) / len(store) / 1e3 for name, store in stores.items()}
    print(f"stores: {len(images)} JPEG files, {CASE.crop_px} px, CPU microseconds per image, images/s of one core, without colours")
    print(f"    {'':<14}{'kB':>6}" + "".join(f"{what:>38}" for what in variants))
    for name in stores:
        figures = [microseconds[name, what] for what in variants]
        cells = [f"{spread(values, 0)}, {1e6 / statistics.median(values):,.0f}/s" for values in figures]
        print(f"    {name:<14}{kilobytes[name]:>6.0f}" + "".join(f"{cell:>38}" for cell in cells))


def cpu_seconds_of_all() -> float:
    """User and system time of this process and of its children."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [own, *own.children(recursive=True)])


def packed_images(images: FileImages, pack_px: int, folder: Path) -> FileImages:
    """The same images, packed with this short side into a few large files."""
    positions = pack_images(images, pack_px, folder, lambda line: None)
    return FileImages(str(folder), images.paths, True, images.gray_bits, positions=positions)


def decoded(decoder: FileDecoder, images: int, views: int) -> None:
    """Cut `views` random crops from all images; each image is decoded once."""
    rows_N = np.repeat(np.arange(images), views)
    view_N = np.tile(np.arange(views), images)
    plan = DecodePlan(rows_N, draw_views(CASE.augment, 0, "anchor", 0, rows_N, view_N)[0], [IMAGE])
    for _ in decoder.batches([plan]):
        pass


def images_per_second(batches: Iterable[object], batch: int, device: torch.device) -> float:
    """The rate, without the first batches."""
    begun, timed = 0.0, -UNTIMED_BATCHES
    for _ in batches:
        timed += 1
        if timed == 0:
            begun = time.perf_counter()
    settle(device)
    return timed * batch / (time.perf_counter() - begun)


def cpu_seconds() -> float:
    """User and system time of this process."""
    return sum(os.times()[:2])


def settle(device: torch.device) -> None:
    """Wait for the GPU to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def files_table(options: argparse.Namespace) -> None:
    """Print the table `files`."""
    batch, device = options.batch_images, torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        images = photographs(Path(options.folder), options.images) if options.folder else made(Path(folder), options.images)
        paths = [Path(images.root) / path for path in images.paths]
        variants = file_variants(images, packed(images, Path(folder, "shard.tar")), paths, options)
        rates: dict[str, list[float]] = {name: [] for name in variants}
        cpu_ms: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(options.repeats):
            for name, make in variants.items():
                begun = cpu_seconds()
                rates[name].append(images_per_second(make(), batch, device))
                cpu_ms[name].append(1e3 * (cpu_seconds() - begun) / (len(images) // batch * batch))
        kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1e3
    print(f"files: {len(images)} JPEG files of {kilobytes:.0f} kB, {CASE.crop_px} px, batch {batch}, {options.workers} workers, {device}")
    print(f"    {'':<26}{'images/s':>30}{'% of Pillow':>26}{'% of simplejpeg':>26}{'CPU ms/image':>26}")
    for name, values in rates.items():
        shares = [[100 * a / b for a, b in zip(values, rates[f"bare decode, {bare}"], strict=True)] for bare in ("Pillow", "simplejpeg")]
        print(f"    {name:<26}{spread(values, 1):>30}{spread(shares[0], 1):>26}{spread(shares[1], 1):>26}{spread(cpu_ms[name]):>26}")


def pixels_table(options: argparse.Namespace) -> None:
    """Print the table `pixels`: differences for up to 64 files, at their own size and resized to 224 px."""
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        images = photographs(Path(options.folder), 64) if options.folder else made(Path(folder), min(64, options.images))
        contents = [Path(images.root, path).read_bytes() for path in images.paths]
    found = decode_on(device, [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents])
    pairs = [
        (image_3HW.cpu().float(), torch.from_numpy(simplejpeg.decode_jpeg(content, "RGB")).permute(2, 0, 1).float())
        for image_3HW, content in zip(found, contents, strict=True)
        if image_3HW is not None
    ]
    print(f"pixels: {len(pairs)} of {len(contents)} files decoded on {device}, levels of 255 from simplejpeg's pixels")
    for name, change in (("as decoded", lambda x: x), (f"at {CASE.crop_px} px", reduced)):
        differences = torch.cat([(change(ours) - change(theirs)).abs().flatten() for ours, theirs in pairs])
        beyond = 100 * float((differences > 2).float().mean())
        print(f"    {name:<14} mean {float(differences.mean()):.3f}, largest {float(differences.max()):.0f}, over 2 levels {beyond:.2f} %")


def reduced(image_3HW: Tensor) -> Tensor:
    """An image resized to the side of a view."""
    return interpolate(image_3HW[None], (CASE.crop_px, CASE.crop_px), mode="bilinear", antialias=True)[0]


def made(folder: Path, count: int) -> FileImages:
    """Files of smooth noise."""
    images = make_images(folder, CASE, count, files=True)
    assert isinstance(images, FileImages)
    return images


def photographs(folder: Path, count: int) -> FileImages:
    """JPEG files at any depth of a folder, repeated until there are `count`."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not names:
        raise SystemExit(f"--folder {folder}: contains no .jpg or .jpeg file")
    return FileImages(str(folder), [names[row % len(names)] for row in range(count)])


def colours_table(options: argparse.Namespace) -> None:
    """Print the table `colours`."""
    batch, device = options.batch_images, torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    crops_BPP3 = torch.randint(0, 256, (batch, CASE.crop_px, CASE.crop_px, 3), dtype=torch.uint8, generator=generator).to(device)
    _, colours = draw_views(CASE.augment, 0, "anchor", 0, np.arange(batch), 0)
    pictures = [Image.fromarray(crop_PP3) for crop_PP3 in crops_BPP3.cpu().numpy()]
    by_image = ByTorchvision(CASE.augment).colours
    variants: dict[str, Callable[[], object]] = {
        "this project": lambda: cropped_views(crops_BPP3, colours, CASE.augment, IMAGE),
        "torchvision": lambda: torch.stack([by_image(picture) for picture in pictures]).to(device),
    }
    if importlib.util.find_spec("kornia"):
        module = by_kornia(CASE.augment, device)
        variants["kornia"] = lambda: module(crops_BPP3.permute(0, 3, 1, 2).float() / 255)
    seconds = in_turns(variants, options.repeats, device)
    print(f"colours: {batch} crops of {CASE.crop_px} px, {device}, {torch.get_num_threads()} threads")
    for name, values in seconds.items():
        times = [value / ours for value, ours in zip(values, seconds["this project"], strict=True)]
        print(f"    {name:<26}{spread([1e3 * value / batch for value in values]):>30} ms/view{spread(times):>26} x this project's")


def memory_table(options: argparse.Namespace) -> None:
    """Print the table `memory`."""
    device = torch.device(options.device)
    case = SMALL if device.type == "cpu" else StepCase(32, "small", 256, "resnet50", 1.0, device, 0, "auto")
    image = ImageParams(crop_px=32, resize_px=32, mean=MEAN, std=STD)
    augment = CASE.augment.model_copy(update={"blur_p": 0.0})  # as in the released code at 32 px
    images = MemoryImages(np.random.default_rng(0).integers(0, 256, (4096, 32, 32, 3), dtype=np.uint8))
    loader, rows_B = ViewLoader(images, image, augment, 0, device), np.arange(case.batch_anchors)
    requests = [Request(rows_B, rows_B, "anchor", 0, view) for view in range(3)]
    variants = {"views": lambda: next(iter(loader.views([requests]))), "step": bare_step(case, 3)}
    seconds = in_turns(variants, max(options.repeats, 15), device)
    shares = [100 * a / b for a, b in zip(seconds["views"], seconds["step"], strict=True)]
    print(f"memory: 3 views of {case.batch_anchors} images of 32 px, resnet18, {device}, {torch.get_num_threads()} threads")
    milliseconds = {name: spread([1e3 * value for value in values], 1) for name, values in seconds.items()}
    print(f"    views {milliseconds['views']} ms, student's forward and backward {milliseconds['step']} ms: {spread(shares, 1)} %")


def in_turns(variants: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each variant, `repeats` times in turns; the first two rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-2, repeats):
        for name, act in variants.items():
            begun = time.perf_counter()
            act()
            settle(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def main() -> None:
    """Measure and print the requested tables."""
    options = parse()
    if options.images < (UNTIMED_BATCHES + 1) * options.batch_images:
        least = (UNTIMED_BATCHES + 1) * options.batch_images
        raise SystemExit(f"--images {options.images}: at least {least} with --batch-images {options.batch_images}")
    for name in options.tables:
        tables = {"files": files_table, "stores": stores_table, "pixels": pixels_table, "colours": colours_table, "memory": memory_table}
        tables[name](options)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ["files", "stores", "pixels", "colours", "memory"]
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", help="photographs instead of synthetic images")
    parser.add_argument("--pack-px", nargs="+", type=int, default=[256, 288, 320, 384])
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--batch-images", type=int, default=32)
    parser.add_argument("--workers", type=int, default=worker_count())
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
