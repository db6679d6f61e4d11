"""semi_eval and transfer_cifar as run by a user: only a student's file is needed, the same bytes after kills, errors in one line."""

import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from workspace import Workspace, new_workspace, until

from bingo.evals.finetune import ClassifierTrainer, Protocol, Task, random_crops
from bingo.evals.transfer import protocols, scanned
from bingo.images.images import open_images
from bingo.images.listing import read_listing
from bingo.nets.backbones import build_backbone
from bingo.nets.students import save_student
from bingo.params import PLAIN_SGD, TuneParams, load_params
from bingo.pipeline.run import Run
from bingo.runtime.checkpoints import Checkpoints
from bingo.runtime.errors import UserError
from stages.transfer_cifar import judge_dataset

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
SPLIT = {"percent": 10.0, "list_file": None, "trunk_lr": 0.05, "head_lr": 0.2, "linear_lr": 1.0}
TUNE = {
    **PLAIN_SGD,
    "epochs": 4, "batch_images": 16, "weight_decay": 0.0, "nesterov": False, "drop_epochs": None, "drop_factor": 0.1, "hold_epochs": 0,
    "init_std": 0.01,
}  # fmt: skip
CIFAR = {"source": "cifar10", "root": "cifar", "store_px": 32, "train_images": None, "test_images": None}
DIGITS = {"source": "digits", "root": None, "store_px": 24, "train_images": 40, "test_images": 20}
CHANGES = {
    "dataset.train_images": 800,
    "dataset.test_images": 100,
    "semi_eval.splits": {"percent_10": SPLIT},
    "semi_eval.finetune": TUNE,
    "semi_eval.linear": TUNE,
    "transfer.linear": {**TUNE, "lr": 1.0},
    "transfer.finetune": {**TUNE, "trunk_lr": 0.05, "head_lr": 0.2},
    "transfer.resized_px": 40,
    "transfer.protocols": ["linear_resized", "linear_native", "finetune"],
    "transfer.nets": ["student"],
    "semi_eval.nets": ["student", "untrained"],
}


def train_student(root: Path) -> None:
    """A student's file, from a training with all labels; what it says about its origin does not matter here."""
    params, listing = load_params(root / "params.yaml"), read_listing(root / "data/listing.parquet")
    network, rows = params.student, np.arange(len(listing))
    backbone = build_backbone(network.arch, network.width, network.stem, 0)
    images, test_rows = open_images(listing, root / "data/images.zarr", None), rows[listing.train_rows :]
    task = Task(images, listing.labels_N, rows[: listing.train_rows], test_rows, 10, params.image, random_crops([0.6, 1.0], 0.0))
    tune = TuneParams.model_validate({**TUNE, "epochs": 10, "batch_images": 64})
    state = Checkpoints(root / "state"), "student"
    trainer = ClassifierTrainer(backbone, Protocol(task, tune, 0.2, 0.1), "fp32", 0, torch.device("cpu"), *state)
    trainer.run()
    student = trainer.classifier.backbone
    files = root / "models/student.safetensors", root / "models/head.safetensors"
    save_student(*files, student, torch.nn.Identity(), network, params.image, {})
    shutil.rmtree(root / "state")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, stages) -> Workspace:
    """A workspace with digits and a student's file only; semi_eval has run."""
    workspace = new_workspace(tmp_path_factory.mktemp("reference") / "bingo", stages, CHANGES)
    workspace.done("scan")
    train_student(workspace.root)
    workspace.done("semi_eval percent_10")
    return workspace


@pytest.fixture
def workspace(tmp_path, stages, reference) -> Workspace:
    shutil.copytree(reference.root, tmp_path / "bingo", symlinks=True)
    shutil.rmtree(tmp_path / "bingo/reports")
    return Workspace(tmp_path / "bingo", stages)


def refused(workspace: Workspace, stage: str, wanted: str) -> None:
    done = workspace.run(stage)
    assert (done.status, done.out) == (2, ""), done
    assert done.err.startswith(f"error: {wanted}"), done.err
    assert done.err.count("\n") == 1
    assert not (workspace.root / "reports").exists()


def read(workspace: Workspace, report: str) -> dict:
    return json.loads((workspace.root / f"reports/{report}.json").read_text())


def test_a_tenth_of_the_labels_is_enough_for_a_good_student(reference):
    report = read(reference, "semi/percent_10")
    assert (report["percent"], report["labels"], report["origin"]) == (10.0, 80, "drawn")
    assert set(report["nets"]) == {"student", "untrained"}
    student, untrained = report["nets"]["student"], report["nets"]["untrained"]
    assert set(student) == {"finetune", "linear"}
    for protocol in student:
        assert student[protocol]["top1_last"] > 50  # chance is 10
        assert student[protocol]["top1_last"] > untrained[protocol]["top1_last"] + 20
        assert student[protocol]["top1_best"] >= student[protocol]["top1_last"]
    assert not list((reference.root / ".bingo/state").glob("*/*"))


