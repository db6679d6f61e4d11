"""The listing's file: unchanged after reading, equal bytes for equal content, refused if it is damaged."""

import hashlib
import json
import tracemalloc
from dataclasses import replace
from mmap import mmap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bingo.browse.listing_rows import ListingRows
from bingo.datasets.members import PathRows
from bingo.images.images import FileImages, MemoryImages, open_images, write_images
from bingo.images.listing import (
    Contents,
    Listing,
    Paths,
    first_outside,
    joined_paths,
    listing_fingerprint,
    read_judged_listing,
    read_listing,
    write_left_out,
    write_listing,
)
from bingo.params import load_params
from bingo.runtime.artefacts import canonical_json
from bingo.runtime.errors import UserError
from bingo.runtime.inside import leads_out

LISTING = Listing(
    dataset="folder",
    paths=["train/a/é 1.jpg", "train/b/2.jpg", "val/a/3.jpg"],
    labels_N=np.array([0, 1, 0]),
    train_rows=2,
    classes=["a", "b"],
    skipped=["train/a/broken.jpg"],
    fingerprint="0123",
)


def test_a_listing_reads_as_it_was_written_and_has_stable_bytes(tmp_path):
    write_listing(tmp_path / "listing.parquet", LISTING)
    again = read_listing(tmp_path / "listing.parquet")
    assert replace(again, labels_N=None) == replace(LISTING, labels_N=None)
    np.testing.assert_array_equal(again.labels_N, LISTING.labels_N)
    write_listing(tmp_path / "again.parquet", again)
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "listing.parquet").read_bytes()
    assert pq.read_table(tmp_path / "listing.parquet").column_names == ["row", "path", "label", "split"]


def test_labelled_and_split():
    assert LISTING.labelled
    assert not replace(LISTING, labels_N=np.array([0, -1, 0])).labelled
    assert [LISTING.split(row) for row in range(3)] == ["train", "train", "test"]


def test_held_out_images_are_counted_and_left_out_ones_are_not_evaluated(tmp_path):
    path, left_out = tmp_path / "listing.parquet", tmp_path / "left_out.json"
    write_listing(path, LISTING)
    own_split = path.read_bytes()
    listing = replace(LISTING, paths=[f"{row}.jpg" for row in range(6)], labels_N=np.array([0, 1, 0, 1, 0, 1]), held_out=5)
    write_listing(path, listing)
    assert read_listing(path).held_out == 5
    assert ListingRows(path, "listing").train_rows == 2
    write_left_out(left_out, listing, np.array([3, 5]))
    judged = read_judged_listing(path, left_out)
    assert (judged.test_rows_N.tolist(), judged.can_judge) == ([2, 4], True)
    write_left_out(left_out, listing, [2, 3, 4, 5])
    assert "near-duplicates" in read_judged_listing(path, left_out).unjudged
    assert "labels" in replace(judged, labels_N=np.array([0, 1, 0, -1, 0, 1])).unjudged
    assert "no test images" in replace(listing, train_rows=6).unjudged
    path.write_bytes(own_split)
    assert read_listing(path).held_out is None
    assert read_judged_listing(path, left_out).test_rows_N.tolist() == [2]


@pytest.mark.parametrize("damage", ["absent", "cut", "row", "other"])
def test_a_damaged_list_of_rows_is_one_line(tmp_path, damage):
    path, left_out = tmp_path / "listing.parquet", tmp_path / "left_out.json"
    listing = replace(LISTING, held_out=1)
    write_listing(path, listing)
    write_left_out(left_out, replace(listing, fingerprint="4567") if damage == "other" else listing, [2])
    content = left_out.read_bytes()
    if damage == "absent":
        left_out.unlink()
    elif damage != "other":
        left_out.write_bytes(content[:9] if damage == "cut" else content.replace(b"2\n", b"3\n"))
    with pytest.raises(UserError, match=r"left_out\.json: .*dvc repro") as error:
        read_judged_listing(path, left_out)
    assert len(error.value.lines) == 1


def test_an_empty_split_can_be_written(tmp_path):
    unlabelled = replace(LISTING, labels_N=np.full(3, -1), classes=[], train_rows=3)
    write_listing(tmp_path / "listing.parquet", unlabelled)
    assert read_listing(tmp_path / "listing.parquet").train_rows == 3


@pytest.mark.parametrize("damage", ["absent", "cut", "flipped", "other"])
def test_a_file_that_is_not_a_listing_is_refused(tmp_path, damage):
    path = tmp_path / "listing.parquet"
    write_listing(path, LISTING)
    content = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(b"not parquet at all")
    else:
        pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(UserError, match=r"listing\.parquet.*dvc repro") as error:
        read_listing(path)
    assert len(error.value.lines) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"labels_N": np.array([0, 2, 0])},
        {"paths": ["../outside.jpg", "b.jpg", "c.jpg"]},
        {"paths": ["/outside.jpg", "b.jpg", "c.jpg"]},
    ],
)
def test_impossible_rows_are_refused(tmp_path, wrong):
    write_listing(tmp_path / "listing.parquet", replace(LISTING, **wrong))
    for read in (read_listing, lambda path: ListingRows(path, str(path)).rows([0])):
        if read is read_listing or "paths" in wrong:
            with pytest.raises(UserError, match="is damaged"):
                read(tmp_path / "listing.parquet")


