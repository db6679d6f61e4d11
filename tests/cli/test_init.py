"""bingo init in a temporary workspace, with a given speed of the machine."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from bingo.cli.main import app
from bingo.nets.backbones import build_backbone
from bingo.nets.students import save_backbone
from bingo.params import load_params, read_yaml, validate
from bingo.planning import first_params
from bingo.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """A repository with the shipped parameters, and 40 small images of two classes in `images`."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for command in ("init -q", "add params.yaml", "-c user.name=a -c user.email=a@b commit -qm a"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    random = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(first_params, "measure_pace", lambda *_: first_params.Pace(8e10, 1e11, 5e10, 200.0, 4e10, (5e-5, 2e-6)))
    return tmp_path


def init(*arguments: str, mistake: bool = False) -> str:
    """The output of the command, or the lines of its user error."""
    done = CliRunner().invoke(app, ["init", *arguments])
    assert isinstance(done.exception, UserError) if mistake else done.exit_code == 0, done.output
    return "\n".join(done.exception.lines) if isinstance(done.exception, UserError) else done.output


def test_it_writes_parameters_for_the_folder_and_keeps_comments(workspace):
    shipped = (workspace / "params.yaml").read_text()
    init("images", "--minutes", "20", "--dry-run")
    assert (workspace / "params.yaml").read_text() == shipped
    init("images", "--minutes", "20")
    text, params = (workspace / "params.yaml").read_text(), load_params(workspace / "params.yaml")
    dataset, image = params.dataset, params.image
    assert (dataset.source, dataset.root, dataset.store_px, dataset.test_images) == ("folder", "images", 20, 8)
    assert (image.crop_px, params.teacher.source, params.student.stem) == (20, "pretrain", "small")
    assert (params.distill.batch_anchors, params.bagging.k, params.knn_eval.k) == (8, 3, [1, 10, 20])
    assert [line for line in shipped.splitlines() if "#" in line] == [line for line in text.splitlines() if "#" in line]
    assert text.count("\n") == shipped.count("\n")
    assert "params.yaml" in init("images", mistake=True)
    assert (workspace / "params.yaml").read_text() == text


@pytest.mark.parametrize(("options", "images"), [([], 40), (["--teacher", "dinov2-s"], 40), (["--student", "resnet50"], 1200)])
def test_the_minutes_that_are_proposed_are_enough(workspace, monkeypatch, options, images):
    slow = first_params.Pace(8e8, 1e9, 5e8, 20.0, 4e10, (5e-5, 2e-6))
    monkeypatch.setattr(first_params, "measure_pace", lambda *_: slow)
    for i in range(40, images):
        shutil.copy(workspace / "images/a/0.png", workspace / f"images/b/{i}.png")

    def proposed(said: str) -> list[int]:
        return [int(minutes) for minutes in re.findall(r"--minutes (\d+)", said.partition("warning: this is the shortest")[2])][1:]

    (least,) = proposed(init("images", *options, "--minutes", "1", "--dry-run"))
    said = init("images", *options, "--minutes", str(least), "--dry-run")
    assert proposed(said) == []
    if least > 3:
        assert proposed(init("images", *options, "--minutes", str(int(0.8 * least)), "--dry-run")) == [least]
    if for_all := re.findall(r"for all, give --minutes (\d+)", said):
        assert " are drawn" not in init("images", *options, "--minutes", *for_all, "--dry-run")
    assert bool(for_all) == (images > 1000)


def test_a_teacher_by_name_and_a_student(workspace):
    said = init("images", "--teacher", "dinov2-s", "--student", "mobilenetv3_large_100", "--minutes", "100000").splitlines()
    weights = "huggingface.co/timm/vit_small_patch14_dinov2.lvd142m"
    assert [line.partition(":")[0] for line in said if weights in line] == ["teacher"], "the student starts from no weights"
    written, params = read_yaml(workspace / "params.yaml")["teacher"], load_params(workspace / "params.yaml")
    assert (written["name"], written["checkpoint"], params.teacher.arch) == ("dinov2-s", None, "vit_small_patch14_dinov2.lvd142m")
    assert (params.teacher.image.crop_px, params.teacher.image.mean) == (224, [0.485, 0.456, 0.406])
    assert (params.student.arch, params.student.width) == ("mobilenetv3_large_100", 1.0)