def test_a_killed_run_gives_the_same_bytes(workspace, reference):
    steps = {"linear": 5 * 4, "finetune": 5 * 4}  # 80 labels in batches of 16

    def done_steps() -> int:
        latest = (workspace.root / ".bingo/state/semi_eval-percent_10").glob("*/*/*/latest.json")
        return sum(json.loads(path.read_text())["step"] for path in latest)

    for step in (5, steps["linear"] + 3, sum(steps.values()) + 2):  # student linear, student fine-tuned, untrained network
        running = workspace.start("semi_eval", BINGO_CHECKPOINT_SECONDS="0")
        until(lambda step=step: done_steps() >= step, running.ended)
        assert running.kill().status < 0
        assert not (workspace.root / "reports").exists()
    out = workspace.done("semi_eval").out  # without a name: all splits
    assert "student, linear: resuming from a checkpoint" in out
    assert "untrained, linear: resuming from a checkpoint" in out
    assert workspace.files("reports/semi/percent_10.json") == reference.files("reports/semi/percent_10.json")


def test_mistakes_of_semi_eval(workspace):
    refused(workspace, "semi_eval percent10", "semi_eval.splits has no percent10: allowed are percent_10; did you mean percent_10?")
    (workspace.root / "list.txt").write_text("digit/0000/p0\nn01440764_10183.JPEG\n")
    workspace.edit({"semi_eval.splits": {"percent_10": {**SPLIT, "list_file": "list.txt"}}})
    wanted = "semi_eval.splits.percent_10.list_file = list.txt: 1 of 2 images (n01440764_10183.JPEG) are not in the train split; "
    refused(workspace, "semi_eval", wanted)
    workspace.edit({"semi_eval.splits": {}})
    refused(workspace, "semi_eval", "semi_eval.splits is empty")
    workspace.edit({"semi_eval.splits": {"percent_10": {**SPLIT, "trunk_lr": 1e8}}})
    refused_late(workspace, "semi_eval", "semi_eval: student, finetune: ")


def refused_late(workspace: Workspace, stage: str, wanted: str) -> None:
    done = workspace.run(stage)
    assert done.status == 2
    assert done.err.startswith(f"error: {wanted}"), done.err
    assert done.err.count("\n") == 1
    assert not (workspace.root / "reports").exists()


def test_images_without_labels_are_one_line(workspace):
    folder = workspace.root / "images"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (20, 20), (50 * number, 0, 0)).save(folder / f"{number}.png")
    flat = {"dataset.source": "folder", "dataset.root": "images"}
    few = {"teacher.pretrain.batch_anchors": 4, "distill.batch_anchors": 4, "bagging.k": 2}
    workspace.edit(flat | few | {"dataset.train_images": None, "dataset.test_images": None})
    workspace.done("scan")
    refused(workspace, "semi_eval", "semi_eval: there are no test images; sort the images into classes, or empty")
    flat_set = {"source": "folder", "root": "images", "store_px": None, "train_images": None, "test_images": None}
    workspace.edit({"transfer.datasets": {"photos": flat_set}})
    refused_late(workspace, "transfer_cifar", "transfer_cifar: student, linear_resized: 4 train images have labels such as -1")


def coloured(labels: np.ndarray, side_px: int) -> np.ndarray:
    """Noise in a colour for each class, uint8 (N, S, S, 3)."""
    rng = np.random.default_rng(len(labels))
    colours = np.random.default_rng(0).integers(40, 215, (int(labels.max()) + 1, 3))
    noise = rng.normal(0, 30, (len(labels), side_px, side_px, 3))
    return (colours[labels][:, None, None, :] + noise).clip(0, 255).astype(np.uint8)


