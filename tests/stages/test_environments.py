"""The short pipeline in other environments: its outputs have the same bytes as an ordinary run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from workspace import ROOT, Workspace, assert_as_reference, environment, new_workspace

FIRST = ("scan", "teacher", "extract", "bag", "distill")
ANYWHERE = "Ünïcode mit Leerzeichen 数字 'x' $HOME"
STAGES_IN_TURN = """
import runpy, sys
for stage in sys.argv[1:]:
    sys.argv = [stage]
    try:
        runpy.run_module(f"stages.{stage}", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && ! touch "$0/x" 2>/dev/null && exec "$@"'  # $0: a folder


def run(folder: Path, *command: str, status: int = 0) -> subprocess.CompletedProcess:
    """Run a command of this code in a folder."""
    done = subprocess.run(command, cwd=folder, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=300)
    assert done.returncode == status, f"{done.stdout}{done.stderr}"
    return done


def emptied(workspace: Workspace) -> Workspace:
    for folder in ("data", "models", "reports", ".bingo"):
        shutil.rmtree(workspace.root / folder)
    return workspace


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a core")
def test_one_core(workspace, reference):
    emptied(workspace)
    server, cores = workspace.stages.server.pid, os.sched_getaffinity(0)
    os.sched_setaffinity(server, {min(cores)})  # and so the stages that it starts
    try:
        for stage in FIRST:
            workspace.done(stage)
    finally:
        os.sched_setaffinity(server, cores)
    for stage in FIRST:
        assert_as_reference(workspace, reference, stage)


def test_a_folder_of_any_name_and_no_visible_gpu(tmp_path, stages, reference):
    shutil.copytree(reference.root, tmp_path / ANYWHERE, symlinks=True)
    workspace = emptied(Workspace(tmp_path / ANYWHERE, stages))
    for stage in FIRST:
        workspace.done(stage, CUDA_VISIBLE_DEVICES="", BINGO_DEVICE="auto")
    for stage in FIRST:
        assert_as_reference(workspace, reference, stage)


@pytest.mark.parametrize("command", [["scan"], ["recipe", "list"], ["bags", "stats"]], ids=" ".join)
def test_a_command_outside_a_workspace_says_where_to_run_it(tmp_path, command):
    printed = run(tmp_path, sys.executable, "-c", "from bingo.cli.main import main; main()", *command, status=2)
    assert printed.stderr.startswith("error: ")
    assert printed.stderr.count("\n") == 1


@pytest.mark.slow
def test_images_in_a_read_only_folder(tmp_path, stages):
    """Permissions do not restrict root, so for root the folder is mounted read-only, if mounting is possible."""
    images = tmp_path / "images"
    for number in range(24):
        folder = images / ("train" if number < 16 else "val") / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (10 * number, 200 * (number % 2), 90)).save(folder / f"{number}.png")
    changes = {"dataset.source": "folder", "dataset.root": str(images), "dataset.store_px": None, "bagging.k": 3}
    changes |= {f"{schedule}.batch_anchors": 4 for schedule in ("teacher.pretrain", "distill")}
    workspace = new_workspace(tmp_path / "bingo", stages, changes)
    command = [sys.executable, "-c", STAGES_IN_TURN, *FIRST]
    if os.geteuid() == 0:
        unshare = ["unshare", "--mount", "sh", "-c", READ_ONLY, str(images)]
        if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here, and permissions do not restrict root")
        run(workspace.root, *unshare, *command)
    else:
        folders = [images, *(path for path in images.rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        try:
            run(workspace.root, *command)
        finally:
            for folder in folders:
                folder.chmod(0o755)
    assert (workspace.root / "models/student.safetensors").exists()
