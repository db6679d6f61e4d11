"""`Params`, all of params.yaml: its sections, checks across sections, and reading of the file."""

from pathlib import Path
from typing import Self

from pydantic import ValidationError, field_validator, model_validator

from bingo.params.data import BaggingParams, DatasetParams, ExtractParams, ImageParams
from bingo.params.evals import CocoParams, KnnEvalParams, LinearEvalParams, SemiEvalParams, TransferParams, TransferSetParams
from bingo.params.fields import Section, Weights, Whole
from bingo.params.methods import MethodsParams, method_names, method_section
from bingo.params.mistakes import explanation, mistake_lines
from bingo.params.networks import StudentParams, TeacherParams
from bingo.params.training import DistillParams
from bingo.params.yaml_files import read_yaml
from bingo.runtime.errors import UserError, near_matches

_MOST_MISTAKES = 40
_OF_FILES_ALONE = ("pack_px", "image_column", "label_column")  # of `dataset` alone, not of the sets of `transfer`


class ReportParams(Section):
    """The HTML report: its title (null: the dataset's name and number of images), the number of bags shown, and published figures to print
    next to the measured ones."""

    title: str | None
    gallery_anchors: Whole
    published: dict[str, str]


class Params(Section):
    """All sections of params.yaml by name."""

    seed: Whole
    dataset: DatasetParams
    image: ImageParams
    teacher: TeacherParams
    extract: ExtractParams
    bagging: BaggingParams
    student: StudentParams
    distill: DistillParams
    methods: MethodsParams
    baselines: list[str]
    supervised: Weights | None
    linear_eval: LinearEvalParams
    knn_eval: KnnEvalParams
    transfer_coco: CocoParams
    semi_eval: SemiEvalParams
    transfer: TransferParams
    report: ReportParams

    @model_validator(mode="after")
    def _names_are_of_networks(self) -> Self:
        settings = {"ema": "distill.student_ema", "start": "student.weights", "supervised": "supervised"}
        made = {"ema": self.distill.student_ema, "start": self.student.weights, "supervised": self.supervised}
        allowed = ["student", *self.baselines, "untrained", *(name for name, setting in made.items() if setting)]
        named = {"linear_eval.crops": self.linear_eval.crops.nets, "semi_eval": self.semi_eval.nets, "transfer": self.transfer.nets}
        lines = [
            f"{section}.nets: {name!r} is not a network, allowed are {', '.join(allowed)}{near_matches(name, allowed)}"
            + (f"; to have it, set {settings[name]}" if name in settings else "")
            + ("; to train it, name it in `baselines`" if name in method_names() and not method_section(name).needs_teacher else "")
            for section, names in named.items()
            for name in names
            if name not in allowed
        ]
        relations = ["teacher", *(f"baselines/{name}" for name in self.baselines)]
        if (relation := self.bagging.relation) not in relations:
            way_out = "; a student's relation needs it among `baselines`" if relation.startswith("baselines/") else ""
            lines.append(f"bagging.relation: {relation!r}, allowed are {', '.join(relations)}{near_matches(relation, relations)}{way_out}")
        if lines:
            raise ValueError("\n".join(lines))
        return self

    @model_validator(mode="after")
    def _neighbours_are_seen_whole(self) -> Self:
        resize_px, crop_px = self.knn_eval.resize_px, self.image.crop_px
        if resize_px is not None and resize_px < crop_px:
            raise ValueError(
                f"knn_eval.resize_px: {resize_px} is less than image.crop_px {crop_px}; set it to {crop_px} or more, or to null"
            )
        return self

    @model_validator(mode="after")
    def _transfer_sets_are_datasets(self) -> Self:
        for name in self.transfer.datasets:
            try:
                self.transfer_set(name)
            except ValidationError as error:
                line = explanation(error.errors()[0]).replace("set dataset.", f"set transfer.datasets.{name}.")
                raise ValueError(f"transfer.datasets.{name}.{line}") from None
        return self

    def transfer_set(self, name: str) -> DatasetParams:
        """The dataset with this name in `transfer.datasets`."""
        as_dataset = self.dataset.model_dump(exclude={*TransferSetParams.model_fields, *_OF_FILES_ALONE})
        return DatasetParams.model_validate(as_dataset | dict.fromkeys(_OF_FILES_ALONE) | self.transfer.datasets[name].model_dump())

    @model_validator(mode="after")
    def _teacher_sees_images(self) -> Self:
        try:
            self.teacher.image_for(self.image)
        except ValidationError as error:
            raise ValueError(f"teacher.image.{explanation(error.errors()[0]).replace('image.', 'teacher.image.')}") from None
        return self

    @property
    def teacher_image(self) -> ImageParams:
        """The teacher's image settings: its own where it has some, otherwise the student's."""
        return self.teacher.image_for(self.image)

    @field_validator("baselines")
    @classmethod
    def _baselines_need_no_teacher(cls, names: list[str]) -> list[str]:
        allowed = [name for name in method_names() if not method_section(name).needs_teacher]
        for name in names:
            if name not in allowed:
                raise ValueError(f"{name!r}: a baseline is a method without a teacher, allowed are {', '.join(allowed)}")
        return names


def load_params(path: Path | str = "params.yaml") -> Params:
    """All settings of params.yaml, validated; sections and keys are attributes. Raises UserError with one line for each error.

    >>> from bingo import load_params
    >>> params = load_params()
    >>> params.dataset.source, params.bagging.k
    ('digits', 5)
    """
    return validate(read_yaml(path), str(path))


def validate(raw: object, origin: str) -> Params:
    """Validate a mapping that was read from `origin`. Raises UserError with one line for each error."""
    if not isinstance(raw, dict):
        raise UserError(f"{origin}: holds {type(raw).__name__}, not sections; restore it with: git checkout {origin}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        lines = [f"{origin}: {line}" for line in mistake_lines(error, Params)]
        more = [f"{origin}: and {len(lines) - _MOST_MISTAKES} more errors"] if len(lines) > _MOST_MISTAKES else []
        raise UserError([*lines[:_MOST_MISTAKES], *more]) from None
