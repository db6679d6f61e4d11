"""The plan of a study, and its missing runs, which are a function of the plan and of the results so far.

Tuning climbs over learning rate and temperature, starting from the best of `first_lr`. The neighbours of the best run on both axes are
tried, and also the neighbours of any run that may be worse only by noise, until none is missing. The best values thus have worse ones on
either side. A training with a loss that is not finite is a run without accuracy.
"""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from bingo.params import read_yaml, validate
from bingo.params.fields import NotNegative, Positive, Whole
from bingo.params.mistakes import mistake_lines
from bingo.planning.recipes import flattened, lay_over, read_recipe, recipe_names
from bingo.runtime.errors import UserError, short

LR, EPOCHS = "distill.lr", "distill.epochs"
Part = Literal["tuning", "anchors", "flops"]
_OF_A_RUN = {"part", "recipe", "seed", "settings", "linear"}
_MEASURED = {"gflop_per_anchor", "anchors"}  # of a run that has not diverged


def _distinct(items: list[Any]) -> list[Any]:
    if twice := [item for item in items if items.count(item) > 1]:
        raise ValueError(f"{twice[0]} is there twice; leave one out")
    return items


class _StudySection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tuning(_StudySection):
    """Seed, learning rates and settings of tuning. `noise_points`: two runs that differ by less in linear accuracy count as equal;
    `variant_seeds`: seeds of variants that are in no round, and of the recipes that they are compared with, besides `seed`."""

    seed: Whole
    variant_seeds: list[Whole] = []
    noise_points: NotNegative
    first_lr: Annotated[list[Positive], Field(min_length=1), AfterValidator(_distinct)]
    settings: dict[str, Any]

    @model_validator(mode="after")
    def _seeds_are_distinct(self) -> Self:
        _distinct([self.seed, *self.variant_seeds])
        return self


class Tables(_StudySection):
    """Seeds and settings of the runs that are compared."""

    seeds: Annotated[list[Whole], Field(min_length=1), AfterValidator(_distinct)]
    settings: dict[str, Any]


class StudyVariant(_StudySection):
    """A recipe with further settings. `recipe` may be a variant above, whose settings and tuned values it shares. Otherwise `like` is the
    recipe or variant from which it takes tuned values, null if it is tuned itself."""

    recipe: str
    like: str | None = None
    settings: dict[str, Any]


class StudyPlan(_StudySection):
    """See the comments in benchmarks/study.yaml. `base` is null for the images of params.yaml."""

    base: str | None
    reference: str
    tuning: Tuning
    tables: Tables
    variants: dict[str, StudyVariant] = {}
    rounds: Annotated[list[dict[str, list[str]]], Field(min_length=1)]

    @property
    def recipes(self) -> list[str]:
        """The recipes and variants of all rounds."""
        return [recipe for recipes in self.rounds for recipe in recipes]

    @property
    def screened(self) -> list[str]:
        """Variants that are in no round; they are run on the images of tuning only, at the tuned values of another recipe."""
        return [name for name in self.variants if name not in self.recipes]

    @property
    def variant_seeds(self) -> list[int]:
        """All seeds of the variants in `screened`."""
        return [self.tuning.seed, *self.tuning.variant_seeds]

    def tuned_as(self, name: str) -> str:
        """The recipe or variant that provides the tuned values: usually itself."""
        if (variant := self.variants.get(name)) is None:
            return name
        return variant.like or (self.tuned_as(variant.recipe) if variant.recipe in self.variants else name)

    @model_validator(mode="after")
    def _variants_are_of_recipes_or_of_variants_above(self) -> Self:
        names = list(self.variants)
        for place, name in enumerate(names):
            if (recipe := self.variants[name].recipe) in names[place:]:
                raise ValueError(f"variants.{name}.recipe = {recipe}: is not a variant above it; move {recipe} up, or give a recipe")
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if self.reference not in self.rounds[0]:
            raise ValueError(f"reference = {self.reference}: is not in the first round")
        round_of = {name: place for place, recipes in enumerate(self.rounds) for name in recipes}
        if len(round_of) < len(self.recipes):
            raise ValueError("rounds: a recipe is in two of them")
        for name in self.variants:
            like = self.tuned_as(name)
            if like == name and name not in round_of:
                raise ValueError(f"variants = {name}: is in no round, and has no `like`")
            if like not in round_of:
                raise ValueError(f"variants.{name}.like = {like}: is in no round")
            if (other := self.tuned_as(like)) != like:
                raise ValueError(f"variants.{name}.like = {like}: takes its values from another; give that one, {other}")
            if round_of.get(name, len(self.rounds)) < round_of[like]:
                raise ValueError(f"variants.{name}.like = {like}: is tuned in a later round; move it to the round of {name}, or before")
        return self

    @model_validator(mode="after")
    def _tuned_values_are_not_settings(self) -> Self:
        keys = {name: keys for tuned in self.rounds for name, keys in tuned.items()}
        for name in (*self.recipes, *self.screened):
            settings = self.fixed(name, "tuning") | self.fixed(name, "anchors")
            if both := sorted({LR, *keys[self.tuned_as(name)]} & settings.keys()):
                raise ValueError(f"settings of {name}: {both[0]} is tuned, so it cannot be set; leave it out")
        return self

    def recipe_of(self, name: str) -> str:
        """The recipe of a variant; a recipe is returned unchanged."""
        return self.recipe_of(self.variants[name].recipe) if name in self.variants else name

    def settings_of(self, name: str) -> dict[str, Any]:
        """The settings of a variant over those of the variant that it is made from; empty for a recipe."""
        if name not in self.variants:
            return {}
        settings = self.settings_of(self.variants[name].recipe)
        lay_over(settings, self.variants[name].settings)
        return settings

    def own_epochs(self, name: str) -> bool:
        """Whether a variant sets its own number of epochs: it is then only in the table of equal FLOPs."""
        return EPOCHS in dict(flattened(self.settings_of(name)))

    def fixed(self, name: str, part: "Part") -> dict[str, Any]:
        """The settings of all runs of a recipe or variant in a part of the study, by dotted keys."""
        common = (self.tuning if part == "tuning" else self.tables).settings
        return dict(flattened(common)) | dict(flattened(self.settings_of(name)))


