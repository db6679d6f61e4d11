"""Scans: which files become rows, in which order, with which label; and every mistake in a folder of images."""

import io
import os
import shutil
import struct
import subprocess
import sys
import urllib.error
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets
from torchvision.transforms import functional as tv

from bingo.datasets import filecheck
from bingo.datasets.digits import draw_digits, read_digits
from bingo.datasets.folder import _row_of_train
from bingo.datasets.sources import scan
from bingo.datasets.subset import draw_subset
from bingo.images.decode import BadImage, decode_rgb, decode_square
from bingo.params import DatasetParams
from bingo.runtime import workers
from bingo.runtime.errors import UserError

DIGITS = DatasetParams(
    source="digits",
    root=None,
    follow_links=False,
    image_column=None,
    label_column=None,
    store_px=20,
    pack_px=None,
    train_images=None,
    test_images=None,
    check="decode",
    on_bad_image="stop",
    jpeg_decoder="cpu",
    placements=2,
    placement_scale=[0.5, 0.75],
    placement_degrees=15.0,
)


def folder(root: Path | str, **changes) -> DatasetParams:
    return DIGITS.model_copy(update={"source": "folder", "root": str(root), "store_px": None, **changes})


def photo(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A smooth random image, because noise would not survive JPEG compression."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed).save(path)
    return path


@pytest.fixture
def pets(tmp_path) -> Path:
    """train: 3 cats (one deeper), 2 dogs; val: a cat, a dog; and files that are not images."""
    names = ["train/cat/b.jpg", "train/cat/a.JPG", "train/cat/deep/er/c.png", "train/dog/2.jpeg", "train/dog/10.webp"]
    for seed, name in enumerate([*names, "val/cat/v.jpg", "val/dog/w.bmp"]):
        save(tmp_path / name, seed)
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    save(tmp_path / "train/cat/.hidden.jpg")
    return tmp_path


def lines_of(dataset: DatasetParams) -> list[str]:
    with pytest.raises(UserError) as error:
        scan(dataset, 0)
    return error.value.lines


# --- digits


def test_digits_are_split_by_digit_and_stratified():
    listing, images = scan(DIGITS, 0)
    digit_N = np.array([int(path.split("/")[1]) for path in listing.paths])
    train, test = set(digit_N[: listing.train_rows]), set(digit_N[listing.train_rows :])
    assert not train & test
    assert len(train | test) == 1797
    assert listing.paths[:2] == ["digit/0000/p0", "digit/0000/p1"]
    assert (images.shape, images.dtype) == ((2 * 1797, 20, 20, 3), np.uint8)
    np.testing.assert_array_equal(listing.labels_N, read_digits()[1][digit_N])
    shares = np.bincount(listing.labels_N[listing.train_rows :]) / np.bincount(listing.labels_N)
    np.testing.assert_allclose(shares, 0.2, atol=0.004)


def test_digits_depend_only_on_the_seed():
    few = DIGITS.model_copy(update={"train_images": 50, "test_images": 20})
    (one, images), (again, images_again), (other, _) = scan(few, 0), scan(few, 0), scan(few, 1)
    assert one.fingerprint == again.fingerprint != other.fingerprint
    np.testing.assert_array_equal(images, images_again)
    whole, whole_images = scan(DIGITS, 0)
    rows = [whole.paths.index(path) for path in one.paths]
    np.testing.assert_array_equal(images, whole_images[rows])


def test_a_digit_is_drawn_in_its_square():
    """An undistorted placement at full scale equals the digit resized to the canvas; a smaller one has its ink, scaled by area, inside the
    square."""
    digits, _ = read_digits()
    still = DIGITS.model_copy(update={"placement_scale": [1.0, 1.0], "placement_degrees": 0.0, "store_px": 8})
    np.testing.assert_array_equal(draw_digits(digits, np.array([3, 4]), np.array([0, 1]), still, 0)[..., 0], digits[3:5])
    half = DIGITS.model_copy(update={"placement_scale": [0.5, 0.5], "placement_degrees": 0.0, "store_px": 64})
    drawn = draw_digits(digits, np.arange(20), np.zeros(20, int), half, 0)
    np.testing.assert_allclose(drawn[..., 0].sum((1, 2)) / digits[:20].sum((1, 2)), 16, rtol=0.1)
    for image in drawn[..., 0]:
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        assert np.ptp(rows) < 34
        assert np.ptp(columns) < 34
    assert (drawn == drawn[..., :1]).all()


def test_scanning_digits_imports_no_torch():
    code = "import sys, bingo.datasets.sources, bingo.datasets.digits, bingo.datasets.folder; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("count", "want"), [(6, [2, 2, 2]), (8, None), (15, [10, 3, 2])])
def test_a_subset_is_balanced_over_classes(count, want):
    labels = np.repeat([0, 1, 2], [10, 3, 2])
    rows = draw_subset(DIGITS.model_copy(update={"train_images": count}), "train", labels, 0)
    sizes = np.bincount(labels[rows]).tolist()
    assert (np.diff(rows) > 0).all()
    assert len(rows) == count
    assert sizes == want if want else sorted(sizes) == [2, 3, 3]


def test_a_subset_larger_than_the_split_is_refused():
    lines = lines_of(DIGITS.model_copy(update={"test_images": 10_000}))
    assert lines == ["dataset.test_images = 10000: the test split has 718 images; set dataset.test_images: null for all, or lower it"]


# --- folders


def test_a_folder_is_listed_in_the_order_of_names(pets):
    listing, images = scan(folder(pets), 0)
    assert images is None
    assert listing.paths == [
        *("train/cat/a.JPG", "train/cat/b.jpg", "train/cat/deep/er/c.png", "train/dog/10.webp", "train/dog/2.jpeg"),
        *("val/cat/v.jpg", "val/dog/w.bmp"),
    ]
    assert listing.labels_N.tolist() == [0, 0, 0, 1, 1, 0, 1]
    assert (listing.train_rows, listing.classes, listing.skipped, listing.labelled) == (5, ["cat", "dog"], [], True)


def test_a_test_folder_is_used_without_val(pets):
    (pets / "val").rename(pets / "test")
    assert scan(folder(pets), 0)[0].paths[5:] == ["test/cat/v.jpg", "test/dog/w.bmp"]


def test_class_folders_alone_are_all_train(pets):
    listing, _ = scan(folder(pets / "train"), 0)
    assert (len(listing), listing.train_rows, listing.classes) == (5, 5, ["cat", "dog"])


def test_a_flat_folder_is_a_train_split_without_labels(pets):
    listing, _ = scan(folder(pets / "train/dog"), 0)
    assert (listing.paths, listing.train_rows, listing.classes) == (["10.webp", "2.jpeg"], 2, [])
    assert listing.labels_N.tolist() == [-1, -1]
    assert not listing.labelled


def test_an_unlabelled_train_split_may_have_a_labelled_test_split(pets):
    for path in list((pets / "train").rglob("*.*")):
        path.rename(pets / "train" / path.name)
    for path in (pets / "train").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    listing, _ = scan(folder(pets), 0)
    assert listing.labels_N.tolist() == [-1] * 5 + [0, 1]


@pytest.mark.parametrize("check", ["decode", "header"])
def test_the_fingerprint_depends_on_content_label_and_order_but_not_time_or_place(pets, tmp_path_factory, check):
    def fingerprint() -> str:
        return scan(folder(pets, check=check), 0)[0].fingerprint

    first = fingerprint()
    os.utime(pets / "train/cat/b.jpg", (1, 1))
    elsewhere = tmp_path_factory.mktemp("copy") / "pets"
    shutil.copytree(pets, elsewhere)
    assert first == fingerprint() == scan(folder(elsewhere, check=check), 0)[0].fingerprint
    seen = {first}
    (pets / "train/cat/b.jpg").rename(pets / "train/dog/b.jpg")  # another label
    seen.add(fingerprint())
    (pets / "train/dog/b.jpg").rename(pets / "train/dog/z.jpg")  # another order
    seen.add(fingerprint())
    save(pets / "train/dog/z.jpg", 99)  # another content
    seen.add(fingerprint())
    assert len(seen) == 4


def test_a_changed_byte_changes_the_fingerprint_with_check_decode_and_not_header(pets):
    path = pets / "val/dog/w.bmp"
    before = {check: scan(folder(pets, check=check), 0)[0].fingerprint for check in ("decode", "header")}
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    after = {check: scan(folder(pets, check=check), 0)[0].fingerprint for check in ("decode", "header")}
    assert before["decode"] != after["decode"]
    assert before["header"] == after["header"]


def test_packed_images_are_resized_and_cropped_as_torchvision_does(pets):
    listing, images = scan(folder(pets, store_px=16), 0)
    assert images.shape == (7, 16, 16, 3)
    for path, image in zip(listing.paths, images, strict=True):
        with Image.open(pets / path) as opened:
            want = np.asarray(tv.center_crop(tv.resize(opened.convert("RGB"), 16), [16, 16]))
        np.testing.assert_allclose(image.astype(int), want, atol=1)
    assert listing.fingerprint != scan(folder(pets), 0)[0].fingerprint


def test_processes_and_threads_give_the_same_listing(pets, monkeypatch):
    by_threads, images = scan(folder(pets, store_px=16), 0)
    monkeypatch.setattr(workers, "THREADS_UP_TO_FILES", 0)
    monkeypatch.setattr(filecheck, "CHUNK_FILES", 2)
    by_processes, images_again = scan(folder(pets, store_px=16), 0)
    assert by_threads.fingerprint == by_processes.fingerprint
    np.testing.assert_array_equal(images, images_again)


def test_a_subset_of_a_folder_is_drawn_before_files_are_read(pets):
    (pets / "val/cat/v.jpg").write_bytes(b"broken")
    for seed in range(8):
        listing, _ = scan(folder(pets, train_images=2, test_images=1, on_bad_image="skip"), seed)
        assert listing.labels_N[:2].tolist() == [0, 1]
        assert len(listing) == 3
        assert listing.skipped in ([], ["val/cat/v.jpg"])  # only files that are drawn are read


# --- mistakes


def test_a_missing_or_empty_root(tmp_path):
    assert "the folder does not exist" in lines_of(folder(tmp_path / "absent"))[0]
    assert "contains no images; recognised are .jpg" in lines_of(folder(tmp_path))[0]
    (tmp_path / "train/cat").mkdir(parents=True)
    assert "train/ contains no images" in lines_of(folder(tmp_path))[0]


def test_an_empty_class_folder_is_named(pets):
    (pets / "train/emu").mkdir()
    assert lines_of(folder(pets)) == [f"dataset.root = {pets}: train/ has the class folder emu without images; fill it, or delete it"]


def test_images_next_to_class_folders(pets):
    save(pets / "train/stray.png")
    assert "holds images (train/stray.png) beside class folders" in lines_of(folder(pets))[0]


def test_a_test_split_that_does_not_match_train(pets):
    save(pets / "val/emu/x.png")
    assert "has classes that train/ lacks: emu" in lines_of(folder(pets))[0]
    for name in ("cat", "dog", "emu"):
        shutil.rmtree(pets / "val" / name)
    save(pets / "val/x.png")
    assert "val/ has no class folders, but train/ has" in lines_of(folder(pets))[0]
    shutil.rmtree(pets / "train")
    assert "has val/ but no train/" in lines_of(folder(pets))[0]


def test_links_out_of_the_root_are_refused_and_links_within_are_followed(pets, tmp_path_factory):
    (pets / "train/cat/link.jpg").symlink_to(pets / "train/dog/2.jpeg")
    assert "train/cat/link.jpg" in scan(folder(pets), 0)[0].paths
    outside = save(tmp_path_factory.mktemp("outside") / "x.jpg")
    (pets / "train/cat/out.jpg").symlink_to(outside)
    assert "train/cat/out.jpg is a link out of it" in lines_of(folder(pets))[0]
    (pets / "train/cat/out.jpg").unlink()
    (pets / "train/cat/circle").symlink_to(pets / "train/cat")
    assert "leads in a circle" in lines_of(folder(pets))[0]
    (pets / "train/cat/circle").unlink()
    (pets / "train/rat").symlink_to(outside.parent)
    assert "train/rat is a link out of it" in lines_of(folder(pets))[0]


def bomb() -> bytes:
    """A small PNG whose header claims 30,000 x 30,000 pixels."""
    sink = io.BytesIO()
    Image.new("L", (1, 1)).save(sink, "PNG")
    content = bytearray(sink.getvalue())
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def test_unreadable_images_stop_the_scan_or_are_skipped(pets):
    bad = {
        "train/cat/e.jpg": b"",
        "train/cat/t.jpg": encoded(photo(5, 400, 300), "JPEG")[:-2000],
        "train/dog/b.png": bomb(),
        "val/cat/x.gif": b"GIF?",
    }
    for name, content in bad.items():
        (pets / name).write_bytes(content)
    (pets / "train/cat/gone.jpg").symlink_to(pets / "train/cat/never-there.jpg")
    lines = lines_of(folder(pets))
    assert [line.split(": ")[1].split(" ")[0] for line in lines[:-1]] == [
        *("train/cat/e.jpg", "train/cat/gone.jpg", "train/cat/t.jpg", "train/dog/b.png", "val/cat/x.gif")
    ]
    assert "(row 4) cannot be read: No such file or directory" in lines[1]
    assert "truncated" in lines[2]
    assert "decompression bomb" in lines[3]
    assert lines[-1] == "5 of 12 images are unreadable; repair or delete them, or set dataset.on_bad_image: skip"
    for store_px in (None, 16):
        listing, images = scan(folder(pets, on_bad_image="skip", store_px=store_px), 0)
        assert listing.skipped == ["train/cat/e.jpg", "train/cat/gone.jpg", *list(bad)[1:]]
        assert (len(listing), listing.train_rows) == (7, 5)
    np.testing.assert_array_equal(images[5], decode_square((pets / "val/cat/v.jpg").read_bytes(), 16, 16))


def test_at_most_20_bad_files_are_named(tmp_path):
    for i in range(25):
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"no image")
    lines = lines_of(folder(tmp_path))
    assert len(lines) == 22
    assert lines[-2].endswith(": and 5 more")
    assert "no train image is left" in lines_of(folder(tmp_path, on_bad_image="skip"))[-1]


