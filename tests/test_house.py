"""Structure of the code: folders are layers, imports run downwards only and never in circles; methods and formats are independent."""

import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from closure import ROOT, closure, imported_files, imported_patterns

from bingo.params import format_names, method_names

# From the lowest layer to the highest; a file may import from its own layer and from lower ones.
LAYERS = [
    ("bingo/runtime/", "bingo/paths.py"),
    ("bingo/params/", "bingo/seeds.py", "bingo/schedules.py"),
    ("bingo/nets/", "bingo/images/"),
    ("bingo/bags/", "bingo/teachers/", "bingo/datasets/"),
    ("bingo/methods/", "bingo/report/", "bingo/browse/", "bingo/export/"),
    ("bingo/embeddings/",),
    ("bingo/evals/", "bingo/detection/", "bingo/training/"),
    ("bingo/pipeline/", "bingo/planning/"),
    ("stages/", "bingo/cli/"),
    ("bingo/api.py",),
]
CODE = [str(path.relative_to(ROOT)) for folder in ("bingo", "stages") for path in sorted((ROOT / folder).rglob("*.py"))]


def layer(file: str) -> int:
    return next(number for number, places in enumerate(LAYERS) if file.startswith(places))


def room(file: str) -> str:
    """The folder of a file, bingo/NAME or stages; for a file directly in bingo/, the file."""
    parts = Path(file).parts
    return parts[0] if parts[0] == "stages" else "/".join(parts[:2])


def found_by_name(file: str) -> set[str]:
    return {other for pattern in imported_patterns(file) for other in CODE if fnmatch(other, pattern)}


@pytest.mark.parametrize("file", [file for file in CODE if Path(file).name != "__init__.py"])
def test_imports_run_downwards(file):
    """Includes imports by name, whether the name is in the code or formed at run time."""
    for other in imported_files(file) | found_by_name(file):
        if not other.endswith("__init__.py"):
            assert layer(other) <= layer(file), f"{file} imports {other}, which is above it"


def test_no_folders_import_each_other_in_a_circle():
    arrows: dict[str, set[str]] = {}
    for file in CODE:
        arrows.setdefault(room(file), set()).update({room(other) for other in imported_files(file)} - {room(file)})
    while leaves := {name for name, others in arrows.items() if not others}:
        arrows = {name: others - leaves for name, others in arrows.items() if name not in leaves}
    assert not arrows, f"in a circle, or above one: {arrows}"


def test_stages_import_neither_each_other_nor_the_command_line():
    for file in CODE:
        others = {other for other in imported_files(file) if not other.endswith("__init__.py")}
        if file.startswith("stages/"):
            assert not [other for other in others if other.startswith(("stages/", "bingo/cli/"))], file
        else:
            assert not [other for other in others if other.startswith("stages/")], file
    assert [file for file in CODE if any(pattern.startswith("stages/") for pattern in imported_patterns(file))] == ["bingo/cli/main.py"]


@pytest.mark.parametrize("file", [file for file in CODE if file.startswith("stages/")])
def test_a_stage_reads_calls_and_writes(file):
    """Stages leave computing to the code in bingo/, so a stage has at most 50 lines of code, not counting docstrings and imports."""
    text = (ROOT / file).read_text()
    aside = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom) or _is_text(node)]
    numbers = {number for node in aside for number in range(node.lineno, node.end_lineno + 1)}
    assert len([line for number, line in enumerate(text.splitlines(), 1) if line.strip() and number not in numbers]) <= 50


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_methods_do_not_import_each_other():
    for name in method_names():
        others = {f"bingo/methods/{other}.py" for other in method_names() if other != name}
        assert not closure(f"bingo/methods/{name}.py") & others


def test_formats_do_not_import_each_other():
    for name in format_names():
        others = {f"bingo/teachers/formats/{other}.py" for other in format_names() if other != name}
        assert not closure(f"bingo/teachers/formats/{name}.py") & others


def test_only_distributed_asks_torch_for_the_process_group():
    asking = [file for file in CODE if re.search(r"\b(dist|distributed)\.is_initialized", (ROOT / file).read_text())]
    assert asking == ["bingo/runtime/distributed.py"]


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys; from bingo.cli.main import app; app(['--help'], standalone_mode=False);"
        "print('heavy:', {'torch', 'timm', 'zarr', 'faiss', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "heavy: set()" in done.stdout
    stages = {Path(file).stem for file in CODE if file.startswith("stages/")} - {"__init__"}
    others = ["bags", "recipe", "export", "embed", "experiments", "teachers"]
    assert not [name for name in [*stages, *others] if f"│ {name} " not in done.stdout]
