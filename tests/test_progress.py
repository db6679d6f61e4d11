"""The progress bar: on a terminal, for work that lasts, by the first process; silence otherwise."""

import io
import sys

import pytest

from bingo import progress


@pytest.fixture
def stderr(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_SILENT_SECONDS", 0)
    return stream


def work(units=4):
    with progress.progress_bar("neighbours", units, "rows") as bar:
        for _ in range(units):
            bar.advance()


def test_a_terminal_sees_label_count_rate_and_time_left(stderr):
    work()
    assert all(words in stderr.getvalue() for words in ("neighbours", "4/4", "rows/s", "left"))


def test_a_file_sees_nothing(stderr):
    stderr.isatty = lambda: False
    work()
    assert stderr.getvalue() == ""


def test_a_second_process_says_nothing(stderr, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    work()
    assert stderr.getvalue() == ""


def test_short_work_says_nothing(stderr, monkeypatch):
    monkeypatch.setattr(progress, "_SILENT_SECONDS", 60)
    work()
    assert stderr.getvalue() == ""
