"""bingo bags export: every pair of an anchor and a member is a line of a table and matches the stored arrays."""

import csv

import numpy as np
import pyarrow.parquet as pq
import pytest

from bingo.bags.index import Bags, read_bags, write_bags
from bingo.browse import pairs
from bingo.embeddings.store import read_embeddings
from bingo.images.listing import read_listing
from tests.command import bingo
from tests.fabricated import make_workspace

COLUMNS = ["row", "path", "label", "member", "member_path", "member_label", "rank", "similarity"]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """1,100 anchors, more than a chunk, in blocks of at most 70 lines, with short and empty bags and names that CSV must quote."""
    listing = make_workspace(tmp_path, train_rows=1100, classes=["ant", 'a "b", c', "cat"], name="new\nline, 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pairs, "_LINES", 70)
    embeddings = read_embeddings("data/embeddings.zarr", listing)
    whole = read_bags("data/bags.zarr", listing).table
    listed_TK = np.arange(4) < (np.arange(1100) % 5)[:, None]  # 0 to 4 members
    bags = Bags(whole.settings, np.where(listed_TK, whole.members_TK, -1), np.where(listed_TK, whole.similarity_TK, -np.inf))
    write_bags("data/bags.zarr", bags, listing.fingerprint, embeddings.fingerprint)
    return tmp_path


def expected() -> list[tuple]:
    """All lines, by loops over the stored arrays."""
    listing = read_listing("data/listing.parquet")
    bags = read_bags("data/bags.zarr", listing).table
    named = [(listing.paths[row], listing.classes[label] if label >= 0 else None) for row, label in enumerate(listing.labels_N)]
    return [
        (row, *named[row], member, *named[member], rank, cosine)
        for row in range(listing.train_rows)
        for rank, (member, cosine) in enumerate(zip(bags.members_TK[row].tolist(), bags.similarity_TK[row].tolist(), strict=True), 1)
        if member >= 0
    ]


def written(*arguments: str) -> list[dict]:
    done = bingo("bags", "export", *arguments)
    assert done.exit_code == 0, done.stderr
    return pq.read_table("bags.parquet").to_pylist()


def test_parquet_has_the_pairs_of_the_index(workspace):
    lines = written()
    assert [tuple(line[name] for name in COLUMNS) for line in lines] == expected()
    assert len(lines) == sum(range(5)) * 220
    assert pq.ParquetFile("bags.parquet").num_row_groups > len(lines) / 71, "written in blocks"


def test_csv_has_the_same_lines(workspace):
    assert bingo("bags", "export", "--to", "csv", "--out", "here.csv").exit_code == 0
    with open("here.csv", newline="") as file:
        head, *lines = csv.reader(file)
    assert head == COLUMNS
    assert [(int(a), b, c, int(d), e, f, int(g), float(np.float32(h))) for a, b, c, d, e, f, g, h in lines] == expected()


def test_features_are_the_anchors(workspace):
    features_ND = read_embeddings("data/embeddings.zarr", read_listing("data/listing.parquet")).features_ND
    assert [(line["row"], line["features"]) for line in written("--features")] == [
        (row, features_ND[row].astype(np.float32).tolist()) for row, *_ in expected()
    ]


def test_pandas_reads_it(workspace):
    pandas = pytest.importorskip("pandas")
    written("--features")
    frame = pandas.read_parquet("bags.parquet")
    assert frame[frame["row"] == 4].member.tolist() == read_bags("data/bags.zarr", read_listing("data/listing.parquet")).members(4).tolist()
    assert np.stack(frame.features).shape == (2200, 8)


def test_images_without_labels_have_none(tmp_path, monkeypatch):
    make_workspace(tmp_path, labelled=False)
    monkeypatch.chdir(tmp_path)
    lines = written()
    assert [tuple(line[name] for name in COLUMNS) for line in lines] == expected()
    assert {line["label"] for line in lines} == {None}


def test_empty_bags_give_a_table_without_lines(workspace):
    nothing = Bags({"method": "knn"}, np.full((1100, 4), -1, np.int32), np.full((1100, 4), -np.inf, np.float16))
    write_bags("data/bags.zarr", nothing, read_listing("data/listing.parquet").fingerprint, "e")
    assert written() == []
    assert pq.read_schema("bags.parquet").names == COLUMNS


@pytest.mark.parametrize(
    "arguments", [["--to", "csv", "--features"], ["--out", "bags.csv"], ["--to", "csv", "--out", "bags.parquet"], ["--to", "excel"]]
)
def test_a_mistake_writes_nothing(workspace, arguments):
    before = sorted(workspace.iterdir())
    done = bingo("bags", "export", *arguments)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert sorted(workspace.iterdir()) == before


def test_an_existing_file_is_replaced_only_with_force(workspace):
    (workspace / "bags.parquet").write_bytes(b"mine")
    assert bingo("bags", "export").exit_code == 2
    assert (workspace / "bags.parquet").read_bytes() == b"mine"
    assert len(written("--force")) == len(expected())


def test_features_of_another_teacher_are_a_mistake(workspace):
    listing = read_listing("data/listing.parquet")
    write_bags("data/bags.zarr", read_bags("data/bags.zarr", listing).table, listing.fingerprint, "another")
    done = bingo("bags", "export", "--features")
    assert done.exit_code == 2
    assert "embeddings" in done.stderr
    assert not (workspace / "bags.parquet").exists()


def test_a_damaged_index_leaves_no_file(workspace):
    chunk = workspace / "data/bags.zarr/similarity/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-3] + b"abc")
    assert bingo("bags", "export").exit_code == 2
    assert not [path for path in workspace.iterdir() if "parquet" in path.name]
