"""Datasets of Hugging Face's library: the same listing and the same views as a folder of the same images, from files written here in the
library's format, and by the library itself if it is installed."""

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bingo.datasets.finding import source_of
from bingo.datasets.saved import read_saved
from bingo.datasets.sources import scan
from bingo.evals.transfer import scanned
from bingo.images.listing import read_listing, write_listing
from bingo.params import DatasetParams, read_yaml, validate
from bingo.runtime.errors import UserError
from tests.datasets.test_shards import pack, relative, same
from tests.datasets.test_sources import folder, lines_of, pets, save

__all__ = ["pets"]
IMAGE = {"_type": "Image"}
BYTES_AND_PATH = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def saved(root: Path | str, **changes) -> DatasetParams:
    return folder(root, source="huggingface", **changes)


def features_of(names: list[str] | None) -> dict[str, Any]:
    return {"image": IMAGE} | ({} if names is None else {"label": {"_type": "ClassLabel", "names": names}})


def write_arrow(path: Path, features: dict[str, Any], columns: dict[str, pa.Array], rows_a_batch: int = 2, **options) -> None:
    """A stream of record batches with the features in the metadata of its schema, as written by the library's ArrowWriter."""
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([(name, column.type) for name, column in columns.items()], metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(pa.table(list(columns.values()), schema=schema), max_chunksize=rows_a_batch)


def images_of(files: list[Path], name: bool = True, with_bytes: bool = True) -> pa.Array:
    rows = [{"bytes": file.read_bytes() if with_bytes else None, "path": file.name if name else None} for file in files]
    return pa.array(rows, BYTES_AND_PATH)


def files_of(root: Path, part: str) -> tuple[list[Path], list[str]]:
    """The images of a split in reverse order, and their classes."""
    found = [path for path in sorted((root / part).glob("*/*"), reverse=True) if path.suffix != ".txt" and path.name[0] != "."]
    return found, [path.parent.name for path in found]


def save_split(where: Path, files: list[Path], classes: list[str], names: list[str], **options) -> None:
    """A split in two files, as written by save_to_disk."""
    half = len(files) // 2
    for number, part in enumerate((slice(half), slice(half, None))):
        columns = {"image": images_of(files[part]), "label": pa.array([names.index(name) for name in classes[part]], pa.int64())}
        write_arrow(where / f"data-{number:05d}-of-00002.arrow", features_of(names), columns, **options)
    state = {"_data_files": [{"filename": f"data-{number:05d}-of-00002.arrow"} for number in range(2)]}
    (where / "state.json").write_text(json.dumps(state))


@pytest.fixture
def flat_pets(pets) -> Path:
    """The pets without a deeper folder, which a saved dataset cannot have."""
    (pets / "train/cat/deep/er/c.png").rename(pets / "train/cat/c.png")
    shutil.rmtree(pets / "train/cat/deep")
    return pets


def test_a_saved_dataset_equals_the_folder_of_its_images(flat_pets, tmp_path_factory):
    """With splits, where validation is used because the test split has no labels; with classes in an unsorted order; with a single
    split."""
    there = tmp_path_factory.mktemp("saved")
    for split, part in (("train", "train"), ("validation", "val")):
        save_split(there / split, *files_of(flat_pets, part), ["dog", "cat"])
    unlabelled = {"image": images_of(files_of(flat_pets, "val")[0]), "label": pa.array([-1, -1], pa.int64())}
    write_arrow(there / "test/data.arrow", features_of(["dog", "cat"]), unlabelled)
    (there / "test/state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (there / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test"]}))
    assert source_of(str(there)) == "huggingface"
    assert same(saved(there), folder(flat_pets), there)
    assert same(saved(there, store_px=9, train_images=3), folder(flat_pets, store_px=9, train_images=3), there)
    assert same(saved(there / "train", test_images=2), folder(flat_pets / "train", test_images=2), there)


