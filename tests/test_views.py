"""Views by name: the numbers that each name stands for, the forms of `augment`, and how recipes and `dvc exp run -S` change it."""

from copy import deepcopy
from pathlib import Path

import pytest

from bingo.params import AugmentParams, read_yaml, validate
from bingo.params.views import PLACES, named_views, spelled_out
from bingo.planning.recipes import lay_over, read_recipe, recipe_names
from bingo.runtime.errors import UserError

ROOT = Path(__file__).parent.parent
SHIPPED = read_yaml(ROOT / "params.yaml")
USUAL = [3 / 4, 4 / 3]
# crop_scale, crop_ratio, rotate_degrees, jitter, jitter_p, gray_p, blur_p, blur_sigma_px, flip_p
MOCO_2 = ([0.2, 1.0], USUAL, 0, [0.4, 0.4, 0.4, 0.1], 0.8, 0.2, 0.5, [0.1, 2.0], 0.5)
SETS = {
    "photographs": MOCO_2,
    "small_photographs": (*MOCO_2[:6], 0.0, *MOCO_2[7:]),
    "swav": ([0.14, 1.0], *MOCO_2[1:]),
    "weak": (*MOCO_2[:4], 0.0, 0.0, 0.0, *MOCO_2[7:]),
    "digits": ([0.6, 1.0], USUAL, 15, [0.4, 0.4, 0.0, 0.0], 0.8, 0.0, 0.0, [0.1, 2.0], 0.0),
    "centre": ([1.0, 1.0], [1.0, 1.0], 0, [0.4, 0.4, 0.0, 0.0], 0.0, 0.0, 0.0, [0.1, 2.0], 0.0),
}
COMPRESS = ([0.08, 1.0], *SETS["weak"][1:])
DIGITS = SETS["digits"]


def numbers(augment: AugmentParams) -> tuple:
    return tuple(value for key, value in augment if key != "name")


def with_augment(augment) -> dict:
    document = deepcopy(SHIPPED)
    document["distill"]["augment"] = augment
    return document


def read(augment) -> AugmentParams:
    return validate(with_augment(augment), "params.yaml").distill.augment


def test_each_name_stands_for_the_numbers_of_its_source():
    assert {name: numbers(read(name)) for name in named_views()} == SETS
    assert all(read(name).name == name for name in SETS)


def expected(recipe: str) -> tuple[tuple, tuple, tuple]:
    """The values for teacher.pretrain, extract and distill, from the papers."""
    if recipe.startswith("cifar10") and recipe != "cifar10-coss":
        return (SETS["small_photographs"],) * 3
    if recipe == "ablation-views-centre":
        return DIGITS, SETS["centre"], DIGITS
    if recipe.startswith("lean-"):  # crops of at least half of the image, as in the study on photographs
        drawn = ([0.5, 1.0], *MOCO_2[1:])
        return DIGITS, drawn, drawn
    if not recipe.startswith(("imagenet-", "foundation-")):
        return DIGITS, DIGITS, DIGITS
    of_method = {"seed-r50w2": SETS["swav"], "-compress-": COMPRESS, "-simreg-": SETS["weak"]}
    drawn = next((drawn for part, drawn in of_method.items() if part in recipe), MOCO_2)
    return DIGITS, drawn, drawn


@pytest.mark.parametrize("name", recipe_names(ROOT / "recipes"))
def test_every_recipe_draws_the_views_of_its_paper(name):
    params = validate(laid(SHIPPED, read_recipe(ROOT / "recipes", name).overlay), name)
    drawn = params.teacher.pretrain.augment, params.extract.augment, params.distill.augment
    assert tuple(map(numbers, drawn)) == expected(name)


def test_a_mapping_replaces_single_numbers_and_all_of_them_need_no_name():
    assert numbers(read({"name": "photographs", "flip_p": 0.0})) == (*MOCO_2[:8], 0.0)
    own = named_views()["swav"] | {"gray_p": 0.3}
    assert (read(own).name, numbers(read(own))) == (None, (*SETS["swav"][:5], 0.3, *SETS["swav"][6:]))
    assert read(spelled_out(with_augment("weak"))["distill"]["augment"]) == read("weak")


