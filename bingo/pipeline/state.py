"""The state folder of an unfinished stage: found again after a kill, used by one run at a time, kept until DVC has recorded the outputs.

DVC moves outputs into its cache after the stage has ended. If it is killed before dvc.lock records them, it deletes them and runs the
stage again. A stage run by DVC therefore keeps its folder, marked by finished.json, which holds the stage's entry in dvc.lock at that
time, and the next stage to start (`sweep`) removes it once the entry has changed. No output depends on this file.

    state     on the disk               transition by, when                                                  to
    absent    no folder                 `_begin`, when the stage starts                                      running
    stopped   a folder, not locked      `_begin`, when the stage starts again                                running
    running   a folder, locked          an error or a kill, which releases the lock                          stopped
                                        `_end`, without DVC, or if committed.json names this very state      absent
                                        `_end`, under DVC                                                    finished
    finished  finished.json             `_begin`, when the stage starts again: DVC has not committed         running
                                        `sweep`, when dvc.lock has another entry: notes it in committed.json absent
                                        `sweep`, when the workspace is gone: a temporary one of an experiment  absent

committed.json, next to a stage's folders, records the last state that DVC has committed and its entry: a forced rerun, which does not
change dvc.lock, ends as absent and is not mistaken for one that DVC has yet to commit.
"""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bingo.params import read_yaml
from bingo.runtime.artefacts import errors_named, fingerprint, read_json, write_json
from bingo.runtime.errors import INTERRUPTED, UserError

_FINISHED, _COMMITTED = "finished.json", "committed.json"


@contextmanager
def state_folder(stage: str, values: dict[str, Any]) -> Iterator[Path]:
    """Context manager with the locked folder of an unfinished stage, named after a hash of everything its output depends on; a second copy
    of the stage must wait.

    `stage`: STAGE-ITEM if dvc.yaml has items, because `sweep` records a commit once for each name.
    The folder is in the original repository even if DVC runs an experiment elsewhere, so that a second run finds the checkpoint.
    It is removed when the work is done: at once, or, if DVC started the stage, when DVC has recorded its outputs (`sweep`).
    """
    folder = state_root() / stage / fingerprint(values)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        first = os.environ.get("RANK", "0") == "0"
        if first:
            _begin(folder, stage, lock)
        with errors_named(folder):
            yield folder
        if first:
            _end(folder)


def _begin(folder: Path, stage: str, lock: IO[str]) -> None:
    """Absent, stopped or finished -> running. Exits if another process holds the lock."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f"error: another {stage} with the same parameters holds {folder}; wait for it or end it", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    (folder / _FINISHED).unlink(missing_ok=True)


def _end(folder: Path) -> None:
    """Running -> absent or finished: the stage's outputs are complete."""
    committed, stage = folder.parent / _COMMITTED, os.environ.get("DVC_STAGE")
    entry = _entry(stage) if stage else None
    known = committed.exists() and read_json(committed) == {"state": folder.name, "entry": entry}
    if stage is None or known:
        _remove(folder)
    else:
        write_json(folder / _FINISHED, {"stage": stage, "entry": entry, "workspace": str(Path.cwd())})


def sweep() -> None:
    """Finished -> absent, for all stages whose outputs DVC has committed; also remove the remains of an interrupted removal."""
    for leftover in state_root().glob("*/.*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    for mark in state_root().glob(f"*/*/{_FINISHED}"):
        try:
            finished = read_json(mark)
        except UserError:
            if mark.exists():
                raise
            continue  # a sweep of another workspace that shares this folder was faster
        if Path(finished["workspace"]) == Path.cwd() and (entry := _entry(finished["stage"])) != finished["entry"]:
            write_json(mark.parent.parent / _COMMITTED, {"state": mark.parent.name, "entry": entry})
            _remove(mark.parent)
        elif not Path(finished["workspace"]).exists():
            _remove(mark.parent)


def _remove(folder: Path) -> None:
    """Delete a state atomically, because a checkpoint without its weights would be considered damaged."""
    leftover = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(leftover, ignore_errors=True)
    with suppress(OSError):
        os.replace(folder, leftover)
    shutil.rmtree(leftover, ignore_errors=True)


def _entry(stage: str) -> str | None:
    """A digest of a stage's entry in dvc.lock; None if there is none."""
    try:
        entry = read_yaml("dvc.lock")["stages"][stage]
    except (UserError, KeyError, TypeError):  # there is none, or it is in conflict
        return None
    return fingerprint(entry)


def state_root() -> Path:
    """The folder of all states, shared by the repository and its experiments."""
    return Path(os.environ.get("BINGO_STATE_DIR") or Path(os.environ.get("DVC_ROOT", ".")) / ".bingo/state")
