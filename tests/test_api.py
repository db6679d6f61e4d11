"""from bingo import ...: the ten functions, their examples, bags as pictures, and a run without a shell."""

import base64
import doctest
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from workspace import ROOT

import bingo
from bingo.bags.index import read_bags
from bingo.images.images import write_images
from bingo.images.listing import read_listing
from bingo.nets.backbones import build_backbone
from bingo.nets.students import save_backbone
from bingo.params import ImageParams, NetworkParams, load_params, read_yaml
from bingo.runtime.errors import UserError
from bingo.teachers.teacher import save_teacher, teacher_metadata
from docs.tools import api
from tests.command import bingo as command
from tests.fabricated import make_workspace


def test_the_functions_are_those_of_the_docs_and_importing_the_package_imports_nothing_heavy():
    assert sorted(bingo.__all__) == sorted(api.ORDER)
    assert len(api.ORDER) == 10
    code = "import bingo, sys; print({'numpy', 'torch', 'pydantic', 'typer'} & set(sys.modules), set(bingo.__all__) <= set(dir(bingo)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set() True\n"
    with pytest.raises(AttributeError):
        _ = bingo.read_bags


@pytest.mark.parametrize("name", api.ORDER)
def test_the_examples_of_the_docs_return_what_they_show(name, reference, monkeypatch):
    monkeypatch.chdir(reference.root)
    function = getattr(bingo, name)
    assert function.__name__ == name
    (found,) = doctest.DocTestFinder(recurse=False).find(function, name)
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0


def pictures(html: str) -> list[Image.Image]:
    """The pictures in a page; the page must not refer to other files."""
    sources = re.findall(r'src="([^"]*)"', html)
    assert not [source for source in sources if not source.startswith("data:image/png;base64,")]
    return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB") for source in sources]


def test_bags_are_shown_as_pictures_and_contain_the_index(tmp_path, monkeypatch):
    make_workspace(tmp_path, name='a"><script>x')
    monkeypatch.chdir(tmp_path)
    bags, index = bingo.open_bags(), read_bags("data/bags.zarr", read_listing("data/listing.parquet"))
    assert [bag.row for bag in bags] == list(range(60)) == list(range(len(bags)))
    assert all(bag.members.tolist() == index.members(bag.row).tolist() for bag in bags)
    bag = bags[5]
    assert (bag.path, bag.label, bag.similarity.tolist()) == ('a"><script>x_0005.png', "cat", index.similarity(5).tolist())
    (shown,) = pictures(bag._repr_html_())
    whole = bag.picture()
    assert shown.size == whole.size
    assert np.abs(np.asarray(shown, float) - np.asarray(whole)).mean() < 4, "256 colours suffice"
    page = bags._repr_html_()
    assert len(pictures(page)) == 3
    assert len(page) < 300_000
    assert "<script>" not in page + bag._repr_html_()
    with pytest.raises(UserError, match="row 60"):
        _ = bags[60]


@pytest.mark.parametrize("files", [False, True])
def test_opened_files_are_read_after_the_process_changes_its_folder(tmp_path, tmp_path_factory, monkeypatch, files):
    """Pixels in the store, or files in a folder that is relative to the workspace."""
    listing = make_workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    pixels = bingo.open_images(listing, "data/images.zarr", None).images_NSS3
    params = load_params(ROOT / "params.yaml").dataset.model_copy(update={"source": "folder", "root": "photos"})
    if files:
        (tmp_path / "params.yaml").write_text("dataset:\n  source: folder\n  root: photos\n")
        for path, image_SS3 in zip(listing.paths, pixels, strict=True):
            (tmp_path / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image_SS3).save(tmp_path / "photos" / path)
        write_images("data/images.zarr", listing, None)
    opened = [(bingo.open_bags(), bingo.open_images(listing, "data/images.zarr", params)) for _ in range(2)]
    opened += [(bingo.open_bags("workspace"), opened[0][1])]
    embeddings = [bingo.read_embeddings("data/embeddings.zarr", listing) for _ in range(2)]

    def read(bags, images, stored):
        content = images.read(7) if files else images.images_NSS3[7].tobytes()
        return (
            bags[5].picture().tobytes(),
            bags._repr_html_(),
            bags.index.members(9).tolist(),
            bags.metrics,
            content,
            stored.features[:3].tolist(),
        )

    before = read(*opened[0], embeddings[0])
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    for bags, images in opened[1:]:
        assert read(bags, images, embeddings[1]) == before


