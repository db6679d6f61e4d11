"""Locate the files given in parameters. DVC runs `dvc exp run --temp` and queued experiments in a copy of the workspace without files
ignored by Git: datasets and checkpoints are then taken from the original repository. No output depends on this file.
"""

import os
import re
from pathlib import Path

_LONGEST_NAME = 255  # bytes, of usual file systems; more make os.stat raise


def located(path: str) -> str:
    """A path in params.yaml, ready to be opened: `~` is expanded, and a path that a copy of the workspace lacks is taken from the
    original repository.

    Raises ValueError for an empty path, and as `expanded` does.
    """
    if not path.strip():
        raise ValueError("allowed is a path, which is not empty (./ is this folder)")
    path = expanded(path)
    original = _original_workspace()
    return path if original is None or _is_held(path) else str(original / path)


def _is_held(path: str) -> bool:
    """Whether a copy contains the data: a file, or a folder with more than what Git keeps in an ignored one (.gitkeep, a README)."""
    if not Path(path).is_dir():
        return Path(path).exists()  # a relative link points elsewhere from the copy, usually nowhere
    files = (name.lower() for _, _, names in os.walk(path) for name in names)
    return any(not name.startswith((".", "readme")) for name in files)


def expanded(path: str) -> str:
    """A path with `~` and `~USER` replaced by the home folder. Raises ValueError for an unknown user or an impossible name."""
    if "\0" in path or any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.split("/")):
        raise ValueError(f"allowed is a path without null bytes, whose parts have at most {_LONGEST_NAME} bytes")
    home = os.path.expanduser(path)  # noqa: PTH111 - Path's raises RuntimeError, and drops a trailing /
    if home.startswith("~"):
        user = path.partition("/")[0]
        raise ValueError(f"this machine has no user {user}; write the whole path, or ./{path} for a folder of this name")
    return home


def images_folder(root: str) -> str:
    """The folder that paths of images and shards are relative to: `root`, or, if `root` is a file or a pattern with braces or wildcards,
    the folder that contains it."""
    before = re.split(r"[{}*?[]", root, maxsplit=1)[0]
    if Path(root).is_dir() or (before == root and not Path(root).is_file()):
        return root
    return before.rpartition("/")[0] or ("/" if root[:1] == "/" else ".")


def _original_workspace() -> Path | None:
    """The folder of which the current folder is a copy, according to DVC_ROOT; None if it is not a copy."""
    root = os.environ.get("DVC_ROOT")
    if not root:
        return None
    here = Path.cwd()
    copy = next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)
    return None if copy == Path(root).resolve() else Path(root) / here.relative_to(copy)
