"""Progress of long work: a bar on a terminal, lines in a file, from the first process only; otherwise silence."""

import io
import os
import pty
import re
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from workspace import PROGRESS

from bingo.runtime import progress

SILENT_SECONDS = progress._SILENT_SECONDS  # conftest.py changes it
LINE = re.compile(r"extract: (\d+) % \(([\d,]+) of ([\d,]+) images\), ([\d,.]+) images/s, (\d+):(\d\d):(\d\d) left")


def shown(monkeypatch, terminal=True, silent_seconds=0.0, nested=False) -> str:
    """The standard error of four steps of work."""
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


class Clock:
    """A clock that is moved by hand, and lines with the second at which each was written."""

    def __init__(self, monkeypatch):
        self.seconds, self.lines = 1000.0, []
        monkeypatch.setattr(progress, "clock", lambda: self.seconds)
        monkeypatch.setattr(progress, "_SILENT_SECONDS", SILENT_SECONDS)
        monkeypatch.setattr(sys, "stderr", self)

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> None:
        assert text.endswith("\n")  # whole lines, so that lines of other processes are not mixed in
        self.lines.append((self.seconds - 1000.0, text.rstrip("\n")))

    def flush(self) -> None:
        pass

    def work(self, seconds: float, step_seconds: float, total: int = 1_000_000, resumed: int = 0) -> list[tuple[float, str]]:
        """The lines of work with a steady pace and this duration, which moves its bar every `step_seconds`."""
        steps = round(seconds / step_seconds)
        with progress.progress_bar("extract", total, "images") as bar:
            if resumed:
                bar.resume_at(resumed)
            for step in range(1, steps + 1):
                self.seconds = 1000.0 + step * step_seconds
                bar.advance_to(resumed + (total - resumed) * step // steps)
        return self.lines


def test_a_terminal_sees_label_count_rate_and_time_left(monkeypatch):
    text = shown(monkeypatch)
    assert all(words in text for words in ("neighbours", "4/4", "rows/s", "left")), text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_within_another_is_not_shown(monkeypatch, terminal):
    text, whole = shown(monkeypatch, terminal, nested=True), "4/4" if terminal else "neighbours: 25 %"
    assert whole in text
    assert "lists" not in text
    assert whole in shown(monkeypatch, terminal)  # the next bar is shown


def test_inner_work_is_silent_even_if_its_outer_loop_has_shown_nothing(monkeypatch):
    clock = Clock(monkeypatch)
    with progress.progress_bar("train", 9, "anchors"):
        clock.work(600, 1)
    assert not [line for _, line in clock.lines if not line.startswith("train: ")]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_second_process_says_nothing(monkeypatch, terminal):
    monkeypatch.setenv("RANK", "1")
    assert shown(monkeypatch, terminal) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_short_work_says_nothing(monkeypatch, terminal):
    assert shown(monkeypatch, terminal, silent_seconds=60) == ""


@pytest.mark.parametrize(
    ("seconds", "least_lines", "most_lines", "longest_gap"),
    [(1.9, 0, 0, 0), (10, 1, 1, 0), (31, 1, 1, 0), (600, 15, 20, 31), (3600, 18, 21, 181), (36_000, 118, 121, 301),
     (864_000, 2800, 2881, 301)],
)  # fmt: skip
def test_lines_are_neither_rare_nor_many(monkeypatch, seconds, least_lines, most_lines, longest_gap):
    lines = Clock(monkeypatch).work(seconds, step_seconds=seconds / 20_000)
    assert least_lines <= len(lines) <= most_lines
    times = [at for at, _ in lines]
    assert all(later - earlier >= 30 for earlier, later in pairwise(times))
    if longest_gap:
        assert max(later - earlier for earlier, later in pairwise([*times, seconds])) <= longest_gap + seconds / 20_000
    if lines:
        assert times[0] <= 2 + seconds / 20_000


@pytest.mark.parametrize("resumed", [0, 250_000])
def test_a_line_has_count_share_rate_and_time_left(monkeypatch, resumed):
    clock = Clock(monkeypatch)
    for at, line in clock.work(500, step_seconds=1, resumed=resumed):
        percent, done, total, rate, *left = (float(figure.replace(",", "")) for figure in LINE.fullmatch(line).groups())
        assert total == 1_000_000
        assert done == pytest.approx(resumed + at / 500 * (1_000_000 - resumed))
        assert percent == done * 100 // total
        assert rate == pytest.approx((1_000_000 - resumed) / 500, abs=1)
        assert left[0] * 3600 + left[1] * 60 + left[2] == pytest.approx(500 - at, abs=1)


def test_a_slow_start_gives_no_estimate(monkeypatch):
    """One unit of 1,000,000 after 5 seconds, at which the work would take 58 days; it is done in 100 seconds."""
    clock = Clock(monkeypatch)
    with progress.progress_bar("neighbours", 1_000_000, "rows") as bar:
        for seconds, done in ((5, 1), (40, 400_000), (100, 1_000_000)):
            clock.seconds = 1000.0 + seconds
            bar.advance_to(done)
    lines = [line for _, line in clock.lines]
    assert lines[:2] == [
        "neighbours: 0 % (1 of 1,000,000 rows), 0:00:05 so far",
        "neighbours: 40 % (400,000 of 1,000,000 rows), 10,000 rows/s, 0:01:00 left",
    ]


def test_a_remark_of_a_loop_is_in_the_line_until_it_changes(monkeypatch):
    clock = Clock(monkeypatch)
    with progress.progress_bar("train", 100, "anchors") as bar:
        for remark in ("", "knn_10 81.2"):
            bar.remark = remark
            clock.seconds += 40
            bar.advance(25)
    first, second = (line for _, line in clock.lines)
    assert first == "train: 25 % (25 of 100 anchors), 0.62 anchors/s, 0:02:00 left"
    assert second == "train: 50 % (50 of 100 anchors), knn_10 81.2, 0.62 anchors/s, 0:01:20 left"
    assert PROGRESS.fullmatch(f"{second}\n")


def test_slow_work_has_a_rate_below_one(monkeypatch):
    (_, line), *_ = Clock(monkeypatch).work(400, step_seconds=100, total=4)
    assert LINE.fullmatch(line)[4] == "0.01"


def test_work_of_unknown_length_shows_how_much_and_how_long(monkeypatch):
    clock = Clock(monkeypatch)
    with progress.progress_bar("finding", unit="files") as bar:
        clock.seconds += 40
        bar.advance(60_000)
    assert clock.lines == [(40.0, "finding: 60,000 files, 1,500 files/s")]


@pytest.mark.slow
def test_a_line_is_written_even_if_no_unit_is_done(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.01)
    with progress.progress_bar("K-means"):
        for seconds in (4, 5, 34, 35, 600, 629, 632):
            clock.seconds = 1000.0 + seconds
            time.sleep(0.3)
    assert clock.lines == [
        (5.0, "K-means: 0:00:05 so far"), (35.0, "K-means: 0:00:35 so far"), (600.0, "K-means: 0:10:00 so far"),
        (632.0, "K-means: 0:10:32 so far"),
    ]  # fmt: skip


def test_empty_work_is_not_a_mistake(monkeypatch):
    clock = Clock(monkeypatch)
    with progress.progress_bar("scan", 0, "images") as bar:
        clock.seconds += 3
        bar.advance_to(0)
    assert clock.lines == []


SLEEPS = """
import time
from bingo.runtime.progress import progress_bar
with progress_bar("scan", 30, "images") as bar:
    for _ in range(30):
        time.sleep(0.1)
        bar.advance()
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_closed_pipe_does_not_stop_the_work():
    read, write = os.pipe()
    os.close(read)
    assert subprocess.run([sys.executable, "-c", SLEEPS], stderr=write, stdout=subprocess.PIPE, check=False).stdout == b"done\n"
    os.close(write)


@pytest.mark.slow
def test_a_real_terminal_has_a_bar_and_a_pipe_a_line():
    piped = subprocess.run([sys.executable, "-c", SLEEPS], capture_output=True, text=True, check=True).stderr
    assert re.fullmatch(r"scan: \d+ % \(\d+ of 30 images\), [\d.]+ images/s, 0:00:0\d left\n", piped)
    master, slave = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", SLEEPS], stderr=slave, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(slave)
        text = b""
        while True:
            try:
                part = os.read(master, 1 << 16)
            except OSError:  # Linux: the other end is closed
                break
            text += part
            if not part:
                break
    os.close(master)
    assert process.returncode == 0
    assert b"30/30" in text
    assert b"\n" not in re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", text).strip()
    assert b" % (" not in text


def test_the_tests_of_stages_ignore_only_progress(monkeypatch):
    lines = [line for _, line in Clock(monkeypatch).work(600, 1)]
    text = "".join(f"{line}\n" for line in [*lines, "K-means: 0:00:05 so far", "finding: 60,000 files, 1,500 files/s"])
    assert PROGRESS.sub("", text) == ""
    kept = "error: a: 12 images/s\nwarning: bag: 0:00:05 so far\ndistill: bingo: stopped at step 3\n"
    assert PROGRESS.sub("", kept) == kept
