"""Read params.yaml: a YAML 1.2 file becomes `Params`, or every error in it becomes a line of one UserError."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bingo.params.mistakes import mistake_lines
from bingo.params.whole import Params
from bingo.runtime.errors import UserError

_MOST_MISTAKES = 40


def load_params(path: Path | str = "params.yaml") -> Params:
    """Read and validate the whole file. Raises UserError with one line for each error."""
    return validate(read_yaml(path), str(path))


def validate(raw: object, origin: str) -> Params:
    """Validate a mapping that was read from `origin`. Raises UserError with one line for each error."""
    if not isinstance(raw, dict):
        raise UserError(f"{origin}: holds {type(raw).__name__}, not sections; restore it with: git checkout {origin}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        lines = [f"{origin}: {line}" for line in mistake_lines(error, Params)]
        more = [f"{origin}: and {len(lines) - _MOST_MISTAKES} more errors"] if len(lines) > _MOST_MISTAKES else []
        raise UserError([*lines[:_MOST_MISTAKES], *more]) from None


def read_yaml(path: Path | str) -> Any:
    """A YAML 1.2 file (so that 1e-05, as DVC writes it, is a number). Raises UserError if it cannot be read or parsed."""
    from ruamel.yaml import YAML

    try:
        return YAML(typ="safe", pure=True).load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run from the folder that holds params.yaml") from None
    except Exception as error:  # arbitrary text makes the parser raise almost anything
        raise UserError(f"{path}: is not YAML: {_yaml_reason(error)}; correct it") from None


def _yaml_reason(error: Exception) -> str:
    """The error and its location, in one line of at most about 200 characters."""
    mark = getattr(error, "problem_mark", None)
    reason = " ".join(str(getattr(error, "problem", None) or error).split()) or type(error).__name__
    place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return (reason if len(reason) <= 160 else f"{reason[:160]}...") + place
