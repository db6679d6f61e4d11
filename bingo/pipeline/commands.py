"""Common code of all command lines: find the workspace from any of its folders, and report a wrong option in one line.

No output depends on this file.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError

from bingo.params import read_yaml
from bingo.params.places import expanded
from bingo.pipeline.process import mistakes_as_lines
from bingo.runtime.errors import INTERRUPTED, USER_MISTAKE, UserError

_UsageError: Any = typer.BadParameter.__base__  # which typer does not export
_stands = Path()  # the user's current folder, if it is not that of the workspace
_BEFORE_ALLOWED = re.compile(r"^(Value error, )?(Input should be |.* is not )", re.DOTALL)


def enter_workspace() -> None:
    """Change to the nearest parent folder that contains params.yaml and dvc.yaml, unless params.yaml is in the current folder."""
    global _stands
    here = Path.cwd()
    if not (here / "params.yaml").exists():
        for folder in here.parents:
            if (folder / "params.yaml").exists() and (folder / "dvc.yaml").exists():
                os.chdir(folder)
                _stands = here
                return


def from_here(option: str, path: Path) -> Path:
    """A path given by the user, relative to the user's current folder; `~` is expanded. Raises UserError if that home does not exist."""
    try:
        return _stands / expanded(str(path))
    except ValueError as error:
        raise UserError(f"{option} = {path}: {error}") from None


def as_seen_from_here(path: Path) -> str:
    """A path to print: relative to the user's current folder, if both are in the workspace."""
    whole = Path.cwd() / path
    return os.path.relpath(whole, _stands) if _stands != Path() and whole.is_relative_to(Path.cwd()) else str(path)


def check_output(option: str, path: Path, suffixes: Sequence[str], force: bool) -> None:
    """Raise UserError for an output with another suffix, in a folder that does not exist, or, unless `force` is set, that already
    exists."""
    if path.suffix not in suffixes:
        raise UserError(f"{option} = {path}: allowed are names that end in {', '.join(suffixes)}")
    if _exists(option, path, force) and (path.is_symlink() or path.is_dir()):
        raise UserError(f"{option} = {path}: is not a file of this kind, so --force does not replace it; give another name")


def check_folder(option: str, path: Path, files: Sequence[str], force: bool) -> None:
    """`check_output` for a folder with `files`: a folder that contains anything else is not replaced."""
    if _exists(option, path, force) and (path.is_symlink() or not path.is_dir() or {file.name for file in path.iterdir()} - set(files)):
        raise UserError(f"{option} = {path}: is not a folder of this kind, so --force does not replace it; give another name")


def check_place(option: str, path: Path) -> None:
    """Raise UserError if a path cannot be written, or if it is, or is inside, an output of a stage."""
    try:
        nearest = next(folder for folder in path.absolute().parents if folder.exists() or folder.is_symlink())
        if not nearest.is_dir():
            shown = nearest if path.is_absolute() else os.path.relpath(nearest)
            raise UserError(f"{option} = {path}: {shown} is a file, not a folder; give another name")
        trial = nearest / f".{path.name}.attempt"  # as long as the name under which it is written at first
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"{option} = {path}: cannot be written ({error.strerror}); give a name in a writable folder") from None
    whole = path.resolve()
    root = next((folder for folder in whole.parents if (folder / "params.yaml").exists() and (folder / "dvc.yaml").exists()), whole)
    for out in declared_outputs(root):
        inside, pattern = whole.relative_to(root), re.sub(r"\$\{.*?\}", "*", out)
        if any(fnmatch(str(place), pattern) for place in (inside, *inside.parents)):
            raise UserError(f"{option} = {path}: belongs to {out}, which only a stage may replace; give another name")


def declared_outputs(root: Path, stage: str | None = None) -> list[str]:
    """The outputs that a workspace's dvc.yaml lists for one of its stages, or for all; names of items are written ${item} or ${key}."""
    stages = (read_yaml(root / "dvc.yaml") if (root / "dvc.yaml").exists() else {"stages": {}})["stages"]
    definitions = [definition.get("do", definition) for name, definition in stages.items() if stage in (None, name)]
    entries = [entry for definition in definitions for part in ("outs", "metrics", "plots") for entry in definition.get(part, [])]
    return [path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)]


def _exists(option: str, path: Path, force: bool) -> bool:
    """Whether the path exists and will be replaced. Raises UserError if it may not be replaced, or if there can be no such path."""
    check_place(option, path)
    if (found := path.is_symlink() or path.exists()) and not force:
        raise UserError(f"{option} = {path}: exists already; give another name, or --force to replace it")
    return found


def app_of(command: Callable[..., None]) -> typer.Typer:
    """The command line of one function."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return app


def run_command(command: typer.Typer | Callable[..., None]) -> None:
    """Run a command line in the workspace that contains the current folder. User errors are printed in one line each, with exit code 2."""
    with mistakes_as_lines():
        _refuse_empty([Path(sys.argv[0]).name, *sys.argv[1:]])
        enter_workspace()
        _run(command if isinstance(command, typer.Typer) else app_of(command))


def _refuse_empty(words: Sequence[str]) -> None:
    """Raise UserError for each argument of a command line that is blank, as a shell's unset variable is: Git and DVC take it for HEAD, and
    pathlib for the current folder."""
    empty = [f"the argument after {before}" for before, word in pairwise(words) if not word.strip()]
    empty += [word.strip() for word in words if re.fullmatch(r"--[\w-]+=\s*", word)]
    if empty:
        raise UserError([f"{name} is empty: give a value, or leave the option out" for name in empty])


def _run(app: typer.Typer) -> None:
    """Run a command line. Raises UserError for invalid arguments, and SystemExit for exit codes other than 0."""
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            raise SystemExit(USER_MISTAKE) from None
        raise UserError(f"{_in_one_line(error)}; see: {error.ctx.command_path if error.ctx else 'bingo'} --help") from None
    except typer.Abort:
        raise SystemExit(INTERRUPTED) from None
    if code:
        raise SystemExit(code)


def _in_one_line(error: Any) -> str:
    """Typer's error as name = value: what is allowed."""
    if (parameter := getattr(error, "param", None)) is None:
        return " ".join(error.format_message().split()).rstrip(".")
    name = next((word for word in parameter.opts if word.startswith("--")), parameter.metavar or parameter.name.upper())
    if not error.message:
        return f"{name} is missing"
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ValidationError):
        value = f" = {cause.errors()[0]['input']}"
    else:  # Typer before 0.19 names the value in its message only
        value = f" = {found[1]}" if (found := re.match(r"'?(.+?)'? is not ", error.message)) else ""
    allowed = _BEFORE_ALLOWED.sub("", error.message).partition(", unable")[0].rstrip(".")
    return f"{name}{value}: allowed is {allowed.replace('valid integer', 'whole number').replace('valid float', 'number')}"
