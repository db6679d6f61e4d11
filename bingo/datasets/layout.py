"""Find images under a root: train/CLASS/* with val|test/CLASS/*, or only CLASS/*, or images without class folders.

Splits are recognised by their common names in any case (Train, training, valid, val2017, test_images, ...). Folders under other names that
look like splits are refused, except in train/, where folders are classes. The order depends only on the sorted names, and not on the
disk, on times or on workers. Files may be nested deeper than the class folder. Hidden files, folders left behind by operating systems
and files with other suffixes are skipped and counted. Links out of the root are followed only on request.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bingo.datasets.members import Members, Placed, rows_of
from bingo.datasets.split_names import look_like_splits, role_of, split_word
from bingo.datasets.subset import Counts
from bingo.images.decode import SUFFIXES
from bingo.images.listing import STRINGS, Paths, joined_paths, path_column
from bingo.runtime.errors import UserError, printable
from bingo.runtime.inside import folded
from bingo.runtime.progress import progress_bar

SYSTEM_FOLDERS = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information", "__pycache__")
_NAMES = 8192  # entries of a folder that are held as objects of Python at once
_MOST_LINES, _MOST_NAMES, _MOST_SUFFIXES = 20, 3, 8
_USUAL = {"train": ("train",), "test": ("val", "test")}  # preferred if several folders have the same role
Say = Callable[[str], None]


@dataclass(frozen=True)
class Split:
    """The images of one split in order, and the class of each; `classes` is empty if images are not in class folders."""

    paths: Paths
    classes: list[str]
    labels_N: np.ndarray  # int64 (N,), places in `classes`; -1 without classes


def _split(by_class: Mapping[str, Sequence[str]]) -> Split:
    """The images of each class in order; a single class without a name means no classes."""
    ordered, classes = sorted(by_class), sorted(name for name in by_class if name)
    paths = joined_paths(by_class[name] for name in ordered)
    images_C = np.array([len(by_class[name]) for name in ordered], np.int64)
    return Split(paths, classes, np.repeat(np.arange(len(ordered)) - int("" in by_class), images_C))


_NO_SPLIT = _split({})


def count_splits(train: Split, test: Split) -> Counts:
    """The numbers of images of the two splits."""
    labelled = bool(train.classes) and bool(test.classes or not test.paths)
    return Counts(len(train.paths), len(test.paths), labelled)


@progress_bar("finding the images")
def find_images(root: Path, name: str, follow_links: bool, say: Say) -> Paths:
    """All images under a root, relative to it, sorted by the parts of their paths; `name` is the name of the root in messages.

    `say` is called with a line on what is skipped. Raises UserError if there is no image, or a link leads in a circle or (unless
    `follow_links`) out of the root.
    """
    _refuse_no_folder(root, name, "images")
    walker = _Walker(root, name, follow_links)
    paths = walker.images("")
    if not paths:
        raise UserError(f"{name} = {root}: contains no images; recognised are {', '.join(SUFFIXES)}{walker.seen_instead()}")
    walker.report(say)
    return paths


@progress_bar("finding the images")
def find_splits(
    root: Path,
    follow_links: bool = False,
    say: Say = lambda line: None,
    name: str = "dataset.root",
    members: Members | None = None,
) -> tuple[Split, Split]:
    """The train and the test split under a root, by its layout, or of `members` of large files, as if they were files under it. `say` is
    called with a line for everything that is assumed or skipped; messages call the root `name`, a parameter or an argument.

    Raises UserError if it is not clear which images are for training.
    """
    if members is None:
        _refuse_no_folder(root, name, "train/ or the images")
    walker = _Walker(root, name, follow_links, splits=True, tree=_tree(f"{name} = {root}", members))
    walker.passed += members.passed if members else Counter()
    if members is not None and members.placed is not None:
        train, test = _placed_splits(walker, members.paths, members.placed, say)
        walker.report(say)
        return train, test
    here, folders = walker.entries("")
    train_name, test_name = (_folder_of(walker, role, folders) for role in ("train", "test"))
    walker.refuse_outside([link for link in walker.top_links if train_name is None or link in (train_name, test_name)])
    if train_name is None:
        if test_name is not None:
            way_out = "put the images to train on into train/ (all class folders, where it is one of them)"
            raise UserError(f"{walker.shown}: has {test_name}/ but no train/; {way_out}")
        train, test = _find_split(walker, "", say), _NO_SPLIT
    else:
        _refuse_class_named_train(walker, train_name, test_name, folders)
        walker.passed_folders += [folder for folder in folders if folder not in (train_name, test_name)]
        walker.passed += Counter({"images outside the splits": len(here)})
        train = _find_split(walker, train_name, say)
        test = _find_split(walker, test_name, say) if test_name else _NO_SPLIT
        if (train_name, test_name) not in (("train", None), ("train", "val"), ("train", "test")):
            say(f"{walker.shown}: train images are those in {printable(train_name)}/, test images {_or_none(test_name)}")
        test = _with_classes_of_train(walker, train, test, str(test_name), say)
    walker.report(say)
    return train, test


def _refuse_no_folder(root: Path, name: str, content: str) -> None:
    if not root.is_dir():
        problem = "is a file" if root.exists() else "the folder does not exist"
        raise UserError(f"{name} = {root}: {problem}; give the folder that contains {content}")


def _or_none(test_name: str | None) -> str:
    return f"those in {printable(test_name)}/" if test_name else "there are none"


def _folder_of(walker: "_Walker", role: str, folders: list[str]) -> str | None:
    """The folder with a role: the one with the preferred name, or the only one. Raises UserError if this is ambiguous."""
    if len(found := _with_role(role, folders)) > 1:
        names = ", ".join(f"{printable(folder)}/" for folder in found)
        raise UserError(f"{walker.shown}: {names} may each be the {role} split; rename one to {_USUAL[role][0]}/, and move the others out")
    return found[0] if found else None


def _with_role(role: str, names: Iterable[str]) -> list[str]:
    """The names of splits with a role; only the preferred name if it is among them."""
    found = [name for name in names if role_of(name) == role]
    return next(([usual] for usual in _USUAL[role] if usual in found), found)


def _placed_splits(walker: "_Walker", paths: Paths, placed: Placed, say: Say) -> tuple[Split, Split]:
    """The train and the test split of images whose splits and classes are given as data, so that classes may have any names. Raises
    UserError if it is not clear which images are for training."""
    by_split = dict[str, dict[str, np.ndarray]]()
    for (split, of_class), rows in zip(placed.pairs, rows_of(placed.number_N, len(placed.pairs)), strict=True):
        by_split.setdefault(split, {})[of_class] = rows
    trains, tests = (_with_role(role, by_split) for role in ("train", "test"))
    if not trains and not tests and len(by_split) == 1:
        trains = list(by_split)
    if len(trains) != 1 or len(tests) > 1:
        names = ", ".join(printable(split) for split in sorted(by_split)) or "none"
        problem = f"which images are for training is not clear from the names of its splits ({names})"
        raise UserError(f"{walker.shown}: {problem}; name them train and test")
    found = [by_split.pop(names[0]) if names else {} for names in (trains, tests)]
    train, test = (_split({name: paths.take(rows).in_order() for name, rows in by_class.items()}) for by_class in found)
    walker.passed["images of other splits"] += sum(len(rows) for by_class in by_split.values() for rows in by_class.values())
    if train.classes and test.paths and not test.classes:
        say(f"{walker.shown}: the images of the split {printable(tests[0])} have no labels, although train images have, and are skipped")
        return train, _NO_SPLIT
    _say_of_names(walker.shown, train.classes, say)
    if train.classes and (unknown := sorted(set(test.classes) - set(train.classes))):
        way_out = "add train images of them, or leave them out"
        raise UserError(f"{walker.shown}: the split {printable(tests[0])} has classes that train images lack: {_some(unknown)}; {way_out}")
    if test.classes:
        _say_of_missing(f"{walker.shown}: the split {printable(tests[0])}", train.classes, test.classes, say)
    return train, test


def _refuse_class_named_train(walker: "_Walker", train_name: str, test_name: str | None, folders: list[str]) -> None:
    """Raise UserError for CLASS/* if a class has the name of the train split."""
    beside = [folder for folder in folders if folder != train_name]
    probe = walker.again()
    if test_name is None and probe.entries(train_name)[0] and (other := next((x for x in beside if probe.entries(x)[0]), None)):
        way_out = f"if it is a class, move all class folders into train/; if it is the split, move {printable(other)}/ out"
        raise UserError(f"{walker.shown}: {printable(train_name)}/ may be the train split or a class beside {printable(other)}/; {way_out}")


def _with_classes_of_train(walker: "_Walker", train: Split, test: Split, test_name: str, say: Say) -> Split:
    """The test split with the class names of the train split. Raises UserError if it has other classes."""
    if not train.classes or not test.paths:
        return test
    if not test.classes:
        raise UserError(f"{walker.shown}: {test_name}/ has no class folders, but train/ has; sort its images into the same classes")
    of_train, known = _unique_folded(train.classes), set(train.classes)
    renamed = {name: of_train[key] for key, name in _unique_folded(test.classes).items() if name not in known and key in of_train}
    if unknown := [name for name in test.classes if name not in known and name not in renamed]:
        way_out = "name the class folders as in train/"
        raise UserError(f"{walker.shown}: {test_name}/ has classes that train/ lacks: {_some(unknown)}; {way_out}")
    if renamed:
        pairs = [f"{old} is {new}" for old, new in renamed.items()]
        say(f"{walker.shown}: class names of {test_name}/ differ from those of train/ only in case: {_some(pairs)}")
    _say_of_missing(f"{walker.shown}: {test_name}/", train.classes, [renamed.get(name, name) for name in test.classes], say)
    names = np.array([renamed.get(name, name) for name in test.classes], object)
    classes, places = np.unique(names, return_inverse=True)
    return replace(test, classes=classes.tolist(), labels_N=places[test.labels_N])


def _say_of_missing(where: str, of_train: list[str], of_test: list[str], say: Say) -> None:
    if missing := sorted(set(of_train) - set(of_test)):
        say(f"{where} has no image of {len(missing)} of the {len(of_train)} classes: {_some(missing)}")


def _unique_folded(names: list[str]) -> dict[str, str]:
    """All names that are unique if case is ignored, by their casefolded form."""
    counts = Counter(folded(name) for name in names)
    return {folded(name): name for name in names if counts[folded(name)] == 1}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(printable(name) for name in names[:_MOST_NAMES]) + more


def _find_split(walker: "_Walker", split: str, say: Say) -> Split:
    """All images under one folder: by class folder, or without classes if they are in the folder itself."""
    here, folders = walker.entries(split) if split else walker.top
    where = f"{walker.shown}: {printable(split) + '/' if split else 'it'}"
    walker.refuse_mixed(split, folders)
    by_folder = {folder: walker.images(folder) for folder in folders}
    if not split:
        walker.refuse_hidden_splits([folder for folder in folders if by_folder[folder]])
    if split and len(folders) == 1 and split_word(_last(folders[0]))[0] and walker.inner[folders[0]]:
        raise UserError(
            f"{where} has no folder but {printable(_last(folders[0]))}/, which is not a class; move its content up into {printable(split)}/"
        )
    if here and any(by_folder.values()):
        raise UserError(f"{where} holds images ({here[0]}) beside class folders; move them into a class, or out of the root")
    if here:
        return _split({"": here})
    if not any(by_folder.values()):
        raise UserError(f"{where} contains no images; recognised are {', '.join(SUFFIXES)}{walker.seen_instead()}")
    if empty := [folder for folder, paths in by_folder.items() if not paths]:
        lines = [f"{where} has the class folder {_last(x)} without images{walker.seen_in(x)}; fill it, or delete it" for x in empty]
        raise UserError(lines[:_MOST_LINES])
    by_class: dict[str, Paths] = {}
    for folder, paths in by_folder.items():
        if by_class.setdefault(normalize("NFC", _last(folder)), paths) is not paths:
            raise UserError(f"{where} has two folders {_last(folder)!a} that differ only in their Unicode form; merge them into one")
    classes = sorted(by_class)
    _say_of_classes(walker, where, classes, list(by_folder), say)
    return _split(by_class)


def _say_of_classes(walker: "_Walker", where: str, classes: list[str], folders: list[str], say: Say) -> None:
    """Report class folders that may not be as intended."""
    inner_of = {folder: walker.inner[folder] for folder in folders}
    if nested := [f"{folder}/{inner[0]}" for folder, inner in inner_of.items() if len(inner) > 1 or any(map(role_of, inner))]:
        say(f"{where} has classes with sub-folders ({_some(nested)}), whose images belong to the class above them")
    _say_of_names(where, classes, say)


def _say_of_names(where: str, classes: list[str], say: Say) -> None:
    """Report names of classes that may not be as intended."""
    if len(classes) == 1:
        say(f"{where} has only one class, {printable(classes[0])}: evaluations by labels are meaningless")
    if similar := sorted(set(classes) - set(_unique_folded(classes).values())):
        say(f"{where} has classes whose names differ only in case: {_some(similar)}; they are kept separate")


def _last(path: str) -> str:
    return path.rpartition("/")[2]


class _Tree(NamedTuple):
    """The folders of images that are no files: the rows of each folder's images among `paths`, and the names of its folders."""

    paths: Paths
    folders: dict[str, tuple[np.ndarray, list[str]]]


def _tree(shown: str, members: Members | None) -> _Tree | None:
    """The folders of members whose split and class are not known otherwise."""
    if members is None or members.placed is not None:
        return None
    paths = path_column(members.paths)
    above = pc.replace_substring_regex(paths, r"(?s)/?[^/]*$", "").dictionary_encode()
    names = above.dictionary.to_pylist()
    all_names = {"/".join(parts[:depth]) for parts in (name.split("/") for name in ["", *names]) for depth in range(len(parts) + 1)}
    if (both := pc.index(pc.is_in(paths, pa.array(all_names, STRINGS)), True).as_py()) >= 0:
        raise UserError(f"{shown}: {printable(paths[both].as_py())} is an image and a folder of images; rename one")
    rows = dict(zip(names, rows_of(above.indices.to_numpy(), len(names)), strict=True))
    folders = {name: (rows.get(name, np.empty(0, np.int64)), list[str]()) for name in all_names}
    for name in all_names - {""}:
        folders[name.rpartition("/")[0]][1].append(_last(name))
    return _Tree(members.paths, folders)


def _entry(entry: os.DirEntry) -> tuple[str, str, bool]:
    is_link = entry.is_symlink()
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()
    except OSError:  # a link to itself
        is_folder = is_file = False
    of_nothing = is_link and not Path(entry.path).exists()  # is reported with the files that cannot be read
    return entry.name, "folder" if is_folder else "file" if is_file or of_nothing else "other", is_link


class _Walker:
    """Lists the files under a root and counts what is skipped; rejects links that lead in a circle or, unless allowed, out of the root,
    and, if the folders are to be `splits` and classes, a mixture of splits."""

    def __init__(self, root: Path, name: str, follow_links: bool, splits: bool = False, tree: _Tree | None = None):
        self.root, self.name, self.follow_links, self.splits, self.tree = root, name, follow_links, splits, tree
        self.set_root, self.allow_links = ("set dataset.root to", "set dataset.follow_links: true")
        if name != "dataset.root":
            self.set_root, self.allow_links = "give", "give --follow-links"
        self.real_root, self.shown = os.path.realpath(root), f"{name} = {root}"
        self.passed: Counter[str] = Counter()  # by suffix or reason
        self.passed_folders: list[str] = []
        self.inner: dict[str, list[str]] = {}  # for each walked folder, the names of the sub-folders with images
        self.split_words: dict[tuple[str, ...], dict[str, str]] = {}  # by the other words of its name, the first folder of each role
        self.top: tuple[Paths, list[str]] = (
            joined_paths([]),
            [],
        )  # of the root; its links are judged later
        self.top_links: list[str] = []

    def again(self) -> "_Walker":
        """A walker with the same settings that has listed nothing yet."""
        return _Walker(self.root, self.name, self.follow_links, self.splits, self.tree)

    def images(self, folder: str) -> Paths:
        """All images in a folder, at any depth, relative to the root, sorted by the parts of their paths."""
        found: list[Paths] = []
        self._collect(folder, (), found)
        return joined_paths(found).in_order() if len(found) > 1 else found[0]

    def _collect(self, folder: str, above: tuple[str, ...], found: list[Paths]) -> int:
        """Add the images of each folder, and return their number."""
        real = os.path.realpath(self.root / folder) if self.tree is None else folder
        if real in above:
            raise UserError(f"{self.shown}: {folder} is a link that leads in a circle; delete it")
        here, folders = self.entries(folder)
        if not folder:
            self.refuse_outside(self.top_links)
        found.append(here)
        count = len(here)
        if self.splits:
            self.refuse_mixed(folder, folders)
        self.inner[folder] = []
        for inner in folders:
            if of_inner := self._collect(inner, (*above, real), found):
                self.inner[folder].append(_last(inner))
                self._note_role(inner)
            count += of_inner
        return count

    def _note_role(self, folder: str) -> None:
        name = _last(folder)
        usual, (word, rest) = role_of(name), split_word(name)
        if role := usual or word:
            self.split_words.setdefault(() if usual else tuple(rest), {}).setdefault(role, folder)

    def refuse_hidden_splits(self, folders: list[str]) -> None:
        """Raise UserError if `folders`, which would be classes, are splits with other names, or contain splits at another depth."""
        above, level = "", folders
        while not (found := look_like_splits({folder: self.inner[folder] for folder in level})) and len(level) == 1:
            above = level[0]
            level = [f"{above}/{name}" for name in self.inner[above]]
        looks = "have sub-folders of the same names, as splits have"
        if not found:
            pairs = (list(roles.values()) for roles in self.split_words.values() if len(roles) > 1)
            found, looks = next(pairs, []), "look like splits"
        if found:
            names = " and ".join(f"{printable(folder)}/" for folder in found)
            root = f", and {self.set_root} {self.root / above}" if above else ""
            of_splits = "put the train images into train/CLASS and the others into val/CLASS"
            way_out = f"if they are splits, {of_splits}; if they are classes, move all class folders into train/"
            raise UserError(f"{self.shown}: {names} {looks}, and would be classes; {way_out}{root}")

    def refuse_mixed(self, folder: str, folders: list[str]) -> None:
        """Raise UserError if a folder contains both a train and a test split, or two folders with names like theirs."""
        roles = {role_of(_last(inner)): _last(inner) for inner in folders}
        self._refuse_twins(folders)
        if "train" in roles and "test" in roles:
            problem = f"{folder}/ holds {roles['train']}/ and {roles['test']}/, which would be mixed"
            way_out = f"{self.set_root} {self.root / folder}, or lay the images out as train/CLASS and test/CLASS"
            raise UserError(f"{self.shown}: {problem}; {way_out}")

    def _refuse_twins(self, folders: list[str]) -> None:
        """Raise UserError if the names of two folders differ only in the word for a split, ignoring numbers: seg_train and seg_test."""
        by_rest: dict[tuple[str, ...], dict[str, str]] = {}
        for inner in folders:
            role, rest = split_word(_last(inner))
            if role and not role_of(_last(inner)):
                by_rest.setdefault(tuple(rest), {})[role] = inner
        if twins := next((found for found in by_rest.values() if len(found) > 1), None):
            problem = f"{printable(twins['train'])}/ and {printable(twins['test'])}/ look like splits, and would be two classes"
            way_out = "name the folder of the train images train/ and the other val/, or, if they are classes, rename one of them"
            raise UserError(f"{self.shown}: {problem}; {way_out}")

    def entries(self, folder: str) -> tuple[Paths, list[str]]:
        """The images and folders directly in `folder`, both sorted, relative to the root. Raises UserError if they cannot be listed or
        used."""
        columns: list[pa.Array] = []
        folders: list[str] = []
        links: list[str] = []
        above = f"{folder}/" if folder else ""
        for files, others in self._listed(folder):
            names = [name for name in files if name[0] != "." and name.lower().endswith(SUFFIXES)]  # most are such
            beside = [(name, "file", False) for name in sorted(set(files).difference(names))] if len(names) < len(files) else []
            for name, kind, is_link in [*others, *beside]:
                path = f"{above}{name}"
                if name.startswith("."):
                    self.passed["hidden"] += 1
                    continue
                if is_link and not self.follow_links:
                    links.append(path)
                if kind == "folder":
                    (self.passed_folders if name.lower() in SYSTEM_FOLDERS else folders).append(path)
                elif not name.lower().endswith(SUFFIXES):
                    self.passed[printable(PurePosixPath(name).suffix.lower()) or "without a suffix"] += 1
                elif kind == "file":
                    names.append(name)
                else:
                    raise UserError(f"{self.shown}: {path} is not a regular file (a pipe or device?); remove it")
            columns.append(self._column(above, names))
        images = pa.chunked_array(columns, STRINGS)
        found = Paths(images.take(pc.sort_indices(images))), sorted(folders)
        if folder:
            self.refuse_outside(links)
        else:
            self.top, self.top_links = found, links
        return found

    def _listed(self, folder: str) -> Iterator[tuple[list[str], list[tuple[str, str, bool]]]]:
        """The names of files and, of each other entry, its name, its kind (folder, file or other) and whether it is a link; some at a
        time. Raises UserError if it cannot be listed."""
        if self.tree is not None:
            rows, folders = self.tree.folders[folder]
            yield [], [(name, "folder", False) for name in folders]
            for start in range(0, len(rows), _NAMES):
                yield list(map(_last, self.tree.paths.take(rows[start : start + _NAMES]))), []
            return
        try:
            with os.scandir(self.root / folder) as entries:
                while block := list(islice(entries, _NAMES)):
                    files = [entry.name for entry in block if entry.is_file(follow_symlinks=False)]
                    others = (entry for entry in block if not entry.is_file(follow_symlinks=False)) if len(files) < len(block) else ()
                    yield files, list(map(_entry, others))
        except OSError as error:
            raise UserError(f"{self.shown}: {folder or 'it'} cannot be listed ({error.strerror}); fix its permissions") from None

    def report(self, say: Say) -> None:
        """Report in one line what was skipped, if anything."""
        if self.passed.total() or self.passed_folders:
            say(f"{self.shown}: skipped: {self._counted()}")

    def seen_instead(self) -> str:
        """The content of a folder without images, for a message."""
        sources = {".tar": "webdataset", ".arrow": "huggingface"}
        hint = "".join(
            f"; with dataset.source: {source}, {suffix} files are read" for suffix, source in sources.items() if self.passed[suffix]
        )
        if self.passed[".heic"] or self.passed[".heif"]:
            hint += "; convert HEIC files to JPEG"
        return f" (skipped: {self._counted()}){hint}" if self.passed.total() or self.passed_folders else ""

    def seen_in(self, folder: str) -> str:
        """The content of one folder without images, for a message."""
        walker = self.again()
        walker.images(folder)
        return walker.seen_instead()

    def _counted(self) -> str:
        parts = [f"{len(self.passed_folders)} folders ({_some(self.passed_folders)})"] if self.passed_folders else []
        common = [(what, count) for what, count in self.passed.most_common() if count]
        parts += [f"{count:,} {what}" for what, count in common[:_MOST_SUFFIXES]]
        if rest := common[_MOST_SUFFIXES:]:
            parts.append(f"{sum(count for _, count in rest):,} of {len(rest)} other suffixes")
        return ", ".join(parts)

    def refuse_outside(self, links: list[str]) -> None:
        """Raise UserError if a link leads out of the root."""
        for path in links:
            target = os.path.realpath(self.root / path)
            if not target.startswith(self.real_root + os.sep):
                raise UserError(
                    f"{self.shown}: {path} is a link out of it, to {target}; {self.allow_links}, or copy the images into the root"
                )

    def _column(self, above: str, names: list[str]) -> pa.Array:
        """Paths in the folder `above`. Raises UserError if one is not UTF-8."""
        try:
            return pa.array([above + name for name in names], STRINGS)
        except UnicodeEncodeError:
            path = next(path for path in (above + name for name in names) if path.encode(errors="replace").decode() != path)
            raise UserError(f"{self.shown}: {path!a} is not a UTF-8 name; rename it") from None