# --- decoding


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def test_every_mode_becomes_rgb():
    rgb = photo(1)
    gray = np.asarray(rgb.convert("L"))
    deep = Image.fromarray(gray.astype(np.uint16) * 256 + 17)
    gray_files = [
        encoded(rgb.convert("L"), "PNG"),
        encoded(deep, "PNG"),
        encoded(deep, "TIFF"),
        encoded(rgb.convert("LA"), "PNG"),
    ]
    for content in gray_files:
        np.testing.assert_array_equal(np.asarray(decode_rgb(content, min)[0]), np.repeat(gray[..., None], 3, 2))
    np.testing.assert_array_equal(np.asarray(decode_rgb(encoded(rgb.convert("RGBA"), "PNG"), min)[0]), np.asarray(rgb))
    palette = rgb.quantize(16)
    for content in (encoded(palette, "PNG"), encoded(palette, "PNG", transparency=bytes(range(16))), encoded(palette, "GIF")):
        np.testing.assert_array_equal(np.asarray(decode_rgb(content, min)[0]), np.asarray(palette.convert("RGB")))
    cmyk = np.asarray(decode_rgb(encoded(rgb.convert("CMYK"), "JPEG", quality=95), lambda h, w: 1)[0]).astype(int)
    assert np.abs(cmyk - np.asarray(rgb)).mean() < 4
    with pytest.raises(BadImage, match="unknown range"):
        decode_rgb(encoded(Image.new("F", (4, 4)), "TIFF"), min)


