"""One process of a command: errors in one line each, exit codes, and termination with the process that started it.

No stage's output depends on this file.
"""

import ctypes
import errno
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bingo.runtime.artefacts import NotWritten
from bingo.runtime.errors import FAILED, INTERRUPTED, USER_MISTAKE, GroupLost, Interrupted, UserError, WorkerLost, out_of_memory, printable

# How long a process of a group waits before it prints an error. In this time the launcher, which sees the first process fail, ends the
# others. A process that has lost the others waits longer, until the launcher has acted, which takes long on a busy machine.
OTHERS_WAIT_SECONDS, LOST_WAIT_SECONDS = 2, 5
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def is_first() -> bool:
    """Whether this is the first process of its group, or the only one; only the first prints and writes."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def mistakes_as_lines(stage: str | None = None) -> Iterator[None]:
    """Print a UserError's lines and exit with code 2; exit with 75 if the stage was stopped with a checkpoint, and with 1 and one line,
    which names the stage, if a worker process was killed.

    Of several processes, only the one that failed first reports the error; the others usually fail because of it, or find the same error.
    """
    try:
        yield
    except UserError as error:
        print_lines([_with_the_way_in(line) for line in error.lines])
        raise SystemExit(USER_MISTAKE) from None
    except OSError as error:
        if error.errno is None or (error.errno not in (*NO_ROOM, *NO_RIGHT) and not isinstance(error, NotWritten)):
            raise
        way_out = "free some space" if error.errno in NO_ROOM else "fix the permissions" if error.errno in NO_RIGHT else "make it writable"
        print_lines([f"{error.filename or Path.cwd()}: {os.strerror(error.errno)}; {way_out}, and start again: finished work is kept"])
        raise SystemExit(USER_MISTAKE) from None
    except Interrupted as error:
        if is_first():
            print(error, file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except GroupLost as error:
        time.sleep(LOST_WAIT_SECONDS)
        while any(map(_has_ended, error.peers)):  # the launcher also sees this, and ends this process
            time.sleep(LOST_WAIT_SECONDS)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}; start again to resume", file=sys.stderr, flush=True)
        raise SystemExit(FAILED) from None
    except WorkerLost as error:
        print_lines([f"{stage}: {error}; start again to resume" if stage else str(error)])
        raise SystemExit(FAILED) from None
    except Exception as error:
        if line := out_of_memory(error):
            print_lines([line])
            raise SystemExit(USER_MISTAKE) from None
        _let_the_first_speak()
        raise


def _has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _with_the_way_in(line: str) -> str:
    """A line that reports a missing artefact, with a hint if the current folder is not in a workspace."""
    if Path("params.yaml").exists() or not re.match(r"(data|models|reports)/\S+: .*does not exist", line):
        return line
    return f"{line}, but first change into the workspace: {Path.cwd()} is not in a folder with params.yaml"


def _let_the_first_speak() -> None:
    if not is_first():
        time.sleep(OTHERS_WAIT_SECONDS)


def print_lines(lines: Sequence[str], word: str = "error") -> None:
    """Print errors, which are usually the same on all processes."""
    _let_the_first_speak()
    print("\n".join(f"{word}: {printable(line)}" for line in lines), file=sys.stderr, flush=True)


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, so that a killed `dvc` does not leave a training behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if _is_orphan():  # the parent was killed before this line
            print("error: the dvc that started this stage has ended; start again", file=sys.stderr, flush=True)
            raise SystemExit(INTERRUPTED)


def _is_orphan() -> bool:
    """Whether DVC started this process and its parent is now process 1, which in a container may be DVC itself."""
    if "DVC_STAGE" not in os.environ or "RANK" in os.environ or os.getppid() != 1:  # a rank's parent is torchrun
        return False
    try:
        name = Path("/proc/1/comm").read_text().strip()
    except OSError:  # hidden: another user's
        return True
    return name != "dvc" and not name.startswith("python")
