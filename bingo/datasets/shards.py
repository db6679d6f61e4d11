"""Tar shards as written by WebDataset: their images, labels and positions. Only headers and labels are read.

A member KEY.EXT with the suffix of an image is an image. Its label is in KEY.cls, or in KEY.json under "label"; otherwise its folder in the
shard is its class. Its split is given by its path, or by the name of its shard or of a folder of shards (imagenet-train-000000.tar).
"""

import json
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from bingo.datasets.layout import SYSTEM_FOLDERS
from bingo.datasets.members import Members, class_names, placed_path, positions_of, refuse, refuse_twins
from bingo.datasets.split_names import role_of, split_folder
from bingo.images.decode import SUFFIXES
from bingo.images.listing import Paths, joined_paths, path_column
from bingo.params.places import images_folder
from bingo.runtime.errors import UserError, printable
from bingo.runtime.inside import leads_out, path_inside
from bingo.runtime.progress import progress_bar
from bingo.runtime.workers import worker_pool

CLASS_NAMES = "classes.txt"  # next to the shards: the names of classes 0, 1, ..., one per line
_MOST_SHARDS = 1_000_000
_MOST_LABEL_BYTES = 2**20
_BYTES_OF_AN_IMAGE = 50_000  # about, to choose between threads and processes
_BLOCK = 512
_PACK_AGAIN = "pack the shard again"
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass
class _Shard:
    """The content of a shard: its size, its images with offset and length, labels by key, suffixes of other members, and lines on
    problems."""

    bytes: int = 0
    names: list[str] = field(default_factory=list)
    places: array = field(default_factory=lambda: array("q"))  # offset and length of each in turn
    labels: dict[str, int | str] = field(default_factory=dict)
    passed: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    unclear: dict[str, str] = field(default_factory=dict)  # by the key of a file without a label, its name

    def label(self, image: str) -> int | str | None:
        """The label of an image, None if the shard has none. Its key is its name up to the last dot, or up to the first, as in
        WebDataset."""
        label = self.labels.get(image.rpartition(".")[0])
        return self.labels.get(_key(image)) if label is None else label

    def columns(self) -> "_Columns":
        """What is kept of the shard once it is read: millions of strings take several times the memory of columns."""
        labels = [*dict.fromkeys(self.labels.values()), None]
        number = {label: place for place, label in enumerate(labels)}
        label_n = np.fromiter((number[self.label(name)] for name in self.names), np.int32, len(self.names))
        places_n2 = np.array(self.places, np.int64).reshape(-1, 2)
        return _Columns(self.bytes, joined_paths([self.names]), places_n2, labels, label_n, self.passed, self.problems)


@dataclass(frozen=True)
class _Columns:
    """What a shard holds, in columns: its size, the names of its n images, offset and length of each, int64 (n, 2), its labels, and for
    each image the place of its label, int32 (n,), which is that of None without one; suffixes of the rest, and lines on what is wrong."""

    bytes: int
    names: Paths
    places_n2: np.ndarray
    labels: list[int | str | None]
    label_n: np.ndarray
    passed: Counter[str]
    problems: list[str]


def _key(name: str) -> str:
    folder, _, last = name.rpartition("/")
    return name[: len(folder) + bool(folder)] + last.partition(".")[0]


