"""Read and validate COCO's instances_*.json, and convert it to one compact line of training targets for each image.

Labels are 1 to C in the order of the category ids, which may have gaps; 0 is the background, as in torchvision's detectors.
Row r is the image of the r-th smallest id, counted from 0. Boxes are x0, y0, x1, y1 in pixels. Shape letters: N rows, I instances
of an image.
"""

import codecs
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from faster_coco_eval import mask as rle
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from bingo.params import CocoParams
from bingo.runtime.artefacts import file_fingerprint
from bingo.runtime.errors import UserError
from bingo.runtime.inside import Outside, folded, leads_out, path_inside
from bingo.runtime.progress import progress_bar

LEAST_SIDE_PX = 1e-3  # narrower boxes are left out: the logarithm of the side is in the loss
_NAMED = 3
_LARGE_PX = 16  # polygons of at least this area cover a pixel and need not be drawn to check it
_CROWD, _NO_BOX, _NO_MASK = "crowds", "boxes without width or height", "masks without an area"

_Pixels = Annotated[int, Field(ge=1, le=10**5)]
_Number = Annotated[float, Field(ge=-1e5, le=1e5)]  # pixels
_Id = Annotated[int, Field(ge=-(2**62), le=2**62)]


class _Rle(TypedDict):
    counts: list[Annotated[int, Field(ge=0, le=10**10)]] | str
    size: Annotated[list[_Pixels], Field(min_length=2, max_length=2)]


class _Image(TypedDict):
    id: _Id
    file_name: str
    height: _Pixels
    width: _Pixels


class _Annotation(TypedDict):
    image_id: _Id
    category_id: _Id
    bbox: NotRequired[Annotated[list[_Number], Field(min_length=4, max_length=4)] | None]
    area: NotRequired[Annotated[float, Field(ge=0, le=1e10)] | None]
    iscrowd: NotRequired[Literal[0, 1] | None]
    segmentation: NotRequired[list[list[_Number]] | list[_Number] | _Rle | None]


class _Category(TypedDict):
    id: _Id


class _InstancesFile(TypedDict):
    images: Annotated[list[_Image], Field(min_length=1)]
    annotations: list[_Annotation]
    categories: Annotated[list[_Category], Field(min_length=1)]


_FILE = TypeAdapter(_InstancesFile)


@dataclass(frozen=True)
class CocoImages:
    """The images of one file in the order of their ids, each with id, file_name, height and width in pixels."""

    entries: list[dict[str, Any]]
    folder: Path

    def __len__(self) -> int:
        return len(self.entries)

    def path(self, row: int) -> Path:
        """The path of the image of a row."""
        return self.folder / self.entries[row]["file_name"]

    def sides_px(self, row: int) -> tuple[int, int]:
        """Height and width of the image of a row."""
        return self.entries[row]["height"], self.entries[row]["width"]

    def name(self, row: int) -> str:
        """The name of the image of a row in messages."""
        return f"{self.path(row)} (image id {self.entries[row]['id']})"


@dataclass(frozen=True)
class Instances:
    """The content of one instances_*.json, without unused fields (names, licences, URLs).

    `fingerprint` identifies the file. `category_ids` are in increasing order: label c stands for `category_ids[c - 1]`. Every annotation
    has image_id, category_id, bbox, area, iscrowd and segmentation, the last None if it covers no pixel; `remarks` counts what was
    derived or left out.
    """

    images: CocoImages
    annotations: list[dict[str, Any]]
    category_ids: list[int]
    fingerprint: str
    remarks: dict[str, int] = field(default_factory=dict)

    def in_words(self) -> str:
        """The remarks as text; empty if the file is complete."""
        return ", ".join(f"{count:,} {remark}" for remark, count in self.remarks.items() if count)


def read_pair(params: CocoParams, follow_links: bool, say: Callable[[str], None]) -> tuple[Instances, Instances]:
    """COCO's training and validation instances. Raises UserError as `read_instances` does, and if their categories differ."""
    assert params.root is not None  # the pattern of a run's name
    root, found = Path(params.root), []
    for split in ("train", "val"):
        key, images = f"transfer_coco.{split}_annotations", root / getattr(params, f"{split}_images")
        found.append(read_instances(root / getattr(params, f"{split}_annotations"), images, key, follow_links))
        if remarks := found[-1].in_words():
            say(f"transfer_coco: {key}: {remarks}")
    train, val = found
    if train.category_ids != val.category_ids:
        raise UserError("transfer_coco.val_annotations: its categories are not those of transfer_coco.train_annotations; give a pair")
    if all(annotation["iscrowd"] for annotation in val.annotations):
        raise UserError("transfer_coco.val_annotations: has no usable instance; give annotations that are not all crowds")
    return train, val