def test_a_cached_dataset_is_read_by_the_names_of_its_files(flat_pets, tmp_path_factory):
    """In the folder of its configuration; files that `map` has cached there are ignored. Images without names are numbered."""
    there = tmp_path_factory.mktemp("cache")
    leaf, wanted = there / "default/0.0.0/c0ffee", tmp_path_factory.mktemp("wanted")
    for split, part in (("train", "train"), ("validation", "val")):
        files, classes = files_of(flat_pets, part)
        labels = pa.array([["cat", "dog"].index(name) for name in classes], pa.int64())
        write_arrow(
            leaf / f"my-pets-{split}-00000-of-00001.arrow", features_of(["cat", "dog"]), {"image": images_of(files, False), "label": labels}
        )
        for number, (file, of_class) in enumerate(zip(files, classes, strict=True)):
            place = wanted / part / of_class / f"{number}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    (leaf / "cache-0123.arrow").write_bytes(b"of map")
    (leaf / "dataset_info.json").write_text("{}")
    assert same(saved(there), folder(wanted), there)


def test_columns_are_found_by_their_type_or_named(flat_pets, tmp_path):
    files, classes = files_of(flat_pets, "train")
    coarse = {"_type": "ClassLabel", "names": ["pet"]}
    features = features_of(["cat", "dog"]) | {"coarse": coarse, "mask": IMAGE, "kind": {"_type": "Value", "dtype": "string"}}
    labels = pa.array([["cat", "dog"].index(name) for name in classes], pa.int64())
    columns = {"image": images_of(files), "label": labels, "coarse": pa.array([0] * 5, pa.int64())}
    columns |= {"mask": images_of(files[::-1]), "kind": pa.array(classes)}
    write_arrow(tmp_path / "new/data.arrow", features, columns)
    (line,) = lines_of(saved(tmp_path / "new"))
    assert "image, mask" in line
    assert "dataset.image_column" in line
    (line,) = lines_of(saved(tmp_path / "new", image_column="image"))
    assert "label, coarse" in line
    assert "dataset.label_column" in line
    wanted = folder(flat_pets / "train")
    for label in ("label", "kind"):
        assert same(saved(tmp_path / "new", image_column="image", label_column=label), wanted, tmp_path)
    assert scan(saved(tmp_path / "new", image_column="image", label_column="coarse"), 0)[0].classes == ["pet"]
    for wrong in ({"image_column": "kind"}, {"image_column": "nothing"}, {"image_column": "image", "label_column": "nothing"}):
        (line,) = lines_of(saved(tmp_path / "new", **wrong))
        assert line.startswith(f"dataset.{list(wrong)[-1]} = ")
    write_arrow(tmp_path / "bare/data.arrow", features_of(None), {"image": images_of(files)})
    listing, _ = scan(saved(tmp_path / "bare"), 0)
    assert (len(listing), listing.classes, set(listing.labels_N)) == (5, [], {-1})
    write_arrow(tmp_path / "none/data.arrow", {"kind": features["kind"]}, {"kind": pa.array(classes)})
    assert "no column of the type Image" in lines_of(saved(tmp_path / "none"))[0]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("cut", "cannot be read"), ("compressed", "compressed"), ("paths", "save_to_disk"), ("other file", "not an Arrow file"),
        ("gone", "cannot be read"), ("state", "state.json"), ("parquet", "load_dataset"), ("empty folder", "save_to_disk"),
        ("two datasets", "holds 2 datasets"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_by_position_are_refused_with_a_way_out(flat_pets, tmp_path, damage, reason):
    files, classes = files_of(flat_pets, "train")
    there = tmp_path / "saved"
    save_split(there, files, classes, ["cat", "dog"], **({"compression": "zstd"} if damage == "compressed" else {}))
    second = there / "data-00001-of-00002.arrow"
    if damage == "cut":
        second.write_bytes(second.read_bytes()[:-700])
    elif damage == "paths":
        for file in there.glob("*.arrow"):
            columns = {"image": images_of(files, with_bytes=False), "label": pa.array([0] * 5, pa.int64())}
            write_arrow(file, features_of(["cat", "dog"]), columns)
    elif damage == "other file":
        (there / "data-00000-of-00002.arrow").write_bytes(b"ARROW1\0\0 but no stream")
    elif damage == "gone":
        second.unlink()
    elif damage == "state":
        (there / "state.json").write_text("{")
    elif damage in ("parquet", "empty folder"):
        shutil.rmtree(there)
        (there / "data").mkdir(parents=True)
        (there / f"data/train-00000-of-00001.{damage}").write_bytes(b"PAR1")
    elif damage == "two datasets":
        (there / "state.json").unlink()
        write_arrow(there / "plain_text/data.arrow", features_of(None), {"image": images_of(files)})
    lines = lines_of(saved(there))
    assert any(reason in line for line in lines), lines


def test_rows_without_an_image_are_unreadable_files(flat_pets, tmp_path):
    files, _ = files_of(flat_pets, "train")
    rows = [{"bytes": files[0].read_bytes(), "path": None}, None, {"bytes": b"no image", "path": None}, {"bytes": None, "path": "far.jpg"}]
    write_arrow(tmp_path / "data.arrow", features_of(None), {"image": pa.array(rows, BYTES_AND_PATH)})
    lines = lines_of(saved(tmp_path))
    assert [f"{row}.jpg (row {row})" in line for row, line in zip((1, 2, 3), lines, strict=False)] == [True] * 3
    listing, _ = scan(saved(tmp_path, on_bad_image="skip"), 0)
    assert (listing.paths, listing.skipped) == (["0.jpg"], ["1.jpg", "2.jpg", "3.jpg"])
    write_arrow(tmp_path / "data.arrow", features_of(None), {"image": pa.array([*rows[:1], None, None, None], BYTES_AND_PATH)})
    members = read_saved(str(tmp_path), False, (None, None), "root", lambda line: None)  # the second batch has no bytes at all
    assert (members.positions.positions_N3[2:, 1:] == 0).all()


def test_files_saved_and_cached_by_the_library_are_read(flat_pets, tmp_path_factory):
    """A folder of images loaded by the library: saved, saved as one split, and cached as a parquet copy."""
    pytest.importorskip("datasets.load", reason="needs Hugging Face's library datasets")  # not this folder of the same name
    import datasets

    there = tmp_path_factory.mktemp("library")
    (flat_pets / "train/cat/notes.txt").unlink()
    found = datasets.load_dataset("imagefolder", data_dir=str(flat_pets), cache_dir=str(there / "images"))
    found.save_to_disk(str(there / "saved"), num_shards={"train": 2, "validation": 1})
    assert same(saved(there / "saved"), folder(flat_pets), there)
    assert same(saved(there / "saved/train"), folder(flat_pets / "train"), there)
    for split, rows in datasets.load_from_disk(str(there / "saved")).items():
        rows.to_parquet(there / f"parquet/data/{split}-00000-of-00001.parquet")
    assert "load_dataset" in lines_of(saved(there / "parquet"))[0]
    datasets.load_dataset("parquet", data_dir=str(there / "parquet"), cache_dir=str(there / "cache"))
    assert same(saved(there / "cache"), folder(flat_pets), there)
    assert "save_to_disk" in lines_of(saved(there / "images"))[0]  # the cache of a folder contains paths


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train/state.json", "{}"),
        ("train/state.json", '{"_data_files": [1]}'),
        ("train/state.json", '{"_data_files": null}'),
        ("dataset_dict.json", "[]"),
        ("dataset_dict.json", '{"splits": []}'),
        ("dataset_dict.json", '{"splits": ["train", null]}'),
        ("dataset_dict.json", "[" * 100_000),
    ],
)
def test_descriptions_that_the_library_did_not_write_are_refused(flat_pets, tmp_path_factory, file, content):
    there = tmp_path_factory.mktemp("saved")
    save_split(there / "train", *files_of(flat_pets, "train"), ["dog", "cat"])
    (there / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (there / file).write_text(content)
    (line,) = lines_of(saved(there))
    assert line.startswith(f"dataset.root = {there}: ")


@pytest.mark.parametrize("features", [["image"], "image", {"image": IMAGE, "label": {"_type": "ClassLabel", "names": [1, 2]}}])
def test_features_that_the_library_did_not_describe_are_refused(flat_pets, tmp_path, features):
    files, _ = files_of(flat_pets, "train")
    write_arrow(tmp_path / "data.arrow", features, {"image": images_of(files), "label": pa.array([0] * 5, pa.int64())})
    (line,) = lines_of(saved(tmp_path))
    assert line.startswith(f"dataset.root = {tmp_path}: ")


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(), pa.string(), pa.list_(BYTES_AND_PATH), pa.struct([("bytes", pa.binary())]), pa.struct([("path", pa.string())]),
        *(pa.struct([("bytes", kind), ("path", pa.string())]) for kind in (pa.binary_view(), pa.binary(3), pa.null(), pa.string())),
    ],
)  # fmt: skip
def test_images_of_a_type_without_positions_are_refused(tmp_path, kind):
    write_arrow(tmp_path / "data.arrow", features_of(None), {"image": pa.nulls(5, kind)})
    (line,) = lines_of(saved(tmp_path))
    assert line.startswith(f"dataset.root = {tmp_path}: data.arrow: ")


