"""tests/stress/chaos.py distinguishes good and bad runs of a stage, given here; .ci/run runs it with real stages."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import bingo.runtime.progress
from tests.stress.chaos import (
    CUT_LOCK,
    CUT_RUN,
    INTERVAL_SECONDS,
    RECORDER,
    WAYS,
    ChaosWorkspace,
    Ended,
    Harassment,
    Kill,
    Move,
    Tally,
    bars_in,
    drawn_kills,
    table,
)

LABEL, TOTAL = "teacher: moco", 64
STOPPED = "teacher: moco: stopped at step 20 with a checkpoint; start again to resume\nfailed to run: ..., exited with 75"


def bar(first: int, last: int, begun: float = 0.0, step_seconds: float = 0.1, total: int = TOTAL) -> dict[str, list[Move]]:
    """A run of the loop from unit `first` to unit `last`."""
    moves = [Move(begun, "resume_at", total, 0), Move(begun, "resume_at", total, first)]
    return {LABEL: moves + [Move(begun + step_seconds * (i - first), "advance_to", total, i) for i in range(first + 1, last + 1)]}


class Scripted:
    """A workspace with given runs of dvc."""

    runs = mended = 0
    chunk_views = 1800

    def __init__(self, *ended: Ended):
        self.script = iter(ended)

    def start(self, *_: str) -> None:
        self.runs += 1

    def strike(self, *_: object) -> float:
        return 0.0

    def ended(self, *_: object) -> Ended:
        return next(self.script)

    def mend_dvc(self, text: str) -> bool:
        self.mended += CUT_LOCK in text
        return CUT_LOCK in text


def problems(*ended: Ended, kill: tuple[str, str] = ("SIGKILL", "both"), stage: str = "teacher") -> list[str]:
    """The problems found if each of these runs is killed except the last one, which succeeds."""
    tally = Tally()
    Harassment(Scripted(*ended), stage, tally).run(Kill(*kill, 1.0) for _ in ended[:-1])
    assert tally.finished == 1
    assert sum(tally.kills.values()) == len(ended) - 1
    return tally.problems


KILLED, WELL = Ended(255, "", bar(0, 20), 2.05), Ended(0, "", bar(16, TOTAL, 10.0), None)


def test_a_training_that_resumes_within_the_interval():
    assert not problems(KILLED, Ended(255, "", {}, 0.5), replace(KILLED, bars=bar(15, 16, 5.0), struck=5.15), WELL)


@pytest.mark.parametrize(("first", "found"), [(14, False), (12, True), (0, True)])
def test_repeated_steps_beyond_the_interval_are_found(first, found):
    """If steps take 0.1 s, six may be repeated: all except the last, which may end while it is saved, then end within 0.4 s."""
    reported = problems(KILLED, replace(WELL, bars=bar(first, TOTAL, 10.0, 0.1)))
    assert bool(reported) == found, reported
    assert not reported or f"{20 - first} steps" in reported[0]
    assert INTERVAL_SECONDS == 0.5


def test_a_complete_run_that_is_repeated_is_found():
    """DVC was killed before its commit."""
    (reported,) = problems(Ended(255, "", bar(0, TOTAL), 7.0), replace(WELL, bars=bar(0, TOTAL, 10.0)))
    assert f"{TOTAL} steps" in reported


@pytest.mark.parametrize(
    ("kill", "text", "bars", "wanted"),
    [
        (("SIGTERM", "stage"), STOPPED, bar(20, TOTAL, 10.0), []),
        (("SIGTERM", "stage"), STOPPED, bar(19, TOTAL, 10.0), ["1 steps before a checkpoint on the way out were done twice"]),
        (("SIGTERM", "stage"), STOPPED.replace("75", "1"), bar(20, TOTAL, 10.0), ["exit code 1, not 75"]),
        (("SIGINT", "both"), "exited with 75", bar(20, TOTAL, 10.0), ["no word of a checkpoint"]),
        (("SIGKILL", "dvc"), STOPPED.partition("failed")[0], bar(20, TOTAL, 10.0), []),
        (("SIGKILL", "stage"), "Traceback ...\nexited with -9", bar(20, TOTAL, 10.0), ["a traceback"]),
        (("SIGKILL", "stage"), "exited with -9", bar(19, TOTAL, 10.0), []),
    ],
)
def test_the_way_out(kill, text, bars, wanted):
    reported = problems(replace(KILLED, text=text), replace(WELL, bars=bars), kill=kill)
    assert len(reported) == len(wanted), reported
    assert all(words in line for words, line in zip(wanted, reported, strict=True)), reported


def test_a_signal_before_or_after_the_loop_needs_no_checkpoint():
    closed = {LABEL: [*bar(0, TOTAL)[LABEL], Move(7.0, "close", TOTAL, TOTAL)]}
    for struck, bars in ((-1.0, bar(0, 0)), (8.0, closed)):
        killed = Ended(255, "Traceback of Python's own\nexited with -2", bars, struck)
        assert not problems(killed, replace(WELL, bars=bar(TOTAL, TOTAL, 10.0)), kill=("SIGINT", "both"))


@pytest.mark.parametrize(("left", "found"), [(9000, False), (9100, True)])
def test_extract_may_lose_two_chunks(left, found):
    """1,800 views per chunk; its bar counts the views that were left at its start."""
    killed = Ended(255, "exited with -15", bar(0, 4500, total=9900), 600.0)
    reported = problems(killed, Ended(0, "", bar(0, left, 1000.0, total=left), None), kill=("SIGTERM", "stage"), stage="extract")
    assert bool(reported) == found, reported


def test_bag_starts_from_the_beginning():
    assert not problems(KILLED, replace(WELL, bars=bar(0, TOTAL, 10.0)), stage="bag")


def test_a_failure_of_dvc_itself_ends_everything():
    with pytest.raises(SystemExit, match="dvc repro failed with 1, undisturbed\nsome text"):
        problems(KILLED, Ended(1, "some text", {}, None))


def test_a_truncated_file_of_dvc_is_repaired_and_counted():
    tally = Tally()
    workspace = Scripted(KILLED, Ended(255, f"ERROR: failed to reproduce 'scan': {CUT_LOCK}: ...", {}, 0.5), WELL)
    Harassment(workspace, "teacher", tally).run(Kill("SIGKILL", "both", 1.0) for _ in range(2))
    assert (tally.cut_off, workspace.mended, sum(tally.kills.values()), tally.problems) == (1, 1, 1, [])


@pytest.mark.slow
def test_truncated_files_of_dvc_are_reported_and_repaired_as_documented(tmp_path):
    """With DVC itself, a lock that was half written, and a folder of its run cache without its entry."""
    (tmp_path / "images").write_text("x")
    (tmp_path / "dvc.yaml").write_text("stages: {scan: {cmd: cp images listing, deps: [images], outs: [listing]}}")
    workspace = ChaosWorkspace(tmp_path)
    workspace.run("init", "--no-scm", "--quiet")
    workspace.run("repro")

    def mended(words: str) -> bool:
        failed = workspace.ended(workspace.start("repro"))
        return failed.status != 0 and words in failed.text and workspace.mend_dvc(failed.text)

    (tmp_path / ".dvc/tmp/rwlock").write_text('{"listing": {"wr')
    assert mended(CUT_LOCK)
    workspace.run("repro")
    (tmp_path / "dvc.lock").unlink()
    for entry in (tmp_path / ".dvc/cache/runs").glob("*/*/*"):
        entry.unlink()
    assert mended(CUT_RUN)
    workspace.run("repro")


def test_the_recorders_lines_can_be_read(tmp_path):
    source = Path(bingo.runtime.progress.__file__).read_text() + RECORDER
    lines = f"bar = Bar({LABEL!r}, 9, 'anchors')\nbar.resume_at(2)\nbar.advance_to(5)\nbar.advance(2)\nbar.close()\n"
    (tmp_path / "recorded.py").write_text(source + lines)
    log = tmp_path / "log"
    subprocess.run([sys.executable, tmp_path / "recorded.py"], env={**os.environ, "CHAOS_LOG": str(log)}, check=True)
    moves = bars_in(log)[LABEL]
    assert [(move.call, move.done) for move in moves] == [
        ("resume_at", 0), ("resume_at", 2), ("advance_to", 5), ("advance", 7), ("close", 7),
    ]  # fmt: skip
    assert [move.left for move in moves] == [9, 7, 4, 2, 2]
    assert bars_in(tmp_path / "none") == {}


def test_the_table_counts_kills_by_signal():
    kills = list(drawn_kills(random.Random(0), 200, 9.0))
    assert {(kill.signal, kill.receiver) for kill in kills} == set(WAYS)
    assert all(0 <= kill.seconds <= 9 for kill in kills)
    tally = Tally(most_lost=3, resumed=4, finished=2, problems=["x"])
    tally.kills.update([WAYS[0], WAYS[0], WAYS[4]])
    assert table({"bag": tally}).splitlines()[2] == "| bag | 3 | 2 | 0 | 0 | 0 | 1 | 0 | 4 | 3 | 2 | 0 | 0 | 1 |"
