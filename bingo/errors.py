"""What a user can mend: one line for each mistake, exit code 2, never a traceback."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UserError(Exception):
    """One or several mistakes of the user's, each a single line: name, value, what is allowed, the way out."""

    def __init__(self, lines: str | Sequence[str]):
        self.lines = [lines] if isinstance(lines, str) else list(lines)
        super().__init__("\n".join(self.lines))


class Interrupted(Exception):
    """A signal asked to stop, and a checkpoint was written: the same command goes on from there."""


class GroupLost(Exception):
    """Another process of the group has ended or cannot be reached: it knows the reason, this one does not."""


def near_matches(word: str, allowed: Iterable[str], most: int = 3) -> str:
    """`; did you mean a, b?` for the names of `allowed` that look like `word`, in whatever case, or an empty string."""
    by_lower = {name.lower(): name for name in allowed}
    near = [by_lower[name] for name in get_close_matches(word.lower(), by_lower, n=most, cutoff=0.5)]
    return f"; did you mean {', '.join(near)}?" if near else ""
