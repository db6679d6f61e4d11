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
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bingo.datasets.layout import SYSTEM_FOLDERS
from bingo.datasets.members import Members, PathRows, Placed, Strings, class_names, paths_below, placed_path, positions_of, refuse
from bingo.datasets.split_names import role_of, split_folder
from bingo.images.decode import SUFFIXES
from bingo.images.listing import Paths, joined_paths
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
    """The content of a shard while it is read: its size, its images with offset and length, labels by key and suffix, suffixes of other
    members, and lines on problems."""

    bytes: int = 0
    names: Strings = field(default_factory=Strings)
    places: array = field(default_factory=lambda: array("q"))  # offset and length of each in turn
    keys: dict[str, Strings] = field(default_factory=lambda: {".cls": Strings(), ".json": Strings()})
    numbers: dict[str, array] = field(default_factory=lambda: {".cls": array("i"), ".json": array("i")})  # of each key's label
    labels: dict[int | str, int] = field(default_factory=dict)  # and of each distinct label
    passed: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    unclear: dict[str, str] = field(default_factory=dict)  # by the key of a file from which no label can be read, a line on it

    def columns(self) -> "_Columns":
        """What is kept of the shard."""
        names, places_n2 = self.names.column(), np.array(self.places, np.int64).reshape(-1, 2)
        label_n = self._label_n(names)
        for name in names.filter(pa.array(label_n < 0)).to_pylist() if self.unclear else []:
            self.problems += self._unclear(name)
        parts = pc.extract_regex(names, r"(?s)^(?P<head>(?:[^/]*/){0,2})(?P<name>.*)$")
        heads = parts.field("head").dictionary_encode()
        labels: list[int | str | None] = [*self.labels, None]  # the last is that of -1
        kinds, kind_n = np.unique(heads.indices.to_numpy().astype(np.int64) * len(labels) + label_n % len(labels), return_inverse=True)
        heads_of = heads.dictionary.to_pylist()
        pairs = [(heads_of[kind // len(labels)], labels[kind % len(labels)]) for kind in kinds.tolist()]
        return _Columns(self.bytes, parts.field("name"), places_n2, pairs, kind_n.astype(np.int32), self.passed, self.problems)

    def _label_n(self, names: pa.Array) -> np.ndarray:
        """The number of each image's label, int32 (n,), -1 without one: that of the last .cls or the first .json with its key, which is its
        name up to the last dot, or up to the first, as in WebDataset."""
        cls, json = (self.keys[kind].column() for kind in (".cls", ".json"))
        keys = pa.concat_arrays([cls.take(pa.array(np.arange(len(cls))[::-1])), json])
        number_K = np.concatenate([self.numbers[".cls"][::-1], self.numbers[".json"], [-1]]).astype(np.int32)
        places = (pc.index_in(pc.replace_substring_regex(names, key, ""), keys) for key in (r"\.[^.]*$", r"\.[^/]*$"))
        return number_K[pc.coalesce(*places).fill_null(-1).to_numpy()]

    def _unclear(self, image: str) -> Iterator[str]:
        """A line if a file should contain the label of an image without another label."""
        if line := next((self.unclear[key] for key in (image.rpartition(".")[0], _key(image)) if key in self.unclear), ""):
            yield line


@dataclass(frozen=True)
class _Columns:
    """What a shard holds: its size, the names of its n images without their first two folders, offset and length of each, int64 (n, 2), the
    kind of each, int32 (n,), among `kinds`: those two folders and a label, or None; suffixes of the rest, and lines on what is wrong."""

    bytes: int
    names: pa.Array
    places_n2: np.ndarray
    kinds: list[tuple[str, int | str | None]]
    kind_n: np.ndarray
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
    rows, way_out = PathRows(paths), "give each image a key of its own"
    holders = ((path, [files[file] for file in positions.positions_N3[[first, row], 0]]) for path, first, row in rows.twins())
    refuse(shown, (f"{printable(path)} is in {' and in '.join(names)}; {way_out}" for path, names in holders))
    return Members(paths, rows, positions, sum((shard.passed for shard in shards), Counter[str]()), placed)


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
    name = "/".join(part for part in member.name.split("/") if part not in ("", "."))  # pathlib takes several times as long
    is_image, kind = name.lower().endswith(SUFFIXES), os.path.splitext(name)[1].lower()  # noqa: PTH122
    if member.isdir():
        return
    link = ""
    if member.issym() or member.islnk():
        link = f"{printable(name)} is a link, to {printable(member.linkname)}; {_PACK_AGAIN} with tar --dereference --hard-dereference"
    if leads_out(member.name):
        shard.problems.append(f"{printable(member.name)} leads out of the shard's folder; {_PACK_AGAIN} with relative names")
    elif any(part.startswith(".") or part.lower() in SYSTEM_FOLDERS for part in name.split("/")):
        shard.passed["hidden"] += 1
    elif is_image and link:
        shard.problems.append(link)
    elif is_image and (not member.isreg() or member.issparse()):
        shard.problems.append(f"{printable(name)} is not a regular file; {_PACK_AGAIN} without it")
    elif is_image and name != name.encode(errors="replace").decode():
        shard.problems.append(f"{printable(name)} is not a UTF-8 name; {_PACK_AGAIN} with another")
    elif is_image:
        shard.names.add(name)
        shard.places.extend((member.offset_data, member.size))
    elif kind in (".cls", ".json") and link:
        shard.unclear[name[: -len(kind)]] = link
    elif kind in (".cls", ".json") and member.isreg():
        key = name[: -len(kind)]
        try:
            label = _label(os.pread(descriptor, min(member.size, _MOST_LABEL_BYTES), member.offset_data), kind)
        except (ValueError, RecursionError):
            wanted = "an integer or a name" if kind == ".cls" else '{"label": an integer or a name}'
            shard.unclear[key] = f"{printable(name)} holds no label; write {wanted} into it"
            return
        if label is not None:
            shard.keys[kind].add(key)
            shard.numbers[kind].append(shard.labels.setdefault(label, len(shard.labels)))
    else:
        shard.passed[printable(kind) if len(kind) > 1 else "without a suffix"] += 1


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


def _paths(shown: str, folder: str, files: list[str], shards: list[_Columns]) -> tuple[Paths, Placed | None]:
    """The path of each image as in a folder: its split, its class, its name; and, if there are labels, split and class separately."""
    splits = [next(filter(None, map(split_folder, reversed(Path(file).with_suffix("").parts))), "") for file in files]  # nearest first
    if any(splits):
        bare = [file for file, split in zip(files, splits, strict=True) if not split]
        refuse(shown, [f"{file}: has no split in its name, which others have; put train or val into it" for file in bare])
    labels = {label for shard in shards for _, label in shard.kinds if label is not None}
    names = class_names(labels, _names(shown, Path(folder, CLASS_NAMES)), shown)
    in_split = (head for split, shard in zip(splits, shards, strict=True) if split for head, _ in shard.kinds)
    by_folders = all(head and role_of(head.partition("/")[0]) for head in in_split)
    placed = [[_placed(split, by_folders, *kind, names) for kind in shard.kinds] for split, shard in zip(splits, shards, strict=True)]
    labelled = {role for own in placed for role, of_class, _ in own if of_class}
    refuse(shown, (line for shard in zip(files, shards, placed, strict=True) for line in _without_label(*shard, labelled)))
    parts, numbers, pairs = [], [], dict[tuple[str, str], int]()
    for shard, own in zip(shards, placed, strict=True):
        above, own_numbers = [], []
        for role, of_class, inside in own:
            first, slash, rest = inside.partition("/")
            above.append(placed_path(role, of_class, (rest if slash and first == of_class else inside).removesuffix("/")))
            own_numbers.append(pairs.setdefault((role, of_class or (first if slash else "")), len(pairs)))
        parts.append(paths_below(above, shard.kind_n, shard.names))
        numbers.append(np.array(own_numbers, np.int32)[shard.kind_n])
    return joined_paths(parts), Placed(list(pairs), np.concatenate(numbers)) if labelled else None


def _without_label(file: str, shard: _Columns, placed: list[tuple[str, str, str]], labelled: set[str]) -> Iterator[str]:
    """A line for each image without a label in a split in which others have one."""
    is_bare = np.array([role in labelled and not of_class for role, of_class, _ in placed], bool)
    for row in np.flatnonzero(is_bare[shard.kind_n]).tolist():
        name = shard.kinds[shard.kind_n[row]][0] + shard.names[row].as_py()
        yield f"{file}: {printable(name)} has no label, or one less than zero, but others do; write its .cls, or {_PACK_AGAIN} without it"


def _names(shown: str, file: Path) -> list[str] | None:
    try:
        return file.read_text("utf-8-sig").splitlines() if file.is_file() else None
    except UnicodeDecodeError:
        raise UserError(f"{shown}: {CLASS_NAMES} is not in UTF-8; write the names of classes 0, 1, ... in UTF-8, one a line") from None


def _placed(split: str, by_folders: bool, head: str, label: int | str | None, names: Mapping[int | str, str]) -> tuple[str, str, str]:
    """Of images with these first folders and label, the split, the name of the label, and the folders below the split; each may be empty.
    If the shard's name gives a split, folders in it are splits only if all are (`by_folders`), since a class may have such a name."""
    first, _, rest = head.partition("/")
    role, inside = (first, rest) if head and (by_folders or not split) and role_of(first) else (split, head)
    return role, "" if label is None else names.get(label, ""), inside
