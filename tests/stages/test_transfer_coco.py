"""transfer_coco as run by a user: the same bytes after kills, figures in the files that others read, one line for every error."""

import csv
import json
import shutil
import signal
import subprocess
import sys

import pytest
from coco_data import CATEGORIES, make_split, write
from safetensors.torch import load_file
from torch import nn
from workspace import ROOT, Workspace, environment, new_workspace, saved_step, until

from bingo.nets.backbones import build_backbone
from bingo.nets.checkpoint import load_network, weights_sha256
from bingo.nets.students import save_student
from bingo.params import load_params

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
STUDENT = {"student.arch": "resnet18", "student.width": 0.125, "student.stem": "imagenet"}
SHORT = STUDENT | {
    "transfer_coco.runs": ["c4-short"],
    "transfer_coco.root": "coco",
    "transfer_coco.train_images": "train",
    "transfer_coco.train_annotations": "annotations/instances_train.json",
    "transfer_coco.val_images": "val",
    "transfer_coco.val_annotations": "annotations/instances_val.json",
    "transfer_coco.schedules": {"short": [4, 5]},
    "transfer_coco.batch_images": 2,
    "transfer_coco.lr_warmup_steps": 2,
    "transfer_coco.min_side_px": [64],
    "transfer_coco.max_side_px": 128,
    "transfer_coco.test_min_side_px": 64,
}
STAGE = "transfer_coco c4-short"
ALONE = {"LOCAL_WORLD_SIZE": "99"}  # leaves no share of the processors for workers, which would take most of the time to start
OUTPUTS = ("models/detectors/c4-short.safetensors", "reports/coco/c4-short.json", "reports/plots/coco-c4-short.csv")


@pytest.fixture(scope="module")
def made(tmp_path_factory, stages) -> Workspace:
    """A student and a small COCO; the stage has not run."""
    workspace = new_workspace(tmp_path_factory.mktemp("made") / "bingo", stages, SHORT)
    for name, images, seed in (("train", 5, 0), ("val", 2, 1)):
        make_split(workspace.root / "coco", name, images, seed)
    params = load_params(workspace.root / "params.yaml")
    backbone = build_backbone("resnet18", 0.125, "imagenet", 0)
    files = (workspace.root / "models/student.safetensors", workspace.root / "models/student_head.safetensors")
    save_student(*files, backbone, nn.Identity(), params.student, params.image, {})
    return workspace


@pytest.fixture(scope="module")
def reference(made) -> dict[str, bytes]:
    """The outputs of an uninterrupted run."""
    done = made.done(STAGE, **ALONE)
    assert "transfer_coco-c4-short: 5 training images; left out: 0 images without targets, 0 crowds" in done.out
    assert "transfer_coco-c4-short: box: AP: " in done.out
    inside = weights_sha256(load_file(made.root / "models/student.safetensors"))  # of the detector before the first step, too
    assert f"transfer_coco-c4-short: starts from the student's weights, sha256 {inside}" in done.out
    return made.files(*OUTPUTS)


@pytest.fixture
def workspace(tmp_path, stages, made) -> Workspace:
    """A copy in which the stage has not run."""
    shutil.copytree(made.root, tmp_path / "bingo", symlinks=True, ignore=shutil.ignore_patterns("detectors", "reports", ".bingo"))
    return Workspace(tmp_path / "bingo", stages)


def test_the_outputs_can_be_read_by_their_users(made, reference):
    scores = json.loads(reference[OUTPUTS[1]])
    measures = {"AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"}
    assert {kind: set(figures) for kind, figures in scores.items()} == {"box": measures, "mask": measures}
    records = list(csv.DictReader(reference[OUTPUTS[2]].decode().splitlines()))
    assert [record["step"] for record in records] == ["1", "2", "3", "4", "5"]
    rates = [float(record["lr"]) / 0.02 for record in records]
    assert rates == pytest.approx([0.001, 0.5005, 1, 1, 0.1])
    state, metadata = load_network(made.root / OUTPUTS[0])
    assert state["backbone.conv1.weight"].shape == (8, 3, 7, 7)
    assert state["roi_heads.box_predictor.cls_score.weight"].shape[0] == len(CATEGORIES) + 1
    assert (metadata["kind"], metadata["run"], metadata["category_ids"]) == ("detector", "c4-short", CATEGORIES)
    assert str(made.root) not in json.dumps(metadata)
    assert metadata["student"]["weights_sha256"] == weights_sha256(load_file(made.root / "models/student.safetensors"))


