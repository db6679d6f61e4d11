"""Errors that a user can fix: one line for each, exit code 2, no traceback."""

import re
import reprlib
import signal
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

FAILED, USER_MISTAKE, INTERRUPTED = 1, 2, 75  # exit codes; 75: stopped with a checkpoint, or in use by another run; to be started again
_MOST_CHARACTERS, _MOST_SHOWN, _MOST_REASON = 1000, 80, 160
_NO_MEMORY = re.compile("out of memory|allocate memory|bad_alloc")  # of CUDA's and of the CPU's allocator in torch, and of FAISS
_REPR = reprlib.Repr()  # for values of any kind: bounded in depth, width and length, since an alias in YAML may expand to billions
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring, _REPR.maxlong, _REPR.maxother = 4, 20, 20, _MOST_SHOWN, 40, _MOST_SHOWN


class UserError(Exception):
    """One or several user errors, one line each: name, value, what is allowed, and how to fix it."""

    def __init__(self, lines: str | Sequence[str]):
        self.lines = [_shortened(line) for line in ([lines] if isinstance(lines, str) else lines)]
        super().__init__("\n".join(self.lines))


def out_of_memory(error: BaseException) -> str | None:
    """One line if the error means that the machine or a GPU is out of memory, for which torch has several classes; otherwise None."""
    text = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
        return None
    reason = reason_of(text or "no details given")
    return f"out of memory ({reason}); lower the batch, image.crop_px, dataset.store_px, extract.views or bagging.k, or use more memory"


def reason_of(error: object) -> str:
    """The message of a library's error, in one line of at most about 160 characters that ends with a whole word; or, if empty, its type."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MOST_REASON else re.sub(r" \S{1,80}$", "", text[:_MOST_REASON]) + " ..."


def first_sentence(message: str) -> str:
    """A library's message without the source location that precedes it, and without its advice."""
    return reason_of(re.sub(r"^\[.*?\]\s*", "", message).partition(". ")[0])


class Interrupted(Exception):
    """A signal requested a stop, and a checkpoint was written, from which the same command resumes."""


class GroupLost(Exception):
    """Another process of the group has ended or cannot be reached; that process reports the reason. `peers`: the ids of the processes
    that this one's launcher had started."""

    def __init__(self, line: str, peers: frozenset[int] = frozenset()):
        super().__init__(line)
        self.peers = peers


class WorkerLost(Exception):
    """A worker process was killed, with its exit code (minus the number of a signal) if it is known; the message is one line. `less`: how
    the user can make the workers use less memory, which it says if the cause may be a lack of memory."""

    def __init__(self, less: str, exit_code: int | None = None):
        lacking = {None: "memory", -signal.SIGKILL: "memory", -signal.SIGBUS: "shared memory (/dev/shm)"}.get(exit_code)
        signalled = exit_code is not None and exit_code < 0
        how = f"was killed by {signal.Signals(-(exit_code or 0)).name}" if signalled else "ended unexpectedly"
        super().__init__(f"a worker process {how}{f', in most cases for lack of {lacking}; {less}, or use more of it' if lacking else ''}")


def _shortened(line: str) -> str:
    """The line, or, if it is long, its beginning and its end (which says how to fix the error), since user input may have any length."""
    half = _MOST_CHARACTERS // 2
    if len(line) <= _MOST_CHARACTERS:
        return line
    first, last = re.sub(r" \S{1,80}$", "", line[:half]), re.sub(r"^\S{1,80} ", "", line[-half:])  # between words, unless one is very long
    return f"{first} ... {last}"


def short(value: Any) -> str:
    """The repr of any value in at most about 80 characters."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an integer too long for Python to print
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 20]}..."


def printable(text: str) -> str:
    """Escape every character that could break a line or control a terminal, since a file name may contain anything."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def near_matches(word: str, allowed: Iterable[str], most: int = 3) -> str:
    """`; did you mean a, b?` for the names in `allowed` that resemble `word`, ignoring case, or an empty string."""
    if len(word) > _MOST_SHOWN:
        return ""
    by_lower = {name.lower(): name for name in allowed}
    near = [by_lower[name] for name in get_close_matches(word.lower(), by_lower, n=most, cutoff=0.5)]
    return f"; did you mean {', '.join(near)}?" if near else ""
