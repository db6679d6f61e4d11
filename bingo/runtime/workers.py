"""Worker processes: their number, how they start, and how they end with their owner, even if it is killed."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from typing import TypeVar

from bingo.runtime.errors import FAILED, WorkerLost
from bingo.runtime.memory import keep_freed_memory

MOST_WORKERS = 32
THREADS_UP_TO_FILES = 4096  # processes scale further than threads, but take about a second to start
Item = TypeVar("Item")
Result = TypeVar("Result")
_LESS = "use fewer workers (taskset -c 0-3 allows 8, two per processor)"
KEPT_BYTES = 2**26  # in each worker, enough for a few large images


def worker_count() -> int:
    """Number of workers for this process: its share of the available processors, minus one for itself."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MOST_WORKERS, max(0, allowed // processes - 1))


def fork_server(module: str) -> BaseContext:
    """Fork workers from a clean process that has imported `module`, not from one with a GPU and threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


@contextmanager
def worker_pool(files: int) -> Iterator[Executor]:
    """A pool to read and check files, two workers for each of this process's processors, since half of them may wait for the disk; pending
    work is dropped if the caller stops early. Raises WorkerLost if a process was killed."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool: Executor
    if processors == 1 or files <= THREADS_UP_TO_FILES:
        pool = ThreadPoolExecutor(2 * processors)
    else:
        pool = ProcessPoolExecutor(2 * processors, multiprocessing.get_context("forkserver"), begin_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise WorkerLost(_LESS) from None
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """The results of `work` for each item, in order, like `pool.map`, but at most `ahead` items are begun before their turn; the results of
    a pool that is faster than its reader do not fill the memory."""
    begun: deque[Future[Result]] = deque()
    for item in items:
        begun.append(pool.submit(work, item))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def begin_worker(*_: object) -> None:
    """Called in a new worker: lets it keep freed memory, and starts a thread that ends it when its owner dies.

    A worker is a child of the fork server, not of its owner, and the two keep each other alive; otherwise they would never end.
    """
    keep_freed_memory(KEPT_BYTES)
    if (owner := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_watch, args=(owner.sentinel,), daemon=True).start()


def _watch(sentinel: int) -> None:
    wait([sentinel])
    os._exit(FAILED)
