"""Which files of the project a stage imports, directly or through others, at any depth of any function: read from the syntax tree."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


@cache
def imported_files(path: str) -> frozenset[str]:
    """Project files named in the imports of one file; imports under `if TYPE_CHECKING:` do not run and do not count."""
    found = set()
    for node in _running(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {file for name in names if (file := _file(name))}
    return frozenset(found)


def closure(path: str) -> set[str]:
    """All project files that running `path` may import, itself included; package markers without code are left out."""
    todo, done = [path], set()
    while todo:
        file = todo.pop()
        if file not in done:
            done.add(file)
            todo.extend(imported_files(file))
    return {file for file in done if not file.endswith("__init__.py")}


def _running(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _running(node)


def _file(name: str) -> str | None:
    relative = name.replace(".", "/")
    for candidate in (f"{relative}.py", f"{relative}/__init__.py"):
        if (ROOT / candidate).is_file():
            return candidate
    return None
