"""`bingo embed`: every format against explicitly cropped images, and errors as one line each."""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from command import bingo
from PIL import Image

from bingo.embeddings.files import write_embeddings
from bingo.embeddings.of_folder import embed_folder
from bingo.export.stored import read_student
from bingo.nets.backbones import build_backbone
from bingo.nets.checkpoint import save_network
from bingo.nets.heads import mlp_head
from bingo.params import ImageParams, NetworkParams
from bingo.runtime.artefacts import file_fingerprint
from bingo.runtime.errors import UserError
from bingo.teachers.teacher import save_teacher, teacher_metadata

# No resizing, so that the explicit crop is exact.
IMAGE = {"crop_px": 16, "resize_px": 20, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.2]}
TINY = ("resnet10t", 0.125, "small")
STUDENT = {"kind": "student", "arch": TINY[0], "width": TINY[1], "stem": TINY[2], **IMAGE, "method": "bingo"}
NAMES = ["a/1.png", "a/10.png", "a/2.png", "a b/é.PNG", "b/x/deep.bmp", "top.png"]
PASSED = "FOLDER = photos: skipped: 1 hidden, 1 .txt\n"
READERS = {
    ".npy": lambda path: (np.load(path), path.with_suffix(".txt").read_text().splitlines()),
    ".parquet": lambda path: (np.array(pq.read_table(path)["embedding"].to_pylist(), np.float32), pq.read_table(path)["path"].to_pylist()),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A workspace with a student and a teacher, and a folder with images that are 20 pixels high and wider than that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BINGO_DEVICE", "cpu")
    save_network("models/student.safetensors", network(1).state_dict(), STUDENT)
    teacher, head = network(2), mlp_head([64, 4], 0)
    facts = teacher_metadata(
        NetworkParams(**dict(zip(("arch", "width", "stem"), TINY, strict=True))), ImageParams(**IMAGE), teacher, head, {}
    )
    save_teacher("models/teacher.safetensors", teacher, head, facts)
    rng = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20 + 2 * number, 3)).astype(np.uint8)).save(path)
    (tmp_path / "photos/notes.txt").write_text("no image")
    (tmp_path / "photos/.hidden.png").write_text("no image")
    return tmp_path


@cache
def network(seed: int):
    """A network whose BatchNorm has statistics of its own, so that a network left in train mode would be noticed."""
    backbone = build_backbone(*TINY, seed_value=seed).eval()
    for name, tensor in backbone.state_dict().items():
        if name.endswith("running_var"):
            tensor.fill_(1.5)
    return backbone


def by_hand(backbone, root: Path, names: list[str]) -> np.ndarray:
    """One image at a time: the middle 16 x 16 pixels, normalised."""
    rows = []
    for name in names:
        pixels = np.asarray(Image.open(root / name).convert("RGB"), np.float64) / 255
        top, left = (pixels.shape[0] - 16) // 2, (pixels.shape[1] - 16) // 2
        crop = (pixels[top : top + 16, left : left + 16] - IMAGE["mean"]) / IMAGE["std"]
        with torch.no_grad():
            rows.append(backbone(torch.from_numpy(crop.transpose(2, 0, 1)).float()[None])[0].numpy())
    return np.array(rows)


def bingo_embed(*arguments):
    """(exit code, stdout, stderr)."""
    return bingo("embed", *arguments)


def sorted_names() -> list[str]:
    return sorted(NAMES, key=lambda name: name.split("/"))


# ---- the files


@pytest.mark.parametrize("suffix", READERS)
def test_rows_are_the_features_of_the_images_in_the_order_of_their_paths(suffix, here):
    out = here / f"out/e{suffix}"
    code, said, err = bingo_embed("photos", "--out", out, "--batch-images", 4)
    assert (code, err) == (0, "")
    assert said == f"{PASSED}written {out}: 6 x 64 float32, by models/student.safetensors\n"
    features, names = READERS[suffix](out)
    assert names == sorted_names()
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, by_hand(network(1), here / "photos", names), atol=1e-5)
    assert sorted(path.name for path in out.parent.iterdir()) == (["e.npy", "e.txt"] if suffix == ".npy" else [f"e{suffix}"])


