"""Which words name a train or a test split in a folder's name."""

import re

from bingo.runtime.inside import folded

_AFFIX = r"(?:images?|imgs?|set|split|data|\d{1,5})"
_WORDS = {
    "train": "train|training|trn",
    "test": "val|valid|validation|dev|test|testing|tst|eval|evaluation|hold[ _-]?out|held[ _-]?out",
}
_ROLES = {role: re.compile(rf"(?:{_AFFIX}[ _.-]?)?(?:{words})(?:[ _.-]?{_AFFIX})?") for role, words in _WORDS.items()}
_PLAIN_WORDS = {word: role for role, words in _WORDS.items() for word in words.split("|")}


def role_of(folder: str) -> str | None:
    """`train` or `test` where a folder's name is one that splits have, whatever its case; otherwise None."""
    return next((role for role, pattern in _ROLES.items() if pattern.fullmatch(folded(folder))), None)


def split_word(folder: str) -> tuple[str | None, list[str]]:
    """The role of a word within a folder's name (seg_train, train.X1, testA), None if it has none or both, and the other words."""
    words = _words(folder)
    roles = {_PLAIN_WORDS[word] for word in words if word in _PLAIN_WORDS}
    return roles.pop() if len(roles) == 1 else None, [word for word in words if word not in _PLAIN_WORDS]


def _words(name: str) -> list[str]:
    return list(map(folded, re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))))


def split_folder(name: str) -> str:
    """The folder, train, val or test, of images under a name with the word of one split (imagenet-train, validation-00); empty without."""
    role = split_word(name)[0]
    return "val" if role == "test" and not {"test", "testing", "tst"} & set(_words(name)) else role or ""
