"""The project files that a file imports, directly or in nested functions, found in its syntax tree."""

import ast
from collections.abc import Collection
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


@cache
def imported_files(path: str) -> frozenset[str]:
    """Project files that one file imports, by statement or by import_module("NAME"). Imports under `if TYPE_CHECKING:` do not run and are
    ignored. Names that are known only at run time, as in import_module(f"PACKAGE.{name}"), are left to `imported_patterns`."""
    found = set()
    for node in _running(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif (argument := _by_name(node)) and isinstance(argument, ast.Constant):
            names = [str(argument.value)]
        else:
            continue
        found |= {file for name in names if (file := _file(name))}
    return frozenset(found)


def imported_patterns(path: str) -> set[str]:
    """Imports of one file by names that are known only at run time, as globs of project files: bingo/export/to_*.py."""
    arguments = (_by_name(node) for node in _running(ast.parse((ROOT / path).read_text())))
    parts = [argument.values for argument in arguments if isinstance(argument, ast.JoinedStr)]
    return {
        "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in each).replace(".", "/") + ".py" for each in parts
    }


def closure(path: str, but: Collection[str] = ()) -> set[str]:
    """All project files that running `path` may import, including itself, except `but` and files that only those import; empty package
    files are left out."""
    todo, done = [path], set()
    while todo:
        file = todo.pop()
        if file not in done and file not in but:
            done.add(file)
            todo.extend(imported_files(file))
    return {file for file in done if not file.endswith("__init__.py")}


def _by_name(node: ast.AST) -> ast.AST | None:
    """The argument of the call if `node` is a call of importlib.import_module."""
    return node.args[0] if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") else None


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
