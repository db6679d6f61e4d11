"""What a fuzzed surface is, and the running of its cases one by one under a limit of time and of memory.

A case is either accepted or refused by a UserError, whose lines are single, short and printable. Whatever else comes of it is a failure.
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

CASE_SECONDS = 20  # of processor time, which is the same on a busy machine; the making of the input counts too
DEAD_SECONDS = 300  # by the clock, for code that waits or reacts to no signal: the process ends itself
CASE_MB = 2048  # the largest image that is decoded has 89 million pixels: 4 bytes in Pillow, 3 in numpy and PyTorch, some of them twice
ROOM_MB = 8192  # of addresses, beyond what the process has at its start: no case may take the machine down
LAST = "last"
LINE_CHARACTERS, MOST_LINES = 1200, 100
MB = 2**20


@dataclass(frozen=True)
class Surface:
    """One way into the program. `cases` draws small descriptions of input, `run` makes the input in an empty folder and hands it in:
    it returns where the input is accepted, and raises UserError where it is refused. `share` is its relative number of cases.
    """

    name: str
    share: int
    cases: SearchStrategy
    run: Callable[[Any, Path], None]


@dataclass
class Tally:
    """What became of a surface's cases: how many, the longest one's seconds, the largest one's MB, and the failures' texts by cause."""

    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    mb: float = 0.0
    failures: dict[str, list[str]] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        """All of them."""
        return self.accepted + self.refused + self.failed

    @property
    def failed(self) -> int:
        """How many failed."""
        return sum(map(len, self.failures.values()))


class Hang(BaseException):
    """A case took too long. No Exception: the code under test turns many of these into something else."""


def fuzz(surface: Surface, cases: int, seed: int, folder: Path) -> Tally:
    """Run this many cases, the same ones for the same seed. `folder/last` holds the current one, and where it
    hung, for the case that this process dies."""
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
    """What is wrong with a refusal, or an empty string."""
    if not lines or not all(line.strip() for line in lines):
        return f"a refusal without a reason: {lines!r}"
    if len(lines) > MOST_LINES:
        return f"{len(lines)} lines, the first {lines[0][:200]!r}"
    bad = [line for line in lines if "\n" in line or len(line) > LINE_CHARACTERS]
    return f"no line that a terminal shows: {bad[0][:500]!r}" if bad else ""


def _where() -> str:
    """The present error with its last frames."""
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
    """Within it this process has no more than ROOM_MB of addresses left."""
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
