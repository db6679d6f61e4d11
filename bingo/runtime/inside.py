"""Paths that must not leave a folder (listings and annotations may come from others), and comparison of names as people read them."""

import errno
import os
from pathlib import Path, PurePosixPath
from unicodedata import normalize


class Outside(OSError):
    """A path that leads out of its folder; `strerror` is the reason, in one line."""

    def __init__(self, door: str = "") -> None:
        super().__init__(errno.EACCES, f"it leads out of the dataset's folder{door}")


def leads_out(path: str) -> bool:
    """Whether a path leads out of its folder because it is absolute, or because of `..`."""
    return path.startswith("/") or (".." in path and ".." in PurePosixPath(path).parts)


def path_inside(root: str, path: str, follow_links: bool = False) -> Path:
    """The location of `path` under `root`. Raises Outside if it leads out of `root` by itself or, unless `follow_links`, through a link."""
    if leads_out(path):
        raise Outside
    if follow_links:
        return Path(root, path)
    place = Path(root)
    for part in path.split("/"):  # only of the path: the root itself may be a link, and resolving all of it takes longer
        place /= part
        # realpath, because Path.resolve raises RuntimeError for a link to itself, which cannot be opened anyway
        if place.is_symlink() and not Path(os.path.realpath(Path(root, path))).is_relative_to(os.path.realpath(root)):
            raise Outside(" through a link; dataset.follow_links: true allows that")
    return place


def folded(name: str) -> str:
    """A name normalised in case and Unicode form, so that names that people read as the same are equal."""
    return normalize("NFC", normalize("NFC", name).casefold())
