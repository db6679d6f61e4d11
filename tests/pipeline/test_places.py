"""Paths in parameters and arguments, in any form: from any folder of the workspace, and in DVC's copies of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fabricated import make_workspace
from PIL import Image
from ruamel.yaml import YAML
from torch import nn
from typer.testing import CliRunner
from workspace import ROOT, Done, Stages, environment

from bingo.cli import browse
from bingo.nets.backbones import build_backbone
from bingo.nets.heads import mlp_head
from bingo.nets.students import save_student
from bingo.params import load_params, read_yaml, validate
from bingo.params.places import located
from bingo.pipeline import commands
from bingo.runtime.errors import UserError

SMALL = {"arch": "resnet18", "width": 0.125, "stem": "small"}
TUNE = {"epochs": 1, "batch_images": 8, "drop_epochs": None}


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """The current folder is DVC's copy of the workspace `original`, which is a folder in its repository."""
    original = tmp_path / "original"
    copy = original / ".dvc/tmp/exps/copy"
    for folder in (copy / ".dvc", copy / "sub/tracked", original / "sub/tracked", original / "sub/ignored", original / "tracked"):
        folder.mkdir(parents=True, exist_ok=True)
    (copy / "sub/tracked/list.txt").touch()
    monkeypatch.chdir(copy / "sub")
    monkeypatch.setenv("DVC_ROOT", str(original))
    return original


def test_files_missing_in_a_copy_are_found_in_the_original(copy, monkeypatch):
    assert located("tracked") == "tracked"
    assert located("ignored") == str(copy / "sub/ignored")
    assert located("absent/at all") == str(copy / "sub/absent/at all")  # the place of a download, and of messages
    assert located("/ignored") == "/ignored"
    monkeypatch.setenv("HOME", "/home/somebody")
    assert located("~/a b") == "/home/somebody/a b"
    assert located("./~/x") == str(copy / "sub/~/x")
    with pytest.raises(ValueError, match="no user ~nobody-of-this-name; write the whole path"):
        located("~nobody-of-this-name/x")


@pytest.mark.parametrize("path", ["", " ", "a\0b", "a/" + "b" * 256 + "/c", "\u00e9" * 128])
def test_impossible_names_of_files_are_refused(path):
    for key in (("dataset", "root"), ("student", "weights"), ("teacher", "checkpoint"), ("supervised",)):
        params = read_yaml(ROOT / "params.yaml")
        section = params[key[0]] if len(key) > 1 else params
        section[key[-1]] = path
        with pytest.raises(UserError, match=f"{'.'.join(key)} = .*: allowed is a path"):
            validate(params, "params.yaml")


@pytest.mark.parametrize("kept", [".gitignore", "train/.gitkeep", "README.md", "link"])
def test_the_tracked_part_of_an_ignored_folder_does_not_replace_the_folder(copy, kept):
    place = Path("kept", kept)
    place.parent.mkdir(parents=True)
    if kept == "link":  # relative to a file next to the original
        place.parent.rmdir()
        Path("kept").symlink_to("../../images")
    else:
        place.touch()
    assert located("kept") == str(copy / "sub/kept")
    if kept != "link":
        Path("kept/train").mkdir(exist_ok=True)
        Path("kept/train/1.png").touch()
        assert located("kept") == "kept"


def test_without_a_copy_a_path_is_not_changed(copy, monkeypatch):
    monkeypatch.chdir(copy / "sub")
    (copy / ".dvc").mkdir(exist_ok=True)
    assert located("absent") == "absent"  # dvc repro sets DVC_ROOT too
    monkeypatch.delenv("DVC_ROOT")
    assert located("absent") == "absent"


