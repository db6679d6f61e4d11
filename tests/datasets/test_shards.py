"""Tar shards: the same listing and the same views as a folder of the same images, and every mistake in shards."""

import gzip
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bingo.datasets.finding import source_of
from bingo.datasets.members import PathRows
from bingo.datasets.shards import expand_braces
from bingo.datasets.sources import count_images, scan
from bingo.images.images import FileImages, MemoryImages, open_images, write_images
from bingo.images.listing import joined_paths, read_listing, write_listing
from bingo.images.loader import center_views
from bingo.params import DatasetParams, ImageParams
from bingo.planning.look import look_at
from tests.datasets.test_sources import folder, lines_of, pets, save

__all__ = ["pets"]
IMAGE = ImageParams(crop_px=16, resize_px=20, mean=[0.5] * 3, std=[0.25] * 3)


def shards(root: Path | str, **changes) -> DatasetParams:
    return folder(root, source="webdataset", **changes)


def pack(shard: Path, members: dict[str, Path | bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w", format=form) as tar:
        for name, content in members.items():
            content = content.read_bytes() if isinstance(content, Path) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return shard


def written(dataset: DatasetParams, where: Path) -> tuple[bytes, torch.Tensor]:
    """The bytes of the listing, and the centre views of all images as later stages open them."""
    said: list[str] = []
    listing, images = scan(dataset, 0, said.append)
    assert count_images(dataset, 0).train + count_images(dataset, 0).test >= len(listing) - len(listing.skipped)
    write_listing(where / "listing.parquet", listing)
    write_images(where / "images.zarr", listing, images)
    opened = open_images(read_listing(where / "listing.parquet"), where / "images.zarr", dataset)
    assert isinstance(opened, MemoryImages if dataset.store_px else FileImages)
    views = torch.cat(list(center_views(opened, range(len(listing)), IMAGE, torch.device("cpu"), 4, workers=0)))
    return (where / "listing.parquet").read_bytes(), views


def same(one: DatasetParams, other: DatasetParams, tmp_path: Path) -> bool:
    (listing, views), (other_listing, other_views) = (written(dataset, tmp_path) for dataset in (one, other))
    return listing == other_listing and torch.equal(views, other_views)


def relative(root: Path, part: str) -> dict[str, Path]:
    """The files in a folder, by their relative paths in reverse order, because the order of members must not matter."""
    return {path.relative_to(root / part).as_posix(): path for path in sorted((root / part).rglob("*"), reverse=True) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_shards_of_each_split_equal_the_folder_that_was_packed(pets, tmp_path_factory, form):
    """Several shards for each split, given by a pattern, a wildcard and their folder; also in memory, with held-out images and subsets."""
    there = tmp_path_factory.mktemp("shards")
    members = list(relative(pets, "train").items())
    for number in range(2):
        pack(there / f"pets-train-{number:06d}.tar", dict(members[number::2]), form)
    pack(there / "pets-validation-00.tar", relative(pets, "val"), form)
    everything = [f"{there}/pets-{{train-{{000000..000001}},validation-00}}.tar", f"{there}/*.tar", there]
    for root in everything:
        assert same(shards(root), folder(pets), there)
    for changes in ({"store_px": 12}, {"train_images": 3, "check": "header"}):
        assert same(shards(there, **changes), folder(pets, **changes), there)
    held_out = {"test_images": 2}
    assert same(shards(f"{there}/pets-train-*.tar", **held_out), folder(pets, **held_out), there) is False  # its test split
    alone, _ = scan(shards(f"{there}/pets-train-*.tar", **held_out), 0)
    assert (alone.train_rows, len(alone), alone.held_out) == (3, 5, 2)


def test_long_names_and_splits_and_hidden_files_within_a_shard(pets, tmp_path_factory):
    """Names of 300 bytes with GNU and PAX headers; archives made by `tar c .`, which contain folders, in a shard without a meaningful
    name."""
    there = tmp_path_factory.mktemp("shards")
    long = save(pets / "train/dog" / "/".join(["a" * 90] * 3) / "caf\u00e9.jpg", 9)
    assert len(str(long.relative_to(pets))) > 280
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(there / f"{number}.tar", "w", format=form) as tar:
            tar.add(pets, ".")
        said: list[str] = []
        scan(shards(there / f"{number}.tar"), 0, said.append)
        assert any("1 hidden" in line and "1 .txt" in line for line in said)
        assert same(shards(there / f"{number}.tar"), folder(pets), there)


@pytest.mark.parametrize("how", ["cls", "json", "names", "text"])
def test_labels_beside_the_images_are_class_folders(pets, tmp_path, tmp_path_factory, how):
    """Integers are padded, so that class 10 comes after class 9; names come from classes.txt or from the label itself."""
    there, wanted = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("folder")
    names = [f"kind{number}" for number in range(11)]
    members: dict[str, Path | bytes] = {}
    for number in range(11):
        for copy in "ab":
            content = save(tmp_path / "one" / f"{number}{copy}.png", 20 * number + ord(copy))
            key, of_class = f"{number:03d}{copy}", f"{number:02d}" if how in ("cls", "json") else names[number]
            members[f"{key}.png"] = content
            label = names[number] if how == "text" else number
            members[f"._{key}.cls"] = b"\0\5\x16\7"  # as macOS adds them
            members |= (
                {f"{key}.json": json.dumps({"label": label, "width": 3}).encode()}
                if how == "json"
                else {f"{key}.cls": f"{label}\n".encode()}
            )
            place = wanted / "train" / of_class / f"{key}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content.read_bytes())
    pack(there / "train-0.tar", members)
    if how == "names":
        (there / "classes.txt").write_text("\n".join(names), "utf-8-sig")
    assert same(shards(there), folder(wanted), there)
    listing, _ = scan(shards(there), 0)
    if how in ("cls", "json"):
        assert listing.labels_N.tolist() == [int(Path(path).name[:3]) for path in listing.paths]


ODD = [b"{", b"\xff\xfe", b"[1, 2]", b'{"label": [1, 2]}', b'{"label": true}', b'{"label": 1.5}', b"", b'{"caption": "a cat"}']


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("beside", ["a label", "no image"])
def test_files_without_a_label_matter_only_if_an_image_needs_it(pets, tmp_path_factory, odd, beside):
    there, photo = tmp_path_factory.mktemp("shards"), (pets / "train/cat/b.jpg").read_bytes()
    members = {"a.jpg": photo, "a.cls": b"cat", "b.jpg": photo, "b.json": b'{"label": "dog"}'}
    members |= {"a.json": odd, "b.cls": b"\xff"} if beside == "a label" else {"info.json": odd, "x/meta.cls": b"\n"}
    for order in (members, dict(reversed(members.items()))):
        pack(there / "0.tar", order)
        listing, _ = scan(shards(there), 0)
        assert (listing.classes, listing.paths) == (["cat", "dog"], ["cat/a.jpg", "dog/b.jpg"])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("suffix", ["cls", "json"])
def test_a_label_file_that_is_a_link_matters_only_if_an_image_needs_it(pets, tmp_path_factory, kind, suffix):
    """As tar packs files with several names."""
    there, photo = tmp_path_factory.mktemp("shards"), (pets / "train/cat/b.jpg").read_bytes()
    label = b"7" if suffix == "cls" else b'{"label": 7}'
    for others in ({"b.json": b'{"label": 8}'} if suffix == "cls" else {"b.cls": b"8"}, {}):
        pack(there / "0.tar", {"a.jpg": photo, f"a.{suffix}": label, "b.jpg": photo, **others})
        with tarfile.open(there / "0.tar", "a") as tar:
            entry = tarfile.TarInfo(f"b.{suffix}")
            entry.type, entry.linkname = kind, f"a.{suffix}"
            tar.addfile(entry)
        if others:
            assert scan(shards(there), 0)[0].paths == ["7/a.jpg", "8/b.jpg"]
    (line,) = lines_of(shards(there))
    assert f"b.{suffix} is a link, to a.{suffix}; " in line


def test_a_label_less_than_zero_is_none(pets, tmp_path_factory):
    there, photo = tmp_path_factory.mktemp("shards"), (pets / "train/cat/b.jpg").read_bytes()
    members = {"a.jpg": photo, "a.cls": b"-1", "b.jpg": photo, "b.json": b'{"label": -100}'}
    pack(there / "train.tar", members)
    listing, _ = scan(shards(there), 0)
    assert (listing.classes, listing.labels_N.tolist()) == ([], [-1, -1])
    pack(there / "train.tar", members | {"c.jpg": photo, "c.cls": b"0"})
    assert [line.split()[4] for line in lines_of(shards(there))] == ["a.jpg", "b.jpg"]


NAMES = [["train", "test", "car"], ["val", "bus"], ["__MACOSX", ".x", "a/b"], ["Dog", "dog"], ["seg_train", "seg_test"]]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("how", ["cls", "numbers"])
def test_any_name_of_a_label_is_a_class(tmp_path_factory, names, how):
    there = tmp_path_factory.mktemp("shards")
    for part in ("train", "val"):
        members: dict[str, Path | bytes] = {}
        for number, name in enumerate(names):
            members[f"{part}{number}.jpg"] = save(there / f"{part}{number}.jpg", number + len(part))
            members[f"{part}{number}.cls"] = (name if how == "cls" else str(number)).encode()
        pack(there / f"shards/{part}-0.tar", members)
    if how == "numbers":
        (there / "shards/classes.txt").write_text("\n".join(names))
    listing, _ = scan(shards(there / "shards"), 0)
    assert (listing.classes, listing.train_rows) == (sorted(names), len(names))
    assert [names[int(Path(path).stem[-1])] for path in listing.paths] == sorted(names) * 2


def test_a_folder_in_a_shard_of_a_split_is_a_class_with_any_name(tmp_path_factory):
    """Except if all folders are named like splits, as in a shard of a whole dataset."""
    there = tmp_path_factory.mktemp("shards")
    for part in ("train", "val"):
        names = [f"{name}/{part}.jpg" for name in ("car", "train", "bus")]
        pack(there / f"classes/{part}.tar", {name: save(there / "x.jpg", len(name)) for name in names})
        pack(there / f"splits/imagenet-{part}.tar", {f"{part}/{name}": save(there / "x.jpg", len(name)) for name in names})
    for root in ("classes", "splits"):
        listing, _ = scan(shards(there / root), 0)
        assert (listing.classes, listing.train_rows, len(listing)) == (["bus", "car", "train"], 3, 6)


def test_the_order_and_the_names_of_shards_do_not_change_rows(pets, tmp_path_factory):
    """The same images in another order, in other shards with other names."""
    there = tmp_path_factory.mktemp("shards")
    members = [*relative(pets, "train").items()]
    for number in range(2):
        pack(there / f"one/pets-train-{number}.tar", dict(members[number::2]))
        pack(there / f"other/{9 - number}/train/x{5 - number}.tar", dict(reversed(members[3 * number :][:3])))
    for place in ("one/pets-val.tar", "other/validation-00.tar"):
        pack(there / place, relative(pets, "val"))
    pattern = f"{there}/other/{{9/train/x5,8/train/x4,validation-00}}.tar"
    for root in (there / "other", pattern):
        assert same(shards(root), shards(there / "one"), there)


def test_a_name_that_is_not_in_utf_8_is_refused(pets, tmp_path):
    photo = (pets / "train/cat/b.jpg").read_bytes()
    pack(tmp_path / "train-0.tar", {"a.jpg": photo, "caf\udce9.jpg": photo, "na\udcefve.txt": b"", "caf\u00e9.jpg": photo})
    (line,) = lines_of(shards(tmp_path))
    assert "train-0.tar: caf\\udce9.jpg " in line


def test_everything_wrong_with_shards_is_reported_at_once(pets, tmp_path_factory):
    there = tmp_path_factory.mktemp("shards")
    photo = (pets / "train/cat/b.jpg").read_bytes()
    pack(
        there / "train-0.tar",
        {
            "a.jpg": photo,
            "a.cls": b"1",
            "../out.jpg": photo,
            "/absolute.jpg": photo,
            "b.jpg": photo,
            "b.cls": b"\xff",
            "c.jpg": photo,
            "c.json": b"{",
        },
    )
    with tarfile.open(there / "train-0.tar", "a") as tar:
        for name, kind in (("soft.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("pipe.jpg", tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "a.jpg"
            tar.addfile(entry)
    pack(there / "train-1.tar", {})
    whole = pack(there / "train-2.tar", {f"{number}.jpg": photo for number in range(8)}).read_bytes()
    (there / "train-2.tar").write_bytes(whole[: len(photo) * 4])
    (there / "train-3.tar").write_bytes(gzip.compress(whole))
    (there / "train-4.tar").write_bytes(b"")
    (there / "train-5.tar").write_bytes(photo)
    (there / "train-6.tar").hardlink_to(there / "train-0.tar")
    lines = lines_of(shards(f"{there}/train-{{0..7}}.tar"))
    of = {number: [line for line in lines if f": train-{number}.tar: " in line] for number in range(8)}
    assert sum(map(len, of.values())) == len(lines) - 1  # the last line counts the remaining mistakes
    assert [any(word in line for line in of[0]) for word in ("../out.jpg", "/absolute.jpg", "b.cls", "c.json")] == [True] * 4
    assert [any(f"{word}.jpg is " in line for line in of[0]) for word in ("soft", "hard", "pipe")] == [True] * 3
    assert {number: len(of[number]) for number in range(1, 6)} == {1: 1, 2: 1, 3: 1, 4: 1, 5: 1}
    assert "gunzip" in of[3][0]
    assert any("the same file as train-0.tar" in line for line in of[6])
    (absent,) = lines_of(shards(f"{there}/nothing-{{0..0}}.tar"))
    assert "No such file" in absent


@pytest.mark.parametrize(
    "cut", ["at a member", "in a header", "in a header's name", "end alone", "damaged header", "two archives", "two, far apart"]
)
def test_a_shard_that_ends_early_is_refused(pets, tmp_path_factory, cut):
    """tarfile mistakes most of these for the end of the archive."""
    there = tmp_path_factory.mktemp("shards")
    photo = (pets / "train/cat/b.jpg").read_bytes()
    whole = pack(there / "0.tar", {"a.jpg": photo, f"{'b' * 200}.jpg": photo, "c.jpg": photo}).read_bytes()
    with tarfile.open(there / "0.tar") as tar:
        _, second, third = tar.getmembers()
    content = {
        "at a member": whole[: third.offset],
        "in a header": whole[: third.offset + 100],
        "in a header's name": whole[: second.offset + 600],
        "end alone": whole[: third.offset_data + len(photo)],
        "damaged header": whole[: third.offset] + b"x" * 512 + whole[third.offset + 512 :],
        "two archives": whole + whole,
        "two, far apart": whole + bytes(2**16) + whole,
    }[cut]
    (there / "0.tar").write_bytes(content)
    (line,) = lines_of(shards(there))
    assert line.startswith(f"dataset.root = {there}: 0.tar: ")


def test_zeros_behind_the_end_of_a_shard_are_padding(pets, tmp_path_factory):
    there = tmp_path_factory.mktemp("shards")
    shard = pack(there / "0.tar", dict.fromkeys(("a.jpg", "b.jpg"), pets / "train/cat/b.jpg"))
    with shard.open("ab") as file:
        file.truncate(shard.stat().st_size + 3 * 2**20)  # as written by tar -b 8192
    assert scan(shards(there), 0)[0].paths == ["a.jpg", "b.jpg"]


def test_names_of_classes_in_another_encoding_are_refused(pets, tmp_path_factory):
    there = tmp_path_factory.mktemp("shards")
    pack(there / "train-0.tar", {"a.jpg": pets / "train/cat/b.jpg", "a.cls": b"0"})
    (there / "classes.txt").write_bytes("Kätzchen".encode("latin-1"))
    (line,) = lines_of(shards(there))
    assert line.startswith(f"dataset.root = {there}: classes.txt ")


def test_one_path_twice_and_labels_that_are_missing_are_named(pets, tmp_path_factory):
    there = tmp_path_factory.mktemp("shards")
    photo = (pets / "train/cat/b.jpg").read_bytes()
    pack(there / "train-0.tar", {"cat/a.jpg": photo, "cat/b.jpg": photo})
    pack(there / "train-1.tar", {"cat/b.jpg": photo, "dog/a.jpg": photo})
    (line,) = lines_of(shards(there))
    assert "train/cat/b.jpg is in train-0.tar and in train-1.tar" in line
    pack(there / "train-1.tar", {"x.jpg": photo, "x.cls": b"3", "y.jpg": photo, "z.jpg": photo, "z.cls": b"-1"})
    named = [line.partition(".tar: ")[2].partition(" has no label")[0] for line in lines_of(shards(there))]
    assert named == ["cat/a.jpg", "cat/b.jpg", "y.jpg", "z.jpg"]
    pack(there / "train-1.tar", {"x.jpg": photo, "x.cls": b"3"})
    (there / "classes.txt").write_text("one\ntwo")
    (line,) = lines_of(shards(there))
    assert "label 3 has no name" in line
    pack(there / "extra.tar", {"x.jpg": photo})
    assert any("extra.tar: has no split" in line for line in lines_of(shards(there)))


def test_an_image_that_cannot_be_read_is_named_or_left_out(pets, tmp_path_factory):
    there = tmp_path_factory.mktemp("shards")
    (pets / "train/cat/c.jpg").write_bytes(b"no image")
    for part in ("train", "val"):
        pack(there / f"{part}.tar", relative(pets, part))
    assert lines_of(shards(there)) == [line.replace(str(pets), str(there)) for line in lines_of(folder(pets))]
    assert same(shards(there, on_bad_image="skip"), folder(pets, on_bad_image="skip"), there)
    listing, images = scan(shards(there, on_bad_image="skip"), 0)
    assert (listing.skipped, len(images)) == (["train/cat/c.jpg"], len(listing))


def test_a_shard_that_is_a_link_is_read_if_links_are_followed(pets, tmp_path_factory):
    there, elsewhere = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("elsewhere")
    (there / "train.tar").symlink_to(pack(elsewhere / "0.tar", relative(pets, "train")))
    (line,) = lines_of(shards(there))
    assert "dataset.follow_links: true" in line
    assert len(written(shards(there, follow_links=True), there)[1]) == 5


def test_special_files_are_refused_without_being_opened(pets, tmp_path_factory):
    """A pipe, which would wait for a writer; a folder; and links to themselves and to a pipe; as shards and as images."""
    there = tmp_path_factory.mktemp("shards")
    (there / "folder.tar").mkdir()
    os.mkfifo(there / "pipe.tar")
    (there / "itself.tar").symlink_to("itself.tar")
    for name, follow_links in [("folder", False), ("pipe", False), ("itself", False), ("itself", True)]:
        (line,) = lines_of(shards(f"{there}/{name}*", follow_links=follow_links))
        assert f": {name}.tar: " in line
    (pets / "train/cat/z.jpg").symlink_to(there / "pipe.tar")
    (line,) = lines_of(folder(pets, follow_links=True))
    assert "train/cat/z.jpg is not a regular file" in line


@pytest.mark.parametrize(
    "pattern", ["a-{000000..000012}.tar", "{train-{0..3},val}-x.tar", "{a,b}{1..2}", "none", "{08..11}", "{a,{b,c}d}e", "x{1..1}"]
)
def test_braces_expand_as_in_bash(pattern):
    printed = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True).stdout
    assert expand_braces(pattern) == printed.split()


@pytest.mark.parametrize("pattern", ["{0..", "a}", "{x}", "{3..1}", "{0..99999999}", "{1..2000}{1..2000}", "{}", "{a..c}"])
def test_other_braces_are_refused(pattern, tmp_path):
    (line,) = lines_of(shards(f"{tmp_path}/{pattern}.tar"))
    assert "allowed" in line


def test_init_recognises_what_a_folder_contains(pets, tmp_path_factory):
    there = tmp_path_factory.mktemp("shards")
    for part in ("train", "val"):
        pack(there / "sub" / f"{part}.tar", relative(pets, part))
    look, of_folder = look_at(str(there), False), look_at(str(pets), False)
    assert (look.source, of_folder.source) == ("webdataset", "folder")
    assert (look.train, look.test, look.classes, look.short_px) == (of_folder.train, of_folder.test, of_folder.classes, of_folder.short_px)
    assert source_of(f"{there}/sub/{{train,val}}.tar") == source_of(f"{there}/sub/train.tar") == "webdataset"
    save(there / "cat/1.jpg")
    assert source_of(str(there)) == "folder"
    np.testing.assert_array_equal(scan(shards(there), 0)[0].labels_N, scan(folder(pets), 0)[0].labels_N)


@pytest.mark.parametrize("hashes", [len, hash])
def test_rows_of_paths_do_not_depend_on_their_hashes(monkeypatch, hashes):
    """Rows are those that a dict finds, even if different paths have the same hash; twins are paths of an earlier row."""
    monkeypatch.setattr("bingo.datasets.members._hashes", lambda paths: np.array([hashes(path) for path in paths], np.int64))
    paths = [f"{number % 7}/{number * number % 61}.jpg" for number in range(100)]
    once = list(dict.fromkeys(paths))
    for held in (paths, once):
        rows = PathRows(joined_paths([held]))
        assert rows.of(once[::-1]).tolist() == [held.index(path) for path in once[::-1]]
        twins = [(path, held.index(path), row) for row, path in enumerate(held) if held.index(path) != row]
        assert list(rows.twins()) == twins
        assert bool(twins) == (held is paths)