def test_attributes_name_the_network_and_the_preprocessing(here):
    bingo_embed("photos", "--out", "e.parquet")
    expected = {"kind": "student", "arch": "resnet10t", "width": 0.125, "stem": "small", **IMAGE}
    expected |= {"network": file_fingerprint("models/student.safetensors"), "precision": "fp32"}
    assert json.loads(pq.read_schema("e.parquet").metadata[b"bingo"]) == expected
    assert pq.read_schema("e.parquet").field("embedding").type.list_size == 64


def test_the_teacher_embeds_with_its_backbone(here):
    code, said, _ = bingo_embed("photos", "--out", "t.npy", "--teacher")
    assert (code, said) == (0, f"{PASSED}written t.npy: 6 x 64 float32, by models/teacher.safetensors\n")
    np.testing.assert_allclose(np.load("t.npy"), by_hand(network(2), here / "photos", sorted_names()), atol=1e-5)


def test_another_student_is_selected_by_its_file(here):
    save_network("other.safetensors", network(3).state_dict(), STUDENT)
    assert bingo_embed("photos", "--out", "o.npy", "--student", "other.safetensors")[0] == 0
    np.testing.assert_allclose(np.load("o.npy"), by_hand(network(3), here / "photos", sorted_names()), atol=1e-5)


@pytest.mark.slow
def test_batches_workers_and_blocks_do_not_change_features(here, monkeypatch):
    """Except the last bits, which depend on the batch in convolutions."""
    net = read_student(Path("models/student.safetensors"))

    def embedded(name: str, batch_images: int) -> np.ndarray:
        embed_folder(net, "f", here / "photos", here / name, torch.device("cpu"), batch_images, False)
        return np.load(here / name)

    expected = embedded("a.npy", 256)
    monkeypatch.setattr("bingo.embeddings.files.BLOCK_ROWS", 4)
    np.testing.assert_allclose(embedded("b.npy", 1), expected, atol=1e-5)
    monkeypatch.setattr("bingo.embeddings.of_folder._FEW_IMAGES", 0)  # worker processes decode
    assert np.array_equal(embedded("c.npy", 256), expected)


