"""params.yaml: complete, strict, and quick to report errors."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from bingo.params import load_params, method_names, read_yaml, validate
from bingo.runtime.errors import UserError

PARAMS = Path(__file__).parent.parent / "params.yaml"

SPLIT = {"percent": 1.0, "list_file": None, "trunk_lr": 0.02, "head_lr": 5.0, "linear_lr": 3.0}
PHOTOS = {"source": "folder", "root": "photos", "store_px": None, "train_images": None, "test_images": None}


def changed(key: str, value) -> dict:
    """The shipped parameters with one dotted key changed, or removed if the value is Ellipsis."""
    raw = read_yaml(PARAMS)
    *parents, last = key.split(".")
    section = raw
    for name in parents:
        section = section[name]
    if value is ...:
        del section[last]
    else:
        section[last] = value
    return raw


def mistakes(raw) -> list[str]:
    with pytest.raises(UserError) as caught:
        validate(raw, "params.yaml")
    return caught.value.lines


def test_the_shipped_file_is_valid_and_frozen():
    params = load_params(PARAMS)
    assert params.bagging.k == read_yaml(PARAMS)["bagging"]["k"]
    with pytest.raises(ValueError, match="frozen"):
        params.bagging.k = 7


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bagging.k", "five", ["bagging.k = 'five'", "whole number"]),
        ("bagging.k", 0, ["bagging.k = 0", "at least 1"]),
        ("bagging.kk", 3, ["bagging.kk", "not a known key", "did you mean k"]),
        ("bagging.k", ..., ["bagging.k is missing"]),
        ("bagging.method", "knnn", ["bagging.method = 'knnn'", "'knn', 'kmeans' or 'label'"]),
        ("bagging.search", "hnsw", ["bagging.search = 'hnsw'", "'exact', 'ivf' or 'cuvs'"]),
        ("bagging.lists", 0, ["bagging.lists = 0", "at least 1"]),
        ("bagging.probes", None, ["bagging.probes = None", "whole number"]),
        ("distill.lr", float("nan"), ["distill.lr = nan", "finite"]),
        ("distill.method", "bing", ["distill.method = 'bing'", "did you mean bingo"]),
        ("student.arch", "resnet81", ["student.arch = 'resnet81'", "did you mean", "resnet18"]),
        ("student.arch", "torchvision/resnet19", ["did you mean", "torchvision/resnet18"]),
        ("baselines", ["bingo"], ["baselines", "'bingo'", "without a teacher", "moco"]),
        ("teacher.pretrain.moco.temprature", 0.1, ["teacher.pretrain.moco.temprature", "did you mean temperature"]),
        ("teacher.source", "checkpoint", ["teacher", "set teacher.checkpoint"]),
        ("dataset.source", "folder", ["dataset", "set dataset.root"]),
        ("image.crop_px", 21, ["image", "lower image.crop_px"]),
        ("knn_eval.resize_px", 15, ["knn_eval.resize_px: 15 is less than image.crop_px 16", "set it to 16 or more"]),
        ("distill.lr_warmup_epochs", 99, ["distill", "lr_warmup_epochs: 99 plus hold_epochs: 0 must be less than epochs, 5"]),
        (
            "distill",
            {**read_yaml(PARAMS)["distill"], "keep_best": True, "probe_every_epochs": 0},
            ["keep_best: true", "probe_every_epochs is 0"],
        ),
        ("distill.accumulate_steps", 3, ["distill", "accumulate_steps: 3", "batch_anchors 64"]),
        (
            "distill",
            {**read_yaml(PARAMS)["distill"], "accumulate_steps": 4, "batchnorm_groups": 2},
            ["batchnorm_groups: 2, allowed for batch_anchors 64 and accumulate_steps 4 are 4, 8, 16"],
        ),
        (
            "distill",
            {**read_yaml(PARAMS)["distill"], "accumulate_steps": 2, "compile": "reduce-overhead"},
            ["accumulate_steps: 2", "compile: reduce-overhead", "set compile: default"],
        ),
        ("distill.hold_epochs", 4, ["distill", "lr_warmup_epochs: 1 plus hold_epochs: 4 must be less than epochs, 5"]),
        ("linear_eval.cached.hold_epochs", 60, ["linear_eval.cached", "hold_epochs: 60 must be less than epochs, 60"]),
        ("distill.drop_epochs", [3, 2], ["distill", "drop_epochs: [3, 2], allowed are increasing epochs from 1 to 4"]),
        ("distill.drop_epochs", [2, 2], ["distill", "drop_epochs: [2, 2], allowed"]),
        ("teacher.pretrain.drop_epochs", [12, 36], ["teacher.pretrain", "allowed are increasing epochs from 1 to 35", "null: a cosine"]),
        ("linear_eval.crops.drop_epochs", [0], ["linear_eval.crops", "drop_epochs: [0], allowed are increasing epochs from 1 to 9"]),
        ("semi_eval.finetune.epochs", 12, ["semi_eval.finetune", "drop_epochs: [12, 16], allowed are increasing epochs from 1 to 11"]),
        ("transfer.finetune.drop_factor", 1.0, ["transfer.finetune", "drop_factor: 1.0 drops nothing at the epochs [12, 16]"]),
        ("transfer.finetune.drop_factor", 0.0, ["transfer.finetune.drop_factor = 0.0", "greater than 0"]),
        ("transfer.linear.hold_epochs", 2, ["transfer.linear", "hold_epochs: 2 is for a cosine, but drop_epochs is []"]),
        ("distill.drop_epochs", 2, ["distill.drop_epochs = 2", "list"]),
        ("bagging", 3, ["bagging"]),
        ("transfer_coco.runs", ["fpn-1x"], ["transfer_coco", "root: null", "set transfer_coco.root"]),
        ("transfer_coco.runs", ["fnp-1x"], ["'fnp-1x'", "fpn-1x, fpn-2x, c4-1x, c4-2x", "did you mean fpn-1x"]),
        ("transfer_coco.runs", ["c4-1x", "c4-1x"], ["names a run twice"]),
        ("transfer_coco.schedules", {"1-x": [5]}, ["'1-x'", "letters, digits and _"]),
        ("transfer_coco.schedules", {"1x": [5, 5]}, ["increasing steps"]),
        ("transfer_coco.min_side_px", [800, 1400], ["max_side_px: 1333 is less than the short side 1400"]),
        ("semi_eval.splits", {"1 %": SPLIT}, ["semi_eval.splits.1 %", "lowercase letters, digits and _", "such as percent_10"]),
        ("semi_eval.splits", {"none": {**SPLIT, "percent": 0.0}}, ["semi_eval.splits.none.percent = 0.0", "greater than 0"]),
        ("semi_eval.splits", {"one": {**SPLIT, "list": None}}, ["semi_eval.splits.one.list is not a known key; did you mean list_file?"]),
        ("semi_eval.nets", ["teacher"], ["semi_eval.nets: 'teacher' is not a network, allowed are student, moco, untrained"]),
        ("semi_eval.nets", ["ema"], ["semi_eval.nets: 'ema' is not", "set distill.student_ema"]),
        ("transfer.nets", ["student", "start"], ["transfer.nets: 'start' is not", "set student.weights"]),
        ("image.std", [0.5, 0.5], ["image.std = [0.5, 0.5]: allowed are at least 3 items"]),
        ("transfer.datasets", {"photos": {**PHOTOS, "root": None}}, ["transfer.datasets.photos.", "set transfer.datasets.photos.root"]),
        ("transfer.datasets", {"photos": {**PHOTOS, "source": "svhn"}}, ["transfer.datasets.photos.source = 'svhn'", "'cifar100'"]),
        ("transfer.protocols", ["linear"], ["transfer.protocols.0 = 'linear'", "'linear_resized', 'linear_native' or 'finetune'"]),
        ("transfer.protocols", [], ["transfer.protocols = []", "at least 1"]),
    ],
)
def test_a_mistake_names_key_value_and_what_is_allowed(key, value, said):
    (line,) = mistakes(changed(key, value))
    assert all(words in line for words in said), line
    assert "\n" not in line


@pytest.mark.parametrize(("key", "value"), [("search", "ivf"), ("mutual", True)])
@pytest.mark.parametrize("method", ["kmeans", "label"])
def test_groups_have_no_neighbours_to_search_for(method, key, value):
    raw = changed("bagging.method", method)
    raw["bagging"][key] = value
    (line,) = mistakes(raw)
    assert line.startswith(f"params.yaml: bagging: {key}: {str(value).lower()}, but bags by {method} ")
    assert f"; set bagging.{key}: " in line


def test_all_mistakes_are_reported_together():
    raw = changed("bagging.k", "five")
    raw["distill"]["lr"] = -1.0
    del raw["seed"]
    assert len(mistakes(raw)) == 3


def test_a_float_as_dvc_writes_it_is_a_float(tmp_path):
    (tmp_path / "params.yaml").write_text(PARAMS.read_text().replace("weight_decay: 1.0e-4", "weight_decay: 1e-05"))
    assert load_params(tmp_path / "params.yaml").distill.weight_decay == 1e-5


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "", "\x00"])
def test_a_file_that_is_not_a_mapping_is_an_error_in_one_line(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_params(tmp_path / "params.yaml")
    assert len(caught.value.lines) == 1


def test_every_method_has_a_file_a_section_and_values_in_the_shipped_parameters():
    sources = (PARAMS.parent / "bingo/methods").glob("*.py")
    files = {path.stem for path in sources if "\nbuild = " in path.read_text()}
    assert set(method_names()) == files == set(read_yaml(PARAMS)["methods"])


@pytest.mark.slow
def test_mypy_refuses_a_parameter_that_params_yaml_does_not_have(tmp_path):
    keys = {"distill.epochs": True, "distill.epoch": False, "methods.bingo.terms": True, "methods.bingo.queue_rows": False}
    keys |= {"teacher.pretrain.moco.queue_rows": True, "teacher.pretrain.moco.terms": False, "trasfer": False}
    reads = [f"    params.{key}" for key in keys]
    (tmp_path / "reads.py").write_text("\n".join(["from bingo.params import Params", "def read(params: Params) -> None:", *reads]))
    command = [sys.executable, "-m", "mypy", "--config-file", PARAMS.parent / "pyproject.toml", "--no-pretty", tmp_path / "reads.py"]
    said = subprocess.run(command, cwd=PARAMS.parent, capture_output=True, text=True).stdout
    refused = {int(line.split(":")[1]) for line in said.splitlines() if "has no attribute" in line}
    assert refused == {number for number, known in enumerate(keys.values(), 3) if not known}, said


def test_a_mistake_is_reported_before_any_heavy_import(tmp_path):
    (tmp_path / "params.yaml").write_text(PARAMS.read_text().replace("arch: resnet10t", "arch: resnt10t"))
    code = "import sys, stages.distill as d\ntry:\n d.main()\nfinally:\n print('torch' in sys.modules, 'timm' in sys.modules)"
    begun = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(PARAMS.parent)}, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout.split() == ["False", "False"], f"{run.stdout}{run.stderr} after {time.monotonic() - begun:.1f} s"
    assert "Traceback" not in run.stderr
    assert run.stderr.count("resnt10t") == 2
