"""Smaller copies of photographs: their pixels, the same bytes after an interruption, and reading without the originals."""

import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bingo.datasets import packing
from bingo.datasets.packing import pack_images, packed
from bingo.datasets.sources import scan
from bingo.images.decode import decode_square
from bingo.images.images import FileImages, open_images, write_images
from bingo.images.listing import Listing, read_listing
from bingo.images.loader import ViewLoader, center_views
from bingo.images.positions import Positions
from bingo.params import load_params
from bingo.planning.limits import rule_mistakes
from bingo.runtime.errors import UserError
from stages import scan as stage
from tests.images.test_loader import AUGMENT, IMAGE, _request
from tests.photographs import photographs
from tests.workspace import new_workspace

CPU, PARAMS, PX = torch.device("cpu"), load_params(Path(__file__).parents[2] / "params.yaml"), 32


def silent(line: str) -> None:
    """Ignore a line."""


@pytest.fixture
def files(tmp_path) -> FileImages:
    (tmp_path / "photos").mkdir()
    return FileImages(str(tmp_path / "photos"), photographs(tmp_path / "photos"))


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def encoded(image: Image.Image, name: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, name, **options)
    return content.getvalue()


SMOOTH = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)).resize((210, 150), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("px", [40, 149])
def test_an_image_is_resized_to_the_short_side_and_upright(px):
    """However the image is stored: the result equals Pillow's resizing of the upright image, saved as JPEG."""
    turned = Image.Exif()
    turned[0x0112] = 6
    expected = SMOOTH.resize((round(px * 210 / 150), px), Image.Resampling.BICUBIC)
    lossless = packed(encoded(SMOOTH), px), packed(encoded(SMOOTH.transpose(Image.Transpose.ROTATE_90), exif=turned), px)
    for content in lossless:
        assert Image.open(io.BytesIO(content)).format == "JPEG"
        by_pillow = pixels(encoded(expected, "JPEG", quality=90, subsampling="4:2:0"))
        assert np.abs(pixels(content) - by_pillow).mean() < 1.5  # libjpeg's versions round differently
    tall = packed(encoded(SMOOTH.transpose(Image.Transpose.ROTATE_90)), px)
    assert pixels(tall).shape == (round(px * 210 / 150), px, 3)


@pytest.mark.parametrize("bits", [12, 16])
def test_grey_images_of_16_bits_keep_the_upper_8_of_the_datasets_bits(bits):
    values_HW = (np.asarray(SMOOTH.convert("L")).astype(np.uint16) << 4) + 7
    content = packed(encoded(Image.fromarray(values_HW)), 50, bits)
    expected = Image.fromarray((values_HW >> (bits - 8)).astype(np.uint8)).resize((70, 50), Image.Resampling.BICUBIC)
    assert np.abs(pixels(content) - np.asarray(expected)[..., None]).mean() < 2


@pytest.mark.parametrize("side", [(150, 150), (30, 151), (210, 150), (30, 90_000)])
def test_an_image_no_larger_or_too_long_for_jpeg_keeps_its_own_bytes(side):
    content = encoded(Image.new("RGB", (side[1], side[0]), (9, 8, 7)))
    assert packed(content, min(side) if max(side) < 90_000 else 29) == content


def test_the_bytes_are_the_same_after_an_interruption_and_with_any_number_of_workers(files, tmp_path, monkeypatch):
    """Packed images are not read again: the originals are missing the second time."""
    monkeypatch.setattr(packing, "PART_IMAGES", 5)
    monkeypatch.setattr(packing, "CHUNK_FILES", 2)
    whole = pack_images(files, PX, tmp_path / "whole", silent)
    assert [whole.read(str(tmp_path / "whole"), row, True) for row in range(len(files))] == [
        packed(files.read(row), PX) for row in range(len(files))
    ]
    assert whole.files == ["pack/00000", "pack/00001", "pack/00002"]
    lost = Path(files.root, files.paths[7])
    content = lost.read_bytes()
    lost.write_bytes(content[:-900])
    with pytest.raises(UserError) as error:
        pack_images(files, PX, tmp_path / "state", silent)
    assert [f"{files.paths[7]} (row 7)" in line for line in error.value.lines] == [True, False]
    lost.write_bytes(content)
    for row in [0, 4, 10, 13]:
        Path(files.root, files.paths[row]).unlink()
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    again = pack_images(files, PX, tmp_path / "state", silent)
    assert np.array_equal(again.positions_N3, whole.positions_N3)
    for name in whole.files:
        assert (tmp_path / "state" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_members_of_a_large_file_are_packed_like_files(files, tmp_path):
    contents = [files.read(row) for row in range(len(files))]
    (tmp_path / "all.bin").write_bytes(b"".join(contents))
    lengths_N = np.array(list(map(len, contents)))
    rows_N3 = np.stack([np.zeros_like(lengths_N), np.cumsum(lengths_N) - lengths_N, lengths_N], axis=1)
    members = FileImages(str(tmp_path), files.paths, positions=Positions(["all.bin"], [int(lengths_N.sum())], rows_N3))
    for source, name in ((files, "of-files"), (members, "of-members")):
        pack_images(source, PX, tmp_path / name, silent)
    assert (tmp_path / "of-files/pack/00000").read_bytes() == (tmp_path / "of-members/pack/00000").read_bytes()


def test_the_stage_packs_and_later_stages_need_no_originals(tmp_path, stages):
    """The listing differs, because the pixels do; the pack is moved into the store, and nothing of it is left in the state folder."""
    own = {"source": "folder", "root": "images", "store_px": None, "pack_px": 16, "train_images": None, "test_images": None}
    changes = {f"dataset.{key}": value for key, value in own.items()} | {"teacher.pretrain.batch_anchors": 8, "distill.batch_anchors": 8}
    workspace = new_workspace(tmp_path / "bingo", stages, changes | {"knn_eval.k": [1], "knn_eval.agreement_k": []})
    for i in range(24):
        folder = workspace.root / "images" / ("train" if i < 16 else "val") / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        SMOOTH.rotate(15 * i).resize((20, 24)).save(folder / f"{i}.png")
    said = workspace.done("scan")
    assert "dataset.pack_px = 16: 24 images" in said.out + said.err
    listing = read_listing(workspace.root / "data/listing.parquet")
    dataset = load_params(workspace.root / "params.yaml").dataset
    unpacked = dataset.model_copy(update={"pack_px": None, "root": str(workspace.root / "images")})
    assert scan(unpacked, 0)[0].paths == listing.paths
    assert scan(unpacked, 0)[0].fingerprint != listing.fingerprint
    originals = FileImages(str(workspace.root / "images"), listing.paths)
    expected = b"".join(packed(originals.read(row), 16) for row in range(24))
    assert (workspace.root / "data/images.zarr/pack/00000").read_bytes() == expected
    assert not list((workspace.root / ".bingo/state/scan").glob("*/pack"))
    shutil.rmtree(workspace.root / "images")
    workspace.done("teacher")


def test_a_killed_pack_of_unhashed_files_restarts_if_one_has_changed(tmp_path, monkeypatch):
    """With `check: header` the listing does not depend on file contents; another photograph of the same dimensions is noticed
    nevertheless."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage, "code_fingerprint", lambda name: "")
    monkeypatch.setattr(packing, "PART_IMAGES", 2)
    flat = [encoded(Image.new("RGB", (40, 40), (level,) * 3), "BMP") for level in (10, 20, 30, 40, 200)]
    (tmp_path / "photos").mkdir()
    for row, content in enumerate(flat[:4]):
        (tmp_path / f"photos/{row}.bmp").write_bytes(content)
    changes = {"source": "folder", "root": "photos", "store_px": None, "pack_px": 16, "check": "header"}
    dataset = PARAMS.dataset.model_copy(update=changes)
    run, write, parts = SimpleNamespace(params=SimpleNamespace(dataset=dataset), say=silent), packing._write, []

    def interrupted(path, *arguments):
        if parts:
            raise KeyboardInterrupt
        parts.append(path)
        return write(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stage._packed(run, *scan(dataset, 0)).__enter__()
    (tmp_path / "photos/1.bmp").write_bytes(flat[4])
    with stage._packed(run, *scan(dataset, 0)) as (pack, folder):
        levels = [int(pixels(pack.read(str(folder), row, False))[0, 0, 0]) for row in range(4)]
    assert levels == [10, 200, 30, 40]


def test_a_truncated_part_is_packed_again(files, tmp_path):
    whole = pack_images(files, PX, tmp_path, silent)
    file = tmp_path / whole.files[0]
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    pack_images(files, PX, tmp_path, silent)
    assert file.read_bytes() == content


def test_free_space_is_checked_before_the_work(files, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"^dataset.pack_px = 32"):
        pack_images(files, PX, tmp_path, silent)
    assert not list((tmp_path / "pack").iterdir())


def test_views_come_from_the_pack_when_the_originals_are_gone(files, tmp_path):
    """Centre views and random views equal those of the packed bytes as files; a store with a truncated or missing file is refused."""
    listing = Listing("folder", files.paths, np.full(len(files), -1), len(files), [], [], "0123")
    store, state, rows = tmp_path / "images.zarr", tmp_path / "state", np.arange(len(files))
    small = tmp_path / "small"
    small.mkdir()
    for row, name in enumerate(files.paths):
        (small / name).write_bytes(packed(files.read(row), PX))
    write_images(store, listing, pack_images(files, PX, state, silent), state)
    shutil.rmtree(files.root)
    shutil.rmtree(state)
    images, by_file = open_images(listing, store, None), FileImages(str(small), files.paths)
    assert isinstance(images, FileImages)
    assert torch.equal(
        torch.cat(list(center_views(images, rows, IMAGE, CPU, 5, 0))), torch.cat(list(center_views(by_file, rows, IMAGE, CPU, 5, 0)))
    )
    requests = [[_request(rows, view=view)] for view in range(2)]
    found, expected = (list(ViewLoader(source, IMAGE, AUGMENT, 0, CPU, 0).views(requests)) for source in (images, by_file))
    assert all(torch.equal(x, y) for (x,), (y,) in zip(found, expected, strict=True))
    assert np.array_equal(decode_square(images.read(10), 16, 16), decode_square((small / files.paths[10]).read_bytes(), 16, 16))
    pack = store / "pack/00000"
    pack.write_bytes(pack.read_bytes()[:-1])
    with pytest.raises(UserError, match="pack/00000"):
        open_images(listing, store, None)
    pack.unlink()
    with pytest.raises(UserError, match="pack/00000"):
        open_images(listing, store, None)


def test_views_larger_than_the_pack_are_refused_by_name():
    def keys(**changes: object) -> list[str]:
        values = PARAMS.model_dump(mode="json")
        values["dataset"] |= {"source": "folder", "root": "photos", "store_px": None, "pack_px": 128}
        values["image"] |= {"crop_px": 112, "resize_px": 128}
        values["teacher"] |= {"name": "own"}
        for key, value in changes.items():
            section = values
            for part in key.split("__")[:-1]:
                section = section[part]
            section[key.split("__")[-1]] = value
        return [line.split(" = ")[0] for line in rule_mistakes(type(PARAMS).model_validate(values), 1) if "pack_px" in line]

    assert keys() == []
    assert keys(image__resize_px=129) == ["image.resize_px"]
    assert keys(teacher__image__crop_px=200, teacher__image__resize_px=224, knn_eval__resize_px=144) == [
        "teacher.image.resize_px",
        "knn_eval.resize_px",
    ]
    small = {"methods__seed__small_crop_px": 130, "distill__method": "seed"}
    assert keys(methods__seed__small_crops=2, **small) == ["methods.seed.small_crop_px"]
    assert keys(methods__seed__small_crops=0, **small) == keys(dataset__pack_px=None, image__resize_px=300) == []