@pytest.mark.parametrize("suffix", READERS)
def test_blocks_join_to_the_same_rows(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("bingo.embeddings.files.BLOCK_ROWS", 4)
    rows = np.random.default_rng(0).standard_normal((23, 5)).astype(np.float32)
    names = [f"{row}.png" for row in range(23)]
    write_embeddings(tmp_path / f"e{suffix}", names, 5, (rows[start : start + 3] for start in range(0, 23, 3)), {"a": 1})
    features, read_names = READERS[suffix](tmp_path / f"e{suffix}")
    assert np.array_equal(features, rows)
    assert read_names == names
    if suffix == ".npy":
        assert np.array_equal(np.load(tmp_path / "e.npy", mmap_mode="r"), rows)


@pytest.mark.parametrize("suffix", READERS)
def test_a_second_run_has_the_same_bytes(suffix, here):
    def content(out: Path) -> list[bytes]:
        return [path.read_bytes() for path in ([out] if out.is_file() else sorted(out.rglob("*"))) if path.is_file()]

    bingo_embed("photos", "--out", f"first{suffix}")
    bingo_embed("photos", "--out", f"second{suffix}")
    before = content(here / f"first{suffix}")
    assert before == content(here / f"second{suffix}")
    (here / "photos/top.png").unlink()
    assert bingo_embed("photos", "--out", f"first{suffix}", "--force")[0] == 0
    assert len(READERS[suffix](here / f"first{suffix}")[0]) == 5, "--force replaces all of it"


@pytest.mark.parametrize("suffix", READERS)
def test_a_failure_halfway_leaves_the_existing_file(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("bingo.embeddings.files.BLOCK_ROWS", 2)
    rows = np.zeros((4, 3), np.float32)

    def broken():
        yield rows[:2]
        raise UserError("a file is gone")

    with pytest.raises(UserError, match="a file is gone"):
        write_embeddings(tmp_path / f"e{suffix}", list("abcd"), 3, broken(), {})
    assert not list(tmp_path.iterdir())
    write_embeddings(tmp_path / f"e{suffix}", list("abcd"), 3, [rows + 7], {})
    with pytest.raises(UserError):
        write_embeddings(tmp_path / f"e{suffix}", list("abcd"), 3, broken(), {})
    assert np.array_equal(READERS[suffix](tmp_path / f"e{suffix}")[0], rows + 7)


# ---- images of several kinds


def test_small_grey_and_transparent_images_are_embedded(here):
    Image.new("L", (3, 5), 77).save(here / "photos/grey.png")
    Image.new("RGBA", (40, 40), (1, 2, 3, 0)).save(here / "photos/clear.png")
    Image.new("P", (9, 30)).save(here / "photos/palette.gif")
    assert bingo_embed("photos", "--out", "e.npy")[0] == 0
    features = np.load("e.npy")
    assert features.shape == (9, 64)
    assert np.isfinite(features).all()


def test_unreadable_images_are_left_out_on_request(here):
    (here / "photos/a/3.png").write_bytes(b"no png")
    code, said, err = bingo_embed("photos", "--out", "e.parquet", "--on-bad-image", "skip")
    assert (code, err) == (0, "")
    first, second = said.removeprefix(PASSED).splitlines()
    assert first == "written e.parquet: 6 x 64 float32, by models/student.safetensors"
    assert second == "left out, unreadable: 1 ('a/3.png')"
    assert READERS[".parquet"](here / "e.parquet")[1] == sorted_names()


def test_unreadable_images_are_an_error_by_default(here):
    (here / "photos/a/3.png").write_bytes(b"no png")
    code, out, err = bingo_embed("photos", "--out", "e.npy")
    assert (code, out) == (2, PASSED)
    first, second = err.splitlines()
    assert first.startswith("error: a/3.png: cannot be read (")
    assert (
        second == "error: FOLDER = photos: 1 of 7 images are unreadable; repair or delete them, or leave them out with --on-bad-image skip"
    )
    assert not Path("e.npy").exists()


def test_a_folder_of_only_unreadable_images_is_always_refused(here):
    (here / "bad").mkdir()
    (here / "bad/a.jpg").write_bytes(b"")
    code, _, err = bingo_embed("bad", "--out", "e.npy", "--on-bad-image", "skip")
    assert code == 2
    assert err.splitlines()[-1] == "error: FOLDER = bad: 1 of 1 images are unreadable; repair or delete them"


def test_a_name_with_a_line_break_is_refused_by_formats_that_cannot_hold_it(here):
    (here / "photos/top.png").rename(here / "photos/to\np.png")
    code, _, err = bingo_embed("photos", "--out", "e.npy")
    assert code == 2
    assert err == "error: --out = e.npy: 'to\\np.png' has a line break in its name, and .npy stores one name per line; write .parquet\n"
    assert bingo_embed("photos", "--out", "e.parquet")[0] == 0
    assert READERS[".parquet"](here / "e.parquet")[1][-1] == "to\np.png"


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none", "--out", "e.npy"], "FOLDER = none: the folder does not exist; give the folder that contains images"),
        (["photos/top.png", "--out", "e.npy"], "FOLDER = photos/top.png: is a file"),
        (["empty", "--out", "e.npy"], "FOLDER = empty: contains no images; recognised are .jpg, .jpeg, .png"),
        (["leads-out", "--out", "e.npy"], "FOLDER = leads-out: x.png is a link out of it, to "),
        (["bytes", "--out", "e.npy"], "FOLDER = bytes: '\\udcff.png' is not a UTF-8 name; rename it"),
        (["photos", "--out", "e.csv"], "--out = e.csv: allowed are names that end in .npy, .parquet"),
        (["photos", "--out", "e"], "--out = e: allowed are names that end in"),
        (["photos", "--out", "there.npy"], "--out = there.npy: exists already; give another name, or --force to replace it"),
        (["photos", "--out", "beside.npy"], "--out: list of paths = beside.txt: exists already"),
        (["photos", "--out", "folder.npy", "--force"], "--out = folder.npy: is not a file of this kind, so --force does not replace it"),
        (["photos", "--out", "there.npy/e.npy"], "--out = there.npy/e.npy: there.npy is a file, not a folder; give another name"),
        (["photos", "--out", "e.npy", "--student", "none.safetensors"], "none.safetensors: cannot be read (the file does not exist)"),
        (["photos", "--out", "e.npy", "--student", "photos"], "photos: cannot be read ("),
        (["photos", "--out", "e.npy", "--student", "models/teacher.safetensors"], "models/teacher.safetensors: holds a teacher, not"),
        (["photos", "--out", "e.npy", "--student", "there.npy"], "there.npy: is damaged, or BINGO did not write it (it has "),
        (["photos", "--out", "e.npy", "--student", "cut.safetensors"], "cut.safetensors: is damaged, or BINGO did not write it (its"),
        (["photos", "--out", "e.npy", "--student", "foreign.safetensors"], "foreign.safetensors: is damaged, or BINGO did not write it"),
        (["photos", "--out", "e.npy", "--student", "other.safetensors"], "other.safetensors: missing layer1.0.conv3.weight, "),
        (["photos", "--out", "e.npy", "--student", "unknown.safetensors"], "arch = resnet19: timm "),
        (["photos", "--out", "e.npy", "--student", "typed.safetensors"], "typed.safetensors: its tensors and metadata do not"),
        (["photos", "--out", "e.npy", "--student", "blind.safetensors"], "blind.safetensors: its tensors and metadata do not"),
        (["photos", "--out", "e.npy", "--student", "nan.safetensors"], "nan.safetensors: bn1.bias contain nan or inf"),
        (["photos", "--out", "e.npy", "--student", "x", "--teacher"], "--student = x: --teacher embeds with models/teacher"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(here, arguments, says):
    state = network(1).state_dict()
    (here / "empty/inside").mkdir(parents=True)
    (here / "leads-out").mkdir()
    (here / "leads-out/x.png").symlink_to(here / "photos/top.png")
    (here / "bytes").mkdir()
    (here / os.fsdecode(b"bytes/\xff.png")).write_bytes(b"")
    (here / "folder.npy").mkdir()
    (here / "there.npy").write_bytes(b"before")
    (here / "beside.txt").write_bytes(b"before")
    (here / "cut.safetensors").write_bytes(Path("models/student.safetensors").read_bytes()[:-9])

    safetensors.torch.save_file(state, "foreign.safetensors")
    save_network("other.safetensors", state, {**STUDENT, "arch": "resnet26d"})
    save_network("unknown.safetensors", state, {**STUDENT, "arch": "resnet19"})
    save_network("typed.safetensors", state, {**STUDENT, "arch": 18})
    save_network("blind.safetensors", state, {name: value for name, value in STUDENT.items() if name != "mean"})
    save_network("nan.safetensors", {**state, "bn1.bias": state["bn1.bias"] * torch.nan}, STUDENT)
    before = sorted(path.relative_to(here) for path in here.rglob("*"))
    code, out, err = bingo_embed(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {says}")
    assert err.count("\n") == 1
    assert sorted(path.relative_to(here) for path in here.rglob("*")) == before
    assert (here / "there.npy").read_bytes() == b"before"


@pytest.mark.parametrize("arguments", [["photos"], ["--out", "e.npy"], ["photos", "--out", "e.npy", "--batch-images", "0"]])
def test_missing_or_absurd_arguments_are_refused(here, arguments):
    assert bingo_embed(*arguments)[0] == 2
    assert not Path("e.npy").exists()
