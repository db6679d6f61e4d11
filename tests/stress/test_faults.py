"""A disk that is full or read-only: an error in one line, no incomplete files, and the next run resumes when there is room.

A full disk is simulated in three ways: by a limit of the length of files (RLIMIT_FSIZE), by a temporary name that leads to /dev/full, and,
if mounting is allowed, by a small tmpfs.
"""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fabricated import make_workspace
from workspace import Done, Running, Workspace, assert_as_reference, remove, saved_step, until

from bingo.embeddings.files import SUFFIXES, write_embeddings
from bingo.export.contract import find_target
from bingo.export.run import export_network
from bingo.pipeline.process import mistakes_as_lines
from bingo.runtime.artefacts import new_directory, new_file, write_json
from tests.cli.test_browse import bingo_bags
from tests.export.test_export import TINY, network

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits another process, fills /dev/full, mounts")
GOES_ON = "resuming from a checkpoint"
WAY_OUT = "free some space, and start again: finished work is kept"


def limit(running: Running, most_bytes: int) -> None:
    """From now on, the process cannot write files larger than this."""
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (most_bytes, most_bytes))


@contextmanager
def little_room(most_bytes: int) -> Iterator[None]:
    """The same in this process, within the body."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_one_line(done: Done, path: str, reason: str, way_out: str = WAY_OUT) -> None:
    assert done.status == 2, done
    assert re.fullmatch(rf"error: \S*{re.escape(path)}\S*: {reason}; {way_out}[^\n]*\n", done.err), done.err


def assert_nothing_half_written(workspace: Workspace, reference: Workspace, stage: str) -> None:
    """Every output that exists is complete, and there are no temporary files next to it."""
    found, whole = workspace.existing_files(*workspace.outputs(stage)), reference.files()
    assert found.items() <= whole.items()
    assert not list(workspace.root.rglob("*.partial"))


@pytest.mark.parametrize(
    ("stage", "most_bytes", "path"),
    [
        ("scan", 4000, "data/images.zarr"),
        ("extract", 2000, ".bingo/state/extract/"),
        ("bag", 1500, "data/bags.zarr"),
        ("report", 4000, "reports/index.html"),
    ],
)
def test_a_stage_without_room_for_its_output(workspace, reference, stage, most_bytes, path):
    remove(workspace, *workspace.outputs(stage))
    running = workspace.start(stage)
    limit(running, most_bytes)
    assert_one_line(running.wait(), path, "File too large")
    assert_nothing_half_written(workspace, reference, stage)
    workspace.done(stage)
    assert_as_reference(workspace, reference, stage)


def test_a_training_without_room_resumes_from_the_last_checkpoint(workspace, reference):
    """First there is no space for a checkpoint, then for the last output."""
    remove(workspace, *workspace.outputs("teacher"))
    training = workspace.start("teacher", BINGO_CHECKPOINT_SECONDS="0")
    until(lambda: saved_step(workspace, "teacher") >= 1, training.ended)
    limit(training, 4000)
    assert_one_line(training.wait(), "checkpoints/step-", "File too large")
    assert saved_step(workspace, "teacher") >= 1
    assert_nothing_half_written(workspace, reference, "teacher")
    (workspace.root / "reports/plots/.teacher.csv.partial").symlink_to("/dev/full")
    done = workspace.run("teacher", BINGO_CHECKPOINT_SECONDS="0")
    assert GOES_ON in done.out
    assert_one_line(done, "reports/plots/teacher.csv", "No space left on device")
    assert saved_step(workspace, "teacher") == 36
    assert_nothing_half_written(workspace, reference, "teacher")
    assert GOES_ON in workspace.done("teacher").out
    assert_as_reference(workspace, reference, "teacher")


def test_small_files_on_a_full_disk(workspace, reference):
    """The last of several outputs; and the record of the run, without which the outputs are still complete."""
    remove(workspace, "reports/linear/pixels.json", ".bingo/runs/linear_eval.json")
    for name in ("reports/linear/.pixels.json.partial", ".bingo/runs/.linear_eval.json.partial"):
        (workspace.root / name).symlink_to("/dev/full")
    assert_one_line(workspace.run("linear_eval"), "reports/linear/pixels.json", "No space left on device")
    assert not (workspace.root / "reports/linear/.pixels.json.partial").is_symlink()
    done = workspace.run("linear_eval")
    assert done.status == 0
    assert re.fullmatch(r"warning: .bingo/runs/linear_eval.json: No space left on device; [^\n]*\n", done.err)
    assert_as_reference(workspace, reference, "linear_eval")
    assert not list(workspace.root.rglob("*.partial"))


@contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[None]:
    """A mount at `folder`; the test is skipped if mounting is not allowed."""
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_small_disk_for_checkpoints(workspace, reference):
    remove(workspace, *workspace.outputs("distill"))
    state = workspace.root / ".bingo/state"
    state.mkdir(exist_ok=True)
    with mounted(state, "-t", "tmpfs", "-o", "size=300k", "tmpfs"):
        assert_one_line(workspace.run("distill", BINGO_CHECKPOINT_SECONDS="0"), "checkpoints/step-", "No space left on device")
        assert_nothing_half_written(workspace, reference, "distill")
        subprocess.run(["mount", "-o", "remount,size=30m", str(state)], check=True)
        workspace.done("distill", BINGO_CHECKPOINT_SECONDS="0")
        assert_as_reference(workspace, reference, "distill")


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make `folder` read-only; because permissions do not restrict root, it gets a mount for root."""
    if os.geteuid() == 0:
        with mounted(folder, "--bind", "-o", "ro", str(folder)):
            yield
        return
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize(("stage", "folder"), [("scan", "data"), ("extract", ".bingo")])
def test_a_read_only_folder(workspace, stage, folder):
    before = workspace.existing_files()
    with read_only(workspace.root / folder):
        done = workspace.run(stage)
    assert_one_line(done, folder, "(Read-only file system|Permission denied)", "fix the permissions")
    assert workspace.existing_files() == before


