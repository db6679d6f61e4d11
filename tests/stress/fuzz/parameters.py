"""Fuzzed params.yaml and recipes: as trees, as text, and run further if they are accepted."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from bingo.params import load_params, read_yaml, validate
from bingo.planning.recipes import lay_over, read_recipe
from bingo.runtime.errors import UserError, out_of_memory
from tests.stress.fuzz.harness import Surface
from tests.stress.fuzz.values import Edit, edited, edits

ROOT = Path(__file__).parents[3]
_LAUGHS = ", ".join(f"&{name} [{', '.join(['*' + before] * 8)}]" for before, name in pairwise("abcdefgh"))  # 8^8 items
FRAGMENTS = (
    "&a [*a]", "&a {a: *a}", "!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!binary '?'", "!!int ''",
    "!!float abc", "!!timestamp x", "!!omap [a: 1, a: 2]", "!!set {a, b}", "!!merge x", "<<: *x", "!x y", "!<tag:x> 1", "%YAML 9.9",
    "%TAG ! x", "---", "...", "--- |", "? [a]\n: b", "{[1]: 2}", "{{}: 1}", "[" * 3000, "{a: " * 2000, "- " * 2000, "'", '"', "\t", "|",
    ">", "@", "`", "*a", "&", "&a", "!", "#", ":", "? ", "- ", "[", "]", "{", "}", ",", "1" * 5000, "-" + "9" * 400, "0x" + "f" * 5000,
    "0o" + "7" * 9000, "0b" + "1" * 20000, "1e" + "9" * 400, "1_000", "1:99:99", "2001-99-99", "2001-12-14t21:59:43.10-99:00", ".inf",
    "-.inf", ".nan", "~", "yes", "0x", "0o9", "1e", ".", "+", "\\", '"\\ud800"', '"\\x00"', '"\\U00110000"', "\u2028", "\ufeff", "\ud7ff",
    "\x85", "\x7f", f"[&a [x, x, x, x, x, x, x, x], {_LAUGHS}]",
)  # fmt: skip
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp037")


@cache
def shipped() -> dict[str, Any]:
    return read_yaml(ROOT / "params.yaml")


def _values(changes: list[Edit], _: Path) -> None:
    validate(edited(shipped(), changes), "params.yaml")


def _text(case: tuple[list[Edit], str, int], folder: Path) -> None:
    changes, encoding, cut = case
    lines = (ROOT / "params.yaml").read_text().splitlines()
    lines = lines[: 1 + cut % len(lines)] if cut % 3 == 0 else lines
    for change in changes:
        at = change.place % len(lines)
        head, colon, _ = lines[at].partition(":")
        new = {"value": [f"{head}{colon} {change.value}"], "line": [change.value], "twice": [lines[at]] * 2, "deeper": [f"  {lines[at]}"]}
        lines[at : at + 1] = new.get(change.kind, [])
        lines = lines or [""]
    path = folder / "params.yaml"
    path.write_bytes("\n".join(lines).encode(encoding, "replace"))
    load_params(path)


def _recipe(case: tuple[list[Edit], list[Edit]], folder: Path) -> None:
    recipes = folder / "recipes"
    (recipes / "parts").mkdir(parents=True, exist_ok=True)
    for name, changes, own in (("a", case[0], A), ("parts/b", case[1], B)):
        _dump(recipes / f"{name}.yaml", edited(own, changes))
    recipe = read_recipe(recipes, "a")
    params = edited(shipped(), [])
    lay_over(params, recipe.overlay)
    validate(params, "params.yaml")


A = {
    "about": {"expected": {"linear_top1": 50.0}, "source": "a table", "deviates": ["x"]},
    "includes": ["parts/b"],
    "distill": {"method": "bingo", "epochs": 3},
}
B = {
    "about": {"teacher": {"published_by": "them", "linear_top1": 60.0}, "images": {"train": 5, "test": 2, "published_by": "others"}},
    "teacher": {"source": "checkpoint", "checkpoint": "x.pth"},
    "dataset": {"source": "folder", "root": "images", "train_images": 100},
}


def _dump(path: Path, tree: Any) -> None:
    """As YAML, or if a value has no form there, as printed by Python, which is a hostile text too."""
    from ruamel.yaml import YAML

    with path.open("w", errors="replace") as file:
        file.write("# A recipe\n")
        try:
            YAML(typ="safe", pure=True).dump(tree, file)
        except Exception:
            file.write(ascii(tree))
    path.touch()


@dataclass(frozen=True)
class Setting:
    """A parameter and a new value from those that its type allows, both selected by remainders."""

    place: int
    value: int


# Values that are often allowed, and the bounds of the schema.
POOLS: dict[type, tuple] = {
    bool: (True, False),
    int: (1, 1, 2, 3, 5, 16, 33, 39, 40, 180, 1000, 4096, 2**14, 10**5, 10**6, 10**9),
    float: (0.0, 1e-9, 1e-5, 1e-3, 0.05, 0.1, 0.5, 1.0, 1.5, 2.0, 180.0, 1e3, 1e9),
    list: ([1.0, 1.0], [1e-3, 1e3], [1e-3, 1.0], [0.05, 0.05], [0.5] * 3, [1e-9] * 3, [1e9] * 3, [1e9, 1e9, 1e9, 0.5], [0.0] * 4, []),
    str: (
        "expected",
        "bingo", "compress", "disco", "isd", "seed", "simreg", "moco", "kmeans", "label", "small", "imagenet", "live", "momentum",
        "features", "queue", "paper", "symmetric_mix", "none", "same", "resnet18", "mobilenetv3_small_050", "batch", "random", "timm",
        "header", "bf16", "weak", "photographs",
    ),
    type(None): (1, 3, 16, 0.5, 1e-5, 1e3, 10**9),
}  # fmt: skip


def settings() -> st.SearchStrategy:
    """Changes to one to three parameters."""
    return st.lists(st.builds(Setting, st.integers(0, 2**20), st.integers(0, 2**10)), min_size=1, max_size=3)


def _taken_on(case: list[Setting], _: Path) -> None:
    """Run accepted parameters: the images, bags, the teacher and one step of the student's training, all small."""
    from bingo.bags.builders import build_kmeans, build_knn, build_label
    from bingo.bags.ivf import InvertedFile
    from bingo.datasets.sources import scan
    from bingo.planning.dry_run import dry_student, dry_teacher

    tree = edited(shipped(), [])
    tree["dataset"] |= {"train_images": 40, "test_images": 20}
    places = [(section, key) for section in _sections(tree) for key, value in section.items() if not isinstance(value, dict)]
    for setting in case:
        section, key = places[setting.place % len(places)]
        pool = POOLS[type(section[key])]
        section[key] = pool[setting.value % len(pool)]
    params = validate(tree, "params.yaml")
    listing, _ = scan(params.dataset, params.seed)
    features = np.random.default_rng(0).standard_normal((min(200, listing.train_rows), 8)).astype(np.float16)
    bagging = params.bagging
    search = InvertedFile(bagging.lists, bagging.probes, params.seed) if bagging.search == "ivf" else None
    builders: dict[str, Callable[[], Any]] = {
        "knn": lambda: build_knn(features, bagging.k, bagging.mutual, search),
        "kmeans": lambda: build_kmeans(features, bagging.clusters, min(bagging.iterations, 10), bagging.k, params.seed),
        "label": lambda: build_label(listing.labels_N[: len(features)], features, bagging.k),
    }
    try:
        builders[bagging.method]()
        dry_student(params, dry_teacher(params, checkpoint=False)).step()
    except (MemoryError, RuntimeError) as error:  # as a stage does
        if line := out_of_memory(error):
            raise UserError(line) from None
        raise


def _sections(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield tree
    for name, value in tree.items():
        if isinstance(value, dict) and name not in ("transfer_coco", "semi_eval", "transfer", "report", "linear_eval", "knn_eval"):
            yield from _sections(value)


TAKEN_ON = Surface("params.yaml, taken on", 3, settings(), _taken_on)
PARAMS_VALUES = Surface("params.yaml, values", 30, edits(), _values)
PARAMS_TEXT = Surface(
    "params.yaml, text",
    15,
    st.tuples(
        st.lists(
            st.builds(
                Edit,
                st.sampled_from(("value", "value", "line", "twice", "deeper", "gone")),
                st.integers(0, 2**20),
                st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=20)),
            ),
            max_size=3,
        ),
        st.sampled_from(ENCODINGS),
        st.integers(0, 2**20),
    ),
    _text,
)
RECIPES = Surface("recipes", 10, st.tuples(edits(most=2), edits(most=2)), _recipe)