def test_missing_bags_are_a_mistake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data/listing.parquet"):
        bingo.open_bags()


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Image files of several kinds, in the order of `bingo embed`; the current folder contains a student and a teacher."""
    random = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(random.integers(0, 4096, (16, 16), dtype=np.uint16)).save(folder / "b.png")  # 12 bits
    Image.fromarray(random.integers(0, 60, (9, 12), dtype=np.uint16)).save(folder / "c.png")
    Image.fromarray(random.integers(0, 256, (12, 12), dtype=np.uint8)).save(folder / "d.jpg")
    network = NetworkParams(arch="resnet18", width=0.125, stem="small")
    image = ImageParams(crop_px=12, resize_px=14, mean=[0.5] * 3, std=[0.25] * 3)
    backbone = build_backbone(network.arch, network.width, network.stem, 0)
    metadata = teacher_metadata(network, image, backbone, None, {"source": "random", "pretrained": False})
    save_backbone(tmp_path / "models/student.safetensors", backbone.state_dict(), network, image, {})
    save_teacher(tmp_path / "models/teacher.safetensors", backbone, None, metadata)
    monkeypatch.chdir(tmp_path)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("teacher", [False, True])
def test_embed_returns_what_the_command_writes(photos, tmp_path, teacher):
    network = bingo.load_teacher("models/teacher.safetensors") if teacher else bingo.load_student()
    assert command("embed", photos[0].parent, "--out", tmp_path / "x.parquet", *["--teacher"] * teacher).exit_code == 0
    written_ND = np.stack(pq.read_table(tmp_path / "x.parquet")["embedding"].to_numpy())
    np.testing.assert_array_equal(bingo.embed(network, photos), written_ND)
    np.testing.assert_allclose(bingo.embed(network, [photos[3], str(photos[1])], batch_images=1), written_ND[[3, 1]], rtol=1e-4, atol=1e-5)


def test_embed_names_every_file_that_cannot_be_read(photos, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    files = [photos[0], tmp_path / "broken.jpg", "absent.png"]
    with pytest.raises(UserError) as error:
        bingo.embed(bingo.load_student(), files)
    assert [str(file) in "".join(error.value.lines) for file in files] == [False, True, True]


@pytest.mark.parametrize("images", ["photos", Path("photos"), [], iter(()), None, 7, b"a.png", [b"a.png"], ["a.png", 3], [None]])
def test_embed_needs_files(photos, images):
    with pytest.raises(UserError, match="images = "):
        bingo.embed(bingo.load_student(), images)


@pytest.mark.parametrize("batch_images", [0, -1, 2.5, "8", None])
def test_embed_needs_a_batch_of_images(photos, batch_images):
    with pytest.raises(UserError, match="batch_images = "):
        bingo.embed(bingo.load_student(), photos, batch_images)


@pytest.mark.parametrize("network", ["models/student.safetensors", None])
def test_embed_needs_a_network(photos, network):
    with pytest.raises(UserError, match="network = "):
        bingo.embed(network, photos)


@pytest.mark.parametrize("kind", [tuple, iter, dict.fromkeys, lambda files: (str(file) for file in files), np.array])
def test_embed_accepts_any_iterable_of_files(photos, kind):
    student = bingo.load_student()
    np.testing.assert_array_equal(bingo.embed(student, kind([str(file) for file in photos])), bingo.embed(student, photos))


@pytest.fixture
def one_stage(workspace, monkeypatch):
    """A finished run whose dvc.yaml has only the stage `bag`; the current folder is another one."""
    root = workspace.root
    text = json.dumps({"stages": {"bag": read_yaml(ROOT / "dvc.yaml")["stages"]["bag"]}})
    (root / "dvc.yaml").write_text(text)
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    monkeypatch.chdir(root.parent)
    for name, value in {"BINGO_DEVICE": "cpu", "DVC_NO_ANALYTICS": "1"}.items():
        monkeypatch.setenv(name, value)
    return root


def test_run_pipeline_sets_parameters_runs_what_is_out_of_date_and_returns_the_figures(one_stage, capfd):
    results = bingo.run_pipeline(one_stage, bagging={"k": 3})
    assert "Running stage 'bag'" in capfd.readouterr().out
    assert results == json.loads((one_stage / "reports/results.json").read_text())
    assert load_params(one_stage / "params.yaml").bagging.k == 3
    assert read_bags(one_stage / "data/bags.zarr", read_listing(one_stage / "data/listing.parquet")).k == 3
    before = (one_stage / "params.yaml").read_bytes()
    with pytest.raises(UserError, match=r"bagging\.k"):
        bingo.run_pipeline(one_stage, bagging={"k": 0})
    assert (one_stage / "params.yaml").read_bytes() == before
    (one_stage / "data/embeddings.zarr/zarr.json").unlink()
    with pytest.raises(UserError, match=r"data/embeddings\.zarr"):
        bingo.run_pipeline(one_stage)
