"""Where the files lie that parameters name. DVC runs `dvc exp run --temp` and queued experiments in a copy of the workspace that lacks
what Git ignores: data sets and checkpoints are then those of the original repository. No output depends on this file.
"""

import os
from pathlib import Path


def located(path: str) -> str:
    """A path of params.yaml as it is to be opened: `~` is a home; what a copy of the workspace lacks lies in the original repository.

    Raises ValueError for the home of a user whom this machine does not know.
    """
    path = expanded(path)
    original = _original_workspace()
    return path if original is None or _is_held(path) else str(original / path)


def _is_held(path: str) -> bool:
    """Whether a copy has what is meant: a file, or a folder with more than Git keeps of one that it ignores (.gitkeep, a README)."""
    if not Path(path).is_dir():
        return Path(path).exists()  # a relative link leads elsewhere from the copy, mostly nowhere
    files = (name.lower() for _, _, names in os.walk(path) for name in names)
    return any(not name.startswith((".", "readme")) for name in files)


def expanded(path: str) -> str:
    """A path with `~` and `~USER` replaced by the home. Raises ValueError for a user whom this machine does not know."""
    home = os.path.expanduser(path)  # noqa: PTH111 - Path's raises RuntimeError, and drops a trailing /
    if home.startswith("~"):
        user = path.partition("/")[0]
        raise ValueError(f"this machine has no home of {user}; write the whole path, or ./{path} for a folder of this name")
    return home


def _original_workspace() -> Path | None:
    """The folder whose copy the current folder is, as DVC_ROOT says; None where it is no copy."""
    root = os.environ.get("DVC_ROOT")
    if not root:
        return None
    here = Path.cwd()
    copy = next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)
    return None if copy == Path(root).resolve() else Path(root) / here.relative_to(copy)
