"""The page docs/api.md, from the signatures and docstrings of the functions that `bingo` exports.

python -m docs.tools.api > docs/api.md
"""

import inspect
import re

import bingo

HEAD = """# Python API

```python
from bingo import load_student, open_bags, embed, run_pipeline
```

{count} functions run the pipeline, read its outputs and compute with them; each is imported when it is first used. The examples run in
the folder of a finished run, here a small one of the digits. In a notebook, bags are displayed as pictures. User errors raise
`bingo.runtime.errors.UserError` with a message that says how to fix them. For the letters in array names see
[Shape letters](architecture.md#shape-letters). This page is generated: `python -m docs.tools.api > docs/api.md`.
"""
ORDER = (
    "run_pipeline", "open_bags", "load_student", "load_teacher", "embed", "top_k", "load_params", "read_listing", "open_images",
    "read_embeddings",
)  # fmt: skip


def page() -> str:
    """The whole page: a heading, the signature and the docstring of each function."""
    return HEAD.format(count=len(ORDER)).replace("10", "Ten", 1) + "".join(map(_section, ORDER))


def _section(name: str) -> str:
    function = getattr(bingo, name)
    text, _, example = inspect.getdoc(function).partition("\n>>> ")
    parameters = [
        parameter.replace(annotation=parameter.empty, default=_plain(parameter.default))
        for parameter in inspect.signature(function).parameters.values()
    ]
    signature = str(inspect.Signature(parameters)).replace("'", '"')
    shown = re.sub(r" *# doctest: \S+", "", f">>> {example}")
    return f"\n## {name}\n\n`{name}{signature}`\n\n{text.strip()}\n\n```pycon\n{shown}\n```\n"


def _plain(default: object) -> object:
    return str(default) if hasattr(default, "parts") else default


if __name__ == "__main__":
    print(page(), end="")