@pytest.mark.parametrize("of_bytes", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("of_path", [pa.string(), pa.large_string(), pa.string_view()])
def test_any_type_of_bytes_and_path_gives_the_same_rows(flat_pets, tmp_path, of_bytes, of_path):
    files, classes = files_of(flat_pets, "train")
    images = images_of(files)
    columns = {
        "image": pa.StructArray.from_arrays([images.field("bytes").cast(of_bytes), images.field("path").cast(of_path)], ["bytes", "path"]),
        "label": pa.array([["cat", "dog"].index(name) for name in classes], pa.int64()),
    }
    write_arrow(tmp_path / "data.arrow", features_of(["cat", "dog"]), columns)
    assert same(saved(tmp_path), folder(flat_pets / "train"), tmp_path)


def test_splits_that_number_their_classes_differently_are_refused(flat_pets, tmp_path_factory):
    there = tmp_path_factory.mktemp("saved")
    save_split(there / "train", *files_of(flat_pets, "train"), ["dog", "cat"])
    save_split(there / "test", *files_of(flat_pets, "val"), ["cat", "dog"])
    (there / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [line.partition(": ")[2].partition(":")[0] for line in lines_of(saved(there))][:2] == [
        "test/data-00000-of-00002.arrow", "test/data-00001-of-00002.arrow",
    ]  # fmt: skip


def test_transfer_accepts_shards_and_saved_datasets(flat_pets, tmp_path_factory):
    """Like the folder of the same images; its columns cannot be named."""
    there = tmp_path_factory.mktemp("sets")
    for split, part in (("train", "train"), ("validation", "val")):
        save_split(there / "saved" / split, *files_of(flat_pets, part), ["cat", "dog"])
        pack(there / f"shards/{split}.tar", relative(flat_pets, part))
    (there / "saved/dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    image = images_of(files_of(flat_pets, "train")[0])
    write_arrow(there / "two/data.arrow", {"image": IMAGE, "mask": IMAGE}, {"image": image, "mask": image})
    roots = {"folder": flat_pets, "webdataset": f"{there}/shards/{{train,validation}}.tar", "huggingface": there / "saved"}
    sets = {source: {"source": source, "root": str(root)} for source, root in roots.items()} | {
        "two": {"source": "huggingface", "root": str(there / "two")}
    }
    document = read_yaml("params.yaml")
    document["transfer"]["datasets"] = {
        name: found | dict.fromkeys(("store_px", "train_images", "test_images")) for name, found in sets.items()
    }
    params = validate(document, "params.yaml")
    (wanted, files), *others = (scanned(params, name, lambda line: None) for name in roots)
    for listing, images in others:
        assert (listing.paths, listing.labels_N.tolist(), listing.train_rows) == (wanted.paths, wanted.labels_N.tolist(), 5)
        assert [images.read(row) for row in range(len(listing))] == [files.read(row) for row in range(len(wanted))]
    with pytest.raises(UserError, match="save it with one of these alone: image, mask") as error:
        scanned(params, "two", lambda line: None)
    assert error.value.lines[0].startswith("transfer.datasets.two.root = ")


OTHER = {
    "a list": [[0], [1]], "a structure": [{"x": 1}, {"x": 2}], "a fraction": [0.0, 1.0], "truth": [True, False], "bytes": [b"a", b"b"],
    "an image": [{"bytes": b"x", "path": None}] * 2, "no bytes": [[], []],
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER)
def test_a_column_without_labels_is_an_error_in_one_line(flat_pets, tmp_path, kind):
    files, _ = files_of(flat_pets, "val")
    columns = {"image": images_of(files), "kind": pa.array(OTHER[kind])}
    write_arrow(tmp_path / "data.arrow", features_of(None) | {"kind": {"_type": "Value"}}, columns)
    (line,) = lines_of(saved(tmp_path, label_column="kind"))
    assert "are neither integers nor names; set dataset.label_column to another column" in line


NO_FOLDERS = {  # names of classes that cannot be names of folders, or that mean something else there
    "of systems": ["__MACOSX", "@eaDir", "lost+found", "cat"],
    "hidden": [".x", ".git", "..", "."],
    "splits": ["train", "test", "val", "car"],
    "twins": ["seg_train", "seg_test", "a/b", "a_b"],
    "suffixes": ["a.jpg", "b.png", "Dog", "dog"],
}


@pytest.mark.parametrize("kind", NO_FOLDERS)
def test_any_name_of_a_class_is_a_class(flat_pets, tmp_path, kind):
    """Each class has one train and one test image, listed in the order of the names of classes."""
    names = NO_FOLDERS[kind]
    files = [save(tmp_path / f"{number}.jpg", number) for number in range(2 * len(names))]
    for part, of_split in (("train", files[: len(names)]), ("test", files[len(names) :])):
        save_split(tmp_path / "saved" / part, of_split, names, names)
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    said: list[str] = []
    listing, _ = scan(saved(tmp_path / "saved"), 0, said.append)
    assert not any("skipped" in line for line in said)
    assert (listing.classes, listing.train_rows) == (sorted(names), len(names))
    assert listing.labels_N.tolist() == [*range(len(names))] * 2
    wanted = [int(names.index(name) + shift) for shift in (0, len(names)) for name in sorted(names)]
    assert [int(Path(path).stem) for path in listing.paths] == wanted
    write_listing(tmp_path / "listing.parquet", listing)
    assert read_listing(tmp_path / "listing.parquet").paths == listing.paths


@pytest.mark.parametrize("names", [[".hidden.jpg", "._a.jpg"], ["..jpg", ".jpg"], ["a b.jpg", "\n.jpg"]])
def test_any_name_of_an_image_is_an_image(flat_pets, tmp_path, names):
    files = [save(tmp_path / f"{number}.jpg", number) for number in range(2)]
    rows = [{"bytes": file.read_bytes(), "path": name} for file, name in zip(files, names, strict=True)]
    write_arrow(tmp_path / "saved/data.arrow", features_of(["a"]), {"image": pa.array(rows, BYTES_AND_PATH), "label": pa.array([0, 0])})
    listing, _ = scan(saved(tmp_path / "saved"), 0)
    assert listing.paths == [f"a/{name}" for name in sorted(names)]


UNKNOWN = {"null": None, "-1": -1, "-100": -100}


@pytest.mark.parametrize("unknown", UNKNOWN)
def test_rows_without_labels(flat_pets, tmp_path, unknown):
    """If no row of a split has a label, its images have none; a test split without labels is ignored if train images have labels. A split
    in which only some rows have labels is refused."""
    files = files_of(flat_pets, "train")[0]

    def write(split: str, labels: list[int | None]) -> None:
        columns = {"image": images_of(files[: len(labels)]), "label": pa.array(labels, pa.int64())}
        write_arrow(tmp_path / f"cache/x-{split}.arrow", features_of(["cat", "dog"]), columns)

    write("train", [UNKNOWN[unknown]] * 3)
    listing, _ = scan(saved(tmp_path / "cache"), 0)
    assert (listing.classes, listing.labels_N.tolist()) == ([], [-1] * 3)
    write("test", [1, 0])
    listing, _ = scan(saved(tmp_path / "cache"), 0)
    assert (listing.classes, listing.labels_N.tolist()) == (["cat", "dog"], [-1, -1, -1, 0, 1])
    write("train", [0, 1, UNKNOWN[unknown]])
    (line,) = lines_of(saved(tmp_path / "cache"))
    assert line.startswith(f"dataset.root = {tmp_path / 'cache'}: 1 of 3 train rows ")
    assert 'row["label"] not in' in line
    write("train", [0, 1, 1])
    write("test", [UNKNOWN[unknown]] * 2)
    said: list[str] = []
    listing, _ = scan(saved(tmp_path / "cache"), 0, said.append)
    assert (listing.labels_N.tolist(), listing.train_rows) == ([0, 1, 1], 3)
    assert any("split test have no labels" in line for line in said)


@pytest.mark.parametrize(("splits", "train_rows"), [(["full"], 2), (["unlabeled", "train"], 2), (["a", "b"], None), (["test"], None)])
def test_splits_with_other_names(flat_pets, tmp_path, splits, train_rows):
    files, classes = files_of(flat_pets, "val")
    labels = pa.array([["cat", "dog"].index(name) for name in classes], pa.int64())
    for split in splits:
        write_arrow(tmp_path / f"x-{split}.arrow", features_of(["cat", "dog"]), {"image": images_of(files), "label": labels})
    if train_rows is None:
        assert "not clear" in lines_of(saved(tmp_path))[0]
        return
    said: list[str] = []
    listing, _ = scan(saved(tmp_path), 0, said.append)
    assert (len(listing), listing.train_rows, listing.classes) == (train_rows, train_rows, ["cat", "dog"])
    assert any("2 images of other splits" in line for line in said) == (len(splits) > 1)


@pytest.mark.parametrize("names", [["", "cat"], ["cat", " "]])
def test_a_class_with_an_empty_name_is_refused_if_it_has_images(flat_pets, tmp_path, names):
    files, empty = files_of(flat_pets, "train")[0][:2], [bool(name.strip()) for name in names].index(False)
    for labels in ([0, 1], [empty, empty], [1 - empty, 1 - empty]):
        write_arrow(tmp_path / "data.arrow", features_of(names), {"image": images_of(files), "label": pa.array(labels, pa.int64())})
        if empty in labels:
            (line,) = lines_of(saved(tmp_path))
            assert f"label {empty} " in line
        else:
            assert scan(saved(tmp_path), 0)[0].classes == ["cat"]


@pytest.mark.parametrize("empty", ["train", "test", ""])
@pytest.mark.parametrize("how", ["no rows", "no files", "gone"])
def test_a_split_without_rows_is_named(flat_pets, tmp_path, empty, how):
    """It is ignored, unless there are then no images to train on."""
    there = tmp_path / "saved"
    for split in ["train", "test"] if empty else [""]:
        save_split(there / split, *files_of(flat_pets, "val"), ["dog", "cat"])
    if empty:
        (there / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for file in (there / empty).glob("*.arrow"):
        write_arrow(file, features_of(["dog", "cat"]), {"image": images_of([]), "label": pa.array([], pa.int64())})
    if how == "no files":
        (there / empty / "state.json").write_text('{"_data_files": []}')
    elif how == "gone":
        shutil.rmtree(there / empty)
    if how == "gone" or empty != "test":
        (line,) = lines_of(saved(there))
        assert (empty or str(there)) in line
        return
    said: list[str] = []
    listing, _ = scan(saved(there), 0, said.append)
    assert (len(listing), listing.train_rows) == (2, 2)
    assert any("the split test " in line for line in said)


def test_memory_for_a_saved_dataset_is_that_of_columns(flat_pets, tmp_path):
    """For 20,000 rows in 100 classes: only numbers are stored per row; a string alone would need 70 bytes."""
    photo, rows = (flat_pets / "train/cat/b.jpg").read_bytes(), 20_000
    names = [f"some photograph {row:06d}.jpg" for row in range(rows)]
    image = pa.StructArray.from_arrays([pa.array([photo] * rows, pa.binary()), pa.array(names)], ["bytes", "path"])
    columns = {"image": image, "label": pa.array([row % 100 for row in range(rows)])}
    write_arrow(tmp_path / "data.arrow", features_of([f"c{label:04d}" for label in range(100)]), columns, rows_a_batch=1000)
    del names, image, columns
    for _ in range(2):  # the first run fills caches
        tracemalloc.start()
        members = read_saved(str(tmp_path), False, (None, None), "root", lambda line: None)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert members.paths[3001] == "c0001/some photograph 003001.jpg"
    assert most / rows < 190
