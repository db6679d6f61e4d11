"""Files written by commands: they never replace an output of a stage, and a place that is not writable is an error before any work."""

import os
import re
from pathlib import Path

import pytest
from command import bingo

from bingo.paths import NO_WEIGHTS
from bingo.pipeline.commands import check_folder, check_output, check_place, declared_outputs
from bingo.pipeline.process import mistakes_as_lines
from bingo.runtime.artefacts import NotWritten, new_directory, new_file, write_bytes
from bingo.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """The two files that make a folder a workspace."""
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


OUTPUTS = [
    "data/listing.parquet", "data/images.zarr/pack/00000", "data/embeddings.zarr/features.npy", "models/teacher.safetensors",
    "models/best/student.safetensors", "models/linear/moco.safetensors", "models/baselines/seed.safetensors", "reports/index.html",
    "reports/plots/teacher.csv", "reports/coco/x.json", "data/../models/student.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("there", [False, True])
def test_no_command_may_write_to_an_output_of_a_stage(workspace, tmp_path_factory, monkeypatch, output, there):
    """By relative and absolute paths, by a link to its folder, and from another folder; whether the output exists or not."""
    if there:
        write_bytes(workspace / "x" / output.replace("../", ""), b"")
        write_bytes(workspace / output, b"of the stage")
    (workspace / "data").mkdir(exist_ok=True)
    (workspace / "link").symlink_to(workspace)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for here, path in (
        (workspace, output),
        (workspace, workspace / output),
        (workspace, f"link/{output}"),
        (elsewhere, workspace / output),
    ):
        monkeypatch.chdir(here)
        with pytest.raises(UserError, match="which only a stage may replace"):
            check_output("--out", Path(path), [Path(path).suffix], force=True)
    if there:
        assert (workspace / output).read_bytes() == b"of the stage"


@pytest.mark.parametrize(
    "path", ["data/mine.parquet", "models/mine.safetensors", "reports/mine.html", "listing.parquet", "out/data/listing.parquet"]
)
def test_other_places_in_a_workspace_are_allowed(workspace, path):
    check_output("--out", Path(path), [Path(path).suffix], force=False)
    assert sorted(found.name for found in workspace.iterdir()) == ["dvc.yaml", "params.yaml"]


def test_every_output_of_the_pipeline_is_known(workspace):
    outputs = declared_outputs(workspace)
    assert {"data/bags.zarr", "reports/bags.json", "reports/plots/teacher.csv", "models/baselines/${item}.safetensors"} <= set(outputs)
    assert declared_outputs(workspace, "scan") == ["data/listing.parquet", "data/images.zarr"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("embed", ".", "--out", "data/listing.parquet", "--force"),
        ("export", "--to", "timm", "--out", "models/teacher.safetensors", "--force"),
        ("export", "--to", "hub", "--out", "models/best", "--force"),
        ("bags", "export", "--out", "data/listing.parquet", "--force"),
        ("bags", "gallery", "--out", "data/bags.zarr"),
    ],
)
def test_no_command_replaces_an_output_of_a_stage(workspace, arguments):
    done = bingo(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "which only a stage may replace" in done.stderr


UNWRITABLE = {
    "/proc": "/proc/x{}", "below /proc": "/proc/x/y/z{}", "/sys": "/sys/x{}", "a file": "file/x{}", "a link to nothing": "nowhere/x{}",
    "a link to itself": "loop/x{}", "a long name": "n" * 248 + "{}", "a long folder": "n" * 256 + "/x{}", "a device": "/dev/null/x{}",
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("init|", "init"), ("init|images|--teacher|", "--teacher"), ("recipe|use|method-seed|--root| ", "--root"),
        ("experiments|--rev=", "--rev="), ("experiments||method-seed", "experiments"),
        ("embed|\t|--out|x.npy", "embed"), ("bags|find|", "find"), ("bags|diff| |v1", "diff"),
        ("linear_eval|", "linear_eval"), ("bags|gallery|--rev|", "--rev"),
    ],
)  # fmt: skip
def test_an_empty_argument_is_an_error_in_one_line_before_any_work(workspace, arguments, named):
    done = bingo(*arguments.split("|"))
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert re.match(rf"error: (the argument after )?{named} is empty: ", done.stderr)
    assert sorted(path.name for path in workspace.iterdir()) == ["dvc.yaml", "params.yaml"]


@pytest.mark.parametrize("place", UNWRITABLE)
@pytest.mark.parametrize(
    "command",
    [
        ("embed", ".", "--out", ".npy"), ("export", "--to", "onnx", "--out", ".onnx"), ("export", "--to", "hub", "--out", ""),
        ("bags", "show", "5", "--out", ".png"), ("bags", "export", "--out", ".parquet"),
    ],
)  # fmt: skip
def test_a_place_that_is_not_writable_is_an_error_in_one_line_before_any_work(workspace, place, command):
    Path("file").touch()
    Path("nowhere").symlink_to("/gone/from/here")
    Path("loop").symlink_to("loop")
    done = bingo(*command[:-1], UNWRITABLE[place].format(command[-1]))
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: --out")
    assert sorted(path.name for path in workspace.iterdir()) == ["dvc.yaml", "file", "loop", "nowhere", "params.yaml"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(workspace):
    Path("locked").mkdir(0o555)
    with pytest.raises(UserError, match="cannot be written"):
        check_place("--out", Path("locked/x.npy"))
    with pytest.raises(UserError, match="cannot be written"):
        check_folder("--out", Path("locked/hub"), [], force=False)


@pytest.mark.parametrize(
    "write", [lambda path: write_bytes(path, b"x"), lambda path: new_file(path).__enter__(), lambda path: new_directory(path).__enter__()]
)
@pytest.mark.parametrize("place", ["nowhere/x", "file/x", "/proc/x/y", "nowhere/below/x"])
def test_a_stage_that_cannot_write_its_output_names_the_place(workspace, capsys, write, place):
    """For example, if data/ is a link to a disk that is not mounted."""
    Path("file").touch()
    Path("nowhere").symlink_to("/gone/from/here")
    with pytest.raises(NotWritten) as error:
        write(place)
    assert Path(place).is_relative_to(str(error.value.filename))
    with pytest.raises(SystemExit) as left, mistakes_as_lines():
        write(place)
    said = capsys.readouterr().err
    assert (left.value.code, said.count("\n")) == (2, 1)
    assert said.startswith(f"error: {error.value.filename}: ")


def test_errors_of_reading_inside_a_write_keep_their_kind(workspace):
    with pytest.raises(FileNotFoundError) as error, new_file("out") as partial:
        partial.write_bytes(Path("absent").read_bytes())
    assert not isinstance(error.value, NotWritten)
    assert not Path("out").exists()


@pytest.mark.parametrize("file", ["models/start.safetensors", "models/supervised.safetensors", "models/linear/student.safetensors", "own"])
def test_a_file_that_says_no_weights_is_not_called_damaged(workspace, file):
    write_bytes(file, NO_WEIGHTS)
    for done in (
        bingo("export", "--to", "timm", "--student", file, "--out", "x.safetensors"),
        bingo("embed", ".", "--student", file, "--out", "x.npy"),
    ):
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {file}: contains no weights")
