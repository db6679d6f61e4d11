"""Datasets of Hugging Face's library `datasets`, saved by `save_to_disk` or in its cache: Arrow files that contain unchanged image files.

The library is not needed. Its description of the features in each file shows which column has the image and which the class.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bingo.datasets.members import Members, PathRows, Placed, class_names, paths_below, placed_path, positions_of, refuse
from bingo.datasets.split_names import role_of, split_folder
from bingo.images.decode import SUFFIXES
from bingo.images.listing import STRINGS, Paths
from bingo.runtime.errors import UserError, printable, short
from bingo.runtime.inside import path_inside
from bingo.runtime.progress import progress_bar

Columns = tuple[str | None, str | None]  # of image and label; None: the only one of its type
_OF_CACHE = re.compile(r".*?-([\w.]+?)(?:-\d{5}-of-\d{5})?\.arrow")  # NAME-SPLIT-00000-of-00002.arrow
_SAVE = 'save it once by Python: from datasets import load_dataset; load_dataset("parquet", data_dir="{}").save_to_disk("NEW FOLDER")'
_NO_DATASET = "names no files as save_to_disk writes them; save the dataset again with save_to_disk"
_WITHOUT_BYTES = (
    "hold paths of other files in place of images; save them with the images: load_from_disk or load_dataset, then save_to_disk"
)


@dataclass(frozen=True)
class _File:
    """The rows of an Arrow file: names of the images' files (empty if a row has none), the number of each row's label among the distinct
    `labels`, int32 (n,), offsets and lengths, int64 (n, 2)."""

    bytes: int
    names: pa.ChunkedArray
    labels: list[int | str | None]
    label_n: np.ndarray
    places_n2: np.ndarray


def read_saved(root: str, follow_links: bool, columns: Columns, name: str, say: Any) -> Members:
    """The images of a saved dataset, with paths as in a folder: SPLIT/CLASS/NAME, where NAME is that of the image's file or its row.

    `say` is called with a line on the columns that are read. Raises UserError for a folder without such a dataset, if it is not clear which
    column is meant, and for files that are damaged, compressed or without images.
    """
    shown = f"{name} = {root}"
    if not Path(root).is_dir():
        raise UserError(f"{shown}: the folder does not exist; name the folder of a dataset that was saved by save_to_disk")
    splits = _splits(Path(root), shown)
    files = [(split, file) for split, names in splits.items() for file in names]
    if not files:
        raise UserError(f"{shown}: {_NO_DATASET}")
    features = _features(Path(root, files[0][1]), shown, files[0][1])
    image, label = _columns(features, columns, shown, say)
    with progress_bar("reading the dataset", len(files), "files") as bar:
        read, problems = [], []
        for _, file in files:
            try:
                read.append(_read(path_inside(root, file, follow_links), image, label, shown))
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())
                problems.append(f"{file}: cannot be read ({reason}); fetch or save the dataset again")
            bar.advance()
    refuse(shown, problems)
    filled = {split for (split, _), rows in zip(files, read, strict=True) if len(rows.names)}
    for split in (split for split in splits if split not in filled):
        line = f"{shown}: {f'the split {printable(split)}' if split else 'it'} has no rows"
        if not filled or role_of(split) == "train":
            raise UserError(f"{line}; save the dataset again with some")
        say(f"{line} and is ignored")
    of_label = features[label] if label else None
    others = [file for _, file in files if label and _features(Path(root, file), shown, file).get(label) != of_label]
    refuse(
        shown,
        [f"{file}: numbers the classes of {label} otherwise than {files[0][1]}; give all splits the same ClassLabel" for file in others],
    )
    names = of_label.get("names") if isinstance(of_label, dict) else None
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{shown}: the classes of {label} are {short(names)}, not a list of names; give it a ClassLabel with names")
    placed = _placed(shown, list(zip((_split(split) for split, _ in files), read, strict=True)), names, label)
    positions = positions_of([file for _, file in files], [rows.bytes for rows in read], [rows.places_n2 for rows in read])
    return Members(
        *_paths(placed, pa.chunked_array([chunk for rows in read for chunk in rows.names.chunks], pa.string())), positions, placed=placed
    )


def _splits(root: Path, shown: str) -> dict[str, list[str]]:
    """The Arrow files of each split, relative to the root, in order; a dataset without splits has the single split ""."""
    whole = "dataset_dict.json"
    if (root / whole).is_file():
        names = _listed(root, whole, "splits", shown)
        if not all(isinstance(split, str) for split in names):
            raise UserError(f"{shown}: {whole}: {_NO_DATASET}")
        return {split: [f"{split}/{file}" for file in _state(root, f"{split}/state.json", shown)] for split in names}
    if (root / "state.json").is_file():
        return {"": _state(root, "state.json", shown)}
    found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.arrow") if not path.name.startswith(("cache-", "tmp")))
    if len(folders := sorted({file.rpartition("/")[0] for file in found})) > 1:
        raise UserError(f"{shown}: holds {len(folders)} datasets ({', '.join(folders[:3])}, ...); name the folder of one of them")
    if not found:
        if next(root.rglob("*.parquet"), None):
            raise UserError(f"{shown}: holds parquet files, in which images are compressed; {_SAVE.format(root)}")
        raise UserError(f"{shown}: holds no dataset that was saved by save_to_disk, and no .arrow files; name the folder of one")
    splits: dict[str, list[str]] = {}
    for file in found:
        match = _OF_CACHE.fullmatch(file.rpartition("/")[2])
        splits.setdefault(match[1] if match else "", []).append(file)
    return splits


def _state(root: Path, name: str, shown: str) -> list[str]:
    files = _listed(root, name, "_data_files", shown)
    if not all(isinstance(file, dict) and isinstance(file.get("filename"), str) for file in files):
        raise UserError(f"{shown}: {name}: {_NO_DATASET}")
    return [file["filename"] for file in files]


def _listed(root: Path, name: str, key: str, shown: str) -> list[Any]:
    """A list that the library wrote into a file."""
    try:
        content = json.loads((root / name).read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shown}: {printable(name)} cannot be read ({reason}); fetch or save the dataset again") from None
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise UserError(f"{shown}: {printable(name)}: {_NO_DATASET}")
    return content[key]


def _features(path: Path, shown: str, file: str) -> dict[str, Any]:
    """The library's description of each column in an Arrow file."""
    try:
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as reader:
            metadata = reader.schema.metadata or {}
        return dict(json.loads(metadata[b"huggingface"])["info"]["features"].items())
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{shown}: {file} is not an Arrow file of the library datasets; save the dataset again with save_to_disk") from None