@pytest.mark.slow
def test_a_file_is_recognised_by_its_published_name_or_needs_the_teachers_name(workspace):
    for name in ("moco_v2_800ep_pretrain.pth.tar", "mine.pth"):
        torch.save({"state_dict": {"module.encoder_q.conv1.weight": torch.ones(64, 3, 7, 7)}}, workspace / name)
    init("images", "--teacher", "moco_v2_800ep_pretrain.pth.tar", "--dry-run")
    assert "mine.pth" in init("images", "--teacher", "mine.pth", mistake=True)
    init("images", "--teacher", "moco-v2-r50-800", "--checkpoint", "mine.pth")
    written = read_yaml(workspace / "params.yaml")["teacher"]
    assert (written["name"], written["checkpoint"]) == ("moco-v2-r50-800", "mine.pth")


def test_weights_of_an_earlier_student_set_its_network_and_normalisation(workspace):
    shipped = validate(read_yaml(workspace / "params.yaml"), "params.yaml")
    network = shipped.student.model_copy(update={"arch": "resnet14t", "width": 0.25})
    image = shipped.image.model_copy(update={"mean": [0.4, 0.5, 0.6]})
    state = build_backbone("resnet14t", 0.25, "small", 0).state_dict()
    save_backbone(workspace / "former.safetensors", state, network, image, {})
    init("images", "--student-weights", "former.safetensors", "--minutes", "20")
    params = load_params(workspace / "params.yaml")
    assert (params.student.arch, params.student.width, params.student.weights) == ("resnet14t", 0.25, "former.safetensors")
    assert params.image.mean == [0.4, 0.5, 0.6]


def test_published_weights_set_the_standard_stem_and_normalisation(workspace):
    init("images", "--student", "tf_efficientnet_lite0.in1k", "--student-weights", "timm")
    params = load_params(workspace / "params.yaml")
    assert (params.student.stem, params.student.weights, params.image.mean) == ("imagenet", "timm", [0.5, 0.5, 0.5])


MISTAKES = [
    ["nothing"],
    ["images", "--student-weights", "absent.pth"],
    ["images", "--student-weights", "params.yaml"],
    ["params.yaml"],
    ["linked"],
    ["images", "--teacher", "dinov9"],
    ["images", "--teacher", "moco-v2-r50-800"],
    ["images", "--teacher", "dinov2-s", "--checkpoint", "~nobody-of-this-name/x"],
    ["images", "--teacher", "dinov2-s", "--checkpoint", "params.yaml"],
    ["images", "--teacher", "dinov2-s", "--checkpoint", "list.pth"],
    ["images", "--teacher", "list.pth"],
    ["images", "--student-weights", "list.pth"],
    ["images", "--student-weights", "empty.pth"],
    ["images", "--checkpoint", "images"],
    ["images", "--student", "resnet18.a1_in1k"],
    ["images", "--student", "resnet8"],
    ["images", "--student", "timm/resnet18"],
    ["images", "--student", "torchvision/resnet18.IMAGENET1K_V1"],
    ["images", "--student", "absent.py:make"],
    ["mixed"],
]


@pytest.mark.parametrize("arguments", MISTAKES, ids=str)
def test_mistakes_write_nothing_and_name_the_option_and_its_value(workspace, arguments):
    (workspace / "linked").mkdir()
    torch.save([1, 2], workspace / "list.pth")
    torch.save({"state_dict": {}}, workspace / "empty.pth")
    (workspace / "linked/0.png").symlink_to(workspace / "images/a/0.png")
    for split in ("train", "val"):
        shutil.copytree(workspace / "images/a", workspace / "mixed/all" / split)
    shipped = (workspace / "params.yaml").read_text()
    message = init(*arguments, mistake=True)
    assert arguments[-1] in message
    assert (arguments[-2] if len(arguments) > 1 else "FOLDER") in message
    assert not [section for section in ("dataset.", "teacher.", "student.") if section in message]
    assert (workspace / "params.yaml").read_text() == shipped


