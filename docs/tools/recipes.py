"""The page docs/recipes.md on the papers' rows: the settings of each recipe, with the published value if it differs.

python -m docs.tools.recipes > docs/recipes.md
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from bingo.params import read_yaml, validate
from bingo.params.known import OWN
from bingo.planning.recipes import Recipe, as_text, flattened, lay_over, read_recipe, recipe_names
from bingo.report.measures import measure_label

ROWS = "imagenet-"
# The columns, each with the keys and sections of params.yaml that it shows; a value is shown under the longest match.
COLUMNS = {
    "Teacher": ("teacher.name",),
    "Student": ("student",),
    "Views and bags": ("image", "distill.augment", "extract.views", "bagging"),
    "Training": ("distill",),
    "Method": ("methods",),
    "Linear layer": ("linear_eval.crops",),
    "k-NN": ("knn_eval",),
}
SECTIONS = [section for sections in COLUMNS.values() for section in sections]
HIDDEN = (
    "student.factory",
    "distill.method",
    "distill.accumulate_steps",
    "distill.keep_best",
    "distill.student_ema",
    "distill.augment.name",
    "distill.probe_every_epochs",
    "linear_eval.crops.nets",
    "bagging.iterations",
    "bagging.lists",
    "bagging.near_duplicate_distance",
    "bagging.probes",
)
HEAD = """# The papers' rows

The settings of every recipe `imagenet-...` when it is applied to the shipped `params.yaml`, as printed by
`python -m docs.tools.recipes`. The first row lists the settings that all of them share. Keys are shortened: `student.arch` is shown as
`arch`.

* `epochs 200`: as published.
* `keys **stored** (live)`: the recipe's value, with the published one in parentheses. The numbers in the last column refer to the reasons
  below the table.
* `views 0°`: not published, or without a counterpart in the paper.

`bingo recipe show imagenet-...` prints a single recipe with its costs.

The teacher runs in every step, as published. `bingo recipe use keys-stored`, after a recipe for BINGO, SEED or DisCo, trains from 8 stored
views of each image instead. The differences are: the teacher sees one of these views instead of a new one each time (SEED's and DisCo's
students see the same view), the teacher's BatchNorm is in evaluation mode (published only for SEED), there are no small crops (SEED with
ResNet-50 x 2), and the queue of BINGO and SEED is initialised with stored keys. A training step of ResNet-18 costs, in GFLOP per anchor,

* BINGO: 48.4 with ResNet-50 live, 78.1 with ResNet-152, 96.6 with ResNet-50 x 2; 32.1 with stored keys;
* SEED: 18.9, 33.7, 90.7 (of which 47.8 for the 6 small crops); 10.7 with stored keys;
* DisCo: 41.3, 71.0, 89.5; 25.0 with stored keys.

Storing the keys costs as much teacher compute as 4 of the 200 epochs with live keys (SEED: 8), and 2.6 GB on disk and in GPU memory.
"""


def markdown(folder: Path, shipped: Mapping[str, Any]) -> str:
    """The page: a row for each of the papers' recipes in `folder`, applied to `shipped` (params.yaml), with the reasons below."""
    recipes = [read_recipe(folder, name) for name in recipe_names(folder) if name.startswith(ROWS)]
    settings = [_settings(recipe, shipped) for recipe in recipes]
    reasons = list(dict.fromkeys(line for recipe in recipes for line in recipe.about.deviates))
    common = {key: text for key, text in settings[0].items() if all(other.get(key) == text for other in settings)}
    lines = [_line(["Recipe", "Published, percent", *COLUMNS, "Deviates"]), _line(["---"] * (len(COLUMNS) + 3))]
    lines.append(_line(["shared by all", "", *_cells(common), ""]))
    for recipe, own in zip(recipes, settings, strict=True):
        numbers = ", ".join(str(reasons.index(line) + 1) for line in recipe.about.deviates)
        cells = _cells({key: text for key, text in own.items() if key not in common})
        lines.append(_line([recipe.name.removeprefix(ROWS), _figures(recipe), *cells, numbers]))
    return "\n".join([HEAD, *lines, "", *(f"{number}. {line}" for number, line in enumerate(reasons, 1)), ""])


def resolved(recipe: Recipe, shipped: Mapping[str, Any]) -> dict[str, Any]:
    """Every value by its dotted key when the recipe is applied to `shipped`. Raises UserError if the result is invalid."""
    document = deepcopy(dict(shipped))
    lay_over(document, recipe.overlay)
    return dict(flattened(validate(document, f"params.yaml with recipe {recipe.name}").model_dump()))


def _settings(recipe: Recipe, shipped: Mapping[str, Any]) -> dict[str, str]:
    """The text of each setting that the table shows for this recipe, by key."""
    ours, published = resolved(recipe, shipped), recipe.about.published
    return {key: _text(value, published.get(key, ...)) for key, value in ours.items() if _is_shown(key, ours, published)}


def _is_shown(key: str, ours: Mapping[str, Any], published: Mapping[str, Any]) -> bool:
    """Whether a setting is relevant; not, for example, the file of an unused teacher, unused bags, another method's settings, drops of a
    cosine."""
    section = key.rpartition(".")[0]
    means_something = {
        "teacher.name": ours["teacher.name"] != OWN,
        **dict.fromkeys(("methods.seed.small_crop_px", "methods.seed.small_crop_scale"), ours["methods.seed.small_crops"] > 0),
        "bagging.clusters": ours["bagging.method"] == "kmeans",
        f"{section}.drop_factor": ours.get(f"{section}.drop_epochs") is not None,
    }
    if key in HIDDEN or not means_something.get(key, True):
        return False
    if key.startswith("bagging.") and not any(name.startswith("bagging.") for name in published):
        return False
    return _section(key) is not None and (section == f"methods.{ours['distill.method']}" or not key.startswith("methods."))


def _section(key: str) -> str | None:
    """The entry of SECTIONS under which a key is shown."""
    return max((section for section in SECTIONS if f"{key}.".startswith(f"{section}.")), key=len, default=None)


def _text(ours: Any, published: Any) -> str:
    if published is ...:
        return f"{as_text(ours)}°"
    return as_text(ours) if ours == published else f"**{as_text(ours)}** ({as_text(published)})"


def _cells(settings: Mapping[str, str]) -> Iterator[str]:
    for sections in COLUMNS.values():
        yield ", ".join(f"{key.rpartition('.')[2]} {text}" for key, text in settings.items() if _section(key) in sections)


def _figures(recipe: Recipe) -> str:
    return "; ".join(f"{measure_label(measure)}: {percent}" for measure, percent in recipe.about.expected.items())


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(markdown(Path("recipes"), read_yaml("params.yaml")), end="")
