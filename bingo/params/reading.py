"""Read params.yaml: a YAML 1.2 file becomes `Params`, or every error in it becomes a line of one UserError."""

from pathlib import Path

from pydantic import ValidationError

from bingo.params.mistakes import mistake_lines
from bingo.params.whole import Params
from bingo.params.yaml_files import read_yaml
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