def test_a_killed_run_resumes_and_ends_with_the_same_bytes(workspace, reference):
    for step in (1, 3):
        running = workspace.start(STAGE, **ALONE, BINGO_CHECKPOINT_SECONDS="0")
        until(lambda step=step: saved_step(workspace, "transfer_coco-c4-short") >= step, running.ended)
        done = running.kill()
        assert (done.status, done.err) == (-signal.SIGKILL, "")
        assert not workspace.existing_files(*OUTPUTS)
    assert "transfer_coco-c4-short: resuming from a checkpoint" in workspace.done(STAGE, **ALONE).out
    assert workspace.files(*OUTPUTS) == reference
    assert not list((workspace.root / ".bingo/state").glob("*/*"))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"student.width": 0.25}, "models/student.safetensors: student.width = 0.25, this network has 0.125; run the stage"),
        ({"transfer_coco.root": None}, "root: null, but transfer_coco.runs needs the folder of COCO; set transfer_coco.root"),
        ({"transfer_coco.root": "cocoo"}, "transfer_coco.train_annotations = cocoo/annotations/instances_train.json: cannot be read"),
        ({"transfer_coco.runs": ["fpn-3x"]}, "runs: 'fpn-3x', allowed are fpn-short, c4-short"),
        ({"transfer_coco.runs": ["fpn-short"]}, "transfer_coco.runs has no c4-short: allowed are fpn-short; did you mean"),
        ({"transfer_coco.schedules": {"short": [5, 4]}}, "short: [5, 4], allowed are increasing steps"),
        ({"transfer_coco.max_side_px": 60}, "max_side_px: 60 is less than the short side 64"),
        ({"transfer_coco.batch_images": 6}, "transfer_coco.batch_images = 6: there are only 5 images with usable instances; lower it"),
        ({"transfer_coco.lr": 1e6, "transfer_coco.lr_warmup_steps": 0}, "transfer_coco-c4-short: the loss is "),
        ({"transfer_coco.val_images": "vall"}, "transfer_coco.val_annotations: images that it lists do not exist: "),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_a_mistake_is_one_line(workspace, changes, wanted):
    workspace.edit(changes)
    done = workspace.run(STAGE, **ALONE)
    assert done.status == 2, done
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert wanted in line
    assert not workspace.existing_files(*OUTPUTS)


def test_categories_of_two_datasets_are_refused(workspace):
    content = json.loads((workspace.root / "coco/annotations/instances_val.json").read_text())
    content["categories"].append({"id": 91, "name": "other"})
    write(workspace.root / "coco", "val", content)
    done = workspace.run(STAGE, **ALONE)
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert "its categories are not those of transfer_coco.train_annotations" in done.err


def test_annotations_with_only_crowds_are_refused_before_the_training(workspace):
    for split in ("train", "val"):
        content = json.loads((workspace.root / f"coco/annotations/instances_{split}.json").read_text())
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 1
        write(workspace.root / "coco", split, content)
        done = workspace.run(STAGE, **ALONE)
        assert (done.status, len(done.err.splitlines())) == (2, 1)
        assert f"transfer_coco.{split}_annotations: " in done.err


def test_the_stage_is_in_the_pipeline_only_if_it_is_requested(made):
    command = [sys.executable, "-m", "dvc"]
    subprocess.run([*command, "init", "--no-scm", "--quiet"], cwd=made.root, env=environment(), check=True)
    listed = subprocess.run([*command, "stage", "list"], cwd=made.root, env=environment(), check=True, capture_output=True, text=True)
    assert [line.split()[0] for line in listed.stdout.splitlines() if "coco" in line] == ["transfer_coco@c4-short"]
    assert load_params(ROOT / "params.yaml").transfer_coco.runs == []


def test_the_command_exists():
    from bingo.cli.main import STAGES

    assert "transfer_coco" in STAGES  # tests/test_house.py checks that --help lists them all


def test_the_state_does_not_depend_on_the_folder_of_coco():
    """It depends on the hashes of the annotations instead."""
    from stages.transfer_coco import WHERE

    section = load_params(ROOT / "params.yaml").transfer_coco
    assert {name for name, value in section.model_dump().items() if isinstance(value, str | None) and name != "precision"} | {
        "runs"
    } == set(WHERE)
