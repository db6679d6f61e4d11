"""A progress bar with rate and remaining time on a terminal, and nothing at all anywhere else."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} {self.unit}/s", style="cyan")


class Bar:
    """What a loop moves; `note` writes a few words beside the bar."""

    def __init__(self, progress: Progress | None, label: str, total: int):
        self.progress = progress
        self.task = progress.add_task(label, total=total) if progress else None

    def advance_to(self, done: int) -> None:
        """Set how many units are done."""
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done)


@contextmanager
def progress_bar(label: str, total: int, unit: str) -> Iterator[Bar]:
    """A bar on standard error if that is a terminal and this is process 0; otherwise a bar that shows nothing."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield Bar(None, label, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bar(progress, label, total)