def read_shards(root: str, follow_links: bool, name: str) -> Members:
    """The images of the shards given by a pattern with braces or wildcards, or by their folder; messages call the root `name`.

    Raises UserError with a line for each shard that is absent, compressed, truncated or without images, each member that is a link, not a
    file or outside, each duplicate path, and each image without a label if others have labels.
    """
    shown, folder = f"{name} = {root}", images_folder(root)
    if not Path(folder).is_dir():
        raise UserError(f"{shown}: the folder {folder} does not exist; name the shards, train-{{000000..000146}}.tar, or their folder")
    files = [os.path.relpath(path, folder) for path in _named(root, shown)]
    found = {path: path.stat() for path in (Path(folder, file) for file in files) if path.is_file()}
    shards, images = [], sum(status.st_size for status in found.values()) // _BYTES_OF_AN_IMAGE
    with worker_pool(images) as pool, progress_bar("reading the shards", len(files), "shards") as bar:
        for shard in pool.map(partial(_read, folder, follow_links), files):
            shards.append(shard)
            bar.advance()
    refuse(
        shown,
        _twice(folder, files, found) + [f"{file}: {line}" for file, shard in zip(files, shards, strict=True) for line in shard.problems],
    )
    paths, placed = _paths(shown, folder, files, shards)
    positions = positions_of(files, [shard.bytes for shard in shards], [shard.places_n2 for shard in shards])
    refuse_twins(shown, paths, positions, "give each image a key of its own")
    passed = sum((shard.passed for shard in shards), Counter[str]())
    return Members(paths, positions, passed, placed)


def _named(root: str, shown: str) -> list[str]:
    """The paths of all shards, in the order of a pattern, or, in a folder, of their names."""
    if Path(root).is_dir():
        found = sorted(path.as_posix() for path in Path(root).rglob("*") if path.name.endswith((".tar", *_COMPRESSED_SUFFIXES)))
        if not found:
            raise UserError(f"{shown}: holds no .tar files; name the shards, train-{{000000..000146}}.tar, or their folder")
        return found
    try:
        names = expand_braces(root)
    except ValueError as error:
        raise UserError(f"{shown}: {error}") from None
    return [path for name in names for path in (sorted(glob(name)) or [name])]  # noqa: PTH207 - Path.glob takes no absolute pattern


def expand_braces(pattern: str) -> list[str]:
    """All names of a pattern, as bash expands it: {000..146} are numbers, of equal width if one begins with 0, {a,b} choices, which may
    contain braces. Raises ValueError for other braces, and for more than a million names."""
    depth, cuts = 0, list[int]()
    for place, letter in enumerate(pattern):
        depth += (letter == "{") - (letter == "}")
        if depth == 1 and letter == "{":
            cuts = [place]
        elif depth == 1 and letter == ",":
            cuts.append(place)
        elif depth == 0 and letter == "}":
            choices = [pattern[first + 1 : last] for first, last in pairwise([*cuts, place])]
            inner = [name for choice in choices for name in expand_braces(choice)] if len(choices) > 1 else _numbers(choices[0])
            behind = expand_braces(pattern[place + 1 :])
            if len(inner) * len(behind) > _MOST_SHARDS:
                break
            return [pattern[: cuts[0]] + middle + end for middle in inner for end in behind]
        if depth < 0:
            break
    else:
        if not depth:
            return [pattern]
    raise ValueError(f"braces that do not match, or name over {_MOST_SHARDS:,} files; allowed are {{000000..000146}} and {{train,val}}")


def _numbers(text: str) -> list[str]:
    match = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", text)
    if match is None or int(match[1]) > int(match[2]) or int(match[2]) - int(match[1]) >= _MOST_SHARDS:
        raise ValueError(f"{{{text}}}: allowed in braces are ascending numbers, {{000000..000146}}, and lists, {{train,val}}")
    padded = any(number.startswith("0") and len(number) > 1 for number in match.groups())
    width = max(map(len, match.groups())) if padded else 0
    return [f"{number:0{width}d}" for number in range(int(match[1]), int(match[2]) + 1)]


def _twice(folder: str, files: list[str], found: dict[Path, os.stat_result]) -> list[str]:
    """A line for each file that is given more than once, possibly under different names."""
    first: dict[tuple[int, int], str] = {}
    lines = []
    for file, status in ((file, found[path]) for file in files if (path := Path(folder, file)) in found):
        if other := first.setdefault((status.st_dev, status.st_ino), ""):
            lines.append(f"{file}: is the same file as {other}; name each shard once")
        first[status.st_dev, status.st_ino] = file
    return lines


