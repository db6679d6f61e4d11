"""Assumptions of a scan about a folder, and ignored files: reported in a line, or refused if train and test images might be mixed."""

import shutil
import tracemalloc
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image, features

from bingo.datasets.layout import find_splits
from bingo.datasets.sources import scan
from bingo.datasets.split_names import role_of
from bingo.images.decode import SUFFIXES
from bingo.images.listing import Listing
from tests.datasets.test_sources import folder, lines_of, save


def make(root: Path, *names: str) -> Path:
    """Write different images with these names."""
    for seed, name in enumerate(names):
        save(root / name, seed)
    return root


def said(root: Path, **changes) -> tuple[Listing, str]:
    """The listing of a folder and all lines of its scan."""
    lines: list[str] = []
    listing, _ = scan(folder(root, **changes), 0, lines.append)
    assert all("\n" not in line for line in lines)
    return listing, "\n".join(lines)


SPLITS = [
    ("Train", "Val"),
    ("training", "testing"),
    ("TRAIN", "TEST"),
    ("train2017", "val2017"),
    ("train_images", "test_images"),
    ("train", "valid"),
    ("train", "dev"),
    ("Training Set", "hold-out"),
    ("images_train", "images_validation"),
    ("trn", "tst"),
]


@pytest.mark.parametrize(("train", "test"), SPLITS)
def test_splits_with_usual_names_are_found_and_reported(tmp_path, train, test):
    make(tmp_path, f"{train}/cat/1.png", f"{train}/dog/2.png", f"{test}/cat/3.png", f"{test}/dog/4.png")
    listing, lines = said(tmp_path)
    assert listing.paths == [f"{train}/cat/1.png", f"{train}/dog/2.png", f"{test}/cat/3.png", f"{test}/dog/4.png"]
    assert (listing.train_rows, listing.classes, listing.labels_N.tolist()) == (2, ["cat", "dog"], [0, 1, 0, 1])
    assert f"{train}/" in lines
    assert f"{test}/" in lines


@pytest.mark.parametrize("name", ["cat", "trainer", "contest", "value", "trains", "n01440764", "device", "holding", "retrain"])
def test_other_words_are_not_splits(name):
    assert role_of(name) is None