def test_every_path_of_the_parameters_is_located(copy):
    raw = read_yaml(ROOT / "params.yaml")
    raw["dataset"] |= {"source": "folder", "root": "ignored"}
    raw["teacher"] |= {"source": "checkpoint", "checkpoint": "ignored/teacher.pth"}
    raw["transfer_coco"] |= {"root": "ignored", "val_images": str(copy)}
    split = {"percent": 1.0, "trunk_lr": 0.1, "head_lr": 0.1, "linear_lr": 0.1}
    raw["semi_eval"]["splits"] = {"one": {**split, "list_file": "ignored/one.txt"}, "none": {**split, "list_file": None}}
    raw["transfer"]["datasets"] = {
        "photos": {"source": "folder", "root": "ignored", "store_px": None, "train_images": None, "test_images": None}
    }
    params, folder = validate(raw, "params.yaml"), str(copy / "sub/ignored")
    assert params.dataset.root == folder
    assert params.teacher.checkpoint == f"{folder}/teacher.pth"
    assert (params.transfer_coco.root, params.transfer_coco.val_images) == (folder, str(copy))
    assert [split.list_file for split in params.semi_eval.splits.values()] == [f"{folder}/one.txt", None]
    assert params.transfer.datasets["photos"].root == params.transfer_set("photos").root == folder
    raw["dataset"]["root"] = raw["transfer_coco"]["train_images"] = "~nobody-of-this-name"
    with pytest.raises(UserError) as caught:
        validate(raw, "params.yaml")
    assert len(caught.value.lines) == 2
    assert all(" = '~nobody-of-this-name': this machine has no user" in line for line in caught.value.lines)


