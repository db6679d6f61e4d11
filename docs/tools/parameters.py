"""The page docs/parameters.md, from the schema (what is allowed) and params.yaml (shipped values and remarks).

python -m docs.tools.parameters > docs/parameters.md
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bingo.params import AugmentParams, load_params
from bingo.params.views import named_views
from bingo.planning.recipes import as_text

PARAMS = Path(__file__).parents[2] / "params.yaml"
HEAD = """# Parameters

All settings in `params.yaml`, with their default values. Units are in the names (`_px`, `_epochs`, `_images`, `_rows`). Missing and
unknown keys are errors. This page is generated: `python -m docs.tools.parameters > docs/parameters.md`.
"""
VIEWS = """
## Views

{}

`augment: photographs` names a set of numbers; `augment: {{name: photographs, flip_p: 0.0}}` replaces single ones, and a section with all of
them needs no name. The sets and their sources are in `bingo/params/views.yaml`; a change there reruns the stages that have an `augment`.
"""
Remarks = dict[str, str]
TINY, HUGE = 1e-9, 1e7  # bounds of the schema beyond any sensible value


def page() -> str:
    """The whole page: a heading and a table for each section, in the order of the file."""
    notes, remarks = read_remarks(PARAMS.read_text())
    return HEAD + "".join([*_sections("", load_params(PARAMS), notes, remarks), *_views()])


def read_remarks(text: str) -> tuple[Remarks, Remarks]:
    """The remarks of params.yaml: notes by section, and what is said of one key (which may be a section) by its dotted name.

    They stand at the head of a section, `# key  text`; a line that starts further in continues the one before; others are notes.
    """
    keys = [(len(line) - len(line.lstrip()), line.strip()) for line in text.splitlines() if line.strip()]
    notes: Remarks = {}
    remarks: Remarks = {}
    path: list[str] = []
    last = (notes, "")
    for indent, line in keys:
        path = path[: indent // 2]
        section = ".".join(path)
        if not line.startswith("#"):
            path.append(line.partition(":")[0])
        elif (found := re.match(r"# (\w+)(?:  +|: )(.*)", line)) and f"{'  ' * (indent // 2)}{found[1]}:" in text:
            last = (remarks, f"{section}.{found[1]}".lstrip("."))
            remarks[last[1]] = found[2]
        elif line.startswith("#   "):
            last[0][last[1]] += f" {line[1:].strip()}"
        else:
            last = (notes, section)
            notes[section] = f"{notes[section]}. {line[2:]}" if section in notes else line[2:]
    return notes, remarks


def _sections(name: str, section: BaseModel, notes: Remarks, remarks: Remarks) -> Iterator[str]:
    schema, values = type(section).model_json_schema(), {key: getattr(section, key) for key in type(section).model_fields}
    leaves = {key: value for key, value in values.items() if not isinstance(value, BaseModel) or isinstance(value, AugmentParams)}
    if name:
        yield f"\n{'#' * min(4, 2 + name.count('.'))} {name}\n"
        yield f"\n{' '.join(schema['description'].split())}\n" if "description" in schema else ""
    for note in (remarks.get(name), notes.get(name)) if name else ():
        yield f"\n{_plain(note)}.\n" if note else ""
    if leaves:
        yield "\n| key | default | allowed | |\n|---|---|---|---|\n"
    for key, value in leaves.items():
        dotted = f"{name}.{key}".lstrip(".")
        remark = remarks.get(dotted, "")
        if isinstance(value, AugmentParams):
            yield f"| `{key}` | `{value.name}` | a name, or a section, see [Views](#views) | {_plain(remark)} |\n"
        else:
            yield f"| `{key}` | `{as_text(value)}` | {allowed(schema['properties'][key], schema.get('$defs', {}))} | {_plain(remark)} |\n"
    for key, value in values.items():
        if key not in leaves:
            yield from _sections(f"{name}.{key}".lstrip("."), value, notes, remarks)


def _views() -> Iterator[str]:
    """The numbers of each named set, one column for a set."""
    schema, sets = AugmentParams.model_json_schema(), named_views()
    yield VIEWS.format(" ".join(schema["description"].split()))
    yield f"\n| key | allowed | {' | '.join(f'`{name}`' for name in sets)} |\n|---|---|{'---|' * len(sets)}\n"
    for key in sets["photographs"]:
        yield f"| `{key}` | {allowed(schema['properties'][key], {})} | {' | '.join(as_text(numbers[key]) for numbers in sets.values())} |\n"


def allowed(field: Any, defs: Any) -> str:
    """What a field's JSON schema allows, in words."""
    field = defs[field["$ref"].rpartition("/")[2]] if "$ref" in field else field
    if "anyOf" in field:
        return " or ".join(allowed(choice, defs) for choice in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{as_text(value)}`" for value in field.get("enum", [field.get("const")]))
    kind = field.get("type")
    if kind == "array":
        count = f"{field['minItems']} of: " if field.get("minItems") == field.get("maxItems", 0) else "list of: "
        return count + allowed(field.get("items", {}), defs)
    if kind in ("integer", "number"):
        return f"{'whole number' if kind == 'integer' else 'number'}{_bounds(field)}"
    return {"null": "`null`", "string": "text", "boolean": "`true`, `false`", "object": "names with values"}.get(str(kind), "a section")


def _bounds(field: Any) -> str:
    """Limits in words, but for those that only keep a slip of the keyboard from becoming an endless run."""
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum", field.get("exclusiveMaximum"))
    texts = [f"above {low:g}" if "exclusiveMinimum" in field else f"from {low:g}"] if low is not None else []
    texts = ["above 0"] if low == TINY else texts
    texts += [f"below {high:g}" if "exclusiveMaximum" in field else f"to {high:g}"] if high is not None and high < HUGE else []
    return f" {' '.join(texts)}" if texts else ""


def _plain(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*")


if __name__ == "__main__":
    print(page(), end="")