def test_the_usual_layout_is_not_reported(tmp_path):
    make(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/4.png")
    assert said(tmp_path)[1] == ""


@pytest.mark.parametrize(
    "names",
    [
        ("cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png"),  # splits below the classes
        ("ILSVRC/train/cat/1.png", "ILSVRC/val/cat/2.png"),  # a folder too high
        ("train/a/Train/cat/1.png", "train/a/Valid/cat/2.png", "train/b/1.png"),
        ("train2014/cat/1.png", "train2017/cat/2.png", "val/cat/3.png"),  # it is unclear which of the two is meant
        ("train/cat/1.png", "val2014/cat/2.png", "val2017/cat/3.png"),
        ("car/1.png", "train/2.png", "bus/3.png"),  # a class with the name of a split
        ("cat/1.png", "dog/2.png", "holdout/3.png"),
        ("Test/cat/1.png",),
    ],
)
def test_layouts_that_may_mix_train_and_test_are_refused(tmp_path, names):
    (line,) = lines_of(folder(make(tmp_path, *names)))
    assert line.startswith(f"dataset.root = {tmp_path}: ")


def test_the_advice_for_a_mixed_layout_helps(tmp_path):
    make(tmp_path, "ILSVRC/train/cat/1.png", "ILSVRC/val/cat/2.png")
    assert f"set dataset.root to {tmp_path}/ILSVRC," in lines_of(folder(tmp_path))[0]
    assert said(tmp_path / "ILSVRC")[0].train_rows == 1
    shutil.rmtree(tmp_path / "ILSVRC")
    make(tmp_path, "car/3.png", "train/4.png")
    assert "move all class folders into train/" in lines_of(folder(tmp_path))[0]
    (tmp_path / "train").rename(tmp_path / "now")
    (tmp_path / "train").mkdir()
    (tmp_path / "now").rename(tmp_path / "train/train")
    (tmp_path / "car").rename(tmp_path / "train/car")
    assert said(tmp_path)[0].classes == ["car", "train"]


TWINS = [
    ("seg_train", "seg_test"),
    ("train.X1", "val.X"),
    ("trainA", "testA"),
    ("bounding_box_train", "bounding_box_test"),
    ("MyTraining", "MyValidation"),
    ("pets-train-2019", "pets-val-2020"),
]


@pytest.mark.parametrize(("train", "test"), TWINS)
@pytest.mark.parametrize("above", ["", "train/"])
def test_folders_that_differ_only_in_a_word_for_a_split_are_not_classes(tmp_path, train, test, above):
    make(tmp_path, f"{above}{train}/cat/1.png", f"{above}{train}/dog/2.png", f"{above}{test}/cat/3.png", f"{above}{test}/dog/4.png")
    assert len(lines_of(folder(tmp_path))) == 1
    (tmp_path / above / train).rename(tmp_path / above / "now")
    (tmp_path / above / test).rename(tmp_path / "val")
    (tmp_path / above / "now").rename(tmp_path / "now")
    if above:
        (tmp_path / "train").rmdir()
    (tmp_path / "now").rename(tmp_path / "train")
    assert (said(tmp_path)[0].train_rows, said(tmp_path)[0].classes) == (2, ["cat", "dog"])


@pytest.mark.parametrize(
    "classes", [("bullet train", "test tube"), ("evaluation", "train"), ("train_red", "test_blue"), ("retrain", "contest")]
)
def test_classes_with_such_words_in_their_names_stay_classes(tmp_path, classes):
    make(tmp_path, *(f"train/{name}/{i}.png" for i, name in enumerate(sorted(classes))))
    if classes == ("evaluation", "train"):  # whole names of splits
        assert "would be mixed" in lines_of(folder(tmp_path))[0]
    else:
        assert said(tmp_path)[0].classes == sorted(classes)


def test_a_split_inside_a_split_of_the_same_name_is_refused_until_moved_up(tmp_path):
    make(tmp_path, "train/seg_train/cat/1.png", "train/seg_train/dog/2.png", "val/cat/3.png")
    assert "move its content up into train/" in lines_of(folder(tmp_path))[0]
    for name in ("cat", "dog"):
        (tmp_path / "train/seg_train" / name).rename(tmp_path / "train" / name)
    (tmp_path / "train/seg_train").rmdir()
    assert said(tmp_path)[0].classes == ["cat", "dog"]


HIDDEN = {  # names in any language: the images' folders, and the places of the splits
    "learn and exam": ["{}learn/cat", "{}learn/dog", "{}exam/cat", "{}exam/dog"],
    "tr and te": ["{}tr/0", "{}tr/1", "{}tr/2", "{}te/0", "{}te/1"],
    "another language": ["{}entrenamiento/gato", "{}entrenamiento/perro", "{}prueba/Gato", "{}prueba/perro"],
    "synsets": ["{}A/n01440764", "{}A/n01443537", "{}B/n01440764", "{}B/n01443537"],
    "folds": [f"{{}}fold{fold}/{name}" for fold in range(5) for name in ("cat", "dog", "fox")],
    "some classes of one split alone, fox and dog/owl": [
        "{}learn/cat",
        "{}learn/dog",
        "{}learn/fox",
        "{}exam/cat",
        "{}exam/dog",
        "{}exam/owl",
    ],
    "domains, and a folder beside": ["{}amazon/desk", "{}amazon/mug", "{}webcam/desk", "{}webcam/mug", "{}more"],
    "splits in folds": ["{}fold0/train/cat", "{}fold0/train/dog", "{}fold1/test/cat", "{}fold1/test/dog"],
    "splits in folders of another name": ["{}x/images_train/cat", "{}x/images_train/dog", "{}y/z/images_val/cat", "{}y/z/images_val/dog"],
    "splits in classes": ["{}cat/learn", "{}cat/exam", "{}dog/learn", "{}dog/exam"],
}


@pytest.mark.parametrize("above", ["", "data/raw/"])
@pytest.mark.parametrize("kind", HIDDEN)
def test_splits_with_unknown_names_are_refused_and_both_solutions_help(tmp_path, kind, above):
    places = [place.format(above) for place in HIDDEN[kind]]
    make(tmp_path / "in", *(f"{place}/{number}.png" for number, place in enumerate(places)))
    (line,) = lines_of(folder(tmp_path / "in"))
    root = Path(line.partition(", and set dataset.root to ")[2] or tmp_path / "in")
    assert root == tmp_path / "in" / above
    shutil.copytree(root, tmp_path / "classes/train")  # if they are classes
    listing, lines = said(tmp_path / "classes")
    assert listing.classes == sorted(path.name for path in root.iterdir())
    assert "sub-folders" in lines
    splits = [place.rpartition("/")[::2] for place in places]
    if kind == "splits in classes":
        splits = [(inner, outer.rpartition("/")[2]) for outer, inner in splits]
    for place, (split, name) in zip(places, splits, strict=True):  # if they are splits
        if not place.endswith("more"):
            target = "train" if split == splits[0][0] else "val"
            shutil.copytree(tmp_path / "in" / place, tmp_path / "splits" / target / name, dirs_exist_ok=True)
    if "dog/owl" in kind:
        assert "has classes that train/ lacks: owl" in lines_of(folder(tmp_path / "splits"))[0]  # about something else, and true
    else:
        assert said(tmp_path / "splits")[0].classes == sorted({name for split, name in splits if split == splits[0][0]})


CHANCE = {
    "cameras": ["cat/cam0", "cat/cam1", "dog/cam0", "dog/cam1"],
    "sessions and a few more": ["cat/session-1", "cat/session-2", "cat/session_3", "dog/session-1", "dog/session-2"],
    "days": ["cat/2021-05-03", "cat/2021-05-04", "dog/2021-05-03", "dog/2021-05-04"],
    "sides": ["car/left", "car/right", "car/front", "bus/left", "bus/right", "bus/front"],
    "one sub-folder each": ["cat/photos", "dog/photos"],
    "one name in common": ["cat/wild", "cat/other", "dog/other", "dog/tame"],
    "few names of many": ["bird/owl", "bird/male", "bird/female", "bird/egg", "fish/cod", "fish/male", "fish/female", "fish/ray"],
    "two classes of many": ["owl/male", "owl/female", "cat/male", "cat/female", "a", "b", "c"],
    "more than any splits": [f"class{number}/{name}" for number in range(11) for name in ("young", "old")],
    "words of splits, unlike each other": ["vehicle/bullet train", "vehicle/car", "lab/test tube", "lab/flask"],
    "train alone": ["vehicle/train", "vehicle/car", "animal/cat", "animal/dog"],
}


@pytest.mark.parametrize("kind", CHANCE)
def test_classes_whose_sub_folders_have_the_same_names_by_chance_stay_classes(tmp_path, kind):
    listing, lines = said(make(tmp_path, *(f"{place}/{number}.png" for number, place in enumerate(CHANCE[kind]))))
    assert listing.classes == sorted({place.split("/")[0] for place in CHANCE[kind]})
    assert ("sub-folders" in lines) == (kind != "one sub-folder each")


def test_files_next_to_the_splits_are_reported(tmp_path):
    make(tmp_path, "train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "test/3.png", "extra/4.png", "logo.png")
    listing, lines = said(tmp_path)
    assert listing.paths == ["train/cat/1.png", "train/dog/1.png", "val/cat/2.png"]
    assert "2 folders (extra, test), 1 images outside the splits" in lines
    assert "no image of 1 of the 2 classes: dog" in lines


def test_system_folders_and_other_files_are_ignored_and_counted(tmp_path):
    make(tmp_path, "train/cat/1.png", "train/dog/2.png", "__MACOSX/train/cat/3.png", "train/cat/@eaDir/4.png", "lost+found/5.png")
    make(tmp_path, "train/.ipynb_checkpoints/6.png", "train/cat/._1.png")
    for name in ("train/cat/Thumbs.db", "train/cat/x.heic", "train/dog/y.HEIC", "train/notes.txt", "train/dog/README"):
        (tmp_path / name).write_bytes(b"x")
    for number in range(9):
        (tmp_path / f"train/cat/z.{number}").write_bytes(b"x")
    listing, lines = said(tmp_path)
    assert listing.paths == ["train/cat/1.png", "train/dog/2.png"]
    for part in ("3 folders (", "__MACOSX", "lost+found", "train/cat/@eaDir", "2 hidden", "2 .heic"):
        assert part in lines
    assert " other suffixes" in lines


def test_names_that_cannot_be_printed_are_counted_too(tmp_path):
    make(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "x.\udcff\n").write_bytes(b"x")
    (tmp_path / "\x1b[2J").mkdir()
    line = lines_of(folder(tmp_path))[0]
    assert "without images" in line
    (tmp_path / "\x1b[2J").rmdir()
    _, lines = said(tmp_path)
    assert lines.isprintable()
    assert lines.encode()


def test_a_folder_without_readable_kinds_of_files_is_reported(tmp_path):
    make(tmp_path, "train/cat/1.png")
    (tmp_path / "train/dog").mkdir()
    (tmp_path / "train/dog/2.heic").write_bytes(b"x")
    line = lines_of(folder(tmp_path))[0]
    assert "dog without images (skipped: 1 .heic)" in line
    assert "JPEG" in line
    shutil.rmtree(tmp_path / "train/cat")
    assert "(skipped: 1 .heic)" in lines_of(folder(tmp_path))[0]


def test_one_class_and_folders_in_classes_are_named(tmp_path):
    make(tmp_path, "images/cat/1.png", "images/dog/2.png")
    listing, lines = said(tmp_path)
    assert listing.classes == ["images"]
    assert "only one class, images" in lines
    assert "images/cat" in lines
    make(tmp_path, "other/only/1.png")
    listing, lines = said(tmp_path)
    assert listing.labels_N.tolist() == [0, 0, 1]
    assert "one class" not in lines
    assert "other/only" not in lines


def test_class_names_that_differ_only_in_case_or_unicode_form(tmp_path):
    nfc, nfd = "caf\u00e9", normalize("NFD", "caf\u00e9")
    make(
        tmp_path,
        f"train/{nfd}/1.png",
        "train/Dog/2.png",
        "train/a/3.png",
        "train/A/4.png",
        f"val/{nfc}/5.png",
        "val/dog/6.png",
        "val/a/7.png",
    )
    listing, lines = said(tmp_path)
    assert listing.classes == ["A", "Dog", "a", nfc]
    assert dict(zip(listing.paths, listing.labels_N.tolist(), strict=True)) == {
        "train/A/4.png": 0,
        "train/Dog/2.png": 1,
        "train/a/3.png": 2,
        f"train/{nfd}/1.png": 3,
        "val/a/7.png": 2,
        f"val/{nfc}/5.png": 3,
        "val/dog/6.png": 1,
    }
    assert "dog is Dog" in lines
    assert "differ only in case: A, a" in lines
    make(tmp_path, f"train/{nfc}/8.png")
    assert "differ only in their Unicode form" in lines_of(folder(tmp_path))[0]


def test_a_test_class_of_either_case_is_refused_if_train_has_both(tmp_path):
    make(tmp_path, "train/ab/1.png", "train/AB/2.png", "val/Ab/3.png")
    assert "has classes that train/ lacks: Ab" in lines_of(folder(tmp_path))[0]


def test_images_of_both_splits_are_counted(tmp_path):
    make(tmp_path, "train/cat/1.png", "train/cat/2.png", "train/dog/3.png", "val/cat/4.png", "val/dog/5.png")
    shutil.copy(tmp_path / "train/cat/2.png", tmp_path / "val/cat/9.png")
    shutil.copy(tmp_path / "train/dog/3.png", tmp_path / "val/cat/8.png")
    listing, lines = said(tmp_path)
    assert "2 test images are byte-for-byte copies of train images (train/dog/3.png and val/cat/8.png)" in lines
    assert len(listing) == 7
    assert "byte-for-byte" not in said(tmp_path, check="header")[1]


def test_a_class_that_loses_all_its_images_is_named(tmp_path):
    make(tmp_path, "train/cat/1.png", "train/dog/2.png")
    (tmp_path / "train/dog/2.png").write_bytes(b"broken")
    assert "no train image of 1 of 2 classes is left (dog" in said(tmp_path, on_bad_image="skip")[1]


FORMATS = {".jfif": "JPEG", ".jpe": "JPEG", ".apng": "PNG", ".pbm": "PPM", ".pnm": "PPM", ".avif": "AVIF", ".jp2": "JPEG2000"}


@pytest.mark.parametrize("suffix", FORMATS)
def test_all_formats_that_pillow_reads_are_read(tmp_path, suffix):
    feature = {"AVIF": "avif", "JPEG2000": "jpg_2000"}.get(FORMATS[suffix])
    assert (suffix in SUFFIXES) == (feature is None or features.check(feature))
    if suffix in SUFFIXES:
        picture = Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((16, 16))).astype(np.uint8)).convert(
            "1" if suffix == ".pbm" else "L"
        )
        (tmp_path / "a").mkdir()
        picture.save(tmp_path / f"a/x{suffix}", FORMATS[suffix])
        (tmp_path / f"a/x{suffix}").rename(tmp_path / f"a/x{suffix.upper()}")
        listing, images = scan(folder(tmp_path, store_px=32), 0)
        assert listing.paths == [f"a/x{suffix.upper()}"]
        assert np.abs(images[0].astype(int) - np.asarray(picture.convert("RGB"))).mean() < 8