def test_fingerprint_changes_with_every_part_of_a_row():
    header, hashes = {"dataset": "folder"}, np.arange(96, dtype=np.uint8).reshape(3, 32)
    contents = Contents(np.array([10, 20, 30]), hashes)

    def fingerprint(paths=LISTING.paths, contents=contents, labels=LISTING.labels_N, train_rows=2, header=header) -> str:
        return listing_fingerprint(header, paths, contents, labels, train_rows)

    others = [
        fingerprint(paths=["other", *LISTING.paths[1:]]),
        fingerprint(contents=Contents(np.array([11, 20, 30]), hashes)),
        fingerprint(contents=Contents(np.array([10, 20, 30]), hashes + np.eye(3, 32, dtype=np.uint8))),
        fingerprint(contents=Contents(np.array([10, 20, 30]), None)),
        fingerprint(labels=np.array([1, 1, 0])),
        fingerprint(train_rows=1),
        fingerprint(header={"dataset": "other"}),
        fingerprint(paths=LISTING.paths[::-1], contents=contents.part(np.array([2, 1, 0])), labels=LISTING.labels_N[::-1]),
    ]
    assert fingerprint() == fingerprint()
    assert len({fingerprint(), *others}) == len(others) + 1


def test_the_paths_of_a_listing_are_a_sequence(tmp_path, monkeypatch):
    monkeypatch.setattr("bingo.images.listing._GROUP_ROWS", 4)
    names = [f"train/é {row}.jpg" for row in range(10)]
    write_listing(tmp_path / "listing.parquet", replace(LISTING, paths=names, labels_N=np.zeros(10, np.int64), train_rows=7))
    paths = read_listing(tmp_path / "listing.parquet").paths
    assert paths == names
    assert paths != names[:-1]
    assert [paths[row] for row in (0, -1, np.int64(5))] == [names[0], names[-1], names[5]]
    for part in (slice(3, 9), slice(-3, None), slice(8, 2), slice(None, None, -2), slice(1, 8, 3)):
        assert list(paths[part]) == names[part]
    with pytest.raises(IndexError):
        paths[10]


OUTSIDE = ["/a", "..", "../a", "a/..", "a/../b", "a//../b", "a/./../b"]
INSIDE = ["a", "..a/b", "a..", "a/..b/c", "a/...", "./a", "a/b..c", "a\n/..b", "", "\n/a"]


@pytest.mark.parametrize("path", [*OUTSIDE, *INSIDE, "a\n/../b", "a\n.."])
def test_paths_that_leave_the_root_are_found_by_the_rule_for_one_path(path):
    wanted = leads_out(path)
    assert wanted or path not in OUTSIDE
    assert first_outside(pa.chunked_array([["in/side.jpg"], [path]])) == (path if wanted else None)


def test_reading_a_listing_creates_no_object_per_row(tmp_path):
    """Memory of Python and NumPy per row: twice the label, and whether it is a train row. A string would be some 70 bytes more."""
    rows = 200_000
    numbers = pa.array(np.arange(rows)).cast(pa.string())
    names = pc.binary_join_element_wise(pa.scalar("train/class/some photograph "), numbers, pa.scalar(".jpg"), "")
    listing = replace(LISTING, paths=Paths(pa.chunked_array([names])), labels_N=np.zeros(rows, np.int64), train_rows=rows - 1)
    write_listing(tmp_path / "listing.parquet", listing)
    tracemalloc.start()
    found = read_listing(tmp_path / "listing.parquet")
    FileImages("root", found.paths)
    peak = tracemalloc.get_traced_memory()[1] - len((tmp_path / "listing.parquet").read_bytes())
    tracemalloc.stop()
    assert peak < 40 * rows
    assert found.paths[rows - 1] == f"train/class/some photograph {rows - 1}.jpg"


def behind_2_gib(paths: list[str]) -> Paths:
    """The same paths as the last of a column whose strings have more than 2^31 bytes together; the system gives memory only to those."""
    text = [path.encode() for path in paths]
    memory = mmap(-1, 2**31 + sum(map(len, text)))
    memory[2**31 :] = b"".join(text)
    ends = 2**31 + np.cumsum([0, *map(len, text)])
    return Paths(pa.chunked_array([pa.LargeStringArray.from_buffers(len(paths), pa.py_buffer(ends), pa.py_buffer(memory))]))


