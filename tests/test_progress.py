"""The progress bar: on a terminal, for work that lasts, by the first process; silence otherwise."""

import io
import re
import sys

from bingo import progress


def shown(monkeypatch, terminal=True, silent_seconds=0.0, nested=False) -> str:
    """What four steps of work write to standard error."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(progress, "_SILENT_SECONDS", silent_seconds)
    with progress.progress_bar("neighbours", 4, "rows") as bar:
        for _ in range(4):
            bar.advance()
            if nested:
                with progress.progress_bar("lists", 1, "lists") as within:
                    within.advance()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_a_terminal_sees_label_count_rate_and_time_left(monkeypatch):
    text = shown(monkeypatch)
    assert all(words in text for words in ("neighbours", "4/4", "rows/s", "left")), text


def test_a_file_sees_nothing(monkeypatch):
    assert shown(monkeypatch, terminal=False) == ""


def test_a_bar_within_another_is_not_drawn(monkeypatch):
    text = shown(monkeypatch, nested=True)
    assert "4/4" in text
    assert "lists" not in text
    assert "4/4" in shown(monkeypatch)  # the next one is


def test_a_second_process_says_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert shown(monkeypatch) == ""


def test_short_work_says_nothing(monkeypatch):
    assert shown(monkeypatch, silent_seconds=60) == ""
