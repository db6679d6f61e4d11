"""Results of files that scans remember: changed files are always noticed, a killed scan resumes, and outputs do not depend on them."""

import errno
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bingo.datasets import filecheck, known
from bingo.datasets.known import KnownFiles, ScannedRoot, identity_of
from bingo.datasets.sources import scan
from bingo.images.images import FileImages
from bingo.images.listing import joined_paths, write_listing
from bingo.runtime import workers
from tests.datasets.test_sources import folder
from tests.photographs import photographs


@pytest.fixture
def photos(tmp_path) -> Path:
    """Photographs in two classes, among them a grey one with 16 bits, a copy of a train image in the test split, and a file that is not an
    image."""
    for place in ("train/a", "train/b", "val/a"):
        (tmp_path / "photos" / place).mkdir(parents=True)
        photographs(tmp_path / "photos" / place)
    Image.fromarray(np.arange(2500, dtype=np.uint16).reshape(50, 50)).save(tmp_path / "photos/train/b/deep.png")
    (tmp_path / "photos/train/a/broken.jpg").write_bytes((tmp_path / "photos/train/a/420.jpg").read_bytes()[:400])
    return tmp_path / "photos"


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The paths that scans read; files count as unchanged from the moment they are written."""
    paths, check = [], filecheck._check

    def noting(files, row, *arguments):
        paths.append(files.paths[row])
        return check(files, row, *arguments)

    monkeypatch.setattr(filecheck, "_check", noting)
    monkeypatch.setattr(known, "_SETTLED_NS", -(10**18))
    return paths


def scanned(photos: Path, state: Path | None, made_by: str = "this", **changes):
    """The bytes of the listing, and the lines of the scan."""
    remembered, said = KnownFiles(state, made_by) if state else None, []
    listing, _ = scan(folder(photos, on_bad_image="skip", **changes), 0, said.append, known=remembered)
    write_listing(photos.parent / "listing.parquet", listing)
    if remembered:
        remembered.keep()
    return (photos.parent / "listing.parquet").read_bytes(), said


@pytest.mark.parametrize("changes", [{}, {"check": "header"}, {"train_images": 20}, {"check": "header", "test_images": 3}])
def test_an_unchanged_folder_is_not_read_again_and_gives_the_same_listing(photos, read, tmp_path, changes):
    wanted = scanned(photos, None, **changes)
    every = set(read)
    read.clear()
    assert scanned(photos, tmp_path / "state", **changes) == wanted
    assert sorted(read) == sorted(every)  # each file once, also if it was read to draw a subset of readable files
    read.clear()
    assert scanned(photos, tmp_path / "state", **changes) == wanted
    assert not read
    (part,) = (tmp_path / "state").iterdir()
    assert sorted(KnownFiles(part.parent, "this")._read(part)["path"].to_pylist()) == sorted(every)


def test_every_way_to_change_a_file_is_noticed(photos, read, tmp_path):
    scanned(photos, tmp_path / "state")
    files = {name: photos / "train/a" / name for name in ("420.jpg", "422.jpg", "444.jpg", "grey.jpg", "exif.jpg", "photo.png")}
    before = {name: (path.read_bytes(), path.stat()) for name, path in files.items()}

    def restore_times(name: str) -> None:
        os.utime(files[name], ns=(before[name][1].st_atime_ns, before[name][1].st_mtime_ns))

    content = bytearray(before["420.jpg"][0])
    content[-20] ^= 1
    files["420.jpg"].write_bytes(content)  # in place, with the same length and the old time
    restore_times("420.jpg")
    shutil.copy(files["444.jpg"], tmp_path / "other.jpg")
    os.utime(tmp_path / "other.jpg", ns=(before["422.jpg"][1].st_atime_ns, before["422.jpg"][1].st_mtime_ns))
    (tmp_path / "other.jpg").rename(files["422.jpg"])  # another file with the same name
    files["444.jpg"].touch()
    files["grey.jpg"].unlink()
    files["exif.jpg"].rename(photos / "train/a/renamed.jpg")
    files["photo.png"].write_bytes(before["photo.png"][0] + b"behind")
    read.clear()
    found = scanned(photos, tmp_path / "state")
    assert sorted(read) == [f"train/a/{name}" for name in ("420.jpg", "422.jpg", "444.jpg", "photo.png", "renamed.jpg")]
    assert found == scanned(photos, None)


def test_an_interrupted_scan_resumes(photos, read, tmp_path, monkeypatch):
    monkeypatch.setattr(filecheck, "SAVED_FILES", 8)
    wanted = scanned(photos, None)
    every = sorted(read)
    saved, write = [], Path.write_bytes

    def ended(path, content):
        if len(saved) == 3:
            write(path, content[: len(content) // 2])
            raise KeyboardInterrupt
        saved.append(path)
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", ended)
        with pytest.raises(KeyboardInterrupt):
            scanned(photos, tmp_path / "state")
    assert len(list((tmp_path / "state").iterdir())) == 4
    read.clear()
    assert scanned(photos, tmp_path / "state") == wanted
    assert len(read) == len(every) - 3 * 8
    assert len(list((tmp_path / "state").iterdir())) == 1


@pytest.mark.parametrize("damage", ["flipped", "cut off", "of other code"])
def test_results_that_are_damaged_or_of_other_code_are_recomputed(photos, read, tmp_path, damage):
    wanted = scanned(photos, tmp_path / "state", made_by="other" if damage == "of other code" else "this")
    (part,) = (tmp_path / "state").iterdir()
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= damage == "flipped"
    part.write_bytes(content[: len(content) // (2 if damage == "cut off" else 1)])
    every = sorted(read)
    read.clear()
    assert scanned(photos, tmp_path / "state") == wanted
    assert sorted(read) == every
    assert len(list((tmp_path / "state").iterdir())) == 1


def test_a_recently_written_file_is_read_again(photos, read, tmp_path, monkeypatch):
    monkeypatch.setattr(known, "_SETTLED_NS", 2 * 10**9)
    scanned(photos, tmp_path / "state")
    every = sorted(read)
    read.clear()
    scanned(photos, tmp_path / "state")
    assert sorted(read) == every


def test_results_stay_with_their_files_after_other_files_change(photos, read, tmp_path):
    """The result of a file that was read again is stored after the others."""
    for name in ("train/a/420.jpg", "train/b/deep.png", "val/a/444.jpg"):
        (photos / name).touch()
        wanted = scanned(photos, None)
        for _ in range(2):
            assert scanned(photos, tmp_path / "state") == wanted
    read.clear()
    assert scanned(photos, tmp_path / "state") == wanted
    assert not read


def test_files_with_errors_of_the_disk_are_read_the_next_time(photos, read, tmp_path, monkeypatch):
    wanted, whole = scanned(photos, None), FileImages.read

    def failing(files, row):
        if files.paths[row] == "train/b/deep.png":
            raise OSError(errno.EIO, "Input/output error")
        return whole(files, row)

    with monkeypatch.context() as patch:
        patch.setattr(FileImages, "read", failing)
        assert scanned(photos, tmp_path / "state") != wanted
    read.clear()
    assert scanned(photos, tmp_path / "state") == wanted
    assert read == ["train/b/deep.png"]


def test_processes_find_the_same_identities_as_one(photos, monkeypatch):
    """Files in several blocks, of which one file does not exist; given as a list and as a part of a column."""
    files = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.*"))
    paths = [*files[:3], "train/absent.jpg", *files[3:]]
    wanted = np.array([(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in (Path(photos, file).stat() for file in files)])
    monkeypatch.setattr(known, "ALONE_UP_TO_FILES", 3)
    monkeypatch.setattr(known, "SAVED_FILES", 4)
    monkeypatch.setattr(workers, "THREADS_UP_TO_FILES", 3)
    for asked in (paths, joined_paths([["before.jpg"], paths])[1:]):
        np.testing.assert_array_equal(identity_of(str(photos), asked), np.insert(wanted, 3, -1, axis=0))
    np.testing.assert_array_equal(identity_of(str(photos), files[:2]), wanted[:2])
    assert (identity_of(str(photos / "absent"), files) == -1).all()


def test_a_file_that_was_and_is_absent_does_not_count_as_unchanged(photos, read, tmp_path):
    place, paths = ScannedRoot(str(photos), True), ["train/a/420.jpg", "train/absent.jpg"]
    columns = filecheck.check_files(FileImages(str(photos), paths), True, None)[0].part(np.arange(2))
    KnownFiles(tmp_path / "state", "this").add(place, paths, identity_of(str(photos), paths), columns, time.time_ns())
    same_N, found = KnownFiles(tmp_path / "state", "this").find(place, paths)
    assert same_N.tolist() == [True, False]
    assert found["path"].to_pylist() == paths[:1]


def test_a_scan_of_some_files_serves_one_of_all(photos, read, tmp_path):
    scanned(photos, None)
    every = set(read)
    read.clear()
    scanned(photos, tmp_path / "state", train_images=12)
    first = set(read)
    shutil.copy(photos / "train/a/420.jpg", photos / "train/a/added.jpg")
    read.clear()
    found = scanned(photos, tmp_path / "state")
    assert sorted(read) == sorted({*every, "train/a/added.jpg"} - first)
    assert found == scanned(photos, None)
