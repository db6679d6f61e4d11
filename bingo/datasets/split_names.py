"""Which folders are train or test splits: by a word in their names, or, with other names (learn and exam, tr and te, fold0 and fold1),
because they contain the same classes."""

import re
from collections.abc import Mapping
from itertools import combinations

from bingo.runtime.inside import folded

_AFFIX = r"(?:images?|imgs?|set|split|data|\d{1,5})"
_WORDS = {
    "train": "train|training|trn",
    "test": "val|valid|validation|dev|test|testing|tst|eval|evaluation|hold[ _-]?out|held[ _-]?out",
}
_ROLES = {role: re.compile(rf"(?:{_AFFIX}[ _.-]?)?(?:{words})(?:[ _.-]?{_AFFIX})?") for role, words in _WORDS.items()}
_PLAIN_WORDS = {word: role for role, words in _WORDS.items() for word in words.split("|")}
_MOST_SPLITS = 10  # as in ten-fold cross-validation; more folders with the same sub-folders are classes
# Names for how images were taken, which may be the same for every class: cam0, session-2, left, 2021-05-03.
_TAKES = re.compile(
    r"(?:\d{4}[-_.]?\d\d[-_.]?\d\d|(?:cam(?:era)?|session|seq(?:uence)?|video|clip|day|night|run|take|part|batch|shot|view|angle|scene|"
    r"sensor|visit|frames?|left|right|front|back|top|side|images?|imgs?|photos?|originals?|raw|rgb|gray|grey|depth|aug(?:mented)?|jpe?g|png)"
    r"[ _.-]?[\da-z]?\d{0,3})"
)


def role_of(folder: str) -> str | None:
    """`train` or `test` if a folder's name is a common name of such a split, in any case; otherwise None."""
    return next((role for role, pattern in _ROLES.items() if pattern.fullmatch(folded(folder))), None)


def split_word(folder: str) -> tuple[str | None, list[str]]:
    """The role of a word within a folder's name (seg_train, train.X1, testA), None if it has none or both, and the other words."""
    words = _words(folder)
    roles = {_PLAIN_WORDS[word] for word in words if word in _PLAIN_WORDS}
    return roles.pop() if len(roles) == 1 else None, [word for word in words if word not in _PLAIN_WORDS]


def _words(name: str) -> list[str]:
    return list(map(folded, re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))))


def split_folder(name: str) -> str:
    """The folder, train, val or test, for a name that contains the word of one split (imagenet-train, validation-00); otherwise empty."""
    role = split_word(name)[0]
    return "val" if role == "test" and not {"test", "testing", "tst"} & set(_words(name)) else role or ""


def look_like_splits(inner: Mapping[str, list[str]]) -> list[str]:
    """Among sibling folders, given the names of their sub-folders, those that are probably splits and not classes; usually none.

    Two folders look like splits if they share at least two names of sub-folders, and over half of those of the folder that has fewer. Names
    for how images were taken do not count. Such folders must be at least half of all folders, and at most ten.
    """
    names = {folder: {folded(name) for name in own} for folder, own in inner.items() if len(own) > 1}
    if len(names) > _MOST_SPLITS:
        return []
    pairs = [pair for pair in combinations(names, 2) if _same_classes(*(names[folder] for folder in pair))]
    found = [folder for folder in names if any(folder in pair for pair in pairs)]
    return found if 2 * len(found) >= len(inner) else []


def _same_classes(one: set[str], other: set[str]) -> bool:
    shared = [name for name in one & other if not _TAKES.fullmatch(name)]
    return len(shared) > 1 and 2 * len(shared) > min(len(one), len(other))
