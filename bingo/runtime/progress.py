"""Progress of long work, on the standard error of the first process: a bar on a terminal, occasional lines in a file or a pipe.

Work of up to two seconds shows nothing. The first line is printed after two seconds (five if no unit is done yet), the next ones every
30 seconds or 5 % of the whole time, whichever is longer, but at least every five minutes. Rate and remaining time are shown after a
thousandth of the work or 20 seconds.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_SILENT_SECONDS, _FIRST_UNIT_SECONDS = 2.0, 5.0
_LINE_SECONDS, _LINE_SHARE, _MOST_LINE_SECONDS = 30.0, 0.05, 300.0
_KNOWN_SHARE, _KNOWN_SECONDS = 0.001, 20.0
_POLL_SECONDS = 0.5  # a unit of work may take minutes, so a thread watches the clock
_shown = threading.Lock()  # held by the outermost loop: nested loops show nothing
clock = time.monotonic  # tests replace it


class Bar:
    """The handle that a loop updates, possibly from several threads. `total` is 0 if the number of units is unknown; `remark` is additional
    text to show."""

    remark = ""

    def __init__(self, label: str, total: int, unit: str):
        self._label, self._total, self._unit = label, total, unit
        self._begun, self._first, self._done = clock(), 0, 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._display: Any = None
        if os.environ.get("RANK", "0") == "0" and _shown.acquire(blocking=False):
            self._display = _Screen(label, total) if sys.stderr.isatty() else _Log(label)
            with suppress(RuntimeError):  # without a thread, lines are printed only when the progress is updated
                threading.Thread(target=self._watch, daemon=True).start()

    def resume_at(self, done: int) -> None:
        """Start from `done` units of an earlier run, which do not count for the rate."""
        with self._lock:
            self._first = self._done = done

    def advance_to(self, done: int) -> None:
        """Set how many units are done."""
        with self._lock:
            self._done = done
            self._show()

    def advance(self, units: int = 1) -> None:
        """Count further units."""
        with self._lock:
            self._done += units
            self._show()

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            with self._lock:
                self._show()

    def _show(self) -> None:
        seconds = clock() - self._begun
        if self._display is None or self._closed.is_set() or seconds < _SILENT_SECONDS:
            return
        moved, whole = self._done - self._first, self._total - self._first
        rate, known = moved / seconds, moved > 0 and (moved >= _KNOWN_SHARE * whole or seconds >= _KNOWN_SECONDS)
        whole_seconds = seconds * whole / moved if self._total and known else seconds
        note = f"{_number(rate)} {self._unit}/s" if known else f"{_clock_time(seconds)} so far"
        if self._total and known:
            note += f", {_clock_time(max(0.0, (self._total - self._done) / rate))} left"
        note = f"{self.remark}, {note}" if self.remark else note
        count = f"{self._done:,} {self._unit}" if self._unit else ""
        if self._unit and self._total:
            count = f"{100 * self._done // self._total} % ({self._done:,} of {self._total:,} {self._unit})"
        self._display.show(seconds, whole_seconds, self._done, note, count)

    def close(self) -> None:
        """Stop showing progress, and clear the bar."""
        with self._lock:
            self._closed.set()
            if self._display is not None:
                self._display.close()
                self._display = None
                _shown.release()


class _Log:
    """Lines in a file, or in a pipe whose reader may be gone."""

    def __init__(self, label: str):
        self._label = label
        self._last_seconds: float | None = None

    def show(self, seconds: float, whole_seconds: float, done: int, note: str, count: str) -> None:
        if self._last_seconds is None:
            due = seconds >= (_SILENT_SECONDS if done else _FIRST_UNIT_SECONDS)
        else:
            due = seconds - self._last_seconds >= min(max(_LINE_SECONDS, _LINE_SHARE * whole_seconds), _MOST_LINE_SECONDS)
        if due:
            self._last_seconds = seconds
            with suppress(OSError, ValueError):
                sys.stderr.write(f"{self._label}: {', '.join(part for part in (count, note) if part)}\n")
                sys.stderr.flush()

    def close(self) -> None:
        pass


class _Screen:
    """A bar on a terminal."""

    def __init__(self, label: str, total: int):
        self._label, self._total = label, total
        self._bar: Any = None

    def show(self, seconds: float, whole_seconds: float, done: int, note: str, count: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task(self._label, total=self._total or None, note="")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, note=note)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _clock_time(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


@contextmanager
def progress_bar(label: str, total: int = 0, unit: str = "") -> Iterator[Bar]:
    """Context manager that shows the progress of its body: `total` units, 0 if unknown; without a `unit`, only the elapsed time."""
    bar = Bar(label, total, unit)
    try:
        yield bar
    finally:
        bar.close()
