"""Paths that must not leave a folder: those of listings and of annotations, which may come from elsewhere."""

import errno
from pathlib import Path, PurePosixPath


class Outside(OSError):
    """A path that leads out of its folder; `strerror` is the reason, in one line."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "it leads out of the dataset's folder")


def leads_out(path: str) -> bool:
    """Whether a relative path names something outside of its folder: it is absolute, or goes up by `..`."""
    return path.startswith("/") or (".." in path and ".." in PurePosixPath(path).parts)


def path_inside(root: str, path: str) -> Path:
    """Where `path` lies under `root`. Raises Outside where it leads out of `root`, by itself or through a link."""
    if leads_out(path):
        raise Outside
    place = Path(root)
    for part in path.split("/"):  # of the path alone: the root itself may be a link, and resolving all of it takes longer
        place /= part
        if place.is_symlink() and not Path(root, path).resolve().is_relative_to(Path(root).resolve()):
            raise Outside
    return place