@pytest.mark.parametrize(
    ("augment", "key", "said"),
    [
        ("photograph", "distill.augment = 'photograph'", [*SETS, "did you mean photographs"]),
        (None, "distill.augment = None", list(SETS)),
        (["weak"], "distill.augment = ['weak']", list(SETS)),
        ({}, "distill.augment", ["add it", *SETS]),
        ({"flip_p": 0}, "distill.augment", ["augment={name: photographs, flip_p: 0}", *SETS]),
        ({"name": None, "flip_p": 0.0}, "distill.augment", ["augment={name: photographs, flip_p: 0.0}"]),
        ({"name": "Weak", "flip_p": 0.0}, "distill.augment.name = 'Weak'", [*SETS, "did you mean weak"]),
        ({"name": {}, "flip_p": 0.0}, "distill.augment.name", ["must be text"]),
        ({"name": "weak", "flip_p": 2.0}, "distill.augment.flip_p = 2.0", ["at most 1"]),
        ({"name": "weak", "flip_p": None}, "distill.augment.flip_p = None", ["number"]),
        ({"name": "weak", "flip": 0.0}, "distill.augment.flip ", ["not a known key", "did you mean flip_p", "crop_scale"]),
        ({"a\nb": 0.0}, "distill.augment.'a\\nb' ", ["not a known key"]),
        ({1: 0.0, "name": "weak"}, "distill.augment.1", ["strings"]),
        ({"name": "weak", "crop_scale": [0.5, 0.2]}, "distill.augment", ["crop_scale", "smaller number first"]),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_allowed_values(augment, key, said):
    with pytest.raises(UserError) as caught:
        read(augment)
    (line,) = caught.value.lines
    assert line.startswith(f"params.yaml: {key}")
    assert all(words in line for words in said), line


def test_mistakes_in_name_and_number_are_reported_together():
    with pytest.raises(UserError) as caught:
        read({"name": "strong", "flip_p": 2.0})
    assert [line.split(" ")[1] for line in caught.value.lines] == ["distill.augment.name", "distill.augment.flip_p"]


def laid(document: dict, overlay: dict) -> dict:
    document = deepcopy(document)
    lay_over(document, overlay)
    return document


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("before", "over", "after"),
    [
        ("digits", "weak", "weak"),
        ({"name": "digits", "flip_p": 0.5}, "weak", "weak"),
        ({"name": "digits", "flip_p": 0.5}, {"name": "weak", "gray_p": 0.1}, {"name": "weak", "gray_p": 0.1}),
        ("digits", {"flip_p": 0.5}, {"name": "digits", "flip_p": 0.5}),
        ({"name": "digits", "flip_p": 0.5}, {"gray_p": 0.1}, {"name": "digits", "flip_p": 0.5, "gray_p": 0.1}),
    ],
)
def test_a_name_replaces_views_entirely_and_numbers_keep_the_rest(place, before, over, after):
    def nested(value) -> dict:
        for key in reversed(place.split(".")):
            value = {key: value}
        return value

    assert laid(nested(before), nested(over)) == nested(after)


@pytest.mark.parametrize(
    ("options", "flips"),
    [
        (["distill.augment=weak"], 0.5),
        (["distill.augment={name: weak, flip_p: 0.1}"], 0.1),
        (["+distill.augment.flip_p=0"], None),  # DVC's own advice after it refuses `distill.augment.flip_p=0`; the name is lost
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from libraries of DVC
def test_values_set_by_dvc_are_read_or_refused_in_one_line(tmp_path, options, flips):
    from dvc.utils.hydra import apply_overrides

    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    apply_overrides(path, options)
    if flips is not None:
        assert validate(read_yaml(path), str(path)).distill.augment.flip_p == flips
        return
    with pytest.raises(UserError) as caught:
        validate(read_yaml(path), str(path))
    (line,) = caught.value.lines
    way_out = line.partition("-S '...")[2].partition("'")[0]
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    apply_overrides(path, [f"distill.{way_out}"])
    assert validate(read_yaml(path), str(path)).distill.augment.flip_p == 0
