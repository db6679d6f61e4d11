"""Images that are parts of large files: the same bytes as separate files in the loader, the report and the display."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from bingo.browse.pictures import Opener, Pictures
from bingo.datasets.filecheck import check_files, common_bits
from bingo.images import positions as positions_module
from bingo.images.images import FileImages, open_images, write_images
from bingo.images.listing import Listing
from bingo.images.loader import ViewLoader, center_views
from bingo.images.positions import Positions
from bingo.params import load_params
from bingo.report.pictures import thumbnail
from bingo.runtime.errors import UserError
from tests.images.test_loader import AUGMENT, IMAGE, _request
from tests.photographs import photographs

CPU, PARAMS = torch.device("cpu"), load_params(Path(__file__).parents[2] / "params.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> FileImages:
    root = tmp_path_factory.mktemp("folder")
    return FileImages(str(root), photographs(root))


def packed(folder: FileImages, root: Path, in_store: bool = False) -> Positions:
    """The same files, concatenated into two large ones in another order."""
    names, rows_N3 = ["some/0.bin", "some/1.bin"], np.zeros((len(folder), 3), np.int64)
    (root / "some").mkdir(parents=True)
    for number, name in enumerate(names):
        with (root / name).open("wb") as file:
            for row in reversed(range(number, len(folder), 2)):
                file.write(b"between")
                rows_N3[row] = number, file.tell(), len(folder.read(row))
                file.write(folder.read(row))
    return Positions(names, [(root / name).stat().st_size for name in names], rows_N3, in_store)


def opener(root: Path) -> Opener:
    return lambda name: (root / name).open("rb")


def listing(folder: FileImages) -> Listing:
    return Listing("folder", folder.paths, np.full(len(folder), -1), len(folder), [], [], "0123")


@pytest.mark.slow
@pytest.mark.parametrize("in_store", [False, True])
def test_parts_of_large_files_equal_separate_files(folder, tmp_path, in_store):
    """Stored and read back, from next to the images or from the store itself: bytes, checks, views, thumbnails and display."""
    store, listed = tmp_path / "images.zarr", listing(folder)
    write_images(store, listed, packed(folder, tmp_path / "large", in_store))
    if in_store:
        (tmp_path / "large/some").rename(store / "some")
    dataset = PARAMS.dataset.model_copy(update={"source": "folder", "root": str(tmp_path / "large")})
    images = open_images(listed, store, dataset)
    rows = range(len(folder))
    assert [images.read(row) for row in rows] == [folder.read(row) for row in rows]
    assert [images.read_start(row, 99) for row in rows] == [folder.read_start(row, 99) for row in rows]
    for decode, store_px in ((True, 9), (False, None)):
        (checked, pixels), (of_files, file_pixels) = (check_files(one, decode, store_px) for one in (images, folder))
        assert common_bits(images, checked, pixels) == common_bits(folder, of_files, file_pixels)
        assert checked.reasons == of_files.reasons
        assert checked.part(np.arange(len(folder))) == of_files.part(np.arange(len(folder)))
        assert (pixels is None and file_pixels is None) or np.array_equal(pixels, file_pixels)
    asked = [[_request([3, 0, 5, 3]), _request([1, 5], view=1)]]
    for got, wanted in zip(*(next(ViewLoader(one, IMAGE, AUGMENT, 0, CPU, 2).views(asked)) for one in (images, folder)), strict=True):
        assert torch.equal(got, wanted)
    assert [thumbnail(images, listed, row) for row in rows] == [thumbnail(folder, listed, row) for row in rows]
    root = Path(str(dataset.root))
    shown = Pictures(store, "images", "0123", opener(store), opener(root))
    write_images(tmp_path / "files.zarr", listed, None)
    of_folder = Pictures(tmp_path / "files.zarr", "files", "0123", NotImplemented, opener(Path(folder.root)))
    for row, path in enumerate(folder.paths):
        assert shown.picture(row, path, 48).tobytes() == of_folder.picture(row, path, 48).tobytes()


def test_a_subset_keeps_only_its_own_files(folder, tmp_path):
    images = FileImages(str(tmp_path), folder.paths, positions=packed(folder, tmp_path))
    part = pickle.loads(pickle.dumps(images.part([5, 1, 5])))
    assert [part.read(row) for row in range(3)] == [folder.read(row) for row in (5, 1, 5)]
    assert (part.paths, part.positions.files) == ([folder.paths[row] for row in (5, 1, 5)], ["some/1.bin"])


def test_a_large_file_that_is_missing_changed_or_outside_is_refused_for_each_row(folder, tmp_path):
    """With the reason; rows of the other file can still be read. The limit of open files is respected."""
    whole = packed(folder, tmp_path)
    (tmp_path / "out.bin").symlink_to("/etc/hostname")
    for number, (name, reason) in enumerate(
        {"gone.bin": "No such file", "../x.bin": "leads out", "/etc/hostname": "leads out", "out.bin": "through a link"}.items()
    ):
        images = FileImages(str(tmp_path), folder.paths, positions=replace(whole, files=[name, whole.files[1]]))
        with pytest.raises(UserError) as refused:
            list(center_views(images, range(4), IMAGE, CPU, 4, workers=0))
        assert [reason in line and f"(row {row})" in line for line, row in zip(refused.value.lines, (0, 2), strict=True)] == [True, True]
        assert images.read(1) == folder.read(1), number
    os.truncate(tmp_path / "some/0.bin", 50)
    positions_module._open_file.cache_clear()
    with pytest.raises(OSError, match="has 50 bytes"):
        FileImages(str(tmp_path), folder.paths, positions=whole).read(0)


def test_damaged_positions_are_refused(folder, tmp_path):
    store, listed = tmp_path / "images.zarr", listing(folder)
    dataset = PARAMS.dataset.model_copy(update={"source": "folder", "root": str(tmp_path)})
    write_images(store, replace(listed, paths=listed.paths[1:]), packed(folder, tmp_path).part(range(len(folder) - 1)))
    with pytest.raises(UserError, match="13 images for 14 rows"):
        open_images(listed, store, dataset)
    write_images(store, listed, packed(folder, tmp_path / "again"))
    chunk = store / "positions/c/0/0"
    content = bytearray(chunk.read_bytes())
    chunk.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(UserError, match="damaged"):
        open_images(listed, store, dataset)
    chunk.unlink()
    with pytest.raises(UserError, match="missing"):
        open_images(listed, store, dataset)
    zarr.open_group(store, mode="r+").attrs["files"] = ["/etc/hostname"]
    with pytest.raises(UserError, match="metadata are damaged"):
        open_images(listed, store, dataset)
