"""Bags of a Git revision or a DVC experiment: from the cache or from the remote, with an error in one line if neither has them."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command import bingo
from fabricated import make_workspace

from bingo.bags.index import read_bags
from bingo.cli.browse_source import BagSource
from bingo.images.listing import read_listing
from bingo.runtime.artefacts import read_json
from tests.cli.test_browse import bingo_bags, mistake

PIPELINE = """stages:
  bag:
    cmd: "true"
    outs: [data/listing.parquet, data/images.zarr, data/bags.zarr]
"""
IDENTITY = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in (("NAME", "a"), ("EMAIL", "a@b"))}


def run(*command):
    program = [sys.executable, "-m", "dvc"] if command[0] == "dvc" else [command[0]]
    done = subprocess.run([*program, *command[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fingerprint_of_the_workspace(root):
    """All files except those of Git and DVC and those that the commands write."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not {".git", ".dvc", ".bingo"} & set(path.parts)]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}, run("git", "status", "--porcelain")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """v0: a pipeline that has not run; v1: bags with k = 4; experiment k6: bags with k = 6; the workspace: other images. A remote has
    everything."""
    root, patch = tmp_path_factory.mktemp("repository"), pytest.MonkeyPatch()
    for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR"):
        patch.setenv(name, str(tmp_path_factory.mktemp("dvc")))
    for name, value in {**IDENTITY, "GIT_CONFIG_GLOBAL": os.devnull, "DVC_NO_ANALYTICS": "1"}.items():
        patch.setenv(name, value)
    patch.chdir(root)
    run("git", "init", "-q")
    run("dvc", "init", "-q")
    run("dvc", "remote", "add", "-q", "-d", "there", str(tmp_path_factory.mktemp("remote")))
    Path(".gitignore").write_text(".bingo/\n")
    Path("dvc.yaml").write_text(PIPELINE)
    run("git", "add", "-A")
    run("git", "commit", "-qm", "a pipeline")
    run("git", "tag", "v0")
    make_workspace(root, k=4)
    run("dvc", "commit", "-fq")
    run("git", "add", "-A")
    run("git", "commit", "-qm", "bags")
    run("git", "tag", "v1")
    run("dvc", "push", "-q")
    make_workspace(root, k=6)
    run("dvc", "commit", "-fq")
    run("dvc", "push", "-q")
    run("dvc", "exp", "save", "-n", "k6")
    run("git", "checkout", "-q", "--", ".")
    make_workspace(root, train_rows=50)
    yield root
    patch.undo()


def test_reading_a_revision_leaves_the_workspace_alone(repository):
    before = fingerprint_of_the_workspace(repository)
    for name, k in (("v1", 4), ("k6", 6), ("HEAD", 4)):
        code, out, _ = bingo_bags("show", 5, "--rev", name)
        assert code == 0
        lines = out.splitlines()
        assert lines[0] == f"row 5  class/image_0005.png  label cat  (knn, k {k})"
        assert len(lines) == 2 + k + 1
        assert lines[-1] == f"picture: .bingo/sheets/bag-5@{name}.png"
    assert bingo_bags("stats", "--rev", "k6")[1].startswith("data/bags.zarr of k6: knn bags of 60 rows of fabricated, k 6\n")
    assert fingerprint_of_the_workspace(repository) == before


def test_a_revision_gives_the_output_of_its_workspace(repository, tmp_path, monkeypatch):
    bingo_bags("show", 5, "--rev", "k6", "--out", tmp_path / "revision.png")
    make_workspace(tmp_path, k=6)
    listing = read_listing(tmp_path / "data/listing.parquet")
    index = read_bags(tmp_path / "data/bags.zarr", listing)
    members = index.members(5).tolist()
    lines = bingo_bags("show", "class/image_0005.png", "--rev", "k6")[1].splitlines()
    assert [int(line.split()[1]) for line in lines[2:-1]] == members
    assert bingo_bags("export", "--rev", "k6", "--out", tmp_path / "k6.parquet")[0] == 0
    assert pq.read_table(tmp_path / "k6.parquet")["member"].to_pylist() == index.table.members_TK.ravel().tolist()


@pytest.mark.parametrize("inside", [True, False])
def test_an_opened_revision_is_read_after_the_process_changes_its_folder(repository, tmp_path, monkeypatch, inside):
    bags = [BagSource("k6") for _ in range(2)]
    before = bags[0][5].picture().tobytes(), bags[0].index.members(9).tolist(), bags[0].metrics
    monkeypatch.chdir(repository / "data" if inside else tmp_path)
    assert (bags[1][5].picture().tobytes(), bags[1].index.members(9).tolist(), bags[1].metrics) == before


def test_diff_of_two_revisions(repository):
    code, out, _ = bingo_bags("diff", "v1", "k6")
    assert code == 0
    assert out.startswith("before: v1 (knn, k 4)\nafter: k6 (knn, k 6)\n")
    assert "mean 0.6667" in out  # four of six neighbours are the same
    assert "only bags of one listing can be compared" in mistake("diff", "v1", "workspace")


def test_gallery_of_a_revision(repository):
    code, out, _ = bingo_bags("gallery", "--rev", "v1")
    assert (code, out) == (0, "gallery: .bingo/gallery@v1/index.html\n")
    assert read_json(".bingo/gallery@v1/made_from.json")


def test_revisions_that_cannot_be_read(repository):
    assert "is empty" in mistake("show", 5, "--rev", "")
    assert "is empty" in mistake("diff", " ", "v1")
    line = mistake("show", 5, "--rev", "nowhere")
    for name in ("nowhere", "HEAD^{tree}", "HEAD:params.yaml"):
        assert bingo("experiments", "--rev", name) == (2, "", line.replace("nowhere", name))
        assert mistake("show", 5, "--rev", name) == line.replace("nowhere", name)
    assert "--rev = workspace" in bingo("experiments", "--rev", "workspace")[2]
    assert line.startswith("error: nowhere: is neither a commit nor a DVC experiment of this repository; see `git log")
    line = mistake("show", 5, "--rev", "v0")
    assert line.startswith("error: data/listing.parquet of v0: this revision has no such file")
    assert "commit dvc.lock" in line  # as v1 has, which can be read
    assert bingo_bags("show", 5, "--rev", "v1")[0] == 0
    assert "commit dvc.lock" in mistake("diff", "v0", "v1")


def test_data_missing_in_the_cache_come_from_the_remote_or_are_a_mistake(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))  # as in a fresh clone
    shutil.rmtree(".dvc/cache")
    assert bingo_bags("show", 5, "--rev", "k6")[0] == 0
    shutil.rmtree(".dvc/cache", ignore_errors=True)
    run("dvc", "remote", "modify", "-q", "there", "url", str(tmp_path / "empty"))
    for site in ("site", "other-site"):
        monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / site))
        line = mistake("show", 5, "--rev", "k6")
        assert "data/listing.parquet of k6: its data are neither in the DVC cache nor on a remote; push them from" in line
        assert "dvc repro bag" in line


def test_a_missing_chunk_is_not_mistaken_for_an_empty_one(repository):
    """zarr returns its fill value for a file that cannot be read."""
    run("dvc", "commit", "-fq")
    run("git", "add", "-A")
    run("git", "commit", "-qm", "other images")
    digest = hashlib.md5((repository / "data/bags.zarr/members/c/0/0").read_bytes(), usedforsecurity=False).hexdigest()
    (repository / f".dvc/cache/files/md5/{digest[:2]}/{digest[2:]}").unlink()
    assert "data/bags.zarr of HEAD: its data are neither in the DVC cache nor on a remote" in mistake("show", 5, "--rev", "HEAD")
