"""Pages that need no network: templates of this package, their text escaped, with the looks of report.css inside."""

from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup


def render(template: str, **context: Any) -> Markup:
    """A template filled in, as markup. A name that the context lacks is an error, and text is escaped unless it is Markup."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = files("bingo.report").joinpath(template).read_text(encoding="utf-8")
    return Markup(environment.from_string(text).render(context))


def render_page(template: str, **context: Any) -> str:
    """A whole page: `render` with the looks of report.css as `style`, and a line's end."""
    style = Markup(files("bingo.report").joinpath("report.css").read_text(encoding="utf-8"))
    return render(template, style=style, **context) + "\n"
