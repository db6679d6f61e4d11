"""dvc.yaml lists the parameters that a stage reads, as it does the files that it imports: every stage is run, and its reads are recorded.

A stage reads no key that it does not list. The opposite would need runs with all settings, so the rule is: for each entry in `params:`, a
key or a section, some run of that stage and item has read part of it.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import test_transfer_coco
import torch
from coco_data import make_split
from PIL import Image
from test_pipeline import INFRASTRUCTURE, STAGES, definition
from torch import nn
from workspace import ROOT, Stages, Workspace, new_workspace

from bingo.nets.backbones import build_backbone
from bingo.nets.students import save_student
from bingo.params import load_params, read_yaml
from tests.stages.test_downstream import TUNE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="starts stages by tests/stage_server.py")
SHORT = {
    "dataset.train_images": 200,
    "dataset.test_images": 50,
    "teacher.pretrain.batch_anchors": 64,
    "distill.batch_anchors": 64,
    "distill.student_ema": 0.9,
    "semi_eval.splits": {"half": {"percent": 50.0, "list_file": None, "trunk_lr": 0.05, "head_lr": 0.2, "linear_lr": 1.0}},
    "semi_eval.finetune": {**TUNE, "epochs": 1},
    "semi_eval.linear": {**TUNE, "epochs": 1},
    "transfer.datasets": {"other": {"source": "digits", "root": None, "store_px": 16, "train_images": 40, "test_images": 20}},
    "transfer.linear": {**TUNE, "epochs": 1, "lr": 1.0},
    "transfer.finetune": {**TUNE, "epochs": 1, "trunk_lr": 0.05, "head_lr": 0.2},
    "transfer.resized_px": 24,
}
# These say where images are. Their content and decoder are in data/listing.parquet, a dependency of all stages that open images.
PLACES = {"dataset.root", "dataset.follow_links", "dataset.jpeg_decoder"}
# Sections are not infrastructure here: reads by their own functions after loading count as reads by a stage.
NO_READERS = {file for file in INFRASTRUCTURE if not file.startswith("bingo/params/") or file.endswith("limits.py")}
PARAMS = read_yaml(ROOT / "params.yaml")
FOR_FILES = {*PLACES, "dataset.check", "dataset.on_bad_image", "dataset.image_column", "dataset.label_column"}
NETS = ("student", "ema", "untrained", "start", "supervised", "teacher", "pixels")


@dataclass(frozen=True)
class Command:
    """A stage of dvc.yaml or one of its items, with additional settings for running it."""

    stage: str
    item: str = ""
    settings: tuple[dict[str, Any], ...] = field(default=({},))
    workspace: str = "main"

    def __str__(self) -> str:
        return f"{self.stage}@{self.item}" if self.item else self.stage

    @property
    def label(self) -> str:
        """The name in pytest."""
        return str(self) if self.workspace == "main" else f"{self}, {self.workspace}"


COMMANDS = [
    Command("scan"),
    Command("teacher"),
    Command("extract"),
    Command("weights", settings=({"student.weights": "start.pth", "supervised": "start.pth"},)),
    Command("baseline", "moco"),
    Command("bag", settings=({"bagging.relation": "baselines/moco"}, {"bagging.method": "kmeans"}, {})),
    Command("distill", settings=({"distill.keys": "live", "distill.method": "seed"}, {})),
    *(Command(f"{evaluation}_eval", net) for evaluation in ("linear", "knn") for net in NETS),
    *(Command(f"{evaluation}_eval_baseline", "moco") for evaluation in ("linear", "knn")),
    Command("semi_eval", "half", ({"semi_eval.nets": ["student", "untrained", "moco"]},)),
    Command("transfer_cifar", "other"),
    Command("report"),
    Command("transfer_coco", "c4-short", workspace="coco"),
    Command("scan", workspace="files"),
    Command("knn_eval", "untrained", workspace="files"),
]


def entries(command: Command, params: dict[str, Any]) -> set[str]:
    """The keys and sections that dvc.yaml lists for a stage or an item, with its names filled in."""
    stage, item = STAGES[command.stage], command.item
    held = stage["foreach"][item] if isinstance(stage.get("foreach"), dict) else item

    def named(match: re.Match) -> str:
        name = match[1]
        if name in ("key", "item"):
            return item
        value = held if name.startswith("item.") else params
        for part in name.removeprefix("item.").split("."):
            value = value[part]
        return value

    listed = definition(command.stage)["params"]
    if {"params.yaml": None} in listed:
        return set(params)
    return {re.sub(r"\$\{(.+?)\}", named, entry) for entry in listed}


def covers(entry: str, key: str) -> bool:
    return f"{key}.".startswith(f"{entry}.")


def coco(root: Path, stages: Stages) -> Workspace:
    """A workspace with a student and a small COCO."""
    workspace = new_workspace(root / "coco", stages, test_transfer_coco.SHORT)
    for name, images in (("train", 3), ("val", 2)):
        make_split(workspace.root / "coco", name, images, images)
    params = load_params(workspace.root / "params.yaml")
    networks = (workspace.root / "models/student.safetensors", workspace.root / "models/student_head.safetensors")
    save_student(*networks, build_backbone("resnet18", 0.125, "imagenet", 0), nn.Identity(), params.student, params.image, {})
    return workspace


def files(root: Path, stages: Stages) -> Workspace:
    """A workspace with images that are decoded on access."""
    changes = {"dataset.source": "folder", "dataset.root": "images", "dataset.store_px": None, "dataset.train_images": None}
    changes |= {
        "dataset.test_images": None,
        "teacher.pretrain.batch_anchors": 8,
        "distill.batch_anchors": 8,
        "knn_eval.k": [1],
        "knn_eval.agreement_k": [],
    }
    workspace = new_workspace(root / "files", stages, changes)
    for i in range(24):
        folder = workspace.root / "images" / ("train" if i < 16 else "val") / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (10 * i, 100 * (i % 2), 50)).save(folder / f"{i}.png")
    return workspace


class Runs:
    """Runs commands, and keeps pairs of listed and read keys for each."""

    def __init__(self, root: Path, stages: Stages):
        self.workspaces = {"main": new_workspace(root / "main", stages, SHORT), "coco": coco(root, stages), "files": files(root, stages)}
        student = load_params(self.workspaces["main"].root / "params.yaml").student
        network = build_backbone(student.arch, student.width, student.stem, 0)
        torch.save(network.state_dict(), self.workspaces["main"].root / "start.pth")
        self.found = {}
        for command in COMMANDS:
            self.found[command.label] = [self._run(command, changes) for changes in command.settings]

    def _run(self, command: Command, changes: dict[str, Any]) -> tuple[set[str], set[str]]:
        workspace = self.workspaces[command.workspace]
        usual = (workspace.root / "params.yaml").read_text()
        workspace.edit(changes)
        log = workspace.root / "reads"
        log.unlink(missing_ok=True)
        module = f"stages.{command.stage.removesuffix('_baseline')} {command}" if command.item else f"stages.{command.stage}"
        done = workspace.stages.start_module(f"recorder {log} {module}", workspace.root, LOCAL_WORLD_SIZE="99").wait()
        assert done.status == 0, f"{command}: {done}"
        listed = entries(command, read_yaml(workspace.root / "params.yaml"))
        (workspace.root / "params.yaml").write_text(usual)
        pairs = [line.split("\t") for line in log.read_text().splitlines()]
        return listed, {key for key, file in pairs if file not in NO_READERS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, stages) -> Runs:
    return Runs(tmp_path_factory.mktemp("declared"), stages)


def test_every_stage_and_its_items_are_run():
    assert {command.stage for command in COMMANDS} == set(STAGES)
    for stage in STAGES:
        if isinstance(items := STAGES[stage].get("foreach"), dict):
            assert {command.item for command in COMMANDS if command.stage == stage} == set(items)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.label)
def test_a_stage_lists_each_parameter_that_it_reads(runs, command):
    for listed, read in runs.found[command.label]:
        assert read, "nothing was recorded"
        undeclared = {key for key in read if not any(covers(entry, key) for entry in listed)}
        if "data/listing.parquet" in definition(command.stage)["deps"]:
            undeclared -= PLACES
        if isinstance(named_in := STAGES[command.stage].get("foreach"), str):
            undeclared -= {named_in.strip("${}")}  # dvc.yaml gets the items from it, so that a stage finds its own item there
        assert not undeclared, f"{command}: add {sorted(undeclared)} to its params in dvc.yaml"


DECIDED = [command for command in COMMANDS if command.stage != "report" and command.workspace != "files"]


@pytest.mark.parametrize("command", DECIDED, ids=str)
def test_a_stage_reads_part_of_each_entry_that_it_lists(runs, command):
    listed = set.union(*(listed for listed, _ in runs.found[command.label]))
    read = set.union(*(read for _, read in runs.found[command.label]))
    idle = {entry for entry in listed if not any(covers(entry, key) for key in read)}
    assert not idle, f"{command}: remove {sorted(idle)} from its params in dvc.yaml"


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("knn_eval@teacher", ["knn_eval.agreement_k", "knn_eval.k", "knn_eval.temperature"]),
        ("linear_eval@pixels", ["seed", *(f"linear_eval.cached.{key}" for key in PARAMS["linear_eval"]["cached"] if key != "drop_factor")]),
        ("scan", ["seed", *(key for key in (f"dataset.{name}" for name in PARAMS["dataset"]) if key not in FOR_FILES)]),
        ("knn_eval@untrained, files", ["dataset.root", "dataset.follow_links", "seed"]),
    ],
)
def test_the_recorded_reads_of_some_stages(runs, command, wanted):
    """Checks the recording against the code: it is complete, and does not include the record of a run, which contains all parameters."""
    ((_, read),) = runs.found[command]
    if command.endswith("files"):
        read &= {*wanted, "baselines", "distill.precision", "dataset.source"}
    assert read == set(wanted)