def test_postscript_stays_unread(tmp_path):
    make(tmp_path, "1.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "y.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    assert "1 .eps" in said(tmp_path, on_bad_image="skip")[1]
    assert "y.png (row 1) cannot be read: no image format is recognised" in lines_of(folder(tmp_path))[0]


# --- links


@pytest.fixture
def linked(tmp_path) -> tuple[Path, Path]:
    """The same images as files, and as a tree of links to files and folders outside, with other names."""
    files = make(tmp_path / "files", "train/cat/1.png", "train/cat/2.png", "train/dog/3.png", "val/cat/4.png", "val/dog/5.png")
    links, store = tmp_path / "links", tmp_path / "store"
    shutil.copytree(files / "train/dog", store / "dog")
    for number, name in enumerate(["train/cat/1.png", "train/cat/2.png", "val/cat/4.png", "val/dog/5.png"]):
        (links / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files / name, store / f"{number:032x}")
        (links / name).symlink_to(store / f"{number:032x}")
    (links / "train/dog").symlink_to(store / "dog")
    return files, links


@pytest.mark.parametrize("changes", [{"check": "decode"}, {"check": "header"}, {"store_px": 16}])
def test_links_out_of_the_root_are_followed_on_request(linked, changes):
    files, links = linked
    assert "set dataset.follow_links: true" in lines_of(folder(links, **changes))[0]
    by_files, images = scan(folder(files, **changes), 0)
    by_links, again = scan(folder(links, follow_links=True, **changes), 0)
    assert (by_links.paths, by_links.fingerprint) == (by_files.paths, by_files.fingerprint)
    assert (images is None) == (again is None)
    if images is not None:
        np.testing.assert_array_equal(images, again)


def test_followed_links_are_decoded_on_access(linked):
    import torch

    from bingo.images.images import FileImages
    from bingo.images.loader import center_views
    from bingo.params import ImageParams

    files, links = linked
    image = ImageParams(crop_px=16, resize_px=16, mean=[0.0] * 3, std=[1.0] * 3)
    listing, _ = scan(folder(links, follow_links=True), 0)
    views = [
        torch.cat(list(center_views(FileImages(str(root), listing.paths, follow), range(5), image, torch.device("cpu"), 2, workers=0)))
        for root, follow in ((files, False), (links, True))
    ]
    assert torch.equal(*views)


def test_bad_links_are_found_even_if_links_are_followed(linked):
    _, links = linked
    (links / "train/cat/gone.png").symlink_to("/nowhere/at/all.png")
    (links / "train/cat/self.png").symlink_to("self.png")
    (links / "val/cat/twin.png").symlink_to(links / "train/cat/1.png")
    lines = lines_of(folder(links, follow_links=True))
    assert [line.split(": ")[1].split(" ")[0] for line in lines[:-1]] == ["train/cat/gone.png", "train/cat/self.png"]
    listing, printed = said(links, follow_links=True, on_bad_image="skip")
    assert "1 test images are byte-for-byte copies of train images" in printed
    assert listing.paths[-2:] == ["val/cat/twin.png", "val/dog/5.png"]
    (links / "train/cat/round").symlink_to(links / "train")
    assert "leads in a circle" in lines_of(folder(links, follow_links=True))[0]


@pytest.mark.parametrize("names_at_once", [1, 2, 65536])
def test_the_order_is_that_of_the_parts_of_paths_for_any_block_of_names(tmp_path, monkeypatch, names_at_once):
    """A part that begins with another one sorts after it, whatever character follows; includes links and names in other alphabets."""
    monkeypatch.setattr("bingo.datasets.layout._NAMES", names_at_once)
    names = ["a/b/1", "a/b-c/1", "a/b", "a/b c", "a/é", "a/Z", "a b/2", "a-b/1", "ä/\U0001f600", "ä/\uffee"]
    make(tmp_path, *(f"train/{name}.png" for name in names), "val/a/1.png")
    (tmp_path / "train/a/0.png").symlink_to(tmp_path / "val/a/1.png")
    listing, _ = said(tmp_path)
    train = [path.relative_to(tmp_path).as_posix() for path in (tmp_path / "train").rglob("*.png")]
    assert listing.paths == [*sorted(train, key=lambda path: path.split("/")), "val/a/1.png"]
    assert [listing.classes[label] for label in listing.labels_N] == [path.split("/")[1] for path in listing.paths]


def test_memory_for_a_folder_is_that_of_columns(tmp_path, monkeypatch):
    """For 20,000 images (links to one file): fewer bytes per row than a Python string needs."""
    save(tmp_path / "one.png", 0)
    for row in range(20_000):
        path = tmp_path / f"train/class-{row % 2}/some photograph {row:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(tmp_path / "one.png")
    (tmp_path / "one.png").unlink()
    monkeypatch.setattr("bingo.datasets.layout._NAMES", 500)
    tracemalloc.start()
    train, _ = find_splits(tmp_path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(train.paths) == 20_000
    assert most < 20 * 20_000
