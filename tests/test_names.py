"""One meaning for each name: no class of the product, its stages and its benchmarks has the name of another."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent


def classes_by_name(*folders: str) -> dict[str, list[str]]:
    """Where each name of a class is defined, at whatever depth."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(str(path.relative_to(ROOT)))
    return places


def test_every_class_has_a_name_of_its_own():
    places = classes_by_name("bingo", "stages", "benchmarks")
    assert len(places) > 50
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}