def _columns(features: dict[str, Any], asked: Columns, shown: str, say: Any) -> tuple[str, str | None]:
    """The names of the image and label columns (None without labels); chosen by their types if none is configured."""
    chosen: list[str | None] = []
    for what, kind, name in zip(("image", "label"), ("Image", "ClassLabel"), asked, strict=True):
        key = f"dataset.{what}_column"
        if name is not None and name not in features:
            raise UserError(f"{key} = {name}: the dataset has the columns {', '.join(map(printable, features))}; name one of them")
        found = [column for column, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == kind]
        if name is not None and name not in found and what == "image":
            raise UserError(f"{key} = {name}: is a column of another type; columns of images are {', '.join(found) or 'none'}")
        if name is None and (len(found) > 1 or (not found and what == "image")):
            problem = f"has {len(found)} columns of the type {kind} ({', '.join(found)})" if found else f"has no column of the type {kind}"
            raise UserError(f"{shown}: {problem}; set {key} to one of: {', '.join(map(printable, found or features))}")
        chosen.append(name or (found[0] if found else None))
    image, label = str(chosen[0]), chosen[1]
    say(f"{shown}: images are in the column {printable(image)}, {f'labels in {printable(label)}' if label else 'without labels'}")
    return image, label


def _read(path: Path, image: str, label: str | None, shown: str) -> _File:
    """The rows of an Arrow file; no image is read. Raises ValueError and pyarrow's errors for files without the bytes of images, and
    UserError for a column that holds no labels."""
    names, numbers, labels, places = [], [np.empty(0, np.int32)], dict[int | str | None, int](), [np.empty((0, 2), np.int64)]
    with pa.memory_map(str(path)) as mapped:
        content = mapped.read_buffer()
        for batch in pa.ipc.open_stream(content):
            column = batch.column(image)
            fields = {field.name: field.type for field in column.type} if pa.types.is_struct(column.type) else {}
            if fields.get("bytes") not in (pa.binary(), pa.large_binary()) or "path" not in fields:
                raise ValueError(f"its images are of the type {short(str(column.type))}, not pairs of bytes and path")
            paths = column.field("path").cast(pa.string()).fill_null("")
            names.append(pc.replace_substring_regex(pc.utf8_rtrim(paths, "/"), r"(?s)^.*/", ""))
            found = _labels(batch.column(label), shown) if label else pa.nulls(len(batch), pa.string())
            found = found.dictionary_encode("encode")
            own = [labels.setdefault(value, len(labels)) for value in found.dictionary.to_pylist()]
            numbers.append(np.array(own, np.int32)[found.indices])
            places.append(_places(column.field("bytes"), content))
    places_n2 = np.concatenate(places)
    if len(places_n2) and not places_n2[:, 1].any():
        raise ValueError(f"its rows {_WITHOUT_BYTES}")
    return _File(content.size, pa.chunked_array(names, pa.string()), list(labels), np.concatenate(numbers), places_n2)


