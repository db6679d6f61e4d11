"""What a user can mend: one line for each mistake, exit code 2, never a traceback."""

import re
import reprlib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

FAILED, USER_MISTAKE, INTERRUPTED = 1, 2, 75  # exit codes; 75: a stop with a checkpoint, or another run holds it: start again
_MOST_CHARACTERS, _MOST_SHOWN, _MOST_REASON = 1000, 80, 160
_NO_MEMORY = re.compile("out of memory|allocate memory|bad_alloc")  # of CUDA's and of the CPU's allocator in torch, and of FAISS
_REPR = reprlib.Repr()  # of all values whatever: bounded in depth, width and length, where an alias in YAML may stand for billions
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring, _REPR.maxlong, _REPR.maxother = 4, 20, 20, _MOST_SHOWN, 40, _MOST_SHOWN


class UserError(Exception):
    """One or several mistakes of the user's, each a single line: name, value, what is allowed, the way out."""

    def __init__(self, lines: str | Sequence[str]):
        self.lines = [_shortened(line) for line in ([lines] if isinstance(lines, str) else lines)]
        super().__init__("\n".join(self.lines))


def out_of_memory(error: BaseException) -> str | None:
    """One line where the error says that there is no memory left, of the machine or of a GPU; torch has several classes for it."""
    text = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
        return None
    reason = text[:_MOST_REASON] or "it does not say for what"
    return f"out of memory ({reason}); lower the batch, image.crop_px, dataset.store_px, extract.views or bagging.k, or take more memory"


class Interrupted(Exception):
    """A signal asked to stop, and a checkpoint was written: the same command goes on from there."""


class GroupLost(Exception):
    """Another process of the group has ended or cannot be reached: it knows the reason, this one does not."""


def _shortened(line: str) -> str:
    """A line as it is, or its beginning and its end, where the way out is: what a user gave may be of any length."""
    return line if len(line) <= _MOST_CHARACTERS else f"{line[: _MOST_CHARACTERS // 2]} ... {line[-_MOST_CHARACTERS // 2 :]}"


def short(value: Any) -> str:
    """A value as Python writes it, in at most some 80 characters, whatever it is."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an integer that Python does not write in decimals
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 20]}..."


def printable(text: str) -> str:
    """A text with every character that could break a line or steer a terminal written as an escape: a file may be called anything."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def near_matches(word: str, allowed: Iterable[str], most: int = 3) -> str:
    """`; did you mean a, b?` for the names of `allowed` that look like `word`, in whatever case, or an empty string."""
    if len(word) > _MOST_SHOWN:
        return ""
    by_lower = {name.lower(): name for name in allowed}
    near = [by_lower[name] for name in get_close_matches(word.lower(), by_lower, n=most, cutoff=0.5)]
    return f"; did you mean {', '.join(near)}?" if near else ""
