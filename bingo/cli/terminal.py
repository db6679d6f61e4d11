"""What the commands write to a terminal: aligned columns, names without control characters, pictures where it can show them."""

import base64
import os
import sys
from collections.abc import Sequence

_KITTY_CHUNK = 4096  # the protocol's largest payload of one escape sequence


def printable(name: str) -> str:
    """A name with everything that could steer a terminal written as an escape: a file may be called anything."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Columns two spaces apart under their heads; `right` has an `r` at the place of each column that is aligned right."""
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    sides = [">" if right[column : column + 1] == "r" else "<" for column in range(len(heads))]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip() for row in [heads, *rows]
    )


def inline_image(png: bytes) -> str | None:
    """The escape sequences that draw a PNG, where stdout is a terminal that says it can; None elsewhere.

    kitty and Ghostty take the kitty graphics protocol, iTerm2 and WezTerm iTerm2's. tmux and screen pass neither on.
    """
    environment = os.environ
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if not sys.stdout.isatty() or environment.get("TMUX") or term.startswith(("screen", "tmux")):
        return None
    data = base64.b64encode(png).decode()
    if environment.get("KITTY_WINDOW_ID") or term == "xterm-kitty" or program == "ghostty":
        parts = [data[start : start + _KITTY_CHUNK] for start in range(0, len(data), _KITTY_CHUNK)]
        last = len(parts) - 1
        heads = (f"{'f=100,a=T,q=2,' if place == 0 else ''}m={int(place < last)}" for place in range(len(parts)))
        return "".join(f"\x1b_G{head};{part}\x1b\\" for head, part in zip(heads, parts, strict=True)) + "\n"
    if program in ("iTerm.app", "WezTerm"):
        return f"\x1b]1337;File=inline=1;size={len(png)}:{data}\x07\n"
    return None