def _labels(column: pa.Array, shown: str) -> pa.Array:
    """A column of integers or strings. Raises UserError if it holds anything else but nulls."""
    column = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
    if any(of_type(column.type) for of_type in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)):
        return column
    if len(others := column.drop_null()):
        problem = f"labels such as {short(others[0].as_py())} are neither integers nor names"
        raise UserError(f"{shown}: {problem}; set dataset.label_column to another column")
    return pa.nulls(len(column), pa.string())


def _places(column: pa.Array, content: pa.Buffer) -> np.ndarray:
    """Offset and length in a file of each value of a column of bytes, int64 (n, 2); a null has length 0."""
    if not len(column):
        return np.empty((0, 2), np.int64)
    _, ends, values = column.buffers()
    ends_n = np.frombuffer(ends, np.int64 if pa.types.is_large_binary(column.type) else np.int32)[column.offset :][: len(column) + 1]
    start = values.address - content.address if values else 0  # without any, it may be anywhere
    if values and not 0 <= start <= content.size - values.size:
        raise ValueError("its rows are compressed, so that images have no positions")
    return np.stack([start + ends_n[:-1].astype(np.int64), np.diff(ends_n).astype(np.int64)], axis=1)


def _placed(shown: str, found: list[tuple[str, _File]], names: list[str] | None, column: str | None) -> Placed:
    """The split and the class of each image, empty without a label. Raises UserError for splits in which some rows have no label."""
    named = class_names({label for _, rows in found for label in rows.labels if label is not None}, names, shown)
    places = [[(split, "" if label is None else named.get(label, "")) for label in rows.labels] for split, rows in found]
    number = {place: number for number, place in enumerate(dict.fromkeys(place for own in places for place in own))}
    parts = [np.array([number[place] for place in own], np.int32)[rows.label_n] for own, (_, rows) in zip(places, found, strict=True)]
    placed = Placed(list(number), np.concatenate(parts))
    rows_of, unknown = Counter[str](), Counter[str]()
    for (split, of_class), rows in zip(number, np.bincount(placed.number_N, minlength=len(number)).tolist(), strict=True):
        rows_of[split] += rows
        unknown[split] += 0 if of_class else rows
    way_out = f'leave them out, by: dataset.filter(lambda row: row["{column}"] not in (None, "", -1)).save_to_disk("NEW FOLDER")'
    mixed = [split for split in unknown if 0 < unknown[split] < rows_of[split]]
    problem = "rows have no label (null, empty or less than zero), which others have"
    refuse(shown, [f"{unknown[x]:,} of {rows_of[x]:,} {printable(x)}{' ' if x else ''}{problem}; {way_out}" for x in mixed])
    return placed


def _paths(placed: Placed, names: pa.ChunkedArray) -> tuple[Paths, PathRows]:
    """The path of each image as in a folder: its split, its class, and its file name; or, if two in a folder have the same name or one has
    none, its number in the split."""
    folders = [placed_path(*pair, "") for pair in placed.pairs]
    if pc.all(pc.match_substring_regex(names, rf"(?i)({'|'.join(map(re.escape, SUFFIXES))})$")).as_py():
        paths = paths_below(folders, placed.number_N, names)
        if next((rows := PathRows(paths)).twins(), None) is None:
            return paths, rows
    number_N = np.empty(len(names), np.int64)
    for split in {split for split, _ in placed.pairs}:
        in_split = np.array([own == split for own, _ in placed.pairs])[placed.number_N]
        number_N[in_split] = np.arange(in_split.sum())
    padded = pc.utf8_lpad(pc.cast(pa.array(number_N), STRINGS), len(str(len(names))), "0")
    paths = paths_below(folders, placed.number_N, pc.binary_join_element_wise(padded, *pa.array([".jpg", ""], STRINGS)))
    return paths, PathRows(paths)


def _split(split: str) -> str:
    """The folder of a split. `validation` is used if the test split has no labels, like val/ in a folder."""
    return "val" if role_of(split) == "test" and split_folder(split) == "val" else split
