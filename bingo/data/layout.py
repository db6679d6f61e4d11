"""Where images lie under a root: train/CLASS/* with val|test/CLASS/*, or CLASS/* alone, or images without class folders.

The order is that of the sorted names and nothing else: not of the disk, of times or of workers. Files may lie deeper than the
class folder. Hidden files and what has no image's suffix are passed over. Nothing outside the root is ever read.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from bingo.errors import UserError
from bingo.progress import progress_bar

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_MOST_LINES = 20


@dataclass(frozen=True)
class Split:
    """The images of one split in order, and the class of each; `classes` is empty where images lie outside class folders."""

    paths: list[str]
    classes: list[str]
    class_names: list[str]  # one for each path; empty for a split without classes


@progress_bar("finding the images")
def find_images(root: Path, name: str) -> list[str]:
    """Every image under a root, relative to it, sorted by the parts of its path; `name` is what messages call the root.

    Raises UserError where there is none, or a link leads out of the root or in a circle.
    """
    if not root.is_dir():
        raise UserError(f"{name} = {root}: there is no such folder; name one that holds images")
    paths = _Walker(root, name).images("")
    if not paths:
        raise UserError(f"{name} = {root}: holds no images; recognised are {', '.join(SUFFIXES)}")
    return paths


@progress_bar("finding the images")
def find_splits(root: Path) -> tuple[Split, Split]:
    """The train and the test split under a root, by its layout. Raises UserError."""
    if not root.is_dir():
        raise UserError(f"dataset.root = {root}: there is no such folder; name the folder that holds train/ or the images")
    test_name = next((name for name in ("val", "test") if (root / name).is_dir()), None)
    if not (root / "train").is_dir():
        if test_name is not None:
            raise UserError(f"dataset.root = {root}: has {test_name}/ but no train/; put the images to train on into train/")
        return _find_split(root, ""), Split([], [], [])
    train = _find_split(root, "train")
    test = _find_split(root, test_name) if test_name else Split([], [], [])
    if train.classes and not test.classes and test.paths:
        raise UserError(f"dataset.root = {root}: {test_name}/ has no class folders, but train/ has; sort its images into the same classes")
    if train.classes and (unknown := sorted(set(test.classes) - set(train.classes))):
        names = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise UserError(f"dataset.root = {root}: {test_name}/ has classes that train/ lacks: {names}; name the class folders alike")
    return train, test


def _find_split(root: Path, split: str) -> Split:
    """All images under one folder: by class folder, or without classes where they lie in the folder itself."""
    walker = _Walker(root, "dataset.root")
    if (root / split).is_symlink() and split:
        walker.refuse_outside(split)
    here, folders = walker.entries(split)
    by_class = {folder.rpartition("/")[2]: walker.images(folder) for folder in folders}
    shown = f"dataset.root = {root}: {split + '/' if split else 'it'}"
    if here and any(by_class.values()):
        raise UserError(f"{shown} holds images ({here[0]}) beside class folders; move them into a class, or out of the root")
    if here:
        return Split(here, [], [])
    if not by_class or not any(by_class.values()):
        raise UserError(f"{shown} holds no images; recognised are {', '.join(SUFFIXES)}")
    if empty := [name for name, paths in by_class.items() if not paths]:
        raise UserError([f"{shown} has the class folder {name} without images; fill it, or delete it" for name in empty[:_MOST_LINES]])
    classes = sorted(by_class)
    paths = [path for name in classes for path in by_class[name]]
    return Split(paths, classes, [name for name in classes for _ in by_class[name]])


class _Walker:
    """Lists what lies under a root; refuses links that lead out of it or in a circle."""

    def __init__(self, root: Path, name: str):
        self.root, self.real_root, self.shown = root, os.path.realpath(root), f"{name} = {root}"

    def images(self, folder: str) -> list[str]:
        """Images in a folder and below, relative to the root, sorted by the parts of their paths."""
        found: list[str] = []
        self._collect(folder, (), found)
        return sorted(found, key=lambda path: path.split("/"))

    def _collect(self, folder: str, above: tuple[str, ...], found: list[str]) -> None:
        real = os.path.realpath(self.root / folder)
        if real in above:
            raise UserError(f"{self.shown}: {folder} is a link that leads in a circle; delete it")
        here, folders = self.entries(folder)
        found.extend(here)
        for inner in folders:
            self._collect(inner, (*above, real), found)

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Images and folders directly in `folder`, both sorted, relative to the root. Raises UserError."""
        images, folders = [], []
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_symlink():
                        self.refuse_outside(path)
                    if entry.is_dir():
                        folders.append(path)
                    elif entry.name.lower().endswith(SUFFIXES):
                        if entry.is_symlink() or entry.is_file():
                            images.append(path)
                        else:
                            raise UserError(f"{self.shown}: {path} is no regular file (a pipe or device?); remove it")
        except OSError as error:
            raise UserError(f"{self.shown}: {folder or 'it'} cannot be listed ({error.strerror}); mend its rights") from None
        for path in images:
            if not path.isprintable() or not path.isascii():
                self._refuse_undecodable(path)
        return sorted(images), sorted(folders)

    def refuse_outside(self, path: str) -> None:
        target = os.path.realpath(self.root / path)
        if not target.startswith(self.real_root + os.sep):
            raise UserError(f"{self.shown}: {path} is a link out of it, to {target}; copy the images into the root")

    def _refuse_undecodable(self, path: str) -> None:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise UserError(f"{self.shown}: {path!a} is no UTF-8 name; rename the file") from None
