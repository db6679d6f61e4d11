"""A progress bar with rate and remaining time, on a terminal, for work that lasts over two seconds; nothing at all anywhere else."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SILENT_SECONDS = 2.0
_on_screen = threading.Lock()  # held by the one bar that is drawn: work inside the loop of another draws none


class Bar:
    """What a loop moves; several threads may."""

    def __init__(self, label: str, total: int, unit: str):
        self._label, self._total, self._unit = label, total, unit
        self._shown = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
        self._begun, self._first, self._done = time.monotonic(), 0, 0
        self._lock = threading.Lock()
        self._drawn: Any = None

    def resume_at(self, done: int) -> None:
        """Start from `done` units that an earlier run did; they do not count for the rate."""
        self._first = self._done = done

    def advance_to(self, done: int) -> None:
        """Set how many units are done."""
        with self._lock:
            self._done = done
            self._draw()

    def advance(self, units: int = 1) -> None:
        """Count further units."""
        with self._lock:
            self._done += units
            self._draw()

    def _draw(self) -> None:
        seconds = time.monotonic() - self._begun
        if not self._shown or seconds < _SILENT_SECONDS:
            return
        rate = (self._done - self._first) / seconds
        if self._drawn is None:
            if not _on_screen.acquire(blocking=False):
                return
            self._drawn = _rich_bar(self._label, self._total)
            self._drawn.start()
        left = (self._total - self._done) / rate if rate else 0
        note = f"{rate:,.0f} {self._unit}/s, {int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02} left"
        self._drawn.update(self._drawn.task_ids[0], completed=self._done, note=note)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._drawn is not None:
            self._drawn.stop()
            _on_screen.release()


def _rich_bar(label: str, total: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(label, total=total, note="")
    return bar


@contextmanager
def progress_bar(label: str, total: int, unit: str) -> Iterator[Bar]:
    """A bar on standard error if that is a terminal and this is the first process."""
    bar = Bar(label, total, unit)
    try:
        yield bar
    finally:
        bar.close()
