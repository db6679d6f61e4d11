"""Building blocks of sections: `Section` itself, and common types of numbers, paths and names with their bounds."""

import re
from collections.abc import Callable, Collection
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from bingo.params.places import expanded, located
from bingo.runtime.errors import near_matches


def _rising(pair: list[float]) -> list[float]:
    if pair[0] > pair[1]:
        raise ValueError("allowed is the smaller number first")
    return pair


# The bounds are far beyond sensible values; they keep a typing error from causing an overflow or an endless run.
Count = Annotated[int, Field(ge=1, le=10**9)]
Whole = Annotated[int, Field(ge=0, le=10**9)]
Width = Annotated[int, Field(ge=1, le=2**14)]  # twice the widest published head; two layers of it take gigabytes
Rows = Annotated[int, Field(ge=1, le=10**7)]  # of a queue, or of a bank's negatives
Pixels = Annotated[int, Field(ge=32, le=10**4)]
Positive = Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=1e-5, le=1e3, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Range = Annotated[list[Annotated[float, Field(ge=1e-3, le=1e3)]], Field(min_length=2, max_length=2), AfterValidator(_rising)]
ShareRange = Annotated[list[Annotated[float, Field(ge=1e-3, le=1)]], Field(min_length=2, max_length=2), AfterValidator(_rising)]
PerChannel = Annotated[list[NotNegative], Field(min_length=3, max_length=3)]
FilePath = Annotated[str, AfterValidator(located)]  # a file or folder of the user
LIBRARIES = ("timm", "torchvision")  # whose published weights may be asked for in place of a file
Weights = Annotated[str, AfterValidator(lambda value: value if value in LIBRARIES else located(value))]
PathUnderRoot = Annotated[str, AfterValidator(expanded)]
Precision = Literal["auto", "fp32", "bf16"]
Interpolation = Literal["bilinear", "bicubic"]


def _check_name(name: object) -> str:
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError("names consist of lowercase letters, digits and _, and begin with a letter, such as percent_10")
    return name


def one_of(names: Callable[[], Collection[str]]) -> AfterValidator:
    """A check that a text is one of `names()`."""

    def check(name: str) -> str:
        if name not in (allowed := names()):
            raise ValueError(f"allowed are {', '.join(allowed)}{near_matches(name, allowed)}")
        return name

    return AfterValidator(check)


Name = Annotated[str, BeforeValidator(_check_name)]  # of a file in reports/ and of an item in dvc.yaml


class Section(BaseModel):
    """A frozen group of parameters: all keys are required, unknown keys are errors, types are not converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
