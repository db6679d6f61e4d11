"""The folder of an unfinished stage: found again after a kill, held by one run at a time, kept until DVC has taken over the outputs.

DVC puts outputs into its cache after the stage has ended, and if it is killed before dvc.lock names them, it deletes them and runs the
stage again. So what DVC runs leaves its state with a mark that it is finished, and the next stage to start removes it if dvc.lock has
changed its mind about that stage since. No stage's output depends on this file.
"""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bingo.params import read_yaml
from bingo.runtime.artefacts import errors_named, fingerprint, read_json, write_json
from bingo.runtime.errors import INTERRUPTED, UserError

_FINISHED, _COMMITTED = "finished.json", "committed.json"


@contextmanager
def state_folder(stage: str, values: dict[str, Any]) -> Iterator[Path]:
    """The folder of an unfinished stage, named by what decides its output, and locked: no second copy may work beside the first.

    `stage`: STAGE-ITEM where dvc.yaml has items, as what `sweep` notes of a commit is noted once for each name.
    It lies under the original repository even where DVC runs an experiment elsewhere, so that a second run finds the checkpoint.
    It goes when the work is done: at once, or where DVC started the stage, when its outputs are in DVC's hands (`sweep`).
    """
    folder = _root() / stage / fingerprint(values)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        first = os.environ.get("RANK", "0") == "0"
        if first:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                print(f"error: another {stage} with the same parameters holds {folder}; wait for it or end it", file=sys.stderr)
                raise SystemExit(INTERRUPTED) from None
            (folder / _FINISHED).unlink(missing_ok=True)
        with errors_named(folder):
            yield folder
        if first:
            _finish(folder)


def sweep() -> None:
    """Remove the state of finished stages whose outputs DVC has committed, and what an interrupted removal left."""
    for leftover in _root().glob("*/.*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    for mark in _root().glob(f"*/*/{_FINISHED}"):
        try:
            finished = read_json(mark)
        except UserError:
            if mark.exists():
                raise
            continue  # a sweep of another workspace, which has this folder of states too, was faster
        if Path(finished["workspace"]) == Path.cwd() and (entry := _entry(finished["stage"])) != finished["entry"]:
            # so that a forced rerun, which leaves dvc.lock as it is, is not taken for one that DVC has not committed
            write_json(mark.parent.parent / _COMMITTED, {"state": mark.parent.name, "entry": entry})
            _remove(mark.parent)
        elif not Path(finished["workspace"]).exists():  # a temporary one of an experiment
            _remove(mark.parent)


def _finish(folder: Path) -> None:
    """The stage's outputs are whole: mark the state as finished where DVC is to commit them, or remove it."""
    committed, stage = folder.parent / _COMMITTED, os.environ.get("DVC_STAGE")
    entry = _entry(stage) if stage else None
    known = committed.exists() and read_json(committed) == {"state": folder.name, "entry": entry}
    if stage is None or known:
        _remove(folder)
    else:
        write_json(folder / _FINISHED, {"stage": stage, "entry": entry, "workspace": str(Path.cwd())})


def _remove(folder: Path) -> None:
    """Delete a state, which is gone at once or not at all: a checkpoint without its weights would be taken for a damaged one."""
    leftover = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(leftover, ignore_errors=True)
    with suppress(OSError):
        os.replace(folder, leftover)
    shutil.rmtree(leftover, ignore_errors=True)


def _entry(stage: str) -> str | None:
    """What dvc.lock says of a stage, in short; None where it says nothing."""
    try:
        entry = read_yaml("dvc.lock")["stages"][stage]
    except (UserError, KeyError, TypeError):  # there is none, or it is in conflict
        return None
    return fingerprint(entry)


def _root() -> Path:
    return Path(os.environ.get("BINGO_STATE_DIR") or Path(os.environ.get("DVC_ROOT", ".")) / ".bingo/state")
