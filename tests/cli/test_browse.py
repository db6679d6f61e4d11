"""`bingo bags`: show, stats, diff and find from the command line; values are compared with plain loops over the index."""

import os
import subprocess
import sys
from pathlib import Path
from unicodedata import combining, east_asian_width

import numpy as np
import pytest
from command import bingo
from fabricated import NEAR_COSINE, images_of, make_workspace
from PIL import Image

from bingo.bags.builders import build_kmeans, build_knn
from bingo.bags.index import Bags, read_bags, write_bags
from bingo.bags.ivf import InvertedFile
from bingo.bags.metrics import bag_metrics
from bingo.browse.diff import compare_bags
from bingo.browse.listing_rows import ListingRows
from bingo.images.images import write_images
from bingo.images.listing import read_listing, write_listing
from bingo.runtime.artefacts import read_json, write_json
from bingo.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    make_workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bingo_bags(*arguments):
    """(exit code, stdout, stderr)."""
    return bingo("bags", *arguments)


def mistake(*arguments):
    """The line printed for a user error."""
    code, out, err = bingo_bags(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# ---- show


def test_show_prints_the_bag_and_draws_it(workspace):
    listing = read_listing("data/listing.parquet")
    index = read_bags("data/bags.zarr", listing)
    code, out, _ = bingo_bags("show", 5)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "row 5  class/image_0005.png  label cat  (knn, k 4)"
    assert lines[1].split() == ["#", "row", "similarity", "label", "same", "path"]
    for place, (row, cosine) in enumerate(zip(index.members(5), index.similarity(5), strict=True)):
        name = listing.classes[listing.labels_N[row]]
        same = "yes" if listing.labels_N[row] == listing.labels_N[5] else "no"
        assert lines[2 + place].split() == [str(place + 1), str(row), f"{cosine:.4f}", name, same, listing.paths[row]]
    assert lines[-1] == "picture: .bingo/sheets/bag-5.png"
    with Image.open(workspace / ".bingo/sheets/bag-5.png") as sheet:
        assert sheet.width > 400
        assert len(sheet.getcolors(1 << 20)) > 50


def test_show_takes_a_path_and_a_place_for_the_picture(workspace):
    by_row, by_path = bingo_bags("show", 7), bingo_bags("show", "class/image_0007.png", "--out", "here/sheet.png")
    assert by_row[1].splitlines()[:-1] == by_path[1].splitlines()[:-1]
    assert by_path[1].endswith("picture: here/sheet.png\n")
    assert (workspace / "here/sheet.png").read_bytes() == (workspace / ".bingo/sheets/bag-7.png").read_bytes()


def test_show_of_a_cluster_gives_the_number_of_members_that_can_be_drawn(tmp_path, monkeypatch):
    make_workspace(tmp_path, method="kmeans")
    monkeypatch.chdir(tmp_path)
    index = read_bags("data/bags.zarr", read_listing("data/listing.parquet"))
    others = len(index.bag(3))
    line = bingo_bags("show", 3)[1].splitlines()[0]
    assert f"(kmeans, cluster {index.cluster(3)}: {others} other rows, the nearest {min(4, others)} listed)" in line


def test_names_cannot_control_the_terminal(tmp_path, monkeypatch):
    make_workspace(tmp_path, classes=["\x1b]0;owned\x07", "[red]b[/red]\nc", "plain"], name="a\x1b[31mb")
    monkeypatch.chdir(tmp_path)
    for command in (["show", 1], ["stats"]):
        code, out, _ = bingo_bags(*command)
        assert code == 0
        assert "\x1b" not in out
        assert "\x07" not in out
        assert "\\x1b[31mb_00" in out
        assert all(line.isprintable() for line in out.splitlines())


def test_columns_are_aligned_whatever_the_width_of_the_characters(tmp_path, monkeypatch):
    make_workspace(tmp_path, classes=["猫", "cafe\u0301 au lait", "dog"])
    monkeypatch.chdir(tmp_path)
    lines = bingo_bags("show", 1)[1].splitlines()[1:-1]
    before_path = [line[: line.index("path" if place == 0 else "class/")] for place, line in enumerate(lines)]
    drawn = [sum(2 if east_asian_width(c) in "WF" else 0 if combining(c) else 1 for c in text) for text in before_path]
    assert len(drawn) == 5
    assert {"猫", "dog"} & set(" ".join(before_path).split())
    assert len(set(drawn)) == 1


def test_unlabelled_rows_short_and_empty_bags(tmp_path, monkeypatch):
    listing = make_workspace(tmp_path, train_rows=9, labelled=False, k=6, method="kmeans")
    monkeypatch.chdir(tmp_path)
    members = [[1, 2, -1], [0, -1, -1], *[[-1, -1, -1]] * 7]
    similarity = np.where(np.array(members) < 0, -np.inf, 0.5)
    table = Bags({"method": "knn"}, np.array(members, np.int32), similarity.astype(np.float16))
    write_bags("data/bags.zarr", table, listing.fingerprint, "e")
    lines = bingo_bags("show", 0)[1].splitlines()
    assert [line.split()[1:] for line in lines[2:-1]] == [[str(row), "0.5000", listing.paths[row]] for row in (1, 2)]
    assert bingo_bags("show", 2)[1].splitlines()[1] == "the bag is empty"
    assert "purity" not in bingo_bags("stats")[1]
    code, out, _ = bingo_bags("diff", "workspace", "workspace")
    assert code == 0
    said = lines + bingo_bags("stats")[1].splitlines() + out.splitlines()
    assert not [line for line in said if any(word in line for word in ("purity", "label"))]


def test_images_that_cannot_be_read_are_shown_as_such(workspace):
    listing = read_listing("data/listing.parquet")
    write_images("data/images.zarr", listing, None)  # files that do not exist
    code, out, _ = bingo_bags("show", 5)
    assert code == 0
    assert out.splitlines()[-1].startswith("picture: ")


def test_images_from_files(workspace):
    listing = read_listing("data/listing.parquet")
    (workspace / "photos/class").mkdir(parents=True)
    for path, pixels in zip(listing.paths, images_of(listing.labels_N, 40), strict=True):
        Image.fromarray(pixels).save(workspace / "photos" / path)
    stored = bingo_bags("show", 5, "--out", "stored.png")
    write_images("data/images.zarr", listing, None)
    Path("params.yaml").write_text("dataset:\n  root: photos\n")
    assert bingo_bags("show", 5, "--out", "files.png")[1].splitlines()[:-1] == stored[1].splitlines()[:-1]
    with Image.open("files.png") as sheet:
        assert len(sheet.getcolors(1 << 20)) > 500


# ---- mistakes


@pytest.mark.parametrize("row", ["-1", "60", "69", "70", "123456789012345678901234567890"])
def test_a_row_without_a_bag(workspace, row):
    line = mistake("show", row)
    assert f"row {row}" in line
    assert "train rows 0 to 59" in line


def test_the_path_of_a_test_image(workspace):
    path = read_listing("data/listing.parquet").paths[60]
    line = mistake("show", path)
    assert line.startswith(f"error: {path}: ")
    assert "bingo bags find" in line


def test_a_path_that_is_not_listed(workspace):
    assert "did you mean 'class/image_0012.png'?" in mistake("show", "image_0012.png")
    assert "no such path in data/listing.parquet (70 rows)\n" in mistake("show", "nothing-like-it")


def test_no_index_no_listing(workspace):
    Path("data/bags.zarr").rename("data/elsewhere.zarr")
    for command in (["show", 5], ["stats"], ["gallery"], ["diff", "workspace", "workspace"]):
        assert "data/bags.zarr: the store does not exist or is incomplete; run: dvc repro bag" in mistake(*command)
    Path("data/listing.parquet").rename("data/elsewhere.parquet")
    assert "data/listing.parquet: the file does not exist; run: dvc repro scan" in mistake("show", 5)


def test_an_index_of_another_listing(workspace, tmp_path):
    other = make_workspace(tmp_path / "other", train_rows=50)
    write_listing("data/listing.parquet", other)
    line = mistake("show", 5)
    assert "data/bags.zarr: was made from listing" in line
    assert other.fingerprint in line
    assert "run: dvc repro bag" in line


def test_damaged_files(workspace):
    chunk = workspace / "data/bags.zarr/members/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-3] + b"abc")
    assert "data/bags.zarr: array members has a damaged chunk" in mistake("show", 5)
    Path("data/listing.parquet").write_bytes(b"PAR1 nothing PAR1")
    assert "data/listing.parquet: is damaged" in mistake("show", 5)


@pytest.mark.parametrize("command", [("show", 5), ("diff", "workspace", "workspace"), ("find", "class/image_0005.png")])
def test_a_picture_replaces_a_file_only_on_request(workspace, command):
    Path("own.png").write_bytes(b"mine")
    assert "exists already" in mistake(*command, "--out", "own.png")
    assert "allowed are names that end in .png" in mistake(*command, "--out", "params.yaml", "--force")
    assert Path("own.png").read_bytes() == b"mine"


def test_a_picture_is_replaced(workspace):
    Path("own.png").write_bytes(b"mine")
    assert bingo_bags("show", 5, "--out", "own.png", "--force").exit_code == 0
    with Image.open("own.png") as sheet:
        assert sheet.width > 400


@pytest.mark.slow
def test_a_revision_outside_of_any_repository(workspace):
    assert mistake("show", 5, "--rev", "v1").startswith("error: v1: ")


# ---- stats


@pytest.mark.parametrize("method", ["knn", "kmeans"])
def test_stats_are_the_metrics_of_the_index(tmp_path, monkeypatch, method):
    make_workspace(tmp_path, method=method)
    monkeypatch.chdir(tmp_path)
    listing = read_listing("data/listing.parquet")
    metrics = bag_metrics(read_bags("data/bags.zarr", listing).table, listing.labels_N[: listing.train_rows], NEAR_COSINE)
    wanted = {name.replace("_", " "): round(metrics[name], 4) for name in ("orphan_share", "mutual_share", "chance_share")}
    lines = [line.split("  ", 1) for line in bingo_bags("stats")[1].splitlines() if line.startswith(tuple(f"{name} " for name in wanted))]
    assert {name: float(value) for name, value in lines} == wanted
    text = bingo_bags("stats")[1]
    assert text.startswith(f"data/bags.zarr: {method} bags of 60 rows of fabricated, k 4\n")
    for name in ("purity", "orphan share", "mutual share", "similarity", "near duplicates", *(["cluster size"] * (method == "kmeans"))):
        assert f"\n{name} " in text
    assert text.count("extract.views") == 1, "the overlap of two views was not measured"
    write_json("reports/bags.json", read_json("reports/bags.json") | {"view_overlap": 0.5})
    assert "extract.views" not in (measured := bingo_bags("stats")[1])
    assert ["view", "overlap", "0.5"] in [line.split() for line in measured.splitlines()]
    hub = metrics["hubs"][0]
    first = text.splitlines()[text.splitlines().index("hubs: the rows in most bags") + 2].split()
    assert first == [str(hub["row"]), str(hub["count"]), listing.classes[listing.labels_N[hub["row"]]], listing.paths[hub["row"]]]
    pair = metrics["closest_pairs"][0]
    assert text.splitlines()[-10].split() == [
        *map(str, pair["rows"]),
        f"{pair['cosine']:.4f}",
        *(listing.paths[row] for row in pair["rows"]),
    ]


def test_stats_of_an_old_revision_have_fewer_figures_and_none_are_a_mistake(workspace):
    whole = read_json("reports/bags.json")
    write_json("reports/bags.json", {name: whole[name] for name in ("hubs", "in_degree", "mutual_share")})
    assert bingo_bags("stats")[0] == 0
    for damage in (lambda path: path.write_text("{"), Path.unlink):
        damage(Path("reports/bags.json"))
        assert "reports/bags.json" in mistake("stats")


def test_an_approximate_search_says_so(workspace):
    listing = read_listing("data/listing.parquet")
    features = np.random.default_rng(0).standard_normal((listing.train_rows, 8))
    bags = build_knn(features, 4, False, InvertedFile(12, 2, 0))
    write_bags("data/bags.zarr", bags, listing.fingerprint, "ee55")
    write_json("reports/bags.json", bag_metrics(bags, None))
    figures = dict(line.split() for line in bingo_bags("stats")[1].splitlines() if line.split()[:1] in (["recall"], ["lists"], ["probes"]))
    assert figures == {"recall": f"{bags.settings['recall']:.4f}".rstrip("0"), "lists": "12", "probes": "2"}
    assert "workspace (knn, k 4, 2 of 12 lists)" in bingo_bags("diff", "workspace", "workspace")[1]


# ---- diff


def all_bags(features_TD):
    return {
        "knn 3": build_knn(features_TD, 3),
        "knn 5": build_knn(features_TD, 5),
        "kmeans 4": build_kmeans(features_TD, 4, 5, 3, 0),
        "kmeans 7": build_kmeans(features_TD, 7, 5, 6, 1),
    }


@pytest.mark.parametrize("first", ["knn 3", "knn 5", "kmeans 4", "kmeans 7"])
@pytest.mark.parametrize("second", ["knn 3", "kmeans 7"])
def test_overlap_and_purity_by_sets(first, second, tmp_path):
    random = np.random.default_rng(0)
    labels_T = random.integers(-1, 3, 40)
    table = all_bags(random.standard_normal((40, 5)).astype(np.float32))
    listing = make_workspace(tmp_path, train_rows=40)
    indexes = []
    for name in (first, second):
        write_bags(tmp_path / name, table[name], listing.fingerprint, "e")
        indexes.append(read_bags(tmp_path / name, listing))
    found = compare_bags(table[first], table[second], labels_T)
    for row in range(40):
        a, b = (set(index.bag(row).tolist()) for index in indexes)
        assert found.jaccard_T[row] == pytest.approx(len(a & b) / len(a | b) if a | b else 1)
        for index, purity in zip(indexes, (found.purity_before_T[row], found.purity_after_T[row]), strict=True):
            known = [labels_T[m] for m in index.members(row) if labels_T[m] >= 0 and labels_T[row] >= 0]
            assert np.isnan(purity) if not known else purity == pytest.approx(np.mean(np.array(known) == labels_T[row]))
    figures = found.summary()["purity"]
    assert figures["after"] == pytest.approx(figures["before"] + figures["gained"] + figures["lost"], abs=1e-5)
    gain_T = np.nan_to_num(found.purity_after_T - found.purity_before_T)
    order = sorted(range(40), key=lambda row: (found.jaccard_T[row], -abs(gain_T[row]), row))
    assert found.most_changed(40).tolist() == order
    assert found.most_changed(3).tolist() == order[:3]


def test_two_empty_bags_are_the_same_bag():
    none = Bags({"method": "knn"}, np.full((2, 2), -1, np.int32), np.full((2, 2), -np.inf, np.float16))
    assert compare_bags(none, none, np.zeros(2, np.int64)).jaccard_T.tolist() == [1, 1]


def test_diff_of_the_workspace_and_itself(workspace):
    code, out, _ = bingo_bags("diff", "workspace", "workspace", "--anchors", 3)
    assert code == 0
    assert "same bags      60" in out
    assert (workspace / ".bingo/sheets/diff@workspace..workspace.png").is_file()


# ---- find


def save_small_teacher(path):
    from bingo.nets.backbones import build_backbone
    from bingo.params import ImageParams, NetworkParams
    from bingo.teachers.teacher import save_teacher, teacher_metadata

    network = NetworkParams(arch="resnet18", width=0.125, stem="small")
    image = ImageParams(crop_px=12, resize_px=12, mean=[0.5] * 3, std=[0.25] * 3)
    backbone = build_backbone(network.arch, network.width, network.stem, 0)
    source = {"source": "random", "pretrained": False}
    save_teacher(path, backbone, None, teacher_metadata(network, image, backbone, None, source))
    return image


@pytest.fixture
def taught(workspace):
    """The workspace, with a teacher and its features of all images."""
    import torch

    from bingo.embeddings.store import create_embeddings
    from bingo.images.images import open_images
    from bingo.images.loader import center_views
    from bingo.runtime.artefacts import file_fingerprint
    from bingo.teachers.teacher import load_teacher

    image = save_small_teacher("models/teacher.safetensors")
    listing = read_listing("data/listing.parquet")
    images = open_images(listing, "data/images.zarr", None)
    teacher = load_teacher("models/teacher.safetensors")
    views = torch.cat(list(center_views(images, np.arange(len(listing)), image, torch.device("cpu"), 16, workers=0)))
    features, keys = (x.numpy() for x in teacher(views))
    recipe = {"image": image.model_dump(mode="json"), "extract": {"precision": "fp32"}}
    attrs = {"listing": listing.fingerprint, "teacher": file_fingerprint("models/teacher.safetensors"), "recipe": recipe}
    rows, train = len(listing), listing.train_rows
    writer = create_embeddings(Path("data/new.zarr"), rows, train, features.shape[1], 1, keys.shape[1], 32, attrs)
    for chunk in range(writer.chunks):
        at, train_at = writer.rows(chunk), writer.train_rows(chunk)
        writer.write_chunk(chunk, features[at.start : at.stop], keys[train_at.start : train_at.stop, None])
    writer.finish(Path("data/embeddings.zarr"))
    return images.images_NSS3, features


def test_find_gives_the_train_rows_nearest_to_a_file(taught, monkeypatch):
    monkeypatch.setenv("BINGO_DEVICE", "cpu")
    images, features = taught
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for row in (17, 64):  # one row of the listing's train images, and a test row, which is not among its own neighbours
        Image.fromarray(images[row]).save("outside.png")
        code, out, _ = bingo_bags("find", "outside.png", "--k", 6)
        assert code == 0
        cosines = unit[:60] @ unit[row]
        lines = [line.split() for line in out.splitlines()[2:-1]]
        assert [int(line[1]) for line in lines] == np.argsort(-cosines, kind="stable")[:6].tolist()
        assert [float(line[2]) for line in lines] == pytest.approx(np.sort(cosines)[::-1][:6].tolist(), abs=2e-3)
    assert out.splitlines()[0] == "outside.png: the 6 nearest train rows of fabricated"
    assert out.splitlines()[-1] == "picture: .bingo/sheets/find-outside.png"


def test_find_refuses_files_that_are_not_images_and_another_teacher(taught, monkeypatch):
    monkeypatch.setenv("BINGO_DEVICE", "cpu")
    Path("text.jpg").write_text("no image")
    assert "text.jpg: is not an image that can be decoded" in mistake("find", "text.jpg")
    assert "absent.jpg: cannot be read (No such file or directory)" in mistake("find", "absent.jpg")
    Image.new("RGB", (30, 20)).save("image.png")
    with open("models/teacher.safetensors", "ab") as file:
        file.write(b" ")
    line = mistake("find", "image.png")
    assert "data/embeddings.zarr: was made by teacher" in line
    assert "run: dvc repro extract" in line


# ---- the listing, row by row


def test_listing_rows_over_several_row_groups(tmp_path, monkeypatch):
    from bingo.images import listing as listing_module

    monkeypatch.setattr(listing_module, "_GROUP_ROWS", 16)
    made = make_workspace(tmp_path)
    rows = ListingRows(tmp_path / "data/listing.parquet", "listing")
    assert rows._file.metadata.num_row_groups == 5
    assert (len(rows), rows.train_rows, rows.classes, rows.fingerprint) == (70, 60, made.classes, made.fingerprint)
    wanted = [69, 0, 17, 16, 15, 17]
    paths, labels = rows.rows(wanted)
    assert paths == [made.paths[row] for row in wanted]
    assert labels.tolist() == made.labels_N[wanted].tolist()
    assert [rows.row_of(path) for path in made.paths] == list(range(70))
    assert rows.labels_N.tolist() == made.labels_N.tolist()
    for step in (1, 7, 16, 100):
        runs = list(rows.paths(step))
        assert [first for first, _ in runs] == list(range(0, 70, step))
        assert [path for _, run in runs for path in run] == made.paths
    with pytest.raises(UserError, match="row 70: listing has rows 0 to 69"):
        rows.rows([3, 70])


# ---- files read and packages imported


@pytest.mark.slow
def test_one_row_reads_one_chunk_and_imports_nothing_heavy(workspace):
    """Chunks of other rows may be missing, and neither torch nor scikit-learn nor DVC is imported."""
    table = build_knn(np.random.default_rng(0).standard_normal((3000, 4)).astype(np.float32), 4)
    listing = make_workspace(workspace, train_rows=3000)
    write_bags("data/bags.zarr", table, listing.fingerprint, "e")
    for array in ("members", "similarity"):
        for chunk in ("1", "2"):
            (workspace / f"data/bags.zarr/{array}/c/{chunk}/0").unlink()
    code = (
        "import sys\nfrom bingo.cli.main import app\n"
        "heavy = {'numpy', 'zarr', 'pyarrow', 'PIL', 'torch', 'sklearn', 'dvc', 'faiss', 'matplotlib', 'timm', 'torchvision'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "app(['bags', 'show', '5'], standalone_mode=False)\n"
        "loaded = heavy & set(sys.modules)\n"
        "assert loaded == {'numpy', 'zarr', 'pyarrow', 'PIL'}, loaded\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "chunk 2 is missing" in mistake("show", 2999)
