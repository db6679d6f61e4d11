"""GPU measurements: the small version of each part runs on the CPU with the packages that it names, and runs can be resumed."""

import re
import sys

import pytest

from benchmarks import gpu
from bingo.runtime.errors import UserError

# This project's dependencies that may be missing from an image with torch, torchvision, timm, typer, pydantic, pyarrow, pillow and psutil.
OTHERS = "dvc dvc_data zarr numcodecs faiss ruamel simplejpeg sklearn scipy matplotlib jinja2 faster_coco_eval onnx pytest kornia"
BROUGHT = {"zarr": ["numcodecs"], "ruamel.yaml": ["ruamel"]}
BLOCKER = """
import os
from importlib.machinery import PathFinder
found, absent = PathFinder.find_spec, os.environ["ABSENT"].split()
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name.partition(".")[0] in absent else found(name, *rest))
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.PARTS, ids=lambda part: part.name)
def test_each_part_runs_on_the_cpu_with_the_packages_that_it_names(tmp_path, monkeypatch, part):
    present = {name for need in part.needs for name in [need, *BROUGHT.get(need, [])]}
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    for name, value in {"PYTHONPATH": str(tmp_path), "ABSENT": " ".join(set(OTHERS.split()) - present)}.items():
        monkeypatch.setenv(name, value)
    for name in ("BINGO_TEST_DEVICE", "BINGO_DEVICE"):
        monkeypatch.setenv(name, "cpu")
    results = gpu.Results(tmp_path / "gpu.md", "here")
    assert gpu.measure(part, part.rehearsed, results, 500), (tmp_path / "gpu.md").read_text()


def commands(tmp_path, **sources: str) -> tuple[str, ...]:
    """Importable modules with these names and sources."""
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    return tuple(sources)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


COUNT = "open({!r}, 'a').write('x'); print('ratio 3.2')"


def test_commands_in_the_file_are_not_measured_again(here):
    names = commands(here, first=COUNT.format(str(here / "runs")), second="import sys; print('half'); sys.exit(3)")
    part = gpu.Part("step", names, (), ())
    assert not gpu.measure(part, names, gpu.Results(here / "gpu.md", "H100"), 60)
    text = (here / "gpu.md").read_text()
    assert re.search(r"^## step: `first`\n\n\d{4}-\d\d-\d\d, \d+ s\n\n```\nratio 3\.2\n```$", text, re.MULTILINE)
    assert "failed with exit code 3" in text
    assert "Machine: H100" in text
    commands(here, second="print('whole')")
    assert gpu.measure(part, names, gpu.Results(here / "gpu.md", "H100"), 60)
    text = (here / "gpu.md").read_text()
    assert (here / "runs").read_text() == "x"
    assert "exit code" not in text
    assert text.index("first") < text.index("second")
    assert gpu.Results(here / "gpu.md", "H100").sections.keys() == {("step", "first"), ("step", "second")}
    with pytest.raises(UserError, match="was measured on H100; here is A100"):
        gpu.Results(here / "gpu.md", "A100")


@pytest.mark.parametrize("place", ["no/such/gpu.md", "folder", "latin.md", "file/gpu.md"])
def test_a_file_that_cannot_be_read_or_written_is_refused_before_the_first_command(here, place):
    (here / "folder").mkdir()
    (here / "file").touch()
    (here / "latin.md").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UserError, match="--out"):
        gpu.Results(here / place, "H100")


def test_any_output_and_own_notes_stay_in_the_file(here):
    names = commands(here, first="print('## Table: 3\\nratio 1'); import sys; sys.stdout.buffer.write(b'\\xff\\n')", second="print(2)")
    part, path = gpu.Part("step", names, (), ()), here / "gpu.md"
    assert gpu.measure(part, names[:1], gpu.Results(path, "H100"), 60)
    path.write_text(path.read_text() + "\n## My notes\n\nThe fan was loud.\n")
    before = path.read_text().rstrip()
    assert "## Table: 3\nratio 1" in before
    assert gpu.measure(part, names, gpu.Results(path, "H100"), 60)
    assert path.read_text().startswith(before)


def test_an_unknown_part_is_refused_with_the_known_names(monkeypatch, capsys):
    for arguments in (["steps"], ["step", "KNN"], [""]):
        monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
        with pytest.raises(SystemExit, match="2"):
            gpu.parse()
        assert f"PART = {arguments[-1]}: allowed is {', '.join(gpu.NAMES)};" in capsys.readouterr().err
    for arguments, parts in (([], []), (["knn", "step"], ["knn", "step"])):
        monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
        assert gpu.parse().parts == parts


def test_parts_are_written_in_their_order_whichever_was_measured_first(here):
    names = commands(here, first="print(1)")
    for name in ("memory", "loader"):
        assert gpu.measure(gpu.Part(name, names, (), ()), names, gpu.Results(here / "gpu.md", "H100"), 60)
    text = (here / "gpu.md").read_text()
    assert text.index("## loader") < text.index("## memory")


@pytest.mark.slow
def test_a_command_is_ended_with_its_processes_when_its_part_runs_out_of_time(here):
    child = f"import subprocess, sys; print('begun', flush=True); subprocess.run([{sys.executable!r}, '-c', 'import time; time.sleep(99)'])"
    names = commands(here, hangs=child)
    assert not gpu.measure(gpu.Part("step", names, (), ()), names, gpu.Results(here / "gpu.md", "H100"), 3)
    text = (here / "gpu.md").read_text()
    assert "stopped unfinished" in text
    assert "begun" in text
    assert not gpu.Results(here / "gpu.md", "H100").has("step", "hangs")


def test_a_part_with_a_missing_package_is_skipped_and_names_it(here, capsys):
    part = gpu.Part("step", ("never",), (), ("zarr", "nowhere", "nor.here"))
    assert not gpu.measure(part, part.commands, gpu.Results(here / "gpu.md", "H100"), 60)
    assert capsys.readouterr().out == "step: left out: nowhere, nor.here not installed\n"
    assert gpu.Results(here / "gpu.md", "H100").sections == {}