def test_an_image_is_turned_upright():
    rgb = photo(2)
    for orientation, turned in ((3, rgb.rotate(180)), (6, rgb.rotate(90, expand=True)), (8, rgb.rotate(-90, expand=True))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright, _ = decode_rgb(encoded(turned, "PNG", exif=exif), min)
        np.testing.assert_array_equal(np.asarray(upright), np.asarray(rgb))


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same():
    large = photo(3, 640, 480)
    content = encoded(large, "JPEG", quality=95)
    assert decode_rgb(content, lambda h, w: min(h, w) / (2 * 32))[1] == 4
    want = np.asarray(tv.center_crop(tv.resize(large, 36), [32, 32])).astype(int)
    assert np.abs(decode_square(content, 36, 32) - want).mean() < 1.5


# --- CIFAR


class FakeCifar:
    """Replaces torchvision's class, with 20 train and 10 test images."""

    filename = "cifar-10-python.tar.gz"
    classes = ("a", "b")

    def __init__(self, root, train, download=False):
        count = 20 if train else 10
        self.data = np.random.default_rng(train).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % 2 for i in range(count)]


def test_cifar_is_listed_packed_and_resized(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "CIFAR10", FakeCifar)
    cifar = DIGITS.model_copy(update={"source": "cifar10", "root": str(tmp_path), "store_px": 32, "train_images": 8})
    listing, images = scan(cifar, 0)
    assert (listing.train_rows, len(listing), listing.classes, listing.dataset) == (8, 18, ["a", "b"], "cifar10")
    assert np.bincount(listing.labels_N[:8]).tolist() == [4, 4]
    first = int(listing.paths[0].removeprefix("train/"))
    np.testing.assert_array_equal(images[0], FakeCifar(None, True).data[first])
    assert scan(cifar.model_copy(update={"store_px": 16}), 0)[1].shape == (18, 16, 16, 3)


