"""mkdocs hooks: the site contains the pages of the repository, with README as its first page and benchmarks/results in addition to docs.

Links work in the repository and are converted to the site's here. A link to a file that is not a page becomes plain text.
Formulas become MathML, which browsers draw without a script.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
# Where the folders of the repository lie in the site.
PLACES = {"docs/": "", "benchmarks/results/": "results/", "benchmarks/plots/": "plots/"}
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that lie outside docs/."""
    found = [ROOT / "README.md", *(ROOT / "benchmarks/results").glob("*.md"), *(ROOT / "benchmarks/plots").glob("*.svg")]
    for path in sorted(found):
        place = site_place(str(path.relative_to(ROOT)))
        assert place
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with the site's links, and formulas as MathML; code stays as it is."""
    source = page.file.src_uri
    origin = next((name for name in _sources() if site_place(name) == source), f"docs/{source}")
    parts = CODE.split(markdown)
    parts[::2] = [FORMULA.sub(_mathml, part) for part in parts[::2]]
    return LINK.sub(lambda link: _site_link(link, origin, source), "".join(parts))


def site_place(name: str) -> str | None:
    """The location of a repository file in the site; None if it is not part of it."""
    if name == "README.md":
        return "index.md"
    return next((place + name.removeprefix(folder) for folder, place in PLACES.items() if name.startswith(folder)), None)


def _sources() -> list[str]:
    return ["README.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks/results").glob("*.md"))]


def _site_link(link: re.Match[str], origin: str, source: str) -> str:
    mark, text, target = link.groups()
    path, hash_, anchor = target.partition("#")
    if "://" in target or not path:
        return link[0]
    place = site_place(posixpath.normpath(posixpath.join(posixpath.dirname(origin), path)))
    if place is None:
        return text
    return f"{mark}[{text}]({posixpath.relpath(place, posixpath.dirname(source) or os.curdir)}{hash_}{anchor})"


def _mathml(formula: re.Match[str]) -> str:
    display = formula[1] is not None
    return convert(" ".join((formula[1] or formula[2]).split()), display="block" if display else "inline")
