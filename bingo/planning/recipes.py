"""Recipes: YAML files that override parts of params.yaml and may include other recipes, which are applied first.

The first line is a comment that describes the recipe. In addition to sections of params.yaml a file may contain

    includes: [names]    recipes that are applied before this one, in this order (`parts/NAME`: parts that recipes share)
    about:               metadata (expected figures, required files), see `About`; not a parameter

Expected figures become `report.title` and `report.published`, so that the report prints them next to the measured ones. A recipe without
such figures removes those of another recipe, since they do not belong to its settings, unless it only adds evaluations.
"""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bingo.params import Params, mistake_lines, read_yaml
from bingo.params.known import known_names, known_teacher
from bingo.params.views import PLACES, laid_views, spelled_out
from bingo.report.measures import measure_label
from bingo.runtime.errors import UserError, near_matches, short

PARTS, REPLACING = "parts", "method-"
Percent = Annotated[float, Field(ge=0, le=100)]
# Sections whose keys are chosen by the user: they are replaced as a whole.
_ADDED = {"semi_eval", "transfer", "transfer_coco", "report"}  # sections of evaluations that can be combined with any other recipe
_WHOLE = {"report.published", "semi_eval.splits", "transfer.datasets"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TeacherFile(_Strict):
    """The checkpoint in `teacher.checkpoint`: who publishes it, and its linear top-1 accuracy in percent."""

    published_by: str
    linear_top1: Percent


class ImagesFrom(_Strict):
    """The number of images in the dataset, and who publishes it."""

    train: int
    test: int
    published_by: str


class About(_Strict):
    """Metadata of a recipe.

    expected: published accuracies in percent by measure; source: where they are from. These two are a recipe's own; the others are
    inherited from included recipes: `teacher` (for a known teacher from its own file), `images`; `published`, the published settings
    by their dotted keys; and `deviates`, lines on what differs from them and why. A line that begins with keys or sections of
    params.yaml and a colon is about these, and is left out of a recipe that sets all of them as published.
    """

    expected: dict[Literal["linear_top1", "linear_top5", "knn_1", "knn_10_weighted", "knn_20"], Percent] = {}
    source: str | None = None
    teacher: TeacherFile | None = None
    images: ImagesFrom | None = None
    published: dict[str, Any] = {}
    deviates: list[str] = []

    @model_validator(mode="after")
    def _figures_have_a_source(self) -> Self:
        if self.expected and not self.source:
            raise ValueError("expected has figures without a source; add about.source")
        return self


@dataclass(frozen=True)
class Recipe:
    """One recipe merged with those that it includes. `overlay` maps sections of params.yaml to their overrides."""

    name: str
    description: str
    overlay: dict[str, Any]
    about: About


def recipe_names(folder: Path, parts: bool = False) -> list[str]:
    """Names of all recipes; with `parts`, also the parts that they share, as parts/NAME. Raises UserError if the folder does not exist."""
    if not folder.is_dir():
        raise UserError(f"{folder}: this folder does not exist; change into a clone, or into a workspace that bingo init has created")
    pieces = [f"{PARTS}/{path.stem}" for path in (folder / PARTS).glob("*.yaml")] if parts else []
    return sorted((path.stem for path in folder.glob("*.yaml")), key=_by_number) + sorted(pieces, key=_by_number)


def _by_number(name: str) -> list[str]:
    """A key for natural sorting: k-5 before k-10."""
    return [part.zfill(9) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def recipe_path(folder: Path, name: str) -> Path:
    """The file of a recipe or part. Raises UserError for an unknown name."""
    if name not in (names := recipe_names(folder, parts=True)):
        raise UserError(f"recipe = {name}: unknown recipe; see: bingo recipe list{near_matches(name, names)}")
    return folder / f"{name}.yaml"


def description(path: Path) -> str:
    """A recipe's first line without the comment sign."""
    with path.open() as file:
        return file.readline().lstrip("# ").strip()


def own_about(path: Path) -> About:
    """The metadata in this file itself, without includes. Raises UserError for unknown keys and wrong types."""
    try:
        return About.model_validate(_content(path).get("about") or {})
    except ValidationError as error:
        raise UserError([f"{path}: {line}" for line in mistake_lines(error, About, "about")]) from None


def read_recipe(folder: Path, name: str) -> Recipe:
    """A recipe merged with its includes. Raises UserError for unknown names and circular includes."""
    path = recipe_path(folder, name)
    overlay: dict[str, Any] = {}
    inherited: dict[str, Any] = {"published": {}, "deviates": []}
    for part in _in_order(folder, name, ()):
        lay_over(overlay, {key: value for key, value in _content(part).items() if key not in ("about", "includes")})
        about = own_about(part)
        inherited |= {key: value for key in ("teacher", "images") if (value := getattr(about, key)) is not None}
        inherited["published"] |= about.published
        inherited["deviates"] += [line for line in about.deviates if line not in inherited["deviates"]]
    teacher = overlay["teacher"] if isinstance(overlay.get("teacher"), dict) else {}
    if (name_of_teacher := teacher.get("name")) in known_names():
        known = known_teacher(name_of_teacher)
        inherited["published"].setdefault("teacher.name", name_of_teacher)
        if known.linear_top1 is not None:
            inherited.setdefault("teacher", TeacherFile(published_by=str(known.published_by), linear_top1=known.linear_top1))
    inherited["deviates"] = _standing(inherited["deviates"], dict(flattened(spelled_out(overlay))), inherited["published"])
    if "teacher" in inherited and "checkpoint" not in teacher:
        raise UserError(
            f"{path}: about.teacher describes a checkpoint that the recipe does not set; set teacher.checkpoint, or remove about.teacher"
        )
    recipe = Recipe(name, description(path), overlay, own_about(path).model_copy(update=inherited))
    lay_over(overlay, _for_the_report(recipe))
    return recipe


def explained(line: str) -> list[str]:
    """The keys and sections of params.yaml with which a line of `deviates` begins; empty if it is not about parameters."""
    keys = line.partition(": ")[0].split(", ")
    return keys if all(re.fullmatch(r"[a-z_]+(\.\w+)+", key) for key in keys) else []


def speaks_of(line: str, key: str) -> bool:
    """Whether a line of `deviates` explains this key's value."""
    return any(f"{key}.".startswith(f"{named}.") for named in explained(line))


def _standing(deviates: list[str], ours: dict[str, Any], published: dict[str, Any]) -> list[str]:
    """The lines that apply to a recipe: those about parameters only if one of the parameters differs from the published value."""
    others = [key for key, value in published.items() if ours.get(key, value) != value]
    return [line for line in deviates if not explained(line) or any(speaks_of(line, key) for key in others)]


def overlay_mistakes(overlay: dict[str, Any]) -> list[str]:
    """One line for each key of an overlay that params.yaml does not have, and for each value that it does not allow there."""
    try:
        Params.model_validate(overlay)
    except ValidationError as error:
        return [line for line in mistake_lines(error, Params) if " is missing; add it " not in line]  # the rest is in params.yaml
    return []


def _for_the_report(recipe: Recipe) -> dict[str, Any]:
    """Expected figures in the form of the section `report`; neither title nor figures if there are none."""
    if not recipe.about.expected:
        cleared: dict[str, Any] = {"report": {"title": None, "published": {}}} if recipe.overlay.keys() - _ADDED else {}
        lay_over(cleared, {key: value for key, value in recipe.overlay.items() if key == "report"})
        return cleared
    published = {measure_label(measure): f"{percent} % ({recipe.about.source})" for measure, percent in recipe.about.expected.items()}
    return {"report": {"title": recipe.description, "published": published}}


def _in_order(folder: Path, name: str, above: tuple[str, ...]) -> Iterator[Path]:
    """The files of a recipe, each after its includes."""
    path = recipe_path(folder, name)
    if name in above:
        raise UserError(f"{path}: circular includes ({' -> '.join((*above, name))}); remove one of them")
    names = _content(path).get("includes") or []
    if not isinstance(names, list) or not all(isinstance(x, str) for x in names):
        raise UserError(f"{path}: includes = {short(names)}: allowed is a list of names of recipes")
    for included in names:
        if included not in (known := recipe_names(folder, parts=True)):
            raise UserError(f"{path}: includes {included}, which does not exist{near_matches(included, known)}")
        yield from _in_order(folder, included, (*above, name))
    yield path


def _content(path: Path) -> dict[str, Any]:
    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not sections of params.yaml")
    return content


def replaced(folder: Path, name: str, document: dict[str, Any], committed: dict[str, Any]) -> dict[str, Any]:
    """The overlay that undoes the settings of other recipes of the group `method-` in `document`, if `name` also belongs to it, since such
    recipes replace one another. Values of the current method that were set by such a recipe become those of `committed`."""
    now, before, overlay = dict(flattened(document)), dict(flattened(committed)), dict[str, Any]()
    for other in recipe_names(folder) if name.startswith(REPLACING) else ():
        theirs = dict(flattened(read_recipe(folder, other).overlay)) if other.startswith(REPLACING) else {}
        if theirs.get("distill.method") == now["distill.method"]:
            for key in (key for key, value in theirs.items() if now.get(key) == value and key in before):
                *sections, last = key.split(".")
                reduce(lambda section, part: section.setdefault(part, {}), sections, overlay)[last] = before[key]
    return overlay


Change = tuple[str, Any, Any]


def lay_over(document: dict[str, Any], overlay: dict[str, Any], prefix: str = "") -> list[Change]:
    """Write the overlay's values into `document`, section by section, and return each change as (dotted key, old or None, new)."""
    changes: list[Change] = []
    for key, value in overlay.items():
        name = f"{prefix}{key}"
        if name in PLACES:
            value = laid_views(document.get(key), value)
        if isinstance(value, dict) and isinstance(document.get(key), dict) and name not in (*_WHOLE, *PLACES):
            changes += lay_over(document[key], value, f"{name}.")
        elif document.get(key, ...) != value:
            changes.append((name, document.get(key), value))
            document[key] = deepcopy(value)  # copied, so that changing one document never changes another
    return changes


def flattened(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted key; sections with the user's keys are not divided."""
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name not in _WHOLE:
            yield from flattened(value, f"{name}.")
        else:
            yield name, value


def as_text(value: Any) -> str:
    """A value as YAML on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
