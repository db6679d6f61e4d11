"""Messages of any length: one line, shortened between words, which keeps the advice at its end."""

import pytest

from bingo.runtime.errors import UserError, reason_of

WORDS = "The file hub/models--timm--vit_small_patch14_dinov2.lvd142m/snapshots could not be reached, as traffic is switched off. " * 9


@pytest.mark.parametrize("text", [WORDS, WORDS[3:], "two\nlines", "x" * 400, "x" * 400 + " y"])
def test_a_long_reason_ends_with_a_whole_word(text):
    found, line = reason_of(ValueError(text)), " ".join(text.split())
    kept = found.removesuffix(" ...")
    assert len(found) <= 164
    assert line.startswith(kept)
    assert kept == line or line[len(kept)] == " " or " " not in line[:160]


def test_an_error_without_a_text_is_named_by_its_type():
    assert reason_of(KeyError()) == "KeyError"


@pytest.mark.parametrize("start", range(12))
def test_a_long_line_is_shortened_between_words_and_keeps_its_end(start):
    (line,) = UserError(f"{WORDS[start:]}; set dataset.root").lines
    first, last = line.split(" ... ")
    assert len(line) <= 1005
    assert line.endswith("; set dataset.root")
    assert WORDS[start:].startswith(f"{first} ")
    assert f" {last}" in f"{WORDS}; set dataset.root"
    (whole,) = UserError("x" * 1990 + "; the end").lines
    assert whole.endswith("x; the end")
    assert len(whole) == 1005