def _read(folder: str, follow_links: bool, name: str) -> _Columns:
    """The content of a shard, with errors in its `problems`."""
    shard, way_out = _Shard(), "restore it, or name the shards that are there"
    try:
        if (path := path_inside(folder, name, follow_links)).exists() and not path.is_file():  # opening a pipe would wait for a writer
            shard.problems.append("is not a regular file; leave it out")
            return shard.columns()
        with path.open("rb", buffering=0) as file:
            shard.bytes, start, way_out = os.fstat(file.fileno()).st_size, os.pread(file.fileno(), 6, 0), "fetch it again"
            if tool := next((tool for magic, tool in _COMPRESSED.items() if start.startswith(magic)), None):
                shard.problems.append(f"is compressed, so that members have no positions; decompress it: {tool} {printable(name)}")
                return shard.columns()
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in _members_of(tar):
                    _note(shard, member, file.fileno())
                shard.problems += _unclear(shard)
                if not _ends(file.fileno(), tar.offset, shard.bytes):
                    shard.problems.append(f"is cut off or damaged at byte {tar.offset:,}, after {len(shard.names):,} images; {way_out}")
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        shard.problems.append(f"cannot be read ({getattr(error, 'strerror', None) or error or type(error).__name__}); {way_out}")
    if not shard.names and not shard.problems:
        shard.problems.append("holds no images; leave it out")
    return shard.columns()


def _members_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Iterate over the members without keeping them."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        yield member


def _ends(descriptor: int, offset: int, file_bytes: int) -> bool:
    """Whether the members end with a block of zeros that only zeros follow, because tarfile also treats damage, and the end of the first of
    several archives in one file, as the end."""
    blocks = (os.pread(descriptor, 2**20, place) for place in range(offset, file_bytes, 2**20))
    return file_bytes - offset >= _BLOCK and not any(block.strip(b"\0") for block in blocks)


def _note(shard: _Shard, member: tarfile.TarInfo, descriptor: int) -> None:
    """Add a member to the content of its shard."""
    name = PurePosixPath(member.name).as_posix()
    is_image, kind = name.lower().endswith(SUFFIXES), PurePosixPath(name).suffix.lower()
    if member.isdir():
        return
    if leads_out(member.name):
        shard.problems.append(f"{printable(member.name)} leads out of the shard's folder; {_PACK_AGAIN} with relative names")
    elif any(part.startswith(".") or part.lower() in SYSTEM_FOLDERS for part in name.split("/")):
        shard.passed["hidden"] += 1
    elif is_image and (member.issym() or member.islnk()):
        to = f"{printable(name)} is a link, to {printable(member.linkname)}"
        shard.problems.append(f"{to}; {_PACK_AGAIN} with tar --dereference --hard-dereference")
    elif is_image and (not member.isreg() or member.issparse()):
        shard.problems.append(f"{printable(name)} is not a regular file; {_PACK_AGAIN} without it")
    elif is_image and name != name.encode(errors="replace").decode():
        shard.problems.append(f"{printable(name)} is not a UTF-8 name; {_PACK_AGAIN} with another")
    elif is_image:
        shard.names.append(name)
        shard.places.extend((member.offset_data, member.size))
    elif kind in (".cls", ".json") and member.isreg():
        key = name[: -len(kind)]
        try:
            label = _label(os.pread(descriptor, min(member.size, _MOST_LABEL_BYTES), member.offset_data), kind)
        except (ValueError, RecursionError):
            shard.unclear[key] = name
            return
        if label is not None and (kind == ".cls" or key not in shard.labels):
            shard.labels[key] = label
    else:
        shard.passed[printable(kind) or "without a suffix"] += 1


