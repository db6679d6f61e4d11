"""Each name has one meaning: no two classes of the package, the stages and the benchmarks have the same name."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent


def classes_by_name(*folders: str) -> dict[str, list[str]]:
    """The places where each class name is defined, at any depth."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(str(path.relative_to(ROOT)))
    return places


def test_no_two_classes_have_the_same_name():
    places = classes_by_name("bingo", "stages", "benchmarks")
    assert len(places) > 50
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}
