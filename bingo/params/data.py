"""Sections on images: dataset and image, the teacher's pass over them (extract), and their bags (bagging)."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from bingo.params.fields import (
    Count,
    FilePath,
    Interpolation,
    PerChannel,
    Positive,
    Precision,
    Rate,
    Section,
    ShareRange,
    Temperature,
    Whole,
)
from bingo.params.views import AugmentParams

FILE_SOURCES = ("folder", "webdataset", "huggingface")


class DatasetParams(Section):
    """The images. `train_images` and `test_images` select a seeded, class-balanced subset (null: all); without a test split,
    `test_images` images are held out from the train images.

    `pack_px`: photographs with a longer short side are resized to it and stored once more; these copies are read instead.
    `follow_links`: follow links in a folder of images that lead out of it. `image_column`, `label_column`: columns of a dataset saved by
    Hugging Face's library `datasets` (null: the only column of that type).
    """

    source: Literal["digits", "folder", "webdataset", "huggingface", "cifar10", "cifar100"]
    root: FilePath | None
    follow_links: bool
    image_column: str | None
    label_column: str | None
    store_px: Annotated[int, Field(ge=1, le=4096)] | None
    pack_px: Annotated[int, Field(ge=16, le=4096)] | None
    train_images: Count | None
    test_images: Count | None
    check: Literal["decode", "header"]
    on_bad_image: Literal["stop", "skip"]
    jpeg_decoder: Literal["cpu", "gpu"]
    placements: Annotated[int, Field(ge=1, le=1000)]
    placement_scale: ShareRange
    placement_degrees: Annotated[float, Field(ge=0, le=180)]

    @model_validator(mode="after")
    def _root_is_named(self) -> Self:
        if self.source != "digits" and not self.root:
            raise ValueError(f"root: null, but source {self.source} needs the folder of the images; set dataset.root")
        if self.source not in FILE_SOURCES and not self.store_px:
            raise ValueError(f"store_px: null, but source {self.source} is held in memory; set dataset.store_px, in pixels")
        if self.store_px and self.pack_px:
            way_out = "set dataset.store_px: null to decode photographs on access, or dataset.pack_px: null"
            raise ValueError(f"pack_px: {self.pack_px}, but with store_px {self.store_px} all images are held in memory; {way_out}")
        if self.placement_scale[0] < 0.05:
            raise ValueError(f"placement_scale: {self.placement_scale}, allowed are two numbers from 0.05 to 1")
        return self


class ImageParams(Section):
    """The input of the networks: views of `crop_px`; the centre view is resized to `resize_px` (short side), then cropped."""

    crop_px: Count
    resize_px: Count
    mean: PerChannel
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)]

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.crop_px > self.resize_px:
            raise ValueError(f"crop_px: {self.crop_px} is larger than resize_px {self.resize_px}; lower image.crop_px")
        return self

    @property
    def interpolation(self) -> Interpolation:
        """The interpolation for resizing."""
        return "bilinear"


class BicubicImageParams(ImageParams):
    """The same views with bicubic interpolation."""

    @property
    def interpolation(self) -> Interpolation:
        return "bicubic"


def seen_image(values: Mapping[str, Any]) -> ImageParams:
    """The image section with the keys in `values`; resizing is bicubic if `interpolation` is, otherwise bilinear.

    Raises KeyError if a key is missing, and pydantic's ValidationError.
    """
    bicubic = values.get("interpolation") == "bicubic"
    return (BicubicImageParams if bicubic else ImageParams)(**{key: values[key] for key in ImageParams.model_fields})


def image_values(image: ImageParams) -> dict[str, Any]:
    """The inverse of `seen_image`. Bilinear interpolation is left out, so that files from before it was a setting do not change."""
    return image.model_dump() | ({"interpolation": image.interpolation} if image.interpolation != "bilinear" else {})


class ExtractParams(Section):
    """The teacher's pass: it stores the feature of the centre view of each image and the keys of `views` random views of each train image
    (0: none, for live or momentum keys, or features as targets), in files of `chunk_rows` rows. A file is the unit of work of a process,
    and the most that is lost when it is killed. `augment`: as in teacher.pretrain."""

    views: Whole
    batch_images: Count
    chunk_rows: Count
    precision: Precision
    augment: AugmentParams


class BaggingParams(Section):
    """Building of bags: `k` members (for kmeans and label: the number of listed members, nearest first).

    `relation` selects the network whose features define similarity: the teacher, or a student trained as a baseline (an ablation of
    the paper). `mutual` keeps a member of a knn bag only if the anchor is also in the member's bag.
    `search` for knn: exact; `ivf`, an inverted file of `lists` lists (null: 4 * sqrt(train rows)), of which `probes` are searched; or
    `cuvs`, a graph on a GPU.
    `draw_temperature` t: members are drawn with probability proportional to exp(cosine / t), among those listed; null: with equal
    probability. `near_duplicate_distance`: images are near-duplicates if their distance, 1 - cosine, is less than this fraction of the
    median distance of an image to its tenth-nearest neighbour, in the teacher's features. They are counted; test images that were held out
    from the train images are left out of every evaluation if they have a near-duplicate among the train images. 0: none are left out.
    """

    method: Literal["knn", "kmeans", "label"]
    k: Count
    clusters: Count
    iterations: Count
    relation: str
    mutual: bool
    search: Literal["exact", "ivf", "cuvs"]
    lists: Count | None
    probes: Count
    draw_temperature: Temperature | None
    near_duplicate_distance: Rate

    @model_validator(mode="after")
    def _mutual_needs_neighbours(self) -> Self:
        if self.mutual and self.method != "knn":
            raise ValueError(
                f"mutual: true, but bags by {self.method} are groups, whose members are always mutual; set bagging.mutual: false"
            )
        return self

    @model_validator(mode="after")
    def _lists_need_neighbours(self) -> Self:
        if self.search != "exact" and self.method != "knn":
            raise ValueError(f"search: {self.search}, but bags by {self.method} are searched exactly; set bagging.search: exact")
        return self
