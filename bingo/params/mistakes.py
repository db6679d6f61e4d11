"""Convert pydantic's errors in a section to one line for each error."""

import re
from types import UnionType
from typing import get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from bingo.runtime.errors import near_matches, short

_PLAIN = {
    "greater than or equal to": "at least", "less than or equal to": "at most", "a valid integer": "a whole number",
    "a valid boolean": "true or false", "a valid string": "text", "a valid ": "a ",
}  # fmt: skip


def mistake_lines(error: ValidationError, model: type[BaseModel], section: str = "") -> list[str]:
    """One line for each error in the section with this name ("": the whole file): dotted key, value, what is allowed."""
    lines = []
    for item in error.errors(include_url=False, include_context=False):
        parts = [str(part) for part in (section, *item["loc"]) if part not in ("", "[key]")]
        key = ".".join(part if part.isprintable() else ascii(part) for part in parts) or "the file"
        if item["type"] == "missing":
            lines.append(f"{key} is missing; add it (recipes/ and the shipped params.yaml show its form)")
        elif item["type"] == "extra_forbidden":
            keys = _keys_beside(model, item["loc"])
            lines.append(f"{key} is not a known key{near_matches(str(item['loc'][-1]), keys)}; allowed are {', '.join(keys)}")
        else:
            value = "" if isinstance(item["input"], dict | BaseModel) else f" = {short(item['input'])}"
            lines += [f"{key}{value}: {line}" if key else line for line in explanation(item).split("\n")]
    return lines


def explanation(item: ErrorDetails) -> str:
    """What is allowed instead of a wrong value; several lines if one check found several errors."""
    if item["type"] in ("model_type", "dict_type"):
        return "allowed is a section, that is keys with values"
    if item["type"] in ("too_short", "too_long"):
        return item["msg"].partition(" after validation")[0].replace("List should have", "allowed are")
    if item["type"] == "literal_error":
        return item["msg"].replace("Input should be", "allowed is")
    text = item["msg"].removeprefix("Value error, ")
    if text.startswith("Input should be"):  # pydantic's words
        text = re.sub("|".join(_PLAIN), lambda found: _PLAIN[found[0]], text.replace("Input should be", "must be").partition(", unable")[0])
    return text


def _keys_beside(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that a section allows, found by walking the schema along an error's location."""
    found: object = model
    for part in loc[:-1]:
        if get_origin(found) is dict:  # part is a name chosen by the user
            found = get_args(found)[1]
        elif isinstance(found, type) and issubclass(found, BaseModel):
            found = found.model_fields[str(part)].annotation
        if get_origin(found) is UnionType:  # a section, or null
            found = get_args(found)[0]
    assert isinstance(found, type)
    assert issubclass(found, BaseModel)
    return list(found.model_fields)