def test_cifar_without_files_or_network(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    cifar = DIGITS.model_copy(update={"source": "cifar100", "root": str(tmp_path / "new"), "store_px": 32})
    (line,) = lines_of(cifar)
    assert "cifar100 is not in this folder and cannot be downloaded (<urlopen error no network>); put the archive cifar-100-python" in line


# --- 16 bits


def deep_file(path: Path, values: np.ndarray, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "TIFF big-endian":
        Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes()).save(path, "TIFF")
    elif kind == "PGM":
        path.write_bytes(b"P5 %d %d 65535\n" % values.shape[::-1] + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values.astype(np.int32 if kind == "TIFF of 32 bits" else np.uint16)).save(path, kind.partition(" ")[0])


def ramp(largest: int) -> np.ndarray:
    """Values from 0 to `largest` over 16 x 16 pixels."""
    return np.rint(np.linspace(0, largest, 256)).astype(np.uint16).reshape(16, 16)


DEEP = [(200, 8), (1000, 10), (1023, 10), (1024, 12), (4095, 12), (16000, 14), (65535, 16)]
KINDS = ["TIFF", "TIFF big-endian", "TIFF of 32 bits", "PGM", "JPEG2000"]


@pytest.mark.parametrize(("kind", "largest", "bits"), [*(("PNG", *deep) for deep in DEEP), *((kind, *DEEP[4]) for kind in KINDS)])
def test_a_dataset_of_deep_greys_is_scaled_by_the_bits_that_its_largest_value_needs(tmp_path, kind, largest, bits):
    suffix = {"PNG": "png", "PGM": "pgm", "JPEG2000": "jp2"}.get(kind, "tif")
    dim = ramp(largest // 16)
    for name, values in (("bright", ramp(largest)), ("dim", dim)):
        deep_file(tmp_path / f"{name}.{suffix}", values, kind)
    save(tmp_path / "photo.png")
    lines: list[str] = []
    listing, images = scan(folder(tmp_path, store_px=16), 0, lines.append)
    assert listing.gray_bits == bits
    assert f"2 images are 16-bit greyscale: {bits} bits hold the picture" in lines[0]
    for row, values in ((0, ramp(largest)), (1, dim)):
        np.testing.assert_array_equal(images[row], np.repeat((values.astype(int) * 2**8 // 2**bits).astype(np.uint8)[..., None], 3, axis=2))
    for check in ("decode", "header"):
        assert scan(folder(tmp_path, check=check), 0)[0].gray_bits == bits
    assert scan(folder(tmp_path, store_px=16, test_images=None), 0)[0].fingerprint == listing.fingerprint


def test_deep_greys_are_decoded_on_access_as_they_are_stored(tmp_path):
    import torch

    from bingo.images.draws import draw_views
    from bingo.images.images import open_images, write_images
    from bingo.images.listing import read_listing, write_listing
    from bingo.images.loader import Request, ViewLoader, center_views
    from bingo.params import ImageParams, load_params

    for name, largest in (("bright", 4000), ("dim", 300)):
        deep_file(tmp_path / f"images/{name}.png", ramp(largest))
    dataset = folder(tmp_path / "images")
    listing, _ = scan(dataset, 0)
    write_listing(tmp_path / "listing.parquet", listing)
    write_images(tmp_path / "images.zarr", listing, None)
    images = open_images(read_listing(tmp_path / "listing.parquet"), tmp_path / "images.zarr", dataset)
    image = ImageParams(crop_px=16, resize_px=16, mean=[0.0] * 3, std=[1.0] * 3)
    cpu = torch.device("cpu")
    (centers,) = center_views(images, [0, 1], image, cpu, 2, 0)
    wanted = np.stack([ramp(4000) >> 4, ramp(300) >> 4])
    np.testing.assert_allclose(centers[:, 0].numpy() * 255, wanted, atol=0.01)
    whole = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "rotate_degrees": 0.0, "jitter_p": 0.0, "flip_p": 0.0}
    augment = load_params(Path(__file__).parents[2] / "params.yaml").distill.augment.model_copy(update=whole)
    rows = np.arange(2)
    assert draw_views(augment, 0, "x", 0, rows, 0)
    ((views,),) = ViewLoader(images, image, augment, 0, cpu, 0).views([[Request(rows, rows, "x", 0, 0)]])
    np.testing.assert_allclose(views[:, 0].numpy() * 255, wanted, atol=0.01)


def deep_colours(channels: int) -> bytes:
    """A PNG of 8 x 8 pixels with 16 bits per channel (2: grey and alpha, 3: RGB, 4: RGBA) and values of 12 bits, which Pillow cannot
    write."""
    kind = {2: 4, 3: 2, 4: 6}[channels]
    rows = (b"\0" + b"\x0f\xff" * 8 * channels) * 8
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("changes", [{"store_px": 16}, {"check": "header"}, {"check": "decode"}])
def test_colours_of_16_bits_come_with_a_warning(tmp_path, channels, changes):
    save(tmp_path / "a.png", 0)
    lines: list[str] = []
    scan(folder(tmp_path, **changes), 0, lines.append)
    assert not lines
    (tmp_path / "b.png").write_bytes(deep_colours(channels))
    scan(folder(tmp_path, **changes), 0, lines.append)
    assert lines[0].startswith("warning: 1 images have 16 bits per colour (b.png)")


def test_the_fingerprint_of_deep_greys_of_16_bits_is_unchanged(tmp_path):
    deep_file(tmp_path / "a.png", ramp(65535))
    of_16 = scan(folder(tmp_path), 0)[0]
    deep_file(tmp_path / "b.png", ramp(4095))
    assert scan(folder(tmp_path), 0)[0].gray_bits == 16
    (tmp_path / "a.png").unlink()
    assert scan(folder(tmp_path), 0)[0].gray_bits == 12
    assert of_16.gray_bits == 16


def test_one_deep_image_alone_is_scaled_by_its_own_bits():
    sink = io.BytesIO()
    Image.fromarray(ramp(4000)).save(sink, "PNG")
    np.testing.assert_array_equal(np.asarray(decode_rgb(sink.getvalue(), min)[0])[..., 0], ramp(4000) >> 4)
    np.testing.assert_array_equal(np.asarray(decode_rgb(sink.getvalue(), min, 10)[0])[..., 0], np.minimum(ramp(4000), 1023) >> 2)


def test_without_a_test_split_one_is_held_out_of_train_balanced_over_the_classes(tmp_path):
    for name, count in (("ant", 12), ("bee", 30)):
        for i in range(count):
            save(tmp_path / f"{name}/{i:02}.png", seed=100 * len(name) + i + 1000 * (name == "bee"))
    shutil.copy(tmp_path / "ant/00.png", tmp_path / "ant/copy.png")
    said: list[str] = []
    whole, _ = scan(folder(tmp_path), 3)
    listing, images = scan(folder(tmp_path, test_images=8, store_px=16), 3, said.append)
    assert sorted(listing.paths) == [path for path in sorted(whole.paths) if path in listing.paths]
    test_rows = range(listing.train_rows, len(listing))
    assert np.bincount(listing.labels_N[listing.train_rows :]).tolist() in ([4, 4], [3, 4])  # one less of the class of the copy
    assert len(said) == 1 + (len(test_rows) < 8)
    again, images_again = scan(folder(tmp_path, test_images=8, store_px=16), 3)
    assert (again.paths, again.fingerprint) == (listing.paths, listing.fingerprint)
    np.testing.assert_array_equal(images, images_again)
    assert scan(folder(tmp_path, test_images=8), 4)[0].paths != listing.paths
    for row in (0, *test_rows):
        np.testing.assert_array_equal(images[row], decode_square((tmp_path / listing.paths[row]).read_bytes(), 16, 16))
    part, _ = scan(folder(tmp_path, test_images=8, train_images=10), 3)
    assert part.train_rows == 10
    assert part.paths[10:] == listing.paths[listing.train_rows :]


def test_copies_of_train_images_are_not_held_out(tmp_path):
    for i in range(6):
        save(tmp_path / f"{i}.png", seed=i // 2)  # three images, two copies of each
    listing, _ = scan(folder(tmp_path, test_images=3), 0)
    digests = [(tmp_path / path).read_bytes() for path in listing.paths]
    assert (listing.train_rows, listing.held_out) == (3, 3)
    assert not {*digests[:3]} & {*digests[3:]}


@pytest.mark.parametrize("train_rows", [0, 1, 30, 40])
def test_copies_are_those_that_a_loop_finds(train_rows):
    """Among few contents, each several times on both sides; zeros stand for a file that could not be read."""
    sha256_N = np.random.default_rng(0).integers(0, 2, (40, 32), np.uint8) * (np.arange(32) < 4)
    wanted = [
        max((row for row in range(train_rows) if sha.any() and (sha256_N[row] == sha).all()), default=-1) for sha in sha256_N[train_rows:]
    ]
    np.testing.assert_array_equal(_row_of_train(sha256_N.astype(np.uint8), train_rows), wanted)


@pytest.mark.parametrize("check", ["decode", "header"])
@pytest.mark.parametrize("store_px", [None, 16])
def test_images_are_held_out_among_those_that_can_be_read(tmp_path, check, store_px):
    for number in range(40):
        path = save(tmp_path / f"{'ant' if number < 15 else 'bee'}/{number:02}.png", seed=number)
        if number % 3 == 0:
            path.write_bytes(b"broken" if number % 2 else b"")
    skipping = {"on_bad_image": "skip", "check": check, "store_px": store_px}
    for seed in range(6):
        listing, images = scan(folder(tmp_path, test_images=8, **skipping), seed)
        assert np.bincount(listing.labels_N[listing.train_rows :]).tolist() == [4, 4]
        assert listing.held_out == 8
        assert len(listing.skipped) == 14
        assert len(listing) == 26
        smaller, _ = scan(folder(tmp_path, test_images=4, **skipping), seed)
        assert set(smaller.paths[smaller.train_rows :]) <= set(listing.paths[listing.train_rows :])
        part, _ = scan(folder(tmp_path, test_images=8, train_images=10, **skipping), seed)
        assert part.paths[part.train_rows :] == listing.paths[listing.train_rows :]
        assert images is None or len(images) == 26
    whole = scan(folder(tmp_path, **skipping), 0)[0]
    assert (whole.held_out, whole.train_rows) == (None, 26)
    with pytest.raises(UserError, match="14 of 40 images are unreadable"):
        scan(folder(tmp_path, test_images=8, check=check, store_px=store_px), 0)
    with pytest.raises(UserError, match=r"no train image is left; lower dataset\.test_images"):
        scan(folder(tmp_path, test_images=30, **skipping), 0)


def test_a_subset_is_drawn_among_the_images_that_can_be_read(tmp_path):
    for number in range(40):  # classes of 12 and 28 images, of which 8 and 19 can be read
        path = save(tmp_path / f"train/{'ant' if number < 12 else 'bee'}/{number:02}.png", seed=number)
        save(tmp_path / f"val/{'ant' if number < 12 else 'bee'}/{number:02}.png", seed=number + 40)
        if number % 3 == 1:
            path.write_bytes(b"broken")
    for seed in range(4):
        listing, _ = scan(folder(tmp_path, on_bad_image="skip", train_images=14, test_images=6), seed)
        assert np.bincount(listing.labels_N[:14]).tolist() == [7, 7]
        assert (listing.train_rows, len(listing)) == (14, 20)
        assert all(int(path[-6:-4]) % 3 == 1 for path in listing.skipped)
        smaller, _ = scan(folder(tmp_path, on_bad_image="skip", train_images=5, test_images=6), seed)
        assert set(smaller.paths[:5]) <= set(listing.paths[:14])
    most, _ = scan(folder(tmp_path, on_bad_image="skip", train_images=40), 0)
    assert np.bincount(most.labels_N[: most.train_rows]).tolist() == [8, 19]
    assert len(most.skipped) == 13
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no train image is left"):
        scan(folder(tmp_path, on_bad_image="skip", train_images=14), 0)


def test_no_more_images_can_be_held_out_than_exist(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", seed=i)
    with pytest.raises(UserError, match=r"dataset\.test_images = 3: .* 3; "):
        scan(folder(tmp_path, test_images=3), 0)


def test_another_jpeg_decoder_makes_another_listing_of_files(tmp_path):
    """Everything that has seen random views of files must then run again; images in memory were all decoded by the scan."""
    save(tmp_path / "a.jpg")
    by_cpu, by_gpu = (scan(folder(tmp_path, jpeg_decoder=decoder), 0)[0] for decoder in ("cpu", "gpu"))
    assert by_cpu.fingerprint != by_gpu.fingerprint
    held = [scan(folder(tmp_path, store_px=16, jpeg_decoder=decoder), 0)[0] for decoder in ("cpu", "gpu")]
    assert held[0].fingerprint == held[1].fingerprint
