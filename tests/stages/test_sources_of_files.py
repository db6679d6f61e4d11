"""Photographs in a folder, in shards and in a saved dataset: the same bytes of every output except the places of the images."""

import json
from pathlib import Path

import pytest

from tests.datasets.test_saved import save_split
from tests.datasets.test_shards import pack, relative
from tests.datasets.test_sources import photo
from tests.workspace import new_workspace

ALL = ("scan", "teacher", "extract", "bag", "weights", "distill", "linear_eval", "knn_eval", "report")
# Photographs that the loader's workers decode on every access.
CHANGES = {
    "baselines": [],
    "dataset.store_px": None,
    "dataset.train_images": 24,
    "dataset.test_images": None,
    "image.crop_px": 32,
    "image.resize_px": 36,
    "teacher.source": "random",
    "extract.views": 2,
    "bagging.k": 3,
    "distill.epochs": 2,
    "distill.batch_anchors": 8,
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """30 train and 8 val images of two classes, with the dimensions of COCO's images divided by four."""
    root = tmp_path_factory.mktemp("photographs") / "images"
    for number in range(38):
        place = root / ("train" if number < 30 else "val") / ("cat", "dog")[number % 2] / f"{number:012d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        photo(number, *((160, 120), (120, 160), (160, 107))[number % 3]).save(place, quality=90)
    return root


def test_every_output_has_the_same_bytes(photographs, tmp_path, stages):
    for part in ("train", "val"):
        for number in range(2):
            pack(tmp_path / f"shards/{part}-{number:03d}.tar", dict(list(relative(photographs, part).items())[number::2]))
        files = list(relative(photographs, part).values())
        save_split(tmp_path / "saved" / part, files, [file.parent.name for file in files], ["dog", "cat"])
    (tmp_path / "saved/dataset_dict.json").write_text(json.dumps({"splits": ["train", "val"]}))
    roots = {"folder": photographs, "webdataset": f"{tmp_path}/shards/{{train,val}}-{{000..001}}.tar", "huggingface": tmp_path / "saved"}
    made = {}
    for source, root in roots.items():
        workspace = new_workspace(tmp_path / source, stages, CHANGES | {"dataset.source": source, "dataset.root": str(root)})
        for stage in ALL if source != "huggingface" else ALL[:1]:
            workspace.done(stage)
        made[source] = {path: content for path, content in workspace.existing_files().items() if not path.startswith("data/images.zarr")}
    assert {"data/listing.parquet", "models/student.safetensors", "data/bags.zarr/zarr.json"} <= made["folder"].keys()
    assert "reports/results.json" in made["folder"]
    for source in ("webdataset", "huggingface"):
        assert {path for path, content in made[source].items() if content != made["folder"][path]} <= {
            "reports/index.html"
        }  # it contains parameters
    assert made["webdataset"].keys() == made["folder"].keys()
