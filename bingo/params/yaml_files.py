"""Read a YAML 1.2 file, or report in one line why it cannot be read."""

import json
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from bingo.runtime.errors import UserError, reason_of


def read_yaml(path: Path | str) -> Any:
    """A YAML 1.2 file (so that 1e-05, as DVC writes it, is a number). Raises UserError if it cannot be read or parsed."""
    try:
        return deepcopy(_parsed(Path(path).read_text()))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run from the folder that holds params.yaml") from None
    except Exception as error:  # arbitrary text makes the parser raise almost anything
        raise UserError(f"{path}: is not YAML: {_yaml_reason(error)}; correct it") from None


@lru_cache(512)
def _parsed(text: str) -> Any:
    """The content of a YAML text, cached because parsing takes a hundred times as long as copying the result."""
    from ruamel.yaml import YAML

    content = YAML(typ="safe", pure=True).load(text)
    json.dumps(content, default=str, skipkeys=True)  # ValueError for an alias inside its own anchor
    return content


def _yaml_reason(error: Exception) -> str:
    """The error and its location, in one line of at most about 200 characters."""
    mark = getattr(error, "problem_mark", None)
    place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return reason_of(getattr(error, "problem", None) or error) + place
