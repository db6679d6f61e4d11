"""Damage to the bytes of a file: flipped, truncated, removed, repeated, overwritten by zeros or extreme numbers."""

import struct
from dataclasses import dataclass

from hypothesis import strategies as st

KINDS = ("flip", "flip", "number", "number", "cut", "zeros", "gone", "twice", "noise")
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 60000, 2**63 - 1, 2**64 - 1)
FORMATS = ("<B", ">H", "<H", ">I", "<I", "<Q")
HEAD_BYTES = 64


@dataclass(frozen=True)
class Damage:
    """One change. `place` counts from the beginning, modulo the length of the file or of its head; `value` determines the change."""

    kind: str
    in_head: bool
    place: int
    value: int


def damages(most: int = 3) -> st.SearchStrategy:
    """Up to `most` changes; most often none or one."""
    one = st.builds(Damage, st.sampled_from(KINDS), st.booleans(), st.integers(0, 2**24), st.integers(0, 2**16))
    return st.one_of(st.just([]), st.lists(one, min_size=1, max_size=1), st.lists(one, max_size=most))


def damaged(content: bytes, changes: list[Damage]) -> bytes:
    """The content after all changes, made one after the other."""
    for change in changes:
        if content:
            content = _changed(content, change)
    return content


def _changed(content: bytes, change: Damage) -> bytes:
    at = change.place % (min(len(content), HEAD_BYTES) if change.in_head else len(content))
    some = 1 + change.value % 200
    if change.kind == "cut":
        return content[:at]
    if change.kind == "gone":
        return content[:at] + content[at + some :]
    if change.kind == "twice":
        return content[: at + some] + content[at:]
    if change.kind == "flip":
        new = bytes([content[at] ^ (1 + change.value % 255)])
    elif change.kind == "zeros":
        new = bytes(some)
    elif change.kind == "noise":
        new = bytes((change.value * (i + 1) * 40503 >> 8) & 0xFF for i in range(some))
    else:
        form = FORMATS[change.value % len(FORMATS)]
        new = struct.pack(form, NUMBERS[change.value // len(FORMATS) % len(NUMBERS)] % 256 ** struct.calcsize(form))
    return content[:at] + new + content[at + len(new) :]
