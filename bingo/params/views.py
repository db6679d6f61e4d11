"""Views by name: `augment` names a set of numbers in views.yaml, some of which it may change.

augment: photographs
augment: {name: photographs, flip_p: 0.0}
augment: {crop_scale: [0.2, 1.0], ...}    all numbers
"""

from contextlib import suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from bingo.params.fields import NotNegative, Range, Section, Share, ShareRange, one_of
from bingo.params.yaml_files import read_yaml
from bingo.runtime.errors import near_matches, short

PLACES = ("teacher.pretrain.augment", "extract.augment", "distill.augment")


@cache
def named_views() -> dict[str, dict[str, Any]]:
    """The numbers of each set by its name, in the order of views.yaml."""
    sets: dict[str, dict[str, Any]] = read_yaml(Path(__file__).with_name("views.yaml"))
    return sets


def numbers_of(augment: Any) -> Any:
    """The numbers of the set that `augment` names, with those that it changes. Raises ValueError for an unknown name, and for some but not
    all numbers without a name."""
    sets = named_views()
    names = ", ".join(sets)
    if isinstance(augment, str):
        if augment not in sets:
            raise ValueError(f"allowed are {names}{near_matches(augment, sets)}")
        return {"name": augment, **sets[augment]}
    if not isinstance(augment, dict):
        raise ValueError(f"allowed is one of {names}, or a section with name and the numbers that differ")
    usual = sets["photographs"]
    if augment.get("name") is None and augment.keys() - {"name"} < usual.keys():
        example = ", ".join(["name: photographs", *(f"{key}: {short(augment[key])}" for key in usual if key in augment)])
        raise ValueError(f"its name is missing; add it (as -S '...augment={{{example}}}'); names are {names}")
    named = next((numbers for name, numbers in sets.items() if name == augment.get("name")), usual)  # a wrong name is one mistake, not ten
    return named | augment


def laid_views(old: Any, new: Any) -> Any:
    """The section `augment` after `new` is laid over `old`: numbers without a name replace the same numbers, anything else replaces all."""
    if not isinstance(new, dict) or "name" in new:
        return new
    return ({"name": old} if isinstance(old, str) else old if isinstance(old, dict) else {}) | new


def spelled_out(document: dict[str, Any]) -> dict[str, Any]:
    """params.yaml, or a part of it, with numbers in place of the names of views; wrong values of `augment` are left as they are."""
    document = deepcopy(document)
    for place in PLACES:
        *sections, key = place.split(".")
        section: Any = document
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and key in section:
            with suppress(ValueError):
                section[key] = numbers_of(section[key])
    return document


class AugmentParams(Section):
    """Augmentation of random views (as in MoCo-v2: crop, colour jitter, greyscale, blur, flip; also a rotation by at most
    `rotate_degrees`): a name, a name and the numbers to change, or all numbers.

    `crop_scale` is a share of the image's area, `crop_ratio` is width over height, `jitter` has the strengths of brightness,
    contrast, saturation and hue as in torchvision's ColorJitter, and `blur_sigma_px` is the standard deviation of the blur.
    """

    name: Annotated[str, one_of(named_views)] | None = None
    crop_scale: ShareRange
    crop_ratio: Range
    rotate_degrees: Annotated[float, Field(ge=0, le=180)]
    jitter: Annotated[list[NotNegative], Field(min_length=4, max_length=4)]
    jitter_p: Share
    gray_p: Share
    blur_p: Share
    blur_sigma_px: Range
    flip_p: Share

    @model_validator(mode="before")
    @classmethod
    def _as_named(cls, section: Any) -> Any:
        return section if isinstance(section, cls) else numbers_of(section)

    @field_validator("jitter")
    @classmethod
    def _hue_is_half_a_turn_at_most(cls, jitter: list[float]) -> list[float]:
        if jitter[3] > 0.5:
            raise ValueError("its fourth number (hue) is at most 0.5")
        return jitter
