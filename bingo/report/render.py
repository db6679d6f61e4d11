"""Pages that need no network: a template of this package, its text escaped, with the looks of report.css inside."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup


def render(template: str, context: Mapping[str, Any]) -> str:
    """The page of a template's file name. What the context lacks is an error, and text is escaped unless it is Markup."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = files("bingo.report").joinpath(template).read_text(encoding="utf-8")
    style = Markup(files("bingo.report").joinpath("report.css").read_text(encoding="utf-8"))
    return environment.from_string(text).render(style=style, **context) + "\n"
