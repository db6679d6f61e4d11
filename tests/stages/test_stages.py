"""The stages as processes on real digits: always the same bytes, also after kills, and one line for every user error."""

import csv
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors
from workspace import (
    SHORT,
    STAGES,
    Running,
    Workspace,
    assert_as_reference,
    environment,
    new_workspace,
    remove,
    saved_step,
    stage_server,
    until,
)

from bingo.bags.index import Bags, write_bags
from bingo.embeddings.store import read_embeddings
from bingo.images.decode import decode_square
from bingo.images.listing import read_listing
from bingo.nets.students import load_backbone
from bingo.pipeline.process import _is_orphan, mistakes_as_lines
from bingo.runtime.errors import UserError
from bingo.runtime.workers import worker_count

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
GOES_ON = "resuming from a checkpoint"


def refused(workspace: Workspace, stage: str, *wanted: str, **variables: str) -> None:
    """A stage ends with exit code 2 and one line for each mistake, which contains `wanted`, and has changed no output."""
    before = workspace.existing_files()
    done = workspace.run(stage, **variables)
    lines = done.err.splitlines()
    assert done.status == 2, done
    assert not done.out
    assert len(lines) == len(wanted), done.err
    for line, words in zip(lines, wanted, strict=True):
        assert line.startswith("error: ")
        assert words in line
    assert workspace.existing_files() == before


# The same bytes.


def test_a_second_run_in_another_folder_gives_the_same_bytes(tmp_path, reference):
    """With another server, in which strings have other hashes and sets another order."""
    (tmp_path / "server").mkdir()
    with stage_server(tmp_path / "server") as others:
        again = new_workspace(tmp_path / "bingo", others, SHORT)
        for stage in STAGES:
            again.done(stage)
    files, wanted = again.files(), reference.files()
    assert sorted(files) == sorted(wanted)
    assert [path for path in files if files[path] != wanted[path]] == []


# Kills.


def done_chunks(workspace: Workspace) -> list[Path]:
    return sorted((workspace.root / ".bingo/state/extract").glob("*/store/done/[0-9]*"))