@pytest.fixture
def below(tmp_path, monkeypatch) -> Path:
    """A workspace with images; the current folder is two levels below it."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for name in ("recipes", "bingo", "stages"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    monkeypatch.setattr(commands, "_stands", Path())
    return tmp_path


def test_the_workspace_is_found_from_its_folders_and_arguments_are_seen_from_there(below):
    commands.enter_workspace()
    assert Path.cwd() == below
    assert commands.from_here("--out", Path("x.npy")) == below / "a/b/x.npy"
    assert commands.from_here("--out", Path("../x.npy")) == below / "a/b/../x.npy"
    assert commands.from_here("--out", Path("/x.npy")) == Path("/x.npy")
    with pytest.raises(UserError, match="--out = ~nobody-of-this-name/x: this machine has no user"):
        commands.from_here("--out", Path("~nobody-of-this-name/x"))


def test_paths_are_printed_as_the_user_sees_them(below):
    commands.enter_workspace()
    for given, shown in [
        (Path("models/x.pt"), "../../models/x.pt"),
        (commands.from_here("--out", Path("x.npy")), "x.npy"),
        (commands.from_here("--out", Path("../x.npy")), "../x.npy"),
        (Path("/elsewhere/x"), "/elsewhere/x"),
    ]:
        assert commands.as_seen_from_here(given) == shown


def test_a_picture_is_named_relative_to_the_current_folder(tmp_path, monkeypatch):
    make_workspace(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "a").mkdir()
    for where, more in (("a", []), ("a", ["--out", "own.png"]), (".", [])):
        monkeypatch.setattr(commands, "_stands", Path())
        monkeypatch.chdir(tmp_path / where)
        commands.enter_workspace()
        line = CliRunner().invoke(browse.app, ["show", "5", *more]).stdout.splitlines()[-1]
        assert (tmp_path / where / line.removeprefix("picture: ")).is_file()
        assert not Path(line.removeprefix("picture: ")).is_absolute()


def test_in_a_workspace_and_outside_of_any_the_current_folder_is_kept(below, tmp_path_factory, monkeypatch):
    (below / "a/b/params.yaml").touch()
    commands.enter_workspace()
    assert Path.cwd() == below / "a/b"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    commands.enter_workspace()
    assert Path.cwd() == elsewhere
    assert commands.from_here("--out", Path("x")) == Path("x")


def bingo(stages: Stages, *arguments: str, folder: Path, module: str = "bingo.cli.main") -> Done:
    return stages.start_module(" ".join([module, *arguments]), folder).wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("bags", "show", "5"),
        ("bags", "stats"),
        ("export", "--to", "timm", "--out", "x.safetensors"),
        ("embed", ".", "--out", "x.npy"),
    ],
)
def test_outside_a_workspace_the_advice_is_to_change_into_one(below, stages, command):
    """Inside a workspace, the advice for a missing artefact is `dvc repro`."""
    for folder, outside in ((below / "a/b", False), (below.parent, True)):
        done = bingo(stages, *command, folder=folder)
        assert done.status == 2, done.err
        assert ("dvc" in done.err, "params.yaml" in done.err) == (True, outside), done.err


@pytest.mark.parametrize("root", ["../../photos", "photos", "/photos", "~/photos", "../../../photos"])
def test_a_recipe_is_used_from_a_folder_of_the_workspace(below, stages, root):
    done = bingo(stages, "recipe", "use", "imagenet-r18-bingo-r50-200ep", "--root", root, folder=below / "a/b")
    assert done.status == 0, done.err
    expected = {"../../photos": "photos", "photos": "a/b/photos", "../../../photos": "../photos"}
    assert read_yaml(below / "params.yaml")["dataset"]["root"] == expected.get(root, root)


def test_a_stage_by_name_runs_from_a_folder_of_the_workspace(below, stages):
    done = bingo(stages, "scan", folder=below / "a/b")
    assert done.status == 0, done.err
    assert (below / "data/listing.parquet").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("", None),
        ("--halp", "error: No such option"),
        ("recip", "error: No such command 'recip'"),
        ("bags", None),
        ("bags find x --k five", "error: --k = five: allowed is a whole number"),
        ("bags find", "error: IMAGE is missing"),
        ("embed x --out y.npy --batch-images 0", "error: --batch-images = 0: allowed is "),
        ("embed x --out y.npy --on-bad-image maybe", "error: --on-bad-image = maybe: allowed is one of 'stop', 'skip'"),
        ("embed x", "error: --out is missing"),
        ("scan more", "error: Got unexpected extra argument"),
        ("recipe use a --root", "error: Option '--root' requires an argument"),
    ],
)
def test_python_m_runs_the_command_and_reports_errors_in_one_line(below, stages, arguments, line):
    done = bingo(stages, *arguments.split(), folder=below)
    assert done.status == 2
    assert "Traceback" not in done.err
    if line is not None:
        assert done.err.startswith(line)
        assert done.err.endswith(" --help\n")
        assert done.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("seeds --seeds x", "error: --seeds = x: allowed is a whole number"),
        ("seeds --seeds", "error: argument --seeds: expected at least one argument"),
        ("compare", "error: the following arguments are required: --variants"),
        ("compare --variants a --jobs 1.5", "error: --jobs = 1.5: allowed is a whole number"),
        ("compare --variants a --sneeds 1", "error: unrecognized arguments: --sneeds 1"),
    ],
)
def test_the_benchmarks_report_errors_in_one_line(arguments, line):
    done = subprocess.run([sys.executable, "-m", *f"benchmarks.{arguments}".split()], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def photos(root: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 4, 16, 16, 3), np.uint8)
    for s, split in enumerate(("train", "val")):
        for c, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(pixels[s, c, i]).save(root / split / name / f"{name}{i}.png")


PIPELINE = """
stages:
  scan:
    cmd: exec python -m stages.scan
    params: [seed, dataset]
    outs: [data/listing.parquet, data/images.zarr]
  teacher:
    cmd: exec python -m stages.teacher
    deps: [data/listing.parquet]
    params: [seed, image, teacher]
    outs: [models/teacher.safetensors, reports/teacher.json, reports/plots/teacher.csv]
  semi_eval:
    foreach: ${semi_eval.splits}
    do:
      cmd: exec python -m stages.semi_eval "$DVC_STAGE"
      deps: [data/listing.parquet, data/images.zarr, models/student.safetensors]
      params: [seed, image, semi_eval]
      outs: ["reports/semi/${key}.json"]