@dataclass(frozen=True)
class Wanted:
    """A run of the plan; `settings` are the dotted keys of params.yaml that the plan sets, without those of base and recipe."""

    part: Part
    recipe: str
    seed: int
    settings: Mapping[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        tuned = {
            key: value for key, value in self.settings.items() if key == LR or (key.startswith("methods.") and isinstance(value, float))
        }
        return "+".join([self.part, self.recipe, *(f"{key.rpartition('.')[2]}={value:g}" for key, value in tuned.items())])

    def is_in(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of the results belongs to this run."""
        return all(line[key] == getattr(self, key) for key in ("part", "recipe", "seed", "settings"))


def read_plan(path: Path) -> StudyPlan:
    """Read a plan. Raises UserError if the file is not a plan."""
    if not path.is_file():
        raise UserError(f"--plan = {path}: is not a file; benchmarks/study.yaml is a plan that can be read")
    try:
        return StudyPlan.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError([f"{path}: {line}" for line in mistake_lines(error, StudyPlan)]) from None


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of the results; empty if the file does not exist. Raises UserError if a line is not a run in JSON, or the file cannot be
    read."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for line in lines:
            if not isinstance(line, dict) or not line.keys() >= _OF_A_RUN or not isinstance(line["settings"], dict):
                raise ValueError(f"{short(line)} is not a run with {', '.join(sorted(_OF_A_RUN))}")
            linear = line["linear"]
            if linear is not None and not (isinstance(linear, dict) and "student" in linear and line.keys() >= _MEASURED):
                raise ValueError(f"{short(line)} has neither linear: null, nor linear.student, {' and '.join(sorted(_MEASURED))}")
        return lines
    except OSError as error:
        raise UserError(f"--out = {path}: cannot be read ({error.strerror}); give another file") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; every line is one run in JSON, delete the one that is not") from None


class Wishes:
    """The missing runs of a plan in order, given the results so far."""

    def __init__(self, plan: StudyPlan, lines: Sequence[Mapping[str, Any]]):
        self.plan, self.lines = plan, lines
        if both := sorted(plan.variants.keys() & set(recipe_names(Path("recipes")))):
            raise UserError(f"variants = {both[0]}: is the name of a recipe, too; rename the variant")
        self.documents = {recipe: document_of(plan, recipe) for recipe in (*plan.recipes, *plan.screened)}
        keys = {recipe: keys for recipes in plan.rounds for recipe, keys in recipes.items()}
        self.starts = {recipe: {key: _number(self.documents[recipe], key) for key in keys[recipe]} for recipe in plan.recipes}

    def next(self) -> Wanted | None:
        """The next run."""
        return next(self._all(), None)

    def _all(self) -> Iterator[Wanted]:
        for recipes in self.plan.rounds:
            for recipe in recipes:
                yield from self._untuned(recipe)
            yield from self._judged(recipes)

    def _judged(self, recipes: Iterable[str]) -> Iterator[Wanted]:
        """The missing runs of tuned recipes: first variants on the images of tuning, then the runs for the tables."""
        screened = [name for name in self.plan.screened if self.plan.tuned_as(name) in recipes]
        for seed in self.plan.variant_seeds:
            for name in dict.fromkeys(name for variant in screened for name in (self.plan.tuned_as(variant), variant)):
                if (wanted := self.tuned_run(name, seed)) and not self.line_of(wanted):
                    yield wanted
        for seed in self.plan.tables.seeds:
            for recipe in recipes:
                yield from self._compared(recipe, seed)

    def ready(self, under_way: Collection[Wanted]) -> Iterator[Wanted]:
        """The missing runs that can start beside those under way, in order; a climb's next step waits for its last, and a table for its
        climb."""
        for recipes in self.plan.rounds:
            climbing = {recipe for recipe in recipes if any(self._untuned(recipe))}
            for recipe in climbing:
                if not any((run.part, run.recipe) == ("tuning", recipe) for run in under_way):
                    yield from self._untuned(recipe)
            tuned = [recipe for recipe in recipes if self.plan.tuned_as(recipe) not in climbing]
            yield from (wanted for wanted in self._judged(tuned) if wanted not in under_way)

    def lines_of(self, wanted: Wanted) -> list[Mapping[str, Any]]:
        """The results of a run; several if it was run on several devices."""
        return [line for line in self.lines if wanted.is_in(line)]

    def line_of(self, wanted: Wanted) -> Mapping[str, Any] | None:
        """The first result of a run, if it has been run."""
        return next(iter(self.lines_of(wanted)), None)

    def _untuned(self, recipe: str) -> Iterator[Wanted]:
        """The next runs of the climb: first all of `first_lr`, then the missing neighbours of the best run and of runs that are as good."""
        if self.plan.tuned_as(recipe) != recipe:
            return
        first = [self.at(recipe, lr, 1.0) for lr in self.plan.tuning.first_lr]
        if missing := [wanted for wanted in first if not self.line_of(wanted)]:
            yield from missing
            return
        if (best := self.best(recipe)) is None:
            return
        tried = {self.place(line): line for line in self.tuning(recipe) if line["linear"]}
        around = self._neighbours(recipe, self.place(best))
        least = best["linear"]["student"] - self.plan.tuning.noise_points
        near = [place for place in around if place in tried and tried[place]["linear"]["student"] > least]
        places = dict.fromkeys([*around, *(further for place in near for further in self._neighbours(recipe, place))])
        wanted = [self.at(recipe, *place) for place in places if self._allowed(recipe, *place)]
        yield from (one for one in wanted if not self.line_of(one))

    def _neighbours(self, recipe: str, place: tuple[float, float]) -> list[tuple[float, float]]:
        """Places one step away in the climb: two, or four if more than the learning rate is tuned."""
        lr, factor = place
        return [(next_lr(lr, up), factor) for up in (True, False)] + (
            [(lr, factor * by) for by in (2.0, 0.5)] if self.starts[recipe] else []
        )

    def _allowed(self, recipe: str, lr: float, factor: float) -> bool:
        """Whether params.yaml allows these values; a share, for example, is at most 1."""
        document = deepcopy(self.documents[recipe])
        for key, value in self.tuned(recipe, lr, factor).items():
            lay_over(document, nested(key, value))
        try:
            validate(document, "params.yaml")
        except UserError:
            return False
        return True

    def at(self, recipe: str, lr: float, factor: float) -> Wanted:
        """The tuning run at a place of the climb."""
        settings = self.plan.fixed(recipe, "tuning") | self.tuned(self.plan.tuned_as(recipe), lr, factor)
        return Wanted("tuning", recipe, self.plan.tuning.seed, settings)

    def tuned_run(self, name: str, seed: int) -> Wanted | None:
        """The run of a recipe or variant on the images of tuning, at its own best values or those of another recipe; None if these are
        not known yet."""
        best = self.best(self.plan.tuned_as(name))
        return None if best is None else replace(self.at(name, *self.place(best)), seed=seed)

    def tuned(self, recipe: str, lr: float, factor: float) -> dict[str, float]:
        """The tuned settings at a place of the climb: a learning rate, and a factor for the other values."""
        return {LR: float(lr), **{key: float(f"{value * factor:.4g}") for key, value in self.starts[recipe].items()}}

    def tuning(self, recipe: str) -> list[Mapping[str, Any]]:
        """Results of a recipe's tuning; not those of other settings or tuned keys, which an earlier plan had."""
        ours, keys = ("tuning", recipe, self.plan.tuning.seed), {LR, *self.starts[self.plan.tuned_as(recipe)]}
        lines = [line for line in self.lines if (line["part"], line["recipe"], line["seed"]) == ours and keys <= line["settings"].keys()]
        return [line for line in lines if self.at(recipe, *self.place(line)).is_in(line)]

    def place(self, line: Mapping[str, Any]) -> tuple[float, float]:
        """Learning rate and factor of a result of tuning."""
        factors = [line["settings"][key] / value for key, value in self.starts[self.plan.tuned_as(line["recipe"])].items()]
        return line["settings"][LR], 2.0 ** round(math.log2(factors[0])) if factors else 1.0

    def best(self, recipe: str) -> Mapping[str, Any] | None:
        """The best result of a recipe's tuning, or None if none has an accuracy."""
        return max((line for line in self.tuning(recipe) if line["linear"]), key=lambda line: line["linear"]["student"], default=None)

    def _compared(self, recipe: str, seed: int) -> Iterator[Wanted]:
        """The missing runs for the tables: at equal anchors, and at equal FLOPs if these differ."""
        yield from (wanted for part in ("anchors", "flops") if (wanted := self.compared(part, recipe, seed)) and not self.line_of(wanted))

    def compared(self, part: Part, recipe: str, seed: int) -> Wanted | None:
        """A run for the tables; None if the recipe is not tuned, its cost is not known, or the run at equal anchors has equal FLOPs."""
        tuned = self.plan.tuned_as(recipe)
        if (best := self.best(tuned)) is None:
            return None
        settings = self.plan.fixed(recipe, part) | self.tuned(tuned, *self.place(best))
        if part == "flops":
            if self.plan.own_epochs(recipe):
                return None
            ours, theirs = self._cost(recipe), self._cost(self.plan.reference)
            usual = dict(flattened(self.documents[recipe]))[EPOCHS] if EPOCHS not in settings else settings[EPOCHS]
            if ours is None or theirs is None or (epochs := max(1, round(usual * theirs / ours))) == usual:
                return None
            settings |= {EPOCHS: epochs}
        return Wanted(part, recipe, seed, settings)

    def _cost(self, recipe: str) -> float | None:
        """GFLOP per anchor; None if it has not been run."""
        return next((line["gflop_per_anchor"] for line in self.lines if line["recipe"] == recipe and line["linear"]), None)


def document_of(plan: StudyPlan, recipe: str) -> dict[str, Any]:
    """params.yaml with base and recipe, and the settings of a variant. Raises UserError if these are not allowed."""
    document = read_yaml("params.yaml")
    for name in filter(None, (plan.base, plan.recipe_of(recipe))):
        lay_over(document, read_recipe(Path("recipes"), name).overlay)
    lay_over(document, plan.settings_of(recipe))
    validate(document, f"params.yaml with {recipe}")
    return document


def _number(document: dict[str, Any], key: str) -> float:
    """A value to be multiplied. Raises UserError if it is not a number other than 0, or if it is the learning rate, which is always
    tuned."""
    value = dict(flattened(document)).get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value or key == LR:
        allowed = f"allowed are keys of params.yaml, except {LR}, with values that are numbers other than 0"
        raise UserError(f"rounds: {key} = {short(value)}: {allowed}")
    return float(value)


def next_lr(lr: float, up: bool) -> float:
    """The next learning rate in the series 0.06, 0.2, 0.6, 2, ... of one-digit numbers."""
    return float(f"{lr * 10 ** (0.5 if up else -0.5):.1g}")


def nested(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for the key "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
