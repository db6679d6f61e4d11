"""The processes that a process has started, from /proc; and processes that start quickly."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

from tests.stage_server import LIBRARIES


def start_two(work: Callable[..., None], *arguments: object) -> None:
    """`start` with two processes."""
    start(2, work, *arguments)


def start(count: int, work: Callable[..., None], *arguments: object) -> None:
    """Run `work(rank, *arguments)` in `count` processes; errors are those of torch.multiprocessing.spawn.

    The processes are forks of one that has imported the large libraries.
    """
    from torch.multiprocessing import start_processes

    multiprocessing.set_forkserver_preload(LIBRARIES)
    start_processes(work, arguments, nprocs=count, start_method="forkserver")


def session(leader: int) -> list[int]:
    """Ids of the running processes in the session of `leader`, including itself; processes in other sessions are not included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(number) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found