def _unclear(shard: _Shard) -> Iterator[str]:
    """A line for each file that should contain the label of an image without another label."""
    for image in shard.names if shard.unclear else []:
        name = next((shard.unclear[key] for key in (image.rpartition(".")[0], _key(image)) if key in shard.unclear), None)
        if name is not None and shard.label(image) is None:
            wanted = "an integer or a name" if name.endswith(".cls") else '{"label": an integer or a name}'
            yield f"{printable(name)} holds no label; write {wanted} into it"


def _label(content: bytes, kind: str) -> int | str | None:
    """The label in a .cls or .json file; None if there is none in the latter. Raises ValueError for anything else."""
    label = content.decode().strip() if kind == ".cls" else json.loads(content)
    if kind == ".json":
        label = label.get("label") if isinstance(label, dict) else None
    elif re.fullmatch(r"-?\d{1,9}", label):
        return int(label)
    if (
        label is None
        or (isinstance(label, int) and not isinstance(label, bool))
        or (isinstance(label, str) and label.isprintable() and label)
    ):
        return label
    raise ValueError


def _paths(shown: str, folder: str, files: list[str], shards: list[_Columns]) -> tuple[Paths, list[tuple[str, str]] | None]:
    """The path of each image as in a folder: its split, its class, its name; and, if there are labels, split and class separately."""
    splits = [next(filter(None, map(split_folder, reversed(Path(file).with_suffix("").parts))), "") for file in files]  # nearest first
    if any(splits):
        bare = [file for file, split in zip(files, splits, strict=True) if not split]
        refuse(shown, [f"{file}: has no split in its name, which others have; put train or val into it" for file in bare])
    labels = {label for shard in shards for label in shard.labels if label is not None}
    names = class_names(labels, _names(shown, Path(folder, CLASS_NAMES)), shown)
    of_split = (name for split, shard in zip(splits, shards, strict=True) if split for name in shard.names)
    by_folders = all("/" in name and role_of(name.partition("/")[0]) for name in of_split)
    placed_in = [partial(_placed, split, by_folders, shard, names) for split, shard in zip(splits, shards, strict=True)]  # again each time
    labelled = {role for placed in placed_in for role, of_class, _ in placed() if of_class}
    lines = [
        f"{file}: {printable(name)} has no label, which others have; write its .cls, or {_PACK_AGAIN} without it"
        for file, shard, placed in zip(files, shards, placed_in, strict=True)
        for name, (role, of_class, _) in zip(shard.names, placed(), strict=True)
        if role in labelled and not of_class
    ]
    refuse(shown, lines)
    parts, places, same = [], [], dict[tuple[str, str], tuple[str, str]]()
    for placed in placed_in:
        paths = []
        for role, of_class, inside in placed():
            first, _, rest = inside.partition("/")
            paths.append(placed_path(role, of_class, rest if rest and first == of_class else inside))
            place = role, of_class or (first if rest else "")
            places.append(same.setdefault(place, place))  # millions of images share few places
        parts.append(path_column(paths))
    return joined_paths(parts), places if labelled else None


def _names(shown: str, file: Path) -> list[str] | None:
    try:
        return file.read_text("utf-8-sig").splitlines() if file.is_file() else None
    except UnicodeDecodeError:
        raise UserError(f"{shown}: {CLASS_NAMES} is not in UTF-8; write the names of classes 0, 1, ... in UTF-8, one a line") from None


def _placed(split: str, by_folders: bool, shard: _Columns, names: Mapping[int | str, str]) -> Iterator[tuple[str, str, str]]:
    """For each image of a shard, its split, the name of its label, and its own name below its split; the first two may be empty. If the
    shard's name gives a split, folders in it are splits only if all are (`by_folders`), since a class may have such a name."""
    class_of = ["" if label is None else names.get(label, "") for label in shard.labels]
    for name, label in zip(shard.names, shard.label_n.tolist(), strict=True):
        first, _, rest = name.partition("/")
        role, inside = (first, rest) if rest and (by_folders or not split) and role_of(first) else (split, name)
        yield role, class_of[label], inside