# Other writers of files.


def assert_no_room(capsys, path: str) -> None:
    assert re.fullmatch(rf"error: \S*{re.escape(path)}: File too large; {WAY_OUT}\n", capsys.readouterr().err)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_embeddings_of_a_folder(tmp_path, capsys, suffix):
    rows = np.random.default_rng(0).random((200, 50)).astype(np.float32)
    names = [f"{row}.png" for row in range(200)]
    with pytest.raises(SystemExit) as left, mistakes_as_lines(), little_room(2000):
        write_embeddings(tmp_path / f"e{suffix}", names, 50, [rows], {})
    assert left.value.code == 2
    assert_no_room(capsys, f"e{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["timm", "torchvision", "hub"])
def test_an_export(tmp_path, capsys, to):
    target = find_target(to)
    out = tmp_path / "".join(["net", *target.SUFFIXES[:1]])
    with pytest.raises(SystemExit) as left, mistakes_as_lines(), little_room(2000):
        export_network(network("torchvision/resnet18", 1.0, "imagenet") if to != "timm" else network(*TINY), target, out)
    assert left.value.code == 2
    assert_no_room(capsys, out.name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("most_bytes", [300, 6000])
def test_a_gallery(tmp_path, monkeypatch, most_bytes):
    """The sheets of thumbnails, and the page."""
    make_workspace(tmp_path, train_rows=150)
    monkeypatch.chdir(tmp_path)
    with little_room(most_bytes):
        code, out, err = bingo_bags("gallery")
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: \S+: File too large; {WAY_OUT}\n", err)
    assert not list((tmp_path / ".bingo").rglob("*.partial"))
    assert not (tmp_path / ".bingo/gallery").exists()
    assert bingo_bags("gallery")[0] == 0


# The file named by an error.


def test_errors_name_the_file_that_was_to_be_written(tmp_path):
    path = tmp_path / "out.json"
    (tmp_path / ".out.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as raised:
        write_json(path, 1)
    assert raised.value.filename == str(path)
    for writer in (new_file, new_directory):
        with pytest.raises(FileNotFoundError) as other, writer(path):
            Path(tmp_path / "input").read_bytes()
        assert other.value.filename == str(tmp_path / "input"), "an error of an input keeps the input's name"
    assert not list(tmp_path.iterdir())
