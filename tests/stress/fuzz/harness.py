"""Fuzzed surfaces, and running their cases one by one with limits of time and memory.

A case is either accepted, or refused by a UserError with single, short and printable lines. Everything else is a failure.
"""

import contextlib
import faulthandler
import io
import re
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis.strategies import SearchStrategy

from bingo.runtime.errors import UserError

CASE_SECONDS = 20  # CPU time, which does not depend on other work; includes making the input
DEAD_SECONDS = 300  # wall time, for code that waits or ignores signals: the process then ends itself
CASE_MB = 2048  # the largest decoded image has 89 million pixels: 4 bytes in Pillow, 3 in numpy and PyTorch, some of them twice
ROOM_MB = 8192  # address space beyond that at the start of the process, to protect the machine
LAST = "last"
LINE_CHARACTERS, MOST_LINES = 1200, 100
MB = 2**20


@dataclass(frozen=True)
class Surface:
    """An entry point of the program. `cases` draws small descriptions of input; `run` makes the input in an empty folder and uses it: it
    returns if the input is accepted, and raises UserError if it is refused. `share` is the relative number of cases.
    """

    name: str
    share: int
    cases: SearchStrategy
    run: Callable[[Any, Path], None]


@dataclass
class Tally:
    """Results of a surface's cases: their number, the longest time in seconds, the most MB, and the texts of failures by cause."""

    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    mb: float = 0.0
    failures: dict[str, list[str]] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        """The number of all cases."""
        return self.accepted + self.refused + self.failed

    @property
    def failed(self) -> int:
        """The number of failures."""
        return sum(map(len, self.failures.values()))


class Hang(BaseException):
    """A case took too long. Not an Exception, because the code under test converts many of these."""


def fuzz(surface: Surface, cases: int, seed: int, folder: Path) -> Tally:
    """Run this many cases, which are the same for the same seed. `folder/last` contains the current one, and its place if it hangs, in case
    this process dies."""
    tally, last, place = Tally(), folder / LAST, folder / "input"
    place.mkdir()

    @hypothesis_seed(seed)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(surface.cases)
    def one(case: Any) -> None:
        with last.open("w") as file:
            print(ascii(case)[:4000], file=file, flush=True)
            _run(surface, case, place, tally, file)

    with _room():
        one()
    return tally


def _run(surface: Surface, case: Any, folder: Path, tally: Tally, last: TextIO) -> None:
    before_mb, begun, failure, refused = _reset_peak_mb(), time.process_time(), "", False
    try:
        with _alarm(last), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            surface.run(case, folder)
    except UserError as error:
        refused, failure = True, _bad_lines(error.lines)
    except Hang:
        failure = f"more than {CASE_SECONDS} s\n{_where()}"
    except (Exception, SystemExit):
        failure = _where()
    seconds, mb = time.process_time() - begun, _peak_mb() - before_mb
    if not failure and seconds > 1.5 * CASE_SECONDS:
        failure = f"{seconds:.1f} s"
    if not failure and mb > CASE_MB:
        failure = f"{mb:.0f} MB"
    tally.seconds, tally.mb = max(tally.seconds, seconds), max(tally.mb, mb)
    if failure:
        cause = re.sub(r"\d+", "0", f"{failure.splitlines()[-1][:60]} {[line for line in failure.splitlines() if 'File' in line][-1:]}")
        tally.failures.setdefault(cause, []).append(f"{surface.name}: {ascii(case)[:1000]}\n{failure}")
    elif refused:
        tally.refused += 1
    else:
        tally.accepted += 1


def _bad_lines(lines: list[str]) -> str:
    """The fault of a refusal, or an empty string."""
    if not lines or not all(line.strip() for line in lines):
        return f"a refusal without a reason: {lines!r}"
    if len(lines) > MOST_LINES:
        return f"{len(lines)} lines, the first {lines[0][:200]!r}"
    bad = [line for line in lines if "\n" in line or len(line) > LINE_CHARACTERS]
    return f"no line that a terminal shows: {bad[0][:500]!r}" if bad else ""


def _where() -> str:
    """The current error with its last frames."""
    return "".join(traceback.format_exc(limit=-6))[-3000:]


@contextlib.contextmanager
def _alarm(last: TextIO) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    previous = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
    faulthandler.dump_traceback_later(DEAD_SECONDS, exit=True, file=last)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, previous)


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """In the body, this process has at most ROOM_MB of address space left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int((_status_mb("VmSize") + ROOM_MB) * MB)
    resource.setrlimit(resource.RLIMIT_AS, (wanted if soft == resource.RLIM_INFINITY else min(wanted, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _reset_peak_mb() -> float:
    """Reset the peak of resident memory; return the current resident memory."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mb("VmRSS")


def _peak_mb() -> float:
    return _status_mb("VmHWM")


def _status_mb(name: str) -> float:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match, f"no {name} in /proc/self/status"
    return int(match[1]) / 1024
