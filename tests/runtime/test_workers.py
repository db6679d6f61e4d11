"""Work in order by a pool, and what is said of workers that were killed."""

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from bingo.runtime import task_loader, workers
from bingo.runtime.errors import WorkerLost
from bingo.runtime.workers import THREADS_UP_TO_FILES, in_order, worker_count, worker_pool


@pytest.mark.parametrize(("items", "ahead"), [(0, 3), (2, 3), (40, 1), (40, 7)])
def test_results_are_in_order_and_few_wait_for_their_reader(items, ahead):
    begun, read = [], 0
    first_may_end = threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item == 0 and items > 1:
            assert first_may_end.wait(60)  # the first ends after the second
        if item == 1:
            first_may_end.set()
        return item * item

    with ThreadPoolExecutor(2) as pool:
        for result in in_order(pool, work, range(items), ahead):
            assert result == read * read
            assert len(begun) <= read + ahead + 1
            read += 1
    assert (read, sorted(begun)) == (items, list(range(items)))


def test_ways_to_use_less_memory_name_the_number_of_workers_that_they_allow(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with worker_pool(THREADS_UP_TO_FILES + 1) as pool:
        assert isinstance(pool, ProcessPoolExecutor)
        assert f"taskset -c 0-3 allows {pool._max_workers}," in workers._LESS
    assert f"taskset -c 0-3 allows {worker_count()}," in task_loader._LESS


@pytest.mark.parametrize(
    "exit_code", [None, 1, *(-number for number in (signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM))]
)
def test_less_memory_is_advised_only_if_memory_may_have_been_lacking(exit_code):
    line = str(WorkerLost("use less", exit_code))
    assert ("; use less, " in line) == (exit_code in (None, -signal.SIGKILL, -signal.SIGBUS))
    assert (signal.Signals(-exit_code).name if exit_code and exit_code < 0 else "unexpectedly") in line
