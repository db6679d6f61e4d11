"""A workspace in an empty folder: a copy of the package and of the other files of a clone that a run needs.

They are taken from the clone, or from bingo/_workspace in an installed package (setup.py). DVC hashes the copied code and stages run it,
so the dependencies in dvc.yaml have the same relative paths as in a clone, and a workspace shares results in DVC's cache with clones.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bingo
from bingo.runtime.errors import UserError, printable

PACKAGE = Path(bingo.__file__).parent
HOME = PACKAGE / "_workspace" if (PACKAGE / "_workspace").is_dir() else PACKAGE.parent
_FILES = (
    "params.yaml", "dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore", "stages/*.py", "recipes/**/*.yaml",
    "data/.gitkeep", "models/**/.gitkeep", "reports/**/.gitkeep",
)  # fmt: skip
_NOT_CODE = {"_workspace", "__pycache__"}
_NO_GIT = "[core]\n", "[core]\n    no_scm = true\n"


@contextmanager
def workspace_here(images: Path, keep: bool) -> Iterator[bool]:
    """Make the current folder a workspace unless it is one, and yield whether it is new; a new one is removed again after an error, or
    without `keep`. Raises UserError if the folder contains anything except hidden files and the folder with `images`."""
    if Path("params.yaml").exists():
        yield False
        return
    sources = _sources()
    made = sorted({Path(name).parts[0] for name in sources})
    _refuse_full(images, made)
    kept = False
    try:
        for name, source in sources.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, name)
        if not in_git():
            Path(".dvc/config").write_text(Path(".dvc/config").read_text().replace(*_NO_GIT))
        yield True
        kept = keep
    finally:
        for path in () if kept else map(Path, made):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def in_git() -> bool:
    """Whether the current folder is in a Git repository; false if git is not installed."""
    return any((folder / ".git").exists() for folder in (Path.cwd(), *Path.cwd().parents))


def _sources() -> dict[str, Path]:
    """The files of a workspace by their names in it."""
    code = (path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*")) if path.is_file())
    found = {f"bingo/{path}": PACKAGE / path for path in code if not _NOT_CODE.intersection(path.parts)}
    return found | {str(path.relative_to(HOME)): path for pattern in _FILES for path in sorted(HOME.glob(pattern))}


def _refuse_full(images: Path, made: list[str]) -> None:
    place = (Path.cwd() / images).resolve()
    others = [
        path.name for path in sorted(Path.cwd().iterdir())
        if path.name in made or (not path.name.startswith(".") and not place.is_relative_to(path.resolve()))
    ]  # fmt: skip
    if others:
        shown = printable(", ".join(others[:3])) + (", ..." if len(others) > 3 else "")
        way_out = "change into the folder of params.yaml, or into an empty folder, in which bingo init creates a workspace"
        raise UserError(f"params.yaml: does not exist here, and the folder is not empty ({shown}); {way_out}")