def test_paths_with_more_than_2_gib_of_text_are_those_of_a_list(tmp_path):
    paths = [*LISTING.paths, "val/a/4.jpg"]
    far, labels_N, hashes = behind_2_gib(paths), np.array([0, 1, 0, 0]), np.zeros((4, 32), np.uint8)
    for number, kept in enumerate((paths, far)):
        write_listing(tmp_path / f"{number}.parquet", replace(LISTING, paths=kept, labels_N=labels_N))
    assert (tmp_path / "0.parquet").read_bytes() == (tmp_path / "1.parquet").read_bytes()
    fingerprints = {listing_fingerprint({}, kept, Contents(labels_N, hashes), labels_N, 2) for kept in (paths, far)}
    assert len(fingerprints) == 1
    assert joined_paths([far, paths, far]) == paths * 3
    assert far.take(np.array([3, 0])) == [paths[3], paths[0]]
    assert PathRows(joined_paths([far])).of([paths[2]]).tolist() == [2]
    in_memory = [far, far[1:3], far.in_order(), joined_paths([]), joined_paths([paths]), read_listing(tmp_path / "1.parquet").paths]
    assert {kept.column.type for kept in in_memory} == {pa.large_string()}


@pytest.mark.parametrize("hashed", [True, False])
def test_the_fingerprint_is_that_of_a_line_of_json_for_each_row(monkeypatch, hashed):
    monkeypatch.setattr("bingo.images.listing._GROUP_ROWS", 3)
    paths = ["a/b.jpg", 'a/quote".jpg', "a/back\\slash", "caf\u00e9/\U0001f600", "tab\t", "del\x7f", "~plain [x]", "b"]
    sizes, labels, train_rows = np.arange(8) * 10**10, np.arange(8) - 1, 4
    hashes = np.random.default_rng(0).integers(0, 256, (8, 32), dtype=np.uint8)
    hasher = hashlib.sha256(canonical_json({"dataset": "folder"}).encode())
    for row, path in enumerate(paths):
        sha256 = hashes[row].tobytes().hex() if hashed else None
        line = [path, int(sizes[row]), sha256, int(labels[row]), "train" if row < train_rows else "test"]
        hasher.update(json.dumps(line).encode() + b"\n")
    found = listing_fingerprint({"dataset": "folder"}, paths, Contents(sizes, hashes if hashed else None), labels, train_rows)
    assert found == hasher.hexdigest()[:32]


def test_images_are_read_back_and_images_of_another_listing_are_refused(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 5, 3), dtype=np.uint8)
    images[1] = 0  # a black image is stored like any other
    write_images(tmp_path / "images.zarr", LISTING, images)
    opened = open_images(LISTING, tmp_path / "images.zarr", None)
    assert isinstance(opened, MemoryImages)
    assert opened.side_px == 5
    np.testing.assert_array_equal(opened.images_NSS3, images)
    with pytest.raises(UserError, match="was made from listing 0123, this run reads listing 4567"):
        open_images(replace(LISTING, fingerprint="4567"), tmp_path / "images.zarr", None)
    with pytest.raises(UserError, match="the store does not exist"):
        open_images(LISTING, tmp_path / "absent.zarr", None)


def test_a_damaged_or_missing_chunk_is_refused(tmp_path):
    path = tmp_path / "images.zarr"
    write_images(path, LISTING, np.full((3, 5, 5, 3), 7, np.uint8))
    chunk = path / "images/c/0/0/0/0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        open_images(LISTING, path, None)
    chunk.unlink()
    with pytest.raises(UserError, match="chunk 0 is missing"):
        open_images(LISTING, path, None)


def test_files_need_their_root(tmp_path):
    write_images(tmp_path / "images.zarr", LISTING, None)
    dataset = load_params(Path(__file__).parents[2] / "params.yaml").dataset.model_copy(update={"root": "somewhere"})
    opened = open_images(LISTING, tmp_path / "images.zarr", dataset)
    assert (opened.root, opened.paths, len(opened)) == (str(Path.cwd() / "somewhere"), LISTING.paths, 3)
    with pytest.raises(UserError, match=r"dataset\.root = null"):
        open_images(LISTING, tmp_path / "images.zarr", None)


def test_a_path_is_found_in_another_case_or_unicode_form(tmp_path):
    paths = ["a/caf\u00e9.png", "a/CAFE.png", "b/X.png", "b/x.png", "c/e\u0301.JPG"]
    content = Contents(np.ones(5, np.int64), None)
    labels = np.zeros(5, np.int64)
    listing = Listing("folder", paths, labels, 5, ["a"], [], listing_fingerprint({}, paths, content, labels, 5))
    write_listing(tmp_path / "listing.parquet", listing)
    rows = ListingRows(tmp_path / "listing.parquet", "the listing")
    for path, row in (("a/cafe\u0301.png", 0), ("A/cafe.PNG", 1), ("b/X.png", 2), ("b/x.png", 3), ("c/\u00e9.jpg", 4)):
        assert rows.row_of(path) == row
    with pytest.raises(UserError, match="no such path"):
        rows.row_of("B/X.PNG")