@progress_bar("reading the annotations")
def read_instances(annotations: Path, folder: Path, parameter: str, follow_links: bool = False) -> Instances:
    """Read a file of COCO instances, whose images are in `folder`.

    If missing or null, these are derived: iscrowd (0), bbox (around the segmentation), area (of the segmentation, or of the box).
    Annotations of images that are not listed, and those with neither box nor segmentation, are left out. Names of images are found in any
    case and Unicode form, and also if they begin with folders above `folder`. Raises UserError in one line, which calls the file
    `parameter`, if it cannot be read, is not in COCO's format, contradicts itself, or lists images that do not exist or (unless
    `follow_links`) are links out of the folder.
    """
    try:
        raw = annotations.read_bytes()
    except OSError as error:
        raise UserError(f"{parameter} = {annotations}: cannot be read ({error.strerror}); set {parameter} and transfer_coco.root") from None
    try:
        content: Any = _FILE.validate_json(raw.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        raise UserError(f"{parameter} = {annotations}: {_mistake(error)}; give COCO's instances_*.json") from None
    content["images"].sort(key=lambda image: image["id"])
    remarks: Counter[str] = Counter()
    found = Instances(
        CocoImages(content["images"], folder),
        content["annotations"],
        sorted({category["id"] for category in content["categories"]}),
        file_fingerprint(annotations),
        remarks,
    )
    for problem in _contradictions(found):
        raise UserError(f"{parameter} = {annotations}: {problem}; correct the file")
    _locate(found.images, parameter, follow_links, remarks)
    sides = {image["id"]: (image["height"], image["width"]) for image in found.images.entries}
    completed = [_completed(annotation, *sides[annotation["image_id"]], remarks) for annotation in _listed(found, sides, remarks)]
    return replace(found, annotations=[annotation for annotation in completed if annotation is not None])


def _listed(found: Instances, sides: dict[int, tuple[int, int]], remarks: Counter[str]) -> Iterator[dict[str, Any]]:
    for annotation in found.annotations:
        if annotation["image_id"] in sides:
            yield annotation
        else:
            remarks["annotations of images that are not listed, left out"] += 1


def _completed(annotation: dict[str, Any], height: int, width: int, remarks: Counter[str]) -> dict[str, Any] | None:
    """An annotation with all its keys; None if it has neither box nor segmentation."""
    segmentation, bbox, area = _segmentation(annotation.get("segmentation"), height, width), annotation.get("bbox"), annotation.get("area")
    if bbox is None and segmentation is None:
        remarks["annotations with neither box nor segmentation, left out"] += 1
        return None
    if annotation.get("iscrowd") is None:
        remarks["without iscrowd, taken as 0"] += 1
    if segmentation is None:
        remarks["without a segmentation that covers a pixel, used only for boxes"] += 1
    if bbox is None:
        remarks["without a box, which is drawn around the segmentation"] += 1
        bbox = _around(segmentation, height, width)
    if area is None:
        remarks["without an area, which is computed"] += 1
        area = bbox[2] * bbox[3] if segmentation is None else float(rle.area(run_lengths(segmentation, height, width)))
    return annotation | {"bbox": bbox, "area": area, "iscrowd": annotation.get("iscrowd") or 0, "segmentation": segmentation}


def _locate(images: CocoImages, parameter: str, follow_links: bool, remarks: Counter[str]) -> None:
    """Replace the names of images by those of their files. Raises UserError for images without a file, or behind a link out of the
    folder."""
    by_folded: dict[str, list[str]] | None = None
    missing = []
    for row, image in enumerate(images.entries):
        try:
            if _is_there(images.folder, image["file_name"], follow_links):
                continue
            by_folded = _files_by_folded(images.folder) if by_folded is None else by_folded
            same = _same_name(image["file_name"], by_folded)
            if len(same) == 1 and _is_there(images.folder, same[0], follow_links):
                image["file_name"] = same[0]
                remarks["images found under another case, Unicode form or folder"] += 1
            else:
                missing.append(row)
        except Outside:
            problem = f"{images.name(row)} is a link out of the folder"
            raise UserError(f"{parameter}: {problem}; set dataset.follow_links: true, or copy the images into it") from None
    if missing:
        named = ", ".join(images.name(row) for row in missing[:_NAMED])
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise UserError(f"{parameter}: images that it lists do not exist: {named}{more}; restore them, or set transfer_coco.root")


def _is_there(folder: Path, file_name: str, follow_links: bool) -> bool:
    try:
        return path_inside(str(folder), file_name, follow_links).is_file()
    except Outside:
        raise
    except OSError:  # a name that no file can have
        return False


def _files_by_folded(folder: Path) -> dict[str, list[str]]:
    by_folded: dict[str, list[str]] = defaultdict(list)
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.relpath(f"{place}/{name}", folder)
            by_folded[folded(path)].append(path)
    return by_folded


def _same_name(file_name: str, by_folded: dict[str, list[str]]) -> list[str]:
    """The files with a name, in any case and Unicode form, or with the longest end of it that any file has."""
    parts = folded(file_name.replace("\\", "/")).split("/")
    return next((same for first in range(len(parts)) if (same := by_folded.get("/".join(parts[first:])))), [])


def _mistake(error: ValidationError) -> str:
    """The first error in a file as text."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(part for part in map(str, first["loc"]) if "[" not in part)  # pydantic's name of one of several types
    if first["type"] == "json_invalid":
        return f"is not JSON ({first['msg'].removeprefix('Invalid JSON: ')})"
    if first["type"] == "missing":
        return f"{place} is missing"
    return f"{place or 'the file'} is not in COCO's format ({first['msg']})"


def _contradictions(found: Instances) -> Iterator[str]:
    """Yield the problems that make a well-formed file unusable."""
    ids = [image["id"] for image in found.images.entries]
    known = set(ids)
    if len(known) < len(ids):
        yield f"image id {next(a for a, b in pairwise(ids) if a == b)} occurs twice"
    if outside := next((image for image in found.images.entries if leads_out(image["file_name"])), None):
        yield f"image id {outside['id']} has the file name {outside['file_name']!a}, which leads out of its folder"
    categories, sides = set(found.category_ids), {image["id"]: [image["height"], image["width"]] for image in found.images.entries}
    for number, annotation in enumerate(found.annotations):
        image, segmentation = annotation["image_id"], annotation.get("segmentation")
        if image not in known:
            continue
        if annotation["category_id"] not in categories:
            yield f"annotations.{number} is of category id {annotation['category_id']}, which is not among the categories"
        if isinstance(segmentation, dict) and not _fits(segmentation, sides[image]):
            yield f"annotations.{number} has run lengths that do not fit image id {image}"


def _fits(segmentation: dict[str, Any], sides: list[int]) -> bool:
    """Whether run lengths cover an image of these sides, and no more."""
    counts = segmentation["counts"]
    if segmentation["size"] != sides or isinstance(counts, list):
        return segmentation["size"] == sides and sum(counts) == sides[0] * sides[1]
    try:
        rle.decode(segmentation)
    except (ValueError, RuntimeError):
        return False
    return True


@dataclass(frozen=True)
class DetectionTargets:
    """The targets of a detector. `lines` has, for each row, a JSON text of boxes, labels and segmentations, or None if there are
    no targets; `left_out` counts annotations by the reason why they are not targets.
    """

    lines: list[str | None]
    left_out: dict[str, int]

    @property
    def rows(self) -> np.ndarray:
        """The rows with targets, int64."""
        return np.array([row for row, line in enumerate(self.lines) if line is not None], dtype=np.int64)

    def in_words(self) -> str:
        """What was left out, as text."""
        empty = self.lines.count(None)
        return ", ".join([f"{empty} images without targets", *(f"{count} {reason}" for reason, count in self.left_out.items())])


@progress_bar("targets of the annotations")
def training_targets(found: Instances) -> DetectionTargets:
    """Every instance but crowds, boxes without width or height inside the image, and segmentations without an area.

    Images without targets are not used for training, as in detectron2 (data/build.py, filter_images_with_only_crowd_annotations,
    which also removes images without annotations).
    """
    labels = {category: label for label, category in enumerate(found.category_ids, 1)}
    rows = {image["id"]: row for row, image in enumerate(found.images.entries)}
    by_row: dict[int, list] = defaultdict(list)
    left_out = dict.fromkeys((_CROWD, _NO_BOX, _NO_MASK), 0)
    for annotation in found.annotations:
        row = rows[annotation["image_id"]]
        if annotation["iscrowd"]:
            left_out[_CROWD] += 1
        elif not has_box(annotation, *found.images.sides_px(row)):
            left_out[_NO_BOX] += 1
        elif annotation["segmentation"] is None:
            left_out[_NO_MASK] += 1
        else:
            box = _box(annotation["bbox"], *found.images.sides_px(row))
            by_row[row].append((box, labels[annotation["category_id"]], annotation["segmentation"]))
    lines = [json.dumps(by_row[row], separators=(",", ":")) if row in by_row else None for row in range(len(found.images))]
    return DetectionTargets(lines, left_out)


def _box(bbox: list[float], height: int, width: int) -> list[float]:
    """COCO's x, y, width, height as corners, cut at the image's edges."""
    x, y, w, h = bbox
    xs, ys = (min(max(x, 0.0), width), min(max(x + w, 0.0), width)), (min(max(y, 0.0), height), min(max(y + h, 0.0), height))
    return [xs[0], ys[0], xs[1], ys[1]]


def has_box(annotation: dict[str, Any], height: int, width: int) -> bool:
    """Whether an annotation's box has width and height inside its image."""
    x0, y0, x1, y1 = _box(annotation["bbox"], height, width)
    return min(x1 - x0, y1 - y0) >= LEAST_SIDE_PX


def _segmentation(segmentation: Any, height: int, width: int) -> Any:
    """Run lengths unchanged; of polygons those with at least three corners, as pairs of numbers; None if no pixel is covered.

    A single polygon that is not in a list is treated as a list of one.
    """
    if not segmentation:
        return None
    if isinstance(segmentation, dict):
        lengths = segmentation["counts"]
        return segmentation if (sum(lengths[1::2]) if isinstance(lengths, list) else rle.area(segmentation)) else None
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    polygons = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if not polygons:
        return None
    if any(_is_large_inside(polygon, height, width) for polygon in polygons):
        return polygons
    return polygons if rle.area(run_lengths(polygons, height, width)) else None


def _around(segmentation: Any, height: int, width: int) -> list[float]:
    """x, y, width and height of the box around a segmentation; for polygons around their corners, as in COCO."""
    if isinstance(segmentation, dict):
        return rle.toBbox(run_lengths(segmentation, height, width)).tolist()
    xs, ys = ([number for polygon in segmentation for number in polygon[first::2]] for first in (0, 1))
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _is_large_inside(polygon: list[float], height: int, width: int) -> bool:
    """Whether a polygon certainly covers pixels, so that it need not be drawn to find out, which takes 20 times as long."""
    xs, ys = polygon[::2], polygon[1::2]
    if min(xs) < 0 or min(ys) < 0 or max(xs) > width or max(ys) > height or min(max(xs) - min(xs), max(ys) - min(ys)) < _LARGE_PX**0.5:
        return False
    around = [ys[-1], *ys, ys[0]]
    return abs(sum(x * (around[i + 2] - around[i]) for i, x in enumerate(xs))) > 2 * _LARGE_PX


def parse_targets(line: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One line of `DetectionTargets` as boxes float32 (I, 4), labels int64 (I,) and masks uint8 (I, height, width) of 0 and 1."""
    boxes, labels, segmentations = zip(*json.loads(line), strict=True)
    masks_IHW = np.stack([rle.decode(run_lengths(segmentation, height, width)) for segmentation in segmentations])
    return np.array(boxes, np.float32), np.array(labels, np.int64), masks_IHW


def run_lengths(segmentation: Any, height: int, width: int) -> Any:
    """A segmentation of COCO (polygons, or run lengths of either kind) as COCO's compressed run lengths."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    return rle.frPyObjects(segmentation, height, width) if isinstance(segmentation["counts"], list) else segmentation