def write_cifar10(root: Path) -> None:
    """Files as read by torchvision's CIFAR10, with 60 train and 40 test images."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, rows in [*((f"data_batch_{number}", 12) for number in range(1, 6)), ("test_batch", 40)]:
        labels = np.arange(rows) % 4
        data = coloured(labels, 32).transpose(0, 3, 1, 2).reshape(rows, -1)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels.tolist()}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{label}" for label in range(10)]}))


def test_transfer_to_cifar_in_torchvisions_files(workspace, monkeypatch):
    write_cifar10(workspace.root / "cifar")
    workspace.edit({"transfer.datasets": {"cifar10": CIFAR}, "transfer.interpolation": "bicubic"})
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # it has the checksums of the real files
    monkeypatch.chdir(workspace.root)
    run = Run("transfer_cifar", load_params())
    seen = [used.task.image.interpolation for used in protocols(run.params, *scanned(run.params, "cifar10", run.say)).values()]
    assert seen == ["bicubic"] * 3
    judge_dataset(run, "cifar10", torch.device("cpu"))
    report = read(workspace, "transfer/cifar10")
    assert (report["dataset"], report["images"]) == ("cifar10", [60, 40])
    assert report["protocols"] == {"linear_resized": {"crop_px": 40}, "linear_native": {"crop_px": 32}, "finetune": {"crop_px": 32}}
    assert all(report["nets"]["student"][protocol]["top1_last"] > 50 for protocol in report["protocols"])  # of the 4 classes with images


def test_transfer_to_a_folder_for_a_student_with_the_published_stem(workspace):
    for split, rows in (("train", 32), ("val", 16)):
        labels = np.arange(rows) % 2
        for row, pixels in enumerate(coloured(labels, 20)):
            folder = workspace.root / f"photos/{split}/class{labels[row]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{row:02}.png")
    photos = {"source": "folder", "root": "photos", "store_px": None, "train_images": None, "test_images": None}
    workspace.edit({"transfer.datasets": {"photos": photos}, "student.stem": "imagenet", "transfer.nets": ["untrained"]})
    workspace.done("transfer_cifar photos")
    report = read(workspace, "transfer/photos")
    assert report["protocols"] == {"linear_resized": {"crop_px": 40}, "linear_native": {"crop_px": 16}, "finetune": {"crop_px": 16}}
    assert report["nets"]["untrained"]["finetune"]["top1_best"] >= 75
    workspace.edit({"transfer.datasets": {"photos": {**photos, "root": "photo"}}})
    shutil.rmtree(workspace.root / "reports")
    refused(workspace, "transfer_cifar photos", "transfer.datasets.photos.root = photo: the folder does not exist")


def test_a_missing_student_is_reported_first(workspace):
    (workspace.root / "models/student.safetensors").unlink()
    workspace.edit({"transfer.datasets": {"cifar10": CIFAR}})
    refused(workspace, "transfer_cifar", "models/student.safetensors: cannot be read (the file does not exist)")


@pytest.mark.parametrize("stage", ["semi_eval", "transfer_cifar"])
def test_a_student_of_another_architecture_is_one_line(workspace, stage):
    workspace.edit({"student.arch": "resnet18", "transfer.datasets": {"cifar10": CIFAR}})
    wanted = "models/student.safetensors: student.arch = resnet18, this network has resnet10t; run the stage that writes it: dvc repro"
    refused(workspace, stage, wanted)
    (workspace.root / "models/student.safetensors").write_bytes(b"nothing")
    refused(workspace, stage, "models/student.safetensors: ")


def test_lists_and_listings_that_are_missing_are_one_line(workspace):
    split = {**SPLIT, "list_file": "lists/10percent.txt"}
    workspace.edit({"semi_eval.splits": {"percent_10": split}})
    wanted = (
        "semi_eval.splits.percent_10.list_file = lists/10percent.txt: cannot be read (No such file or directory); give a list of images"
    )
    refused(workspace, "semi_eval", wanted)
    (workspace.root / "data/listing.parquet").unlink()
    refused(workspace, "semi_eval percent_10", "data/listing.parquet: ")


def test_cifar_that_is_missing_and_cannot_be_downloaded_is_one_line(workspace, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    workspace.edit({"transfer.datasets": {"cifar100": {**CIFAR, "source": "cifar100"}}})
    monkeypatch.chdir(workspace.root)
    with pytest.raises(UserError) as caught:
        judge_dataset(Run("transfer_cifar", load_params()), "cifar100", torch.device("cpu"))
    (line,) = caught.value.lines
    assert line.startswith(
        "transfer.datasets.cifar100.root = cifar: cifar100 is not in this folder and cannot be downloaded (no network); put the"
    )


def test_a_protocol_with_images_that_the_student_cannot_use_is_one_line(workspace):
    workspace.edit({"transfer.datasets": {"digits": DIGITS}, "student.arch": "vit_tiny_patch16_224", "student.width": 1.0})
    workspace.edit({"student.stem": "imagenet", "transfer.nets": ["untrained"], "transfer.resized_px": 41})
    done = workspace.run("transfer_cifar")
    (mistake,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert (done.status, mistake.partition(":")[2].partition(":")[0]) == (2, " transfer.resized_px = 41")
    workspace.edit({"transfer.resized_px": int(re.search(r"set transfer\.resized_px to (\d+)", mistake)[1])})
    assert "transfer.resized_px = " not in workspace.run("transfer_cifar").err