@pytest.mark.parametrize("state", ["untracked", "ignored", "staged", "no repository", "no git"])
def test_parameters_that_could_not_be_restored_are_kept(workspace, monkeypatch, state):
    params = workspace / "params.yaml"
    if state == "staged":
        params.write_text(params.read_text() + "\n")
        subprocess.run(["git", "add", "params.yaml"], check=True)
    elif state == "no repository":
        shutil.rmtree(workspace / ".git")
    elif state == "no git":
        monkeypatch.setenv("PATH", "")
    else:
        subprocess.run(["git", "rm", "-q", "--cached", "params.yaml"], check=True)
        (workspace / ".gitignore").write_text("params.yaml\n" if state == "ignored" else "")
        if state == "untracked":
            subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "b"], check=True)
    before = params.read_text()
    message = init("images", mistake=True)
    assert "params.yaml" in message
    assert ("git init" in message) == (state == "no repository")
    assert params.read_text() == before
    init("images", "--dry-run")


def test_names_with_any_characters_are_written_and_shown_in_one_line(workspace):
    folder = 'na me\'s "q": #${seed}\n\N{GRINNING FACE}'
    (workspace / "images").rename(workspace / folder)
    (workspace / folder / "a").rename(workspace / folder / "a\nb")
    lines = init(folder).splitlines()
    assert load_params(workspace / "params.yaml").dataset.root == folder
    assert [line.split(":")[0] for line in lines if ": " not in line] == []


@pytest.fixture
def empty(workspace, monkeypatch) -> Path:
    """A folder with a hidden file and a folder of images, not in a workspace."""
    folder = workspace / "images/new"
    shutil.copytree(workspace / "images/a", folder / "photos/cat")
    shutil.copytree(workspace / "images/b", folder / "photos/dog")
    (folder / ".venv").mkdir()
    for name in ("params.yaml", "dvc.yaml"):
        (workspace / name).unlink()
    monkeypatch.chdir(folder)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("git", [True, False])
def test_an_empty_folder_becomes_a_workspace(empty, workspace, git):
    if not git:
        shutil.rmtree(workspace / ".git")
    said = init("photos")
    assert load_params(empty / "params.yaml").dataset.root == "photos"
    assert {"dvc.yaml", "bingo", "stages", "recipes", ".dvc", "models", "reports"} <= names(empty)
    deps = {dep for stage in read_yaml(ROOT / "dvc.yaml")["stages"].values() for dep in stage.get("do", stage)["deps"]}
    assert not [dep for dep in deps if dep.startswith(("bingo/", "stages/", "recipes/")) and "$" not in dep and not (empty / dep).exists()]
    assert ("no_scm" in said, "no_scm" in (empty / ".dvc/config").read_text()) == (not git, not git)
    assert "params.yaml" in init("photos", mistake=True), "now it is a workspace, and its values must be restorable"


@pytest.mark.parametrize(
    "arguments", [["photos", "--dry-run"], ["nothing"], ["photos", "--teacher", "dinov9"], ["photos", "--student", "resnet8"]]
)
def test_a_dry_run_and_mistakes_leave_the_folder_empty(empty, arguments):
    init(*arguments, mistake="--dry-run" not in arguments)
    assert names(empty) == {"photos", ".venv"}


@pytest.mark.parametrize("other", ["notes.txt", "bingo", ".dvc", ".gitignore"])
def test_a_folder_that_is_not_empty_is_left_alone(empty, other):
    (empty / other).mkdir()
    message = init("photos", mistake=True)
    assert other in message
    assert "params.yaml" in message
    assert names(empty) == {"photos", ".venv", other}
