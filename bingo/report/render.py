"""Render pages that need no network, from the templates of this package, with escaped text and inlined report.css."""

from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup


def render(template: str, **context: Any) -> Markup:
    """A rendered template as markup. Missing names are errors, and text is escaped unless it is Markup."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = files("bingo.report").joinpath(template).read_text(encoding="utf-8")
    return Markup(environment.from_string(text).render(context))


def render_page(template: str, **context: Any) -> str:
    """A whole page: `render` with report.css as `style`, and a final newline."""
    style = Markup(files("bingo.report").joinpath("report.css").read_text(encoding="utf-8"))
    return render(template, style=style, **context) + "\n"