"""


@pytest.fixture
def repository(tmp_path) -> Path:
    """A repository of Git and DVC with images, a teacher and a list of labels, which Git ignores and the parameters name by relative
    paths."""
    root = tmp_path / "repository"
    photos(root / "given/photos")
    (root / "given/list.txt").write_text("cat0.png\ncat2.png\ndog1.png\n")
    query = nn.Module()
    query.encoder_q = build_backbone(*SMALL.values(), 0)
    query.encoder_q.fc = mlp_head([64, 64, 128], 0)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in query.state_dict().items()}}, root / "given/moco.pth.tar")
    raw = read_yaml(ROOT / "params.yaml")
    raw["dataset"] |= {"source": "folder", "root": "given/photos", "store_px": 16}
    raw["teacher"] |= {"source": "checkpoint", "checkpoint": "given/moco.pth.tar", **SMALL}
    raw["student"] |= SMALL
    raw["baselines"], raw["linear_eval"]["crops"]["nets"] = [], []
    raw["distill"]["batch_anchors"] = raw["teacher"]["pretrain"]["batch_anchors"] = 4
    raw["bagging"]["k"] = 2
    rates = {"trunk_lr": 0.1, "head_lr": 0.1, "linear_lr": 0.1}
    raw["semi_eval"]["splits"] = {"few": {"percent": 50.0, "list_file": "given/list.txt", **rates}}
    for protocol in ("finetune", "linear"):
        raw["semi_eval"][protocol] |= TUNE
    with open(root / "params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(raw, file)
    (root / "dvc.yaml").write_text(PIPELINE)
    for name in ("bingo", "stages"):  # a workspace has its own code
        (root / name).symlink_to(ROOT / name)
    (root / ".gitignore").write_text("/given/\n/.bingo/\n")
    params = load_params(root / "params.yaml")
    files = root / "models/student.safetensors", root / "models/student_head.safetensors"
    save_student(*files, build_backbone(*SMALL.values(), 1), nn.Identity(), params.student, params.image, {})
    return root


def test_a_dvc_experiment_finds_ignored_files_and_its_outputs_do_not_depend_on_the_form_of_paths(repository, tmp_path):
    identity = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in (("NAME", "a"), ("EMAIL", "a@b"))}
    folders = {name: str(tmp_path / "dvc") for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR")}
    variables = environment(**identity, **folders, GIT_CONFIG_GLOBAL=os.devnull, DVC_NO_ANALYTICS="1", HOME=str(tmp_path))

    def run(*command: str) -> str:
        program = [sys.executable, "-m", "dvc"] if command[0] == "dvc" else [command[0]]
        done = subprocess.run([*program, *command[1:]], cwd=repository, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    run("git", "init", "-q")
    run("dvc", "init", "-q")
    run("git", "add", "-A")
    run("git", "commit", "-qm", "a workspace")
    run("dvc", "exp", "run", "--temp", "-n", "relative")
    home = [f"dataset.root='~/{repository.name}/given/photos'", f"teacher.checkpoint={repository}/given/moco.pth.tar"]
    home.append(f"semi_eval.splits.few.list_file={repository}/given/list.txt")
    run("dvc", "exp", "run", "-n", "home", *(word for override in home for word in ("-S", override)))
    run("git", "checkout", "-q", "--", ".")
    run("dvc", "exp", "run", "--queue", "-n", "queued", "-S", "seed=1", "teacher")
    run("dvc", "exp", "run", "--run-all")
    locks = {}
    for ref in run("git", "for-each-ref", "--format=%(refname)", "refs/exps").split():
        if (name := ref.rpartition("/")[2]) in ("relative", "home", "queued"):
            stages = YAML(typ="safe", pure=True).load(run("git", "show", f"{ref}:dvc.lock"))["stages"]
            locks[name] = {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}
    assert {"data/listing.parquet", "models/teacher.safetensors", "reports/semi/few.json"} < set(locks["home"])
    assert locks["relative"] == locks["home"]
    assert set(locks["queued"]) == set(locks["home"]) - {"reports/semi/few.json"}
