"""The built package, installed in a new environment, makes a workspace of an empty folder and runs stages there."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.workspace import ROOT, environment

pytestmark = pytest.mark.slow
COPIED = ["bingo", "stages", "recipes", "dvc.yaml", ".dvcignore", ".gitignore", ".dvc/.gitignore", "data", "models", "reports"]
CHANGED = ["params.yaml", ".dvc/config"]


def run(*command: object, folder: Path) -> str:
    """The output of a command, which must succeed; programs in the same folder take precedence."""
    path = os.pathsep.join([str(Path(str(command[0])).parent.absolute()), os.environ["PATH"]])
    words, variables = list(map(str, command)), environment(PATH=path)
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked(*places: str) -> dict[str, bytes]:
    """Tracked and new files of this clone in some places, by name."""
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *places, folder=ROOT).split("\0")
    return {name: (ROOT / name).read_bytes() for name in names if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of an environment that contains the wheel, and the dependencies of this environment."""
    root = tmp_path_factory.mktemp("wheel")
    for name, content in tracked(*COPIED, *CHANGED, "setup.py", "pyproject.toml", "README.md", "LICENSE").items():
        (root / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "source" / name).write_bytes(content)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", root, root / "source", folder=root)
    run(sys.executable, "-m", "venv", "--without-pip", root / "env", folder=root)
    (packages,) = (root / "env").glob("lib/python*/site-packages")
    others = {*(path for path in sys.path if path.endswith("site-packages")), sysconfig.get_paths()["purelib"]}
    (packages / "others.pth").write_text("\n".join(sorted(others)))  # their own .pth files are not read: this clone cannot be imported
    run(*pip, "--python", root / "env/bin/python", "install", "--no-deps", "--no-index", *root.glob("*.whl"), folder=root)
    assert {path.name for path in packages.iterdir()} - {"bingo", "others.pth", "bingo_distil-0.1.0.dist-info"} == set()
    return root / "env/bin/python"


@pytest.fixture(scope="module")
def made(python, tmp_path_factory) -> Path:
    """A workspace created by `bingo init` in a folder that contains only images."""
    root = tmp_path_factory.mktemp("made")
    random = np.random.default_rng(0)
    for i in range(20):
        (root / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / f"photos/{'ab'[i % 2]}/{i}.png")
    run(python.with_name("bingo"), "init", "photos", "--minutes", "1", folder=root)
    return root


def test_a_workspace_contains_the_files_of_a_clone(made):
    """All files that a run depends on, byte for byte, so that DVC's hashes of the code are those of a clone."""
    paths = [path for path in made.rglob("*") if path.is_file() and not {"__pycache__", "photos"} & set(path.parts)]
    files = {str(path.relative_to(made)): path.read_bytes() for path in paths}
    assert {name: content for name, content in files.items() if name not in CHANGED} == tracked(*COPIED)
    assert b"photos" in files["params.yaml"]


def test_its_stages_run_and_the_commands_use_its_code(made, python):
    said = run(python, "-m", "dvc", "repro", "bag", folder=made)
    assert [line for line in said.splitlines() if line.startswith("Running stage")] == [
        f"Running stage '{name}':" for name in ("scan", "teacher", "extract", "bag")
    ]
    (made / "below").mkdir()
    assert "16 rows" in run(python.with_name("bingo"), "bags", "stats", folder=made / "below")
    with open(made / "bingo/cli/browse.py", "a") as code:
        code.write('\n\n@app.command()\ndef mine() -> None:\n    """Mine."""\n    typer.echo(__file__)\n')
    assert run(python.with_name("bingo"), "bags", "mine", folder=made / "below") == f"{made}/bingo/cli/browse.py\n"
