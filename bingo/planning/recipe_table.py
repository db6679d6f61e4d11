"""The page of the papers' rows, docs/recipes.md: what each recipe sets, and the published value beside it where that is another one."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from bingo.params import validate
from bingo.planning.recipes import Recipe, as_text, flattened, lay_over, read_recipe, recipe_names
from bingo.report.measures import measure_label

ROWS = "imagenet-"
# The columns, each with the keys and sections of params.yaml whose values it shows; a value stands where the longest of them is.
COLUMNS = {
    "Teacher": ("teacher.checkpoint",),
    "Student": ("student",),
    "Views and bags": ("image", "distill.augment", "extract.views", "bagging"),
    "Training": ("distill",),
    "Method": ("methods",),
    "Linear layer": ("linear_eval.crops",),
    "kNN": ("knn_eval",),
}
SECTIONS = [section for sections in COLUMNS.values() for section in sections]
HIDDEN = ("distill.method", "distill.probe_every_epochs", "linear_eval.crops.nets", "bagging.iterations", "bagging.lists", "bagging.probes")
HEAD = """# The papers' rows

Every recipe `imagenet-...` with what it sets when it is laid over the shipped `params.yaml`, as `bingo recipe table` prints it. The first
row has what all of them share; `student.arch` stands as `arch`, and so on.

* `epochs 200`: as published.
* `keys **stored** (live)`: ours, and what was published. The numbers in the last column say why; the reasons stand below the table.
* `views 0°`: not published, or without a counterpart there.

`bingo recipe show imagenet-...` prints one of them with its costs.

The teacher runs in every step, as published. `bingo recipe use keys-stored`, after a row of BINGO, SEED or DisCo, trains from 8 stored
views of each image instead. What differs: the teacher's view is one of these and not a new one each time (SEED's and DisCo's students
see the same one), the teacher's BatchNorm is in evaluation mode (published so for SEED alone), and the queue of BINGO and SEED starts
with stored keys. A training step of ResNet-18 costs, in GFLOP for each anchor,

* BINGO: 48.4 with ResNet-50 live, 78.1 with ResNet-152, 96.6 with ResNet-50 x 2; 32.1 with stored keys;
* SEED: 18.9, 33.7, 43.0; 10.7 with stored keys;
* DisCo: 41.3, 71.0, 89.5; 25.0 with stored keys.

To store the keys costs the teacher as much as 4 of the 200 epochs do live (SEED: 8), and 2.6 GB on the disk and in the GPU's memory.
"""


def markdown(folder: Path, shipped: Mapping[str, Any]) -> str:
    """The page: a row for each of the papers' recipes in `folder`, laid over `shipped` (params.yaml), and the reasons below."""
    recipes = [read_recipe(folder, name) for name in recipe_names(folder) if name.startswith(ROWS)]
    settings = [_settings(recipe, shipped) for recipe in recipes]
    reasons = list(dict.fromkeys(line for recipe in recipes for line in recipe.about.deviates))
    common = {key: text for key, text in settings[0].items() if all(other.get(key) == text for other in settings)}
    lines = [_line(["Recipe", "Published, percent", *COLUMNS, "Deviates"]), _line(["---"] * (len(COLUMNS) + 3))]
    lines.append(_line(["all of them", "", *_cells(common), ""]))
    for recipe, own in zip(recipes, settings, strict=True):
        numbers = ", ".join(str(reasons.index(line) + 1) for line in recipe.about.deviates)
        cells = _cells({key: text for key, text in own.items() if key not in common})
        lines.append(_line([recipe.name.removeprefix(ROWS), _figures(recipe), *cells, numbers]))
    return "\n".join([HEAD, *lines, "", *(f"{number}. {line}" for number, line in enumerate(reasons, 1)), ""])


def resolved(recipe: Recipe, shipped: Mapping[str, Any]) -> dict[str, Any]:
    """Every value by its dotted key when the recipe is laid over `shipped`. Raises UserError where that is not valid."""
    document = deepcopy(dict(shipped))
    lay_over(document, recipe.overlay)
    return dict(flattened(validate(document, f"params.yaml with recipe {recipe.name}").model_dump()))


def _settings(recipe: Recipe, shipped: Mapping[str, Any]) -> dict[str, str]:
    """The text of each setting that the table shows of this recipe, by its key."""
    ours, published = resolved(recipe, shipped), recipe.about.published
    return {key: _text(value, published.get(key, ...)) for key, value in ours.items() if _is_shown(key, ours, published)}


def _is_shown(key: str, ours: Mapping[str, Any], published: Mapping[str, Any]) -> bool:
    """Not what means nothing here: a file of no teacher, bags of a method without, another method's numbers, drops of a cosine."""
    section = key.rpartition(".")[0]
    means_something = {
        "teacher.checkpoint": ours["teacher.source"] == "checkpoint",
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
