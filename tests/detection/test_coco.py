"""COCO annotations and images: which instances become targets, consistent resizing and flips, and one line for every bad file."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_data import CATEGORIES, crowd, make_split, write
from PIL import Image, ImageDraw

from bingo.detection.coco import Instances, parse_targets, read_instances, run_lengths, training_targets
from bingo.detection.loader import CocoLoader, View, resized_px, unpack
from bingo.detection.scores import coco_scores
from bingo.runtime.errors import UserError

CPU = torch.device("cpu")
REAL = Path(__file__).parents[3] / "shared/data/coco-tiny.tar.xz"
FAR = View(0, 96, 128)


def read(root: Path, name: str = "train") -> Instances:
    return read_instances(root / f"annotations/instances_{name}.json", root / name, "the key")


def line_of(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(root)
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


def examples(found: Instances, views: list[View], workers: int = 0) -> list:
    return list(CocoLoader(found.images, training_targets(found).lines, CPU, workers).examples(views))


# Targets of training.


def test_rows_are_images_in_the_order_of_their_ids_and_labels_close_the_gaps(tmp_path):
    content = make_split(tmp_path, "train", 4, 0)
    found = read(tmp_path)
    assert [image["id"] for image in found.images.entries] == sorted(image["id"] for image in content["images"])
    assert found.category_ids == CATEGORIES
    for row, line in enumerate(training_targets(found).lines):
        own = [a for a in content["annotations"] if a["image_id"] == found.images.entries[row]["id"]]
        boxes, labels, masks = parse_targets(line, *found.images.sides_px(row))
        assert [CATEGORIES[label - 1] for label in labels] == [a["category_id"] for a in own]
        x, y, width, height = np.array([a["bbox"] for a in own], np.float32).T
        assert np.allclose(boxes, np.stack([x, y, x + width, y + height], axis=1))
        for mask, annotation in zip(masks, own, strict=True):
            assert abs(int(mask.sum()) - annotation["area"]) <= 0.15 * annotation["area"]


def test_crowds_and_empty_instances_are_left_out_and_counted(tmp_path):
    content = make_split(tmp_path, "train", 5, 0, empty=(4,))
    first, second = content["images"][:2]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != second["id"]]
    content["annotations"].append(crowd(second, 7, 10))  # contains only a crowd
    usual = next(a for a in content["annotations"] if a["image_id"] == first["id"])
    for box in ([5, 5, 0, 9], [5, 5, 9, 0], [first["width"], 0, 9, 9], [-20, 0, 20, 9]):  # no width, no height, outside the image
        content["annotations"].append(usual | {"bbox": box})
    content["annotations"].append(usual | {"segmentation": [[1.0, 1.0, 2.0, 2.0]]})
    sides = [first["height"], first["width"]]
    from faster_coco_eval import mask as rle

    nothing = {"size": sides, "counts": [first["height"] * first["width"]]}
    content["annotations"].append(usual | {"segmentation": nothing})
    content["annotations"].append(usual | {"segmentation": nothing | {"counts": rle.frPyObjects(nothing, *sides)["counts"].decode()}})
    write(tmp_path, "train", content)
    found = read(tmp_path)
    targets = training_targets(found)
    assert list(targets.left_out.values()) == [1, 4, 3]
    assert targets.in_words() == "2 images without targets, 1 crowds, 4 boxes without width or height, 3 masks without an area"
    kept = [found.images.entries[row]["id"] for row in targets.rows]
    assert kept == sorted({image["id"] for image in content["images"]} - {second["id"], content["images"][4]["id"]})
    assert sum(len(json.loads(line)) for line in targets.lines if line) == 6


def test_boxes_are_cut_at_the_edges(tmp_path):
    content = make_split(tmp_path, "train", 1, 0)
    content["annotations"][0]["bbox"] = [-4, -5, 30, 200]
    write(tmp_path, "train", content)
    found = read(tmp_path)
    assert parse_targets(training_targets(found).lines[0], 108, 81)[0][0].tolist() == [0, 0, 26, 108]


def test_run_lengths_of_both_kinds_are_masks(tmp_path):
    from faster_coco_eval import mask as rle

    content = make_split(tmp_path, "train", 1, 0)
    wanted = np.zeros((108, 81), np.uint8)
    wanted[10:30, 5:20] = 1
    packed = rle.encode(np.asfortranarray(wanted))
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], wanted.T.ravel(), [2]]))))
    content["annotations"][0]["segmentation"] = {"counts": packed["counts"].decode(), "size": [108, 81]}
    content["annotations"][1]["segmentation"] = {"counts": runs.tolist(), "size": [108, 81]}
    write(tmp_path, "train", content)
    masks = parse_targets(training_targets(read(tmp_path)).lines[0], 108, 81)[2]
    assert (masks == wanted).all()


def mask_of(annotation: dict, height: int, width: int) -> np.ndarray:
    """A polygon drawn by Pillow."""
    picture = Image.new("L", (width, height))
    ImageDraw.Draw(picture).polygon(annotation["segmentation"][0], fill=1)
    return np.asarray(picture)


@pytest.mark.parametrize("empty", ["absent", "null"])
def test_fields_that_an_exporter_left_out_are_derived_and_counted(tmp_path, empty):
    content = make_split(tmp_path, "train", 4, 0)
    write(tmp_path, "train", content)
    whole = read(tmp_path)
    assert whole.in_words() == ""
    short = json.loads(json.dumps(content))
    for annotation in short["annotations"]:
        for key in ("iscrowd", "area", "bbox", "id"):
            annotation.pop(key) if empty == "absent" else annotation.update({key: None})
    write(tmp_path, "train", short)
    found = read(tmp_path)
    assert [count for count in found.remarks.values() if count] == [8, 8, 8]
    for given, derived in zip(content["annotations"], found.annotations, strict=True):
        assert derived["iscrowd"] == 0
        np.testing.assert_allclose(derived["bbox"], given["bbox"])
        assert abs(derived["area"] - given["area"]) <= 0.05 * given["area"]
    assert np.array_equal(training_targets(found).rows, training_targets(whole).rows)
    for annotation in short["annotations"]:
        annotation["bbox"], annotation["segmentation"] = [2, 3, 20, 10], None
    write(tmp_path, "train", short)
    assert {annotation["area"] for annotation in read(tmp_path).annotations} == {200.0}


NOTHING = {
    "absent": ...,
    "null": None,
    "an empty list": [],
    "empty polygons": [[], []],
    "a point": [[5.0, 5.0]],
    "a box": [[5.0, 5.0, 9.0, 9.0]],
    "an odd count": [[5.0, 5.0, 9.0, 9.0, 5.0, 9.0, 1.0]],
    "one place": [[5.0, 5.0] * 4],
    "a slanting line": [[5.0, 5.0, 50.0, 50.0, 20.0, 20.0]],
    "beside the image": [[200.0, 200.0, 250.0, 200.0, 250.0, 250.0]],
    "left of the image": [[-60.0, 5.0, -5.0, 5.0, -5.0, 60.0]],
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_segmentation_that_covers_nothing_is_never_an_empty_mask(tmp_path, name):
    content = make_split(tmp_path, "train", 1, 0)
    first = content["annotations"][0]
    first["segmentation"] = NOTHING[name]
    if NOTHING[name] is ...:
        del first["segmentation"]
    write(tmp_path, "train", content)
    found = read(tmp_path)
    targets = training_targets(found)
    assert sum(found.remarks.values()) == 1
    assert list(targets.left_out.values()) == [0, 0, 1]
    _, labels, masks = parse_targets(targets.lines[0], 108, 81)
    assert len(labels) == 1
    assert masks.any(axis=(1, 2)).all()
    del content["annotations"][0]["bbox"]
    write(tmp_path, "train", content)
    assert len(read(tmp_path).annotations) == 1


SHAPES = {
    "small": [[5.0, 5.0, 8.0, 5.0, 8.0, 8.0, 5.0, 8.0]],
    "crossing itself": [[5.0, 5.0, 45.0, 45.0, 45.0, 5.0, 5.0, 45.0]],
    "half outside": [[-20.0, 5.0, 30.0, 5.0, 30.0, 60.0, -20.0, 60.0]],
    "one of two is a point": [[5.0, 5.0], [10.0, 10.0, 40.0, 10.0, 40.0, 40.0, 10.0, 40.0]],
    "in no list of polygons": [10.0, 10.0, 40.0, 10.0, 40.0, 40.0, 10.0, 40.0],
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_segmentation_that_covers_pixels_is_kept(tmp_path, name):
    content = make_split(tmp_path, "train", 1, 0)
    content["annotations"][0]["segmentation"] = SHAPES[name]
    write(tmp_path, "train", content)
    found = read(tmp_path)
    masks = parse_targets(training_targets(found).lines[0], 108, 81)[2]
    polygon = SHAPES[name] if not isinstance(SHAPES[name][0], list) else SHAPES[name][-1]
    wanted = int(mask_of({"segmentation": [polygon]}, 108, 81).sum())
    assert abs(int(masks[0].sum()) - wanted) <= 0.2 * wanted + 8
    assert found.in_words() == ""


def test_annotations_of_images_that_are_not_listed_are_left_out(tmp_path):
    content = make_split(tmp_path, "train", 3, 0)
    gone = content["images"].pop()
    write(tmp_path, "train", content)
    found = read(tmp_path)
    assert found.in_words().startswith("2 annotations of images that are not listed")
    assert gone["id"] not in {annotation["image_id"] for annotation in found.annotations}
    assert len(found.annotations) == 4


@pytest.mark.parametrize(
    ("on_disk", "named"),
    [
        ("0.png", "0.PNG"),
        ("Stra\u00dfe.png", "STRASSE.PNG"),
        ("caf\u00e9.png", "cafe\u0301.png"),
        ("0.png", "train/0.png"),
        ("0.png", "images\\train\\0.png"),
        ("deep/0.png", "Deep/0.png"),
    ],
)
def test_images_are_found_by_names_in_another_unicode_form(tmp_path, on_disk, named):
    content = make_split(tmp_path, "train", 2, 0)
    (tmp_path / "train" / on_disk).parent.mkdir(exist_ok=True)
    (tmp_path / "train/0.png").rename(tmp_path / "train" / on_disk)
    content["images"][0]["file_name"] = named
    write(tmp_path, "train", content)
    found = read(tmp_path)
    assert found.images.path(1) == tmp_path / "train" / on_disk
    assert sum(found.remarks.values()) == 1
    assert len(examples(found, [View(1, 96, 128)])) == 1


def test_a_name_that_matches_two_files_except_in_case_is_refused(tmp_path):
    content = make_split(tmp_path, "train", 2, 0)
    for name in ("a.PNG", "A.png"):
        (tmp_path / "train" / name).write_bytes((tmp_path / "train/0.png").read_bytes())
    content["images"][0]["file_name"] = "a.png"
    write(tmp_path, "train", content)
    assert "do not exist" in line_of(tmp_path)


def test_a_byte_order_mark_is_ignored(tmp_path):
    write(tmp_path, "train", make_split(tmp_path, "train", 1, 0))
    path = tmp_path / "annotations/instances_train.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read(tmp_path).annotations) == 2


def test_links_out_of_the_folder_are_followed_on_request(tmp_path):
    make_split(tmp_path, "train", 2, 0)
    (tmp_path / "store").mkdir()
    (tmp_path / "train/0.png").rename(tmp_path / "store/0123")
    (tmp_path / "train/0.png").symlink_to(tmp_path / "store/0123")
    assert "set dataset.follow_links: true" in line_of(tmp_path)
    found = read_instances(tmp_path / "annotations/instances_train.json", tmp_path / "train", "the key", follow_links=True)
    assert len(examples(found, [FAR, View(1, 96, 128)])) == 2
    (tmp_path / "store/0123").unlink()
    with pytest.raises(UserError, match="do not exist"):
        read_instances(tmp_path / "annotations/instances_train.json", tmp_path / "train", "the key", follow_links=True)


def test_instances_without_a_box_or_mask_do_not_lower_its_measure(tmp_path):
    from faster_coco_eval import mask as rle

    content = make_split(tmp_path, "train", 3, 0)
    content["annotations"][0]["segmentation"] = None
    content["annotations"][1]["bbox"] = [5, 5, 0, 9]
    write(tmp_path, "train", content)
    found = read(tmp_path)
    sides = {image["id"]: (image["height"], image["width"]) for image in found.images.entries}
    perfect = []
    for a in found.annotations:
        height, width = sides[a["image_id"]]
        nothing = np.zeros((height, width), np.uint8, "F")
        lengths = run_lengths(a["segmentation"], height, width) if a["segmentation"] else rle.encode(nothing)
        perfect.append({key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0, "segmentation": lengths})
    boxes, masks = [one for one in perfect if one["bbox"][2]], [one for one in perfect if rle.area(one["segmentation"])]
    assert coco_scores(found, boxes)["box"]["AP"] == 100.0
    assert coco_scores(found, masks)["mask"]["AP"] == 100.0


# Images.


@pytest.mark.parametrize(
    ("sides", "wanted"), [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((200, 640), (417, 1333)), ((96, 96), (800, 800))]
)
def test_the_short_side_is_reached_unless_the_long_one_would_be_too_long(sides, wanted):
    assert resized_px(*sides, 800, 1333) == wanted


def test_image_boxes_and_masks_are_resized_and_flipped_consistently(tmp_path):
    make_split(tmp_path, "train", 3, 1)
    found = read(tmp_path)
    plain, mirrored = examples(found, [View(1, 96, 200), View(1, 96, 200, flip=True)])
    assert plain.image_3HW.shape == (3, *resized_px(*found.images.sides_px(1), 96, 200))
    assert torch.equal(plain.image_3HW.flip(2), mirrored.image_3HW)
    assert torch.equal(plain.masks_IHW.flip(2), mirrored.masks_IHW)
    assert torch.allclose(plain.image_3HW.shape[2] - plain.boxes_I4[:, [2, 0]], mirrored.boxes_I4[:, [0, 2]])
    assert torch.equal(plain.boxes_I4[:, [1, 3]], mirrored.boxes_I4[:, [1, 3]])
    for example in (plain, mirrored):
        for box, mask in zip(example.boxes_I4, example.masks_IHW, strict=True):
            ys, xs = torch.nonzero(mask, as_tuple=True)
            around = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
            assert (around - box).abs().max() <= 3  # a polygon's edge crosses pixels, which are then enlarged
            assert example.image_3HW[:, mask.bool()].float().mean(1).max() > 150, "the mask covers the drawn colour"


def test_packed_masks_are_unpacked_unchanged():
    masks = np.random.default_rng(0).integers(0, 2, (3, 5, 13), dtype=np.uint8)
    assert (unpack(torch.from_numpy(np.packbits(masks, axis=2)), 13).numpy() == masks).all()


@pytest.mark.slow
def test_workers_do_not_change_examples(tmp_path):
    make_split(tmp_path, "train", 4, 0, empty=(2,))
    found = read(tmp_path)
    views = [View(row, side, 200, row == 1) for row in (3, 0, 1, 2) for side in (64, 96)]
    alone = examples(found, views)
    loader = CocoLoader(found.images, training_targets(found).lines, CPU, workers=1)
    for _ in range(2):
        for one, other in zip(alone, loader.examples(views), strict=True):
            assert one.row == other.row
            assert all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("image_3HW", "boxes_I4", "labels_I", "masks_IHW"))


def test_exif_orientation_is_ignored(tmp_path):
    make_split(tmp_path, "train", 1, 0)
    found = read(tmp_path)
    (plain,) = examples(found, [FAR])
    path = found.images.path(0)
    picture, exif = Image.open(path), Image.Exif()
    exif[0x0112] = 6
    picture.save(path, format="PNG", exif=exif)
    (turned,) = examples(found, [FAR])
    assert torch.equal(plain.image_3HW, turned.image_3HW)


# Bad files, one line for each.


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda c: c["annotations"][1].pop("image_id"), "annotations.1.image_id is missing; give COCO's instances_*.json"),
        (lambda c: c.pop("categories"), "categories is missing"),
        (lambda c: c["images"].clear(), "images is not in COCO's format"),
        (lambda c: c["images"][0].pop("height"), "images.0.height is missing"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "annotations.0.bbox.2 is not in COCO's format"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "annotations.0.bbox is not in COCO's format"),
        (lambda c: c["annotations"][0].update(category_id=4), "annotations.0 is of category id 4, which is not among the categories"),
        (lambda c: c["images"].append(c["images"][0]), "image id 1000 occurs twice"),
        (
            lambda c: c["annotations"][0].update(segmentation={"counts": [5], "size": [108, 81]}),
            "annotations.0 has run lengths that do not fit image id 1000",
        ),
        (
            lambda c: c["annotations"][0].update(segmentation={"counts": "zzzz999", "size": [108, 81]}),
            "annotations.0 has run lengths that do not fit image id 1000",
        ),
        (
            lambda c: c["images"][1].update(file_name="../train/0.png"),
            "image id 993 has the file name '../train/0.png', which leads out of its folder; correct the file",
        ),
        (lambda c: c["images"][1].update(file_name="/0.png"), "image id 993 has the file name '/0.png', which leads out"),
        (lambda c: c["images"][1].update(file_name="a" * 5000), "images that it lists do not exist: "),
        (
            lambda c: c["images"][1].update(file_name="gone.jpg"),
            "images that it lists do not exist: {root}/train/gone.jpg (image id 993); restore them, or set transfer_coco.root",
        ),
    ],
)
def test_a_file_that_is_not_in_cocos_format(tmp_path, change, wanted):
    content = make_split(tmp_path, "train", 2, 0)
    change(content)
    write(tmp_path, "train", content)
    line = line_of(tmp_path)
    assert line.startswith("the key")
    assert wanted.format(root=tmp_path) in line


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[1, 2]", "the file is not in COCO's format"),
        ("{", "is not JSON (EOF"),
        ("\udcff", "is not JSON"),
        (None, "cannot be read (No such file"),
    ],
)
def test_a_file_that_is_not_a_json_object(tmp_path, text, wanted):
    (tmp_path / "annotations").mkdir()
    if text is not None:
        (tmp_path / "annotations/instances_train.json").write_bytes(text.encode(errors="surrogateescape"))
    assert wanted in line_of(tmp_path)


def test_unusable_images_are_named(tmp_path):
    make_split(tmp_path, "train", 2, 0)
    found = read(tmp_path)
    Image.new("RGB", (30, 20)).save(found.images.path(0))
    with pytest.raises(UserError, match=r"1\.png \(image id 993\) is 30 x 20 pixels, and the annotations say 96 x 72; restore it"):
        examples(found, [FAR])
    found.images.path(0).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"\(image id 993\) cannot be read \(no image format is recognised in it\); restore it"):
        examples(found, [FAR])
    found.images.path(0).unlink()
    with pytest.raises(UserError, match=r"\(image id 993\) cannot be read \(No such file or directory\)"):
        examples(found, [FAR])


# COCO itself.


@pytest.mark.skipif(not REAL.exists(), reason="needs shared/data/coco-tiny.tar.xz beside the repository")
def test_real_images_load_and_perfect_detections_of_them_score_100(tmp_path):
    from faster_coco_eval import mask as rle

    with tarfile.open(REAL) as file:
        file.extractall(tmp_path, filter="data")
    found = read_instances(tmp_path / "annotations/instances_val2017.json", tmp_path / "images/val2017", "the key")
    assert len(found.category_ids) == 80
    assert found.category_ids[-1] == 90
    targets = training_targets(found)
    loaded = examples(found, [View(int(row), 200, 400) for row in targets.rows])
    assert sum(len(example.labels_I) for example in loaded) == len(found.annotations) - sum(targets.left_out.values())
    sides = {image["id"]: (image["height"], image["width"]) for image in found.images.entries}
    perfect = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "score": 1.0,
            "bbox": a["bbox"],
            "segmentation": rle.encode(np.asfortranarray(rle.decode(run_lengths(a["segmentation"], *sides[a["image_id"]])))),
        }
        for a in found.annotations
        if not a["iscrowd"]
    ]
    scores = coco_scores(found, perfect)
    assert {kind: figures["AP"] for kind, figures in scores.items()} == {"box": 100.0, "mask": 100.0}