@pytest.mark.parametrize("stage", ["teacher", "distill"])
def test_a_killed_training_resumes_from_its_checkpoint(workspace, reference, stage):
    """Also in the same run of its logger, which does not change outputs."""
    logged = {"BINGO_LOGGERS": "jsonl", "DVC_EXP_NAME": "k10"}
    remove(workspace, *workspace.outputs(stage))
    for step in (1, 13, 25):  # in the first, second and third epoch
        training = workspace.start(stage, BINGO_CHECKPOINT_SECONDS="0", **logged)
        until(lambda step=step: saved_step(workspace, stage) >= step, training.ended)
        done = training.kill()
        assert (done.status, done.err) == (-signal.SIGKILL, "")
        assert (GOES_ON in done.out) == (step > 1)
        assert not workspace.existing_files(*workspace.outputs(stage))
    assert f"{stage}: {GOES_ON}" in workspace.done(stage, **logged).out
    assert_as_reference(workspace, reference, stage)
    (log,) = (workspace.root / ".bingo/logs/k10").glob("*/*/log.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert log.parent.parent.name == stage
    assert sorted({line["step"] for line in lines}) == [line["step"] for line in lines], "every step once, and in order"
    curve = csv.DictReader((workspace.root / f"reports/plots/{stage}.csv").read_text().splitlines())
    shown = [line for line in lines if "epoch" in line]
    assert [(line["epoch"], line["epoch/loss"]) for line in shown] == [(int(row["epoch"]), float(row["loss"])) for row in curve]
    spread = json.loads((workspace.root / f"reports/{stage}.json").read_text())
    assert {name: shown[-1][f"epoch/{name}"] for name in ("feature_std", "effective_rank")}.items() <= spread.items()
    assert len(list(log.parent.glob("bags/row-*.png"))) == (4 if stage == "distill" else 0)


def test_the_best_epoch_is_that_of_the_curve_and_has_a_students_file(workspace):
    curve = list(csv.DictReader((workspace.root / "reports/plots/distill.csv").read_text().splitlines()))
    best = max(curve, key=lambda record: (float(record["knn_10"]), -int(record["epoch"])))
    found = json.loads((workspace.root / "models/best/epoch.json").read_text())
    assert found == {"epoch": int(best["epoch"]), "knn_10": float(best["knn_10"])}
    (kept, metadata), (last, _) = (
        load_backbone(workspace.root / path) for path in ("models/best/student.safetensors", "models/student.safetensors")
    )
    assert metadata["best"] == found
    same = all(torch.equal(a, b) for a, b in zip(kept.state_dict().values(), last.state_dict().values(), strict=True))
    assert same == (found["epoch"] == 3)


def test_a_killed_pass_of_the_teacher_keeps_its_chunks(workspace, reference):
    remove(workspace, "data/embeddings.zarr")
    written: dict[str, int] = {}
    for chunks in (1, 5, 9):
        extract = workspace.start("extract")
        until(lambda chunks=chunks: len(done_chunks(workspace)) >= chunks, extract.ended)
        assert extract.kill().status == -signal.SIGKILL
        times = {path.name: path.stat().st_mtime_ns for path in done_chunks(workspace)}
        assert len(times) < 16
        assert written.items() <= times.items(), "a chunk was computed twice"
        written = times
        assert not (workspace.root / "data/embeddings.zarr").exists()
    workspace.done("extract")
    assert_as_reference(workspace, reference, "extract")


@pytest.mark.parametrize("stage", ["teacher", "extract", "distill"])
def test_kills_at_any_moment_do_no_harm(workspace, reference, stage):
    remove(workspace, *workspace.outputs(stage))
    moments = random.Random(stage)
    for _ in range(4):
        running = workspace.start(stage, BINGO_CHECKPOINT_SECONDS="0.05")
        time.sleep(moments.uniform(0.1, 1.5))
        assert running.kill().status in (-signal.SIGKILL, 0)
    workspace.done(stage)
    assert_as_reference(workspace, reference, stage)


@pytest.mark.parametrize("stage", ["teacher", "distill"])
def test_a_training_that_is_asked_to_stop_saves_and_reports_it(workspace, reference, stage):
    training = workspace.start(stage, BINGO_CHECKPOINT_SECONDS="0")
    until(lambda: saved_step(workspace, stage) >= 1, training.ended)
    training.send(signal.SIGTERM)
    done = training.wait()
    assert done.status == 75
    assert re.fullmatch(rf"{stage}: \w+: stopped at step \d+ with a checkpoint; start again to resume\n", done.err)
    assert f"step {saved_step(workspace, stage)} " in done.err
    assert GOES_ON in workspace.done(stage).out
    assert_as_reference(workspace, reference, stage)


def test_ctrl_c_during_the_teacher_pass_prints_no_traceback(workspace, reference):
    remove(workspace, "data/embeddings.zarr")
    extract = workspace.start("extract")
    until(lambda: len(done_chunks(workspace)) >= 1, extract.ended)
    extract.send(signal.SIGINT)
    done = extract.wait()
    assert (done.status, done.err) == (75, "")
    workspace.done("extract")
    assert_as_reference(workspace, reference, "extract")


def test_a_second_copy_beside_a_running_one_is_refused(workspace, reference):
    first = workspace.start("teacher", BINGO_CHECKPOINT_SECONDS="0")
    until(lambda: saved_step(workspace, "teacher") >= 1, first.ended)
    first.send(signal.SIGSTOP)
    second = workspace.run("teacher")
    first.send(signal.SIGCONT)
    assert (second.status, second.out) == (75, "")
    assert re.fullmatch(r"error: another teacher with the same parameters holds .*; wait for it or end it\n", second.err)
    assert first.wait().status == 0
    assert_as_reference(workspace, reference, "teacher")


def processes_in(folder: Path, word: str) -> list[int]:
    """Processes that run in a folder, with `word` in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder and word in (process / "cmdline").read_text():
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("variables", "parent", "first_process", "orphan"),
    [
        ({"DVC_STAGE": "teacher"}, 1, "systemd", True),
        ({"DVC_STAGE": "teacher"}, 1, "dvc", False),
        ({"DVC_STAGE": "teacher"}, 1, "python3.11", False),
        ({"DVC_STAGE": "teacher"}, 2, "systemd", False),
        ({"DVC_STAGE": "teacher", "RANK": "0"}, 1, "pt_elastic", False),
        ({}, 1, "sh", False),
    ],
)
def test_a_stage_whose_dvc_was_killed_while_python_started(monkeypatch, variables, parent, first_process, orphan):
    for name in ("DVC_STAGE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getppid", lambda: parent)
    monkeypatch.setattr(Path, "read_text", lambda path: {"/proc/1/comm": f"{first_process}\n"}[str(path)])
    assert _is_orphan() == orphan


def test_two_dvc_processes_in_one_workspace_and_a_killed_one(workspace, reference):
    """DVC refuses to start twice and names the process it waits for; a killed DVC leaves no training running, and the next one resumes."""
    remove(workspace, *workspace.outputs("teacher"))
    variables = environment(BINGO_CHECKPOINT_SECONDS="0")

    def dvc(log: str, *arguments: str) -> subprocess.Popen:
        with (workspace.root / log).open("w") as file:
            command = [sys.executable, "-m", "dvc", *arguments]
            return subprocess.Popen(command, cwd=workspace.root, env=variables, stdout=file, stderr=subprocess.STDOUT)

    assert dvc("init", "init", "--no-scm", "--quiet").wait() == 0
    first = dvc("first", "repro", "--single-item", "teacher")
    until(lambda: saved_step(workspace, "teacher") >= 1, lambda: first.poll() is not None)
    (training,) = processes_in(workspace.root, "stages.teacher")
    os.kill(training, signal.SIGSTOP)
    saved = saved_step(workspace, "teacher")
    assert dvc("second", "repro", "--single-item", "teacher").wait() == 255
    printed = (workspace.root / "second").read_text()
    assert f"is busy, it is being blocked by:\n  (PID {first.pid}): " in printed
    assert "Traceback" not in printed
    os.kill(training, signal.SIGCONT)
    until(lambda: saved_step(workspace, "teacher") > saved, lambda: first.poll() is not None)  # the first one is not affected
    first.kill()
    first.wait()
    until(lambda: not processes_in(workspace.root, "stages.teacher"))
    assert not workspace.existing_files(*workspace.outputs("teacher"))
    assert dvc("third", "repro", "--single-item", "teacher").wait() == 0, (workspace.root / "third").read_text()
    assert f"teacher: {GOES_ON}" in (workspace.root / "third").read_text()
    workspace.done("scan")  # the next stage removes the state that was kept until DVC committed the teacher
    assert_as_reference(workspace, reference, "teacher")


ALL_KNN = {f"knn_eval@{net}" for net in ("student", "ema", "untrained", "start", "supervised", "teacher", "pixels")} | {
    "knn_eval_baseline@moco"
}


def test_an_evaluation_is_out_of_date_only_if_its_own_network_or_parameters_change(workspace):
    """Checks the list of dvc status after a change; consequences of changed outputs are not in it."""
    for folder in ("semi", "transfer", "coco"):
        (workspace.root / "reports" / folder).mkdir()

    def dvc(*arguments: str) -> str:
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(command, cwd=workspace.root, env=environment(), check=True, capture_output=True, text=True).stdout

    dvc("init", "--no-scm", "--quiet")
    dvc("commit", "--force", "--quiet")
    assert json.loads(dvc("status", "--json")) == {}
    params, student = (workspace.root / "params.yaml").read_text(), workspace.root / "models/student.safetensors"
    for changes, wanted in (
        ({"bagging.k": 9}, {"bag"}),
        ({"knn_eval.temperature": 0.2}, ALL_KNN),
        ({"knn_eval.resize_px": 20}, ALL_KNN - {"knn_eval@teacher", "knn_eval@pixels"}),
        ({"linear_eval.crops.nets": []}, {name.replace("knn", "linear") for name in ALL_KNN if not name.endswith(("teacher", "pixels"))}),
    ):
        workspace.edit(changes)
        assert set(json.loads(dvc("status", "--json"))) == {*wanted, "report"}
        (workspace.root / "params.yaml").write_text(params)
    student.write_bytes(student.read_bytes() + b"x")
    assert set(json.loads(dvc("status", "--json"))) == {"distill", "linear_eval@student", "knn_eval@student", "report"}


@pytest.mark.parametrize("net", ["teacher", "pixels"])
def test_neighbours_among_stored_features_need_no_torch(workspace, net):
    code = "import sys, stages.knn_eval as k; k.main(*sys.argv[1:]); assert not {'torch', 'timm'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code, net], cwd=workspace.root, env=environment(), check=True)


# Parameters.


@pytest.mark.parametrize(
    ("stage", "changes", "wanted"),
    [
        ("report", {"distil": {}}, ["params.yaml: distil is not a known key; did you mean distill?"]),
        ("bag", {"bagging.K": 5}, ["params.yaml: bagging.K is not a known key; did you mean k?"]),
        (
            "scan",
            {"seed": "0", "dataset.store_px": 16.5, "bagging.method": "kmeens"},
            ["seed = '0': ", "dataset.store_px = 16.5: ", "bagging.method = 'kmeens': allowed is 'knn', 'kmeans' or 'label'"],
        ),
        (
            "distill",
            {"student.arch": "resnet10"},
            ["student.arch = 'resnet10': no network of timm (or torchvision/NAME) has this name; did"],
        ),
        (
            "distill",
            {"distill.method": "bingoo"},
            [
                "distill.method = 'bingoo': allowed are bingo, compress, ",
            ],
        ),
        ("teacher", {"image.crop_px": 32}, ["crop_px: 32 is larger than resize_px 16; lower image.crop_px"]),
        ("teacher", {"teacher.source": "checkpoint"}, ["teacher.checkpoint to the file"]),
        (
            "linear_eval",
            {"linear_eval.crops.nets": ["studnt"]},
            ["linear_eval.crops.nets: 'studnt' is not a network, allowed are student"],
        ),
        ("baseline bingo", {}, ["baselines has no bingo: allowed are moco"]),
        ("baseline moco", {"baselines": ["bingo"]}, ["a baseline is a method without a teacher, allowed are isd, moco"]),
        ("scan", {"dataset.train_images": 9999}, ["dataset.train_images = 9999: the train split has 1438 images"]),
        ("teacher", {"teacher.pretrain.batch_anchors": 401}, ["teacher.pretrain.batch_anchors = 401: there are only 400 train images"]),
        ("distill", {"distill.batch_anchors": 401}, ["distill.batch_anchors = 401: there are only 400 train images"]),
        ("baseline moco", {"distill.batch_anchors": 401}, ["distill.batch_anchors = 401: there are only 400 train images"]),
        ("bag", {"bagging.k": 400}, ["bagging.k = 400: a bag of the 400 train rows has at most 399 members"]),
        ("bag", {"bagging.search": "cuvs"}, ["bagging.search = cuvs: cuVS is not installed"]),
        ("bag", {"bagging.method": "kmeans", "bagging.clusters": 401}, ["bagging.clusters = 401: there are only 400 train rows"]),
        ("distill", {"student.width": 0.013}, ["width = 0.013: 64 channels become 0.832"]),
        ("distill", {"student.arch": "torchvision/resnet18"}, ["width = 0.125: torchvision/resnet18 cannot be scaled"]),
        (
            "distill",
            {"student.arch": "swin_tiny_patch4_window7_224", "student.width": 1.0, "student.stem": "imagenet"},
            ["image.crop_px = 16: swin_tiny_patch4_window7_224 does not accept this size"],
        ),
        (
            "teacher",
            {"teacher.arch": "swin_tiny_patch4_window7_224", "teacher.width": 1.0, "teacher.stem": "imagenet"},
            ["image.crop_px = 16: swin_tiny_patch4_window7_224 does not accept this size"],
        ),
        ("distill", {"distill.keys": "momentum"}, ["bingo.negatives = bank: with distill.keys = momentum no key is stored"]),
        ("distill", {"distill.lr": 1e6}, ["distill: bingo: the loss is nan at step"]),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_a_mistake_in_the_parameters(workspace, stage, changes, wanted):
    workspace.edit(changes)
    refused(workspace, stage, *wanted)


def test_an_approximate_search_reports_its_recall(workspace):
    workspace.edit({"bagging.search": "ivf", "bagging.lists": 50, "bagging.probes": 1})
    done = workspace.run("bag")
    recall = json.loads((workspace.root / "reports/bags.json").read_text())["recall"]
    assert 0 < recall < 0.95
    assert done.out.startswith("bag: knn bags of 400 images by 1 of 50 lists: ")
    assert f" {100 * recall:.3g} % of the nearest images" in done.out
    assert re.fullmatch(r"bag: wrote data/bags\.zarr, data/left_out\.json, reports/bags\.json in [\d.]+ s", done.out.splitlines()[-1])
    warning = f"warning: bag: recall {recall:g}: the search misses many of the nearest images; raise bagging.probes\n"
    assert (done.status, done.err) == (0, warning)


def test_bags_that_are_all_empty_end_bag_and_distill(workspace):
    workspace.edit({"bagging.search": "ivf", "bagging.lists": 400, "bagging.probes": 1})
    refused(workspace, "bag", "all 400 bags are empty: no other image was found for the anchor; raise bagging.probes (1)")
    listing = read_listing(workspace.root / "data/listing.parquet")
    embeddings = read_embeddings(workspace.root / "data/embeddings.zarr", listing)
    nothing = Bags({"method": "knn", "k": 1}, np.full((400, 1), -1, np.int32), np.full((400, 1), -np.inf, np.float16))
    remove(workspace, "data/bags.zarr")
    write_bags(workspace.root / "data/bags.zarr", nothing, listing.fingerprint, embeddings.fingerprint)
    workspace.edit({"distill.method": "bingo"})
    refused(workspace, "distill", "all 400 bags are empty")
    workspace.edit({"distill.method": "seed"})
    workspace.done("distill")


@pytest.mark.parametrize(
    ("stage", "variables", "wanted"),
    [
        ("teacher", {"BINGO_DEVICE": "nonsense"}, "BINGO_DEVICE = nonsense: allowed are auto, cpu, cuda"),
        ("teacher", {"BINGO_PROCESSES": "zero"}, "BINGO_PROCESSES = zero: allowed is a whole number from 1"),
        ("extract", {"BINGO_PROCESSES": "0"}, "BINGO_PROCESSES = 0: allowed is a whole number from 1"),
        ("scan", {"BINGO_LOGGERS": "tensorbord"}, "BINGO_LOGGERS = tensorbord: allowed are jsonl, tensorboard, wandb, mlflow"),
        ("distill", {"BINGO_CHECKPOINT_SECONDS": "soon"}, "BINGO_CHECKPOINT_SECONDS = soon: allowed is a number of seconds from 0"),
        ("distill", {"BINGO_CHECKPOINT_SECONDS": "-1"}, "BINGO_CHECKPOINT_SECONDS = -1: allowed is a number of seconds from 0"),
    ],
)
def test_a_mistake_in_the_environment(workspace, stage, variables, wanted):
    refused(workspace, stage, wanted, **variables)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("stage", ["teacher", "extract", "distill", "linear_eval"])
def test_cuda_without_a_gpu(workspace, stage):
    refused(workspace, stage, "BINGO_DEVICE = cuda: torch sees no GPU here", BINGO_DEVICE="cuda")


def test_a_stage_outside_of_a_workspace(tmp_path, stages):
    for name in ("bingo", "stages"):
        (tmp_path / name).symlink_to(Path(__file__).parents[2] / name)
    done = Workspace(tmp_path, stages).run("scan")
    assert (done.status, done.out) == (2, "")
    assert done.err == "error: params.yaml: cannot be read (No such file or directory); run from the folder that holds params.yaml\n"


def test_a_student_that_collapses_is_reported(workspace):
    figures = json.loads((workspace.root / "reports/distill.json").read_text())
    assert figures["feature_std"] > 0.1
    assert figures["effective_rank"] > 3
    workspace.edit({"distill.weight_decay": 5.0, "distill.sgd_momentum": 0.0, "distill.epochs": 4})  # weights shrink to zero
    done = workspace.run("distill")
    assert done.status == 0, done
    (line,) = done.err.splitlines()
    assert line.startswith("warning: distill: the network has collapsed, its features hardly differ (feature_std ")
    assert json.loads((workspace.root / "reports/distill.json").read_text())["feature_std"] < 0.01


# Images.


def digit_folder(root: Path, names: list[str], classes: int, side_px: tuple[int, int] = (20, 24)) -> None:
    """PNGs of noise, each in one colour, in the folders `names`, each with `classes` classes (0: none)."""
    numbers = np.random.default_rng(0)
    for name in names:
        for i in range(60):
            folder = root / name / (f"class{i % classes}" if classes else "")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = numbers.integers(0, 255, (*side_px, 3)) * numbers.random(3)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")


@pytest.fixture
def own_images(tmp_path, stages) -> Workspace:
    """A workspace for images in `images/`, with batches small enough for a few images."""
    small = {"teacher.pretrain.batch_anchors": 16, "distill.batch_anchors": 16, "extract.batch_images": 32, "extract.chunk_rows": 32}
    own = {"dataset.source": "folder", "dataset.root": "images", "dataset.store_px": 16, "report.gallery_anchors": 2}
    return new_workspace(tmp_path / "bingo", stages, {**own, **small})


def test_a_missing_or_empty_folder(own_images):
    refused(own_images, "scan", "dataset.root = images: the folder does not exist")
    (own_images.root / "images/train").mkdir(parents=True)
    refused(own_images, "scan", "dataset.root = images: train/ contains no images; recognised are .jpg")


@pytest.mark.slow
def test_class_folders_without_images_are_all_named(own_images):
    digit_folder(own_images.root / "images", ["train"], 3)
    for name in ("empty", "void"):
        (own_images.root / "images/train" / name).mkdir()
    wanted = "dataset.root = images: train/ has the class folder {} without images; fill it, or delete it"
    refused(own_images, "scan", wanted.format("empty"), wanted.format("void"))


@pytest.mark.slow
def test_unreadable_images_are_named_or_counted(own_images):
    images = own_images.root / "images"
    digit_folder(images, ["train", "val"], 3)
    (images / "train/class0/00.png").write_bytes(b"")
    jpeg = io.BytesIO()
    Image.open(images / "train/class0/03.png").save(jpeg, "JPEG")
    (images / "val/class1/zz.jpg").write_bytes(jpeg.getvalue()[:-100])
    refused(
        own_images,
        "scan",
        "train/class0/00.png (row 0) cannot be read: no image format is recognised in it",
        "val/class1/zz.jpg (row 100) cannot be read: ",
        "2 of 121 images are unreadable; repair or delete them, or set dataset.on_bad_image: skip",
    )
    own_images.edit({"dataset.on_bad_image": "skip"})
    assert "59 train and 60 test images, 3 classes, 2 skipped" in own_images.done("scan").out


@pytest.mark.slow
def test_values_of_k_that_are_too_large_for_the_dataset_are_left_out(own_images):
    digit_folder(own_images.root / "images", ["train", "val"], 3, (8, 9))  # smaller than image.crop_px
    for stage in STAGES:
        out = own_images.done(stage).out
        if stage == "knn_eval":
            for name, k in (("k", 200), ("agreement_k", 100)):
                assert f"knn_eval: there are only 60 train images, so knn_eval.{name} {k} is left out" in out
    scores = {path.stem: json.loads(path.read_text()) for path in (own_images.root / "reports/knn").glob("*.json")}
    assert set(scores) == {"student", "ema", "moco", "untrained", "start", "supervised", "teacher", "pixels"}
    agreements, votes = {"agreement_1", "agreement_10"}, {f"knn_{k}{kind}" for k in (1, 10, 20) for kind in ("", "_weighted")}
    assert set(scores["student"]) == agreements | votes
    assert set(scores["teacher"]) == votes


def flat_folder(images: Path) -> None:
    """80 digits, the first 30 again as JPEG, and two files that are not images."""
    images.mkdir()
    for number, digit in enumerate(load_digits().images[:80]):
        picture = Image.fromarray((digit * 15).astype(np.uint8)).resize((24, 24), Image.Resampling.BICUBIC).convert("RGB")
        picture.save(images / f"{number:02}.png")
        if number < 30:
            picture.save(images / f"{number:02}-again.jpg", quality=85)
    for name in ("x.png", "y.jpg"):
        (images / name).write_bytes(b"no image")


@pytest.mark.slow
def test_images_without_labels_can_be_run_to_a_report(own_images):
    flat_folder(own_images.root / "images")
    own_images.edit({"dataset.test_images": 25, "dataset.on_bad_image": "skip", "teacher.pretrain.epochs": 6, "distill.keep_best": True})
    for stage in STAGES:
        own_images.done(stage)
    listing = read_listing(own_images.root / "data/listing.parquet")
    digits = [path[:2] for path in listing.paths]
    twins = [row for row in range(85, 110) if digits[row] in digits[:85]]
    assert (listing.train_rows, len(listing), listing.held_out) == (85, 110, 25)
    assert len(twins) > 5
    assert json.loads((own_images.root / "data/left_out.json").read_text())["rows"] == twins
    scores = {net: json.loads((own_images.root / f"reports/knn/{net}.json").read_text()) for net in ("student", "teacher", "pixels")}
    assert [set(score) for score in scores.values()] == [{"agreement_1", "agreement_10"}, set(), {"agreement_1", "agreement_10"}]
    assert scores["student"]["agreement_10"] > 100 * 10 / 85  # chance
    pixels = read_pixels(own_images.root / "data/images.zarr").reshape(110, -1).astype(float)
    teacher = read_embeddings(own_images.root / "data/embeddings.zarr", listing).features_ND.astype(float)
    judged = [row for row in range(85, 110) if row not in twins]
    ours, theirs = (nearest_ten(features[:85], features[judged]) for features in (pixels, teacher))
    assert scores["pixels"]["agreement_10"] == pytest.approx(10 * np.mean([len(a & b) for a, b in zip(ours, theirs, strict=True)]), abs=1)
    assert json.loads((own_images.root / "reports/linear/moco.json").read_text()) == {}
    assert set(json.loads((own_images.root / "models/best/epoch.json").read_text())) == {"epoch", "agreement_10"}
    curve = (own_images.root / "reports/plots/distill.csv").read_text().splitlines()
    last = dict(zip(curve[0].split(","), curve[-1].split(","), strict=True))
    assert 0 < float(last["agreement_10"]) < 100
    assert "agreement with the teacher, k = 10: " in json.loads((own_images.root / ".bingo/runs/distill.json").read_text())["probe"]
    assert "probe" not in json.loads((own_images.root / ".bingo/runs/baseline-moco.json").read_text())
    page = (own_images.root / "reports/index.html").read_text()
    assert f"the student finds {scores['student']['agreement_10']:.1f} % of the 10 train images" in page
    assert f"25 of the train images were drawn with seed 0 and held out. Of these {len(twins)} are near-duplicates" in page
    bags = json.loads((own_images.root / "reports/bags.json").read_text())
    assert bags["near_duplicates"] == sum(digits[:85].count(digit) == 2 for digit in digits[:85])
    assert bags["chance_share"] < bags["view_overlap"] < 1
    own_images.edit({"bagging.near_duplicate_distance": 0.0})
    own_images.done("bag")
    assert json.loads((own_images.root / "data/left_out.json").read_text())["rows"] == []
    own_images.edit({"bagging.method": "label"})
    refused(own_images, "bag", "bagging.method = label: 85 of 85 train rows have no label")


def nearest_ten(train: np.ndarray, test: np.ndarray) -> list[set]:
    search = NearestNeighbors(n_neighbors=10, metric="cosine", algorithm="brute").fit(train)
    return [set(found) for found in search.kneighbors(test, return_distance=False)]


def read_pixels(store: Path) -> np.ndarray:
    return np.asarray(zarr.open_group(store, mode="r")["images"])


@pytest.mark.slow
def test_files_that_are_decoded_on_access(own_images):
    images = own_images.root / "images"
    digit_folder(images, ["train", "val"], 3)
    own_images.edit({"dataset.store_px": None, "knn_eval.agreement_k": [], "knn_eval.k": [1]})
    own_images.done("scan")
    for evaluation in ("linear_eval", "knn_eval"):
        own_images.done(f"{evaluation} pixels")
    listing = read_listing(own_images.root / "data/listing.parquet")
    squares = [decode_square((images / path).read_bytes(), 16, 16) for path in listing.paths]
    pixels = np.stack(squares).reshape(len(listing), -1).astype(float)
    nearest = (pixels / np.linalg.norm(pixels, axis=1, keepdims=True) @ pixels[:60].T / np.linalg.norm(pixels[:60], axis=1)).argmax(axis=1)
    scores = [json.loads((own_images.root / f"reports/{report}/pixels.json").read_text()) for report in ("knn", "linear")]
    assert scores[0]["knn_1"] == pytest.approx(100 * (listing.labels_N[nearest] == listing.labels_N)[60:].mean(), abs=1e-4)
    assert set(scores[1]) == {"cached"}
    training = own_images.start("teacher", BINGO_CHECKPOINT_SECONDS="0")
    until(lambda: saved_step(own_images, "teacher") >= 1, training.ended)
    training.kill()
    until(lambda: not training.session())  # the workers have ended, too
    assert GOES_ON in own_images.done("teacher").out
    (images / "val/class1/01.png").unlink()
    refused(own_images, "extract", "val/class1/01.png (row 80) can no longer be read (No such file or directory); restore it")


@pytest.mark.slow
@pytest.mark.skipif(worker_count() == 0, reason="one processor: the stage decodes by itself")
def test_a_killed_worker_ends_a_training_in_one_line(own_images):
    digit_folder(own_images.root / "images", ["train", "val"], 3)
    own_images.edit({"dataset.store_px": None})
    own_images.done("scan")
    training = own_images.start("teacher", BINGO_CHECKPOINT_SECONDS="0")
    until(lambda: saved_step(own_images, "teacher") >= 1, training.ended)
    for worker in workers_of(training):
        os.kill(worker, signal.SIGKILL)
    done = training.wait()
    assert done.status == 1
    assert done.err.startswith("error: teacher: a worker process was killed by SIGKILL, ")
    assert done.err.count("\n") == 1
    assert GOES_ON in own_images.done("teacher").out


def workers_of(running: Running) -> list[int]:
    """Processes of the session whose parent is its fork server."""
    server = {pid for pid in running.session() if "multiprocessing.forkserver" in Path(f"/proc/{pid}/cmdline").read_text()}
    return [pid for pid in server if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) in server]


# Artefacts that are missing, damaged, or of another run.


@pytest.mark.parametrize(
    ("stage", "missing", "wanted"),
    [
        ("teacher", "data/listing.parquet", "data/listing.parquet: cannot be read (No such file or directory)"),
        ("teacher", "data/images.zarr", "data/images.zarr: the store does not exist"),
        ("extract", "models/teacher.safetensors", "models/teacher.safetensors: cannot be read (No such file or directory)"),
        ("bag", "data/embeddings.zarr", "data/embeddings.zarr: the store does not exist or is incomplete; run: dvc repro extract"),
        ("distill", "data/bags.zarr", "data/bags.zarr: the store does not exist or is incomplete; run: dvc repro bag"),
        ("knn_eval", "models/student.safetensors", "models/student.safetensors: cannot be read (the file does not exist)"),
        ("linear_eval", "models/baselines/moco.safetensors", "models/baselines/moco.safetensors: cannot be read"),
        ("distill", "dvc.yaml", "dvc.yaml: cannot be read (No such file or directory)"),
    ],
)
def test_a_missing_input(workspace, stage, missing, wanted):
    remove(workspace, missing)
    refused(workspace, stage, wanted)


@pytest.mark.parametrize(
    ("stage", "file", "wanted"),
    [
        ("bag", "data/embeddings.zarr/features/c/3/0", "data/embeddings.zarr: array features has a damaged chunk"),
        ("distill", "data/embeddings.zarr/keys/c/3/0/0", "data/embeddings.zarr: array keys has a damaged chunk"),
        ("distill", "data/bags.zarr/members/c/0/0", "data/bags.zarr: array members has a damaged chunk"),
        ("teacher", "data/images.zarr/images/c/0/0/0/0", "data/images.zarr: chunk 0 is missing or cut off"),
        ("bag", "data/embeddings.zarr/zarr.json", "data/embeddings.zarr: its metadata are damaged"),
        ("distill", "data/listing.parquet", "data/listing.parquet: is damaged"),
        ("extract", "models/teacher.safetensors", "models/teacher.safetensors: is damaged, or BINGO did not write it"),
        ("knn_eval", "models/student.safetensors", "models/student.safetensors: is damaged, or BINGO did not write it"),
    ],
)
def test_a_truncated_input(workspace, stage, file, wanted):
    path = workspace.root / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(workspace, stage, wanted)


@pytest.mark.parametrize("stage", ["bag", "distill", "linear_eval", "knn_eval"])
def test_embeddings_of_another_listing(workspace, stage):
    workspace.edit({"dataset.train_images": 390})
    workspace.done("scan")
    refused(workspace, stage, "data/embeddings.zarr: was made from listing ")


def test_bags_of_another_listing(workspace):
    workspace.edit({"dataset.train_images": 390})
    for stage in ("scan", "extract"):
        workspace.done(stage)
    refused(workspace, "distill", "data/bags.zarr: was made from listing ")
    refused(workspace, "report", "data/bags.zarr: was made from listing ")


def test_images_of_another_listing(workspace, reference):
    workspace.edit({"dataset.train_images": 390})
    workspace.done("scan")
    shutil.rmtree(workspace.root / "data/images.zarr")
    shutil.copytree(reference.root / "data/images.zarr", workspace.root / "data/images.zarr")
    refused(workspace, "teacher", "data/images.zarr: was made from listing ")


def test_bags_of_other_embeddings(workspace):
    workspace.edit({"extract.views": 2})
    workspace.done("extract")
    refused(workspace, "distill", "data/bags.zarr: was made from embeddings ")


@pytest.mark.parametrize("stage", ["linear_eval", "knn_eval"])
def test_a_student_of_another_architecture(workspace, stage):
    workspace.edit({"student.width": 0.25, "student.stem": "imagenet"})
    wanted = "student.width = 0.25, this network has 0.125, student.stem = imagenet, this network has small; run the stage"
    refused(workspace, stage, f"models/student.safetensors: {wanted}")


# Teachers from a file.


class Code:
    """Code that pickle runs when loading."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def moco_state() -> dict[str, torch.Tensor]:
    """Names of a MoCo-v1 checkpoint, for a network that is not a ResNet."""
    return {"module.encoder_q.conv.weight": torch.zeros(4, 3, 3, 3), "module.encoder_q.fc.weight": torch.zeros(8, 4)}


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "the file does not exist; set teacher.checkpoint"),
        (b"not a checkpoint", "is not a checkpoint of torch.save"),
        (
            {"model": {"conv.weight": torch.zeros(1)}},
            "is not a checkpoint of format moco: expected a state_dict with module.encoder_q.*, found a dict of 1: conv.weight",
        ),
        ({"state_dict": moco_state()}, "its backbone does not fit resnet10t: missing conv1.weight"),
        ({"state_dict": moco_state(), "code": Code()}, "holds pickled code (posix.system), which is never run"),
    ],
    ids=["absent", "no checkpoint", "another format", "unmatched keys", "pickled code"],
)
def test_a_checkpoint_that_is_not_a_teacher(workspace, content, wanted):
    workspace.edit({"teacher.source": "checkpoint", "teacher.checkpoint": "source.pth"})
    if isinstance(content, bytes):
        (workspace.root / "source.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, workspace.root / "source.pth")
    refused(workspace, "teacher", f"source.pth: {wanted}")
    assert not (workspace.root / "pwned").exists()


# Limits of the machine.


@pytest.mark.parametrize(("number", "wanted"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "fix the permissions")])
def test_a_full_or_locked_disk_is_one_line(capsys, number, wanted):
    with pytest.raises(SystemExit) as left, mistakes_as_lines():
        raise OSError(number, os.strerror(number), "data/x")
    assert left.value.code == 2
    printed = capsys.readouterr().err
    assert printed == f"error: data/x: {os.strerror(number)}; {wanted}, and start again: finished work is kept\n"


def test_an_error_of_the_program_itself_is_not_hidden():
    with pytest.raises(FileExistsError), mistakes_as_lines():
        raise FileExistsError(errno.EEXIST, "exists", "data/x")


def test_several_mistakes_are_several_lines(capsys):
    with pytest.raises(SystemExit), mistakes_as_lines():
        raise UserError(["a: wrong", "b: wrong"])
    assert capsys.readouterr().err == "error: a: wrong\nerror: b: wrong\n"


def test_a_mistake_with_a_line_break_in_a_name_is_one_line(capsys):
    with pytest.raises(SystemExit), mistakes_as_lines():
        raise UserError("FOLDER = a\nb\x1b[2J: an ä stays")
    assert capsys.readouterr().err == "error: FOLDER = a\\nb\\x1b[2J: an ä stays\n"
