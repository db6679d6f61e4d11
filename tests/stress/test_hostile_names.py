"""Folders and files named like HTML, from a scan to the report and the gallery in a real browser: shown as text, and nothing runs."""

import shutil
import subprocess
from pathlib import Path

import chromium
import numpy as np
import pytest
from PIL import Image

from bingo.bags.builders import build_knn
from bingo.bags.index import read_bags, write_bags
from bingo.datasets.sources import scan
from bingo.export.links import add_link
from bingo.export.measured import ExportFigures
from bingo.images.images import open_images, write_images
from bingo.images.listing import read_listing, write_listing
from bingo.params import DatasetParams, load_params, read_yaml
from bingo.report.inputs import Artefacts
from bingo.report.page import build_page
from tests.cli.test_browse import bingo_bags

ROOT = Path(__file__).parents[2]
CLASSES = ["<img src=x onerror=document.title='pwned'>", '"><svg onload=document.title="pwned">']
FILE = "' onmouseover='x' <iframe src=javascript:document.title='pwned'>&lt;{}.png"
pytestmark = pytest.mark.skipif(chromium.PATH is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Listing, images and bags of 24 images in two classes with such names, a report and a gallery."""
    root = tmp_path_factory.mktemp("hostile")
    random = np.random.default_rng(0)
    for split, images in (("train", 16), ("val", 8)):
        for number in range(images):
            folder = root / "images" / split / CLASSES[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / FILE.format(number))
    dataset = read_yaml(ROOT / "params.yaml")["dataset"] | {"source": "folder", "root": str(root / "images"), "store_px": 16}
    listing, pixels = scan(DatasetParams.model_validate(dataset | {"train_images": None, "test_images": None}), 0)
    write_listing(root / "data/listing.parquet", listing)
    write_images(root / "data/images.zarr", listing, pixels)
    bags = build_knn(random.standard_normal((16, 4)).astype(np.float16), 3)
    write_bags(root / "data/bags.zarr", bags, listing.fingerprint, "e")
    (root / "params.yaml").write_text("dataset:\n  root: null\n")
    patch = pytest.MonkeyPatch()
    patch.chdir(root)
    assert bingo_bags("gallery")[0] == 0
    patch.undo()
    read = read_listing(root / "data/listing.parquet")
    images, index = open_images(read, root / "data/images.zarr", None), read_bags(root / "data/bags.zarr", read)
    params = load_params(ROOT / "params.yaml")
    (root / "report.html").write_text(build_page(Artefacts(params=params, params_text=FILE, listing=read, images=images, bags=index)))
    patch.chdir(root)
    (root / "net.safetensors").write_bytes(b"")
    for name in ("javascript:pwned", FILE.format(0)):
        (root / name).write_bytes(b"")
        add_link(Path(name), Path(name), FILE, Path("net.safetensors"), ExportFigures([("bytes", "", FILE)], ""))
    patch.undo()
    shutil.move(root / "reports/exports.js", root / "exports.js")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("page", ["report.html", ".bingo/gallery/index.html"])
def test_names_are_text_in_a_browser(workspace, tmp_path, page):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=10000", "--dump-dom"]
    command = [str(chromium.PATH), *flags, (workspace / page).as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    title = dom.partition("<title>")[2].partition("</title>")[0]
    assert title
    assert "pwned" not in title
    assert "&lt;img src=x onerror=document.title='pwned'&gt;" in dom  # as text it is there
    for tag in ('<img src="x"', "<svg onload", "<iframe", '" onload=', '" onerror=', '" onmouseover='):
        assert tag not in dom, tag
    if page == "report.html":
        assert 'href="../javascript%3Apwned"' in dom
        assert dom.count(">model card</a>") == 2
