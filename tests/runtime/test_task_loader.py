"""The loader of tasks: results in reused memory are correct for as long as they may be used."""

import os
import random
import signal
from pathlib import Path

import pytest
import torch

from bingo.runtime.errors import WorkerLost
from bingo.runtime.task_loader import Empty, TaskLoader, Work
from bingo.runtime.workers import THREADS_UP_TO_FILES, worker_count, worker_pool

AHEAD, WORKERS = 2, 2


class Filled(Work):
    """Parts of the lengths listed in a task, filled with its first number; the worker's process; and its number of slots."""

    def result(self, task: tuple[int, list[int]], empty: Empty) -> tuple[list[torch.Tensor], int, int]:
        number, lengths = task
        return [empty(2, length).fill_(number) for length in lengths], os.getpid(), len(self._slots)


def check(parts: list[torch.Tensor], task: tuple[int, list[int]]) -> None:
    """Check shapes and values."""
    number, lengths = task
    assert [part.shape for part in parts] == [(2, length) for length in lengths]
    assert all(bool((part == number).all()) for part in parts)


@pytest.mark.slow
def test_results_are_unchanged_until_the_next_item_for_all_lengths():
    """Items of 0 to 9 tasks, parts of 0 to 50,000 bytes, and an unfinished pass: many more results than there is memory for."""
    draw, loader, slots, pids = random.Random(0), TaskLoader(Filled(), WORKERS, AHEAD, pin=False), 0, set[int]()
    for last in (40, 3, 40):
        items = [
            [(draw.randrange(256), [draw.choice([0, 1, 50_000]) for _ in range(3)]) for _ in range(draw.randrange(10))] for _ in range(41)
        ]
        for i, (item, found) in enumerate(loader.results((tasks, tasks) for tasks in items)):
            for (parts, pid, count), task in zip(found, item, strict=True):
                check(parts, task)
                slots, pids = max(slots, count), pids | {pid}
            if i == last:
                break
    assert len(pids - {os.getpid()}) == WORKERS
    assert slots <= AHEAD + 1 + 5 + 1, "more than the tasks ahead and those of an item that a worker may have had"
    assert not [file for pid in pids for file in Path("/dev/shm").glob(f"torch_{pid}_*")], "a kill would leave these"


def test_without_workers_every_result_has_its_own_memory():
    """Two items, which are kept."""
    tasks = [(number, [3, 0]) for number in range(4)]
    kept = list(TaskLoader(Filled(), 0, AHEAD, pin=False).results((None, [task]) for task in tasks))
    for (_, [(parts, pid, _)]), task in zip(kept, tasks, strict=True):
        check(parts, task)
        assert pid == os.getpid()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_replaced_pass_neither_takes_results_of_the_new_one_nor_ends_it(workers: int):
    """Asking the first pass for more while the second is running is an error, and closes the first."""
    loader = TaskLoader(Filled(), workers, AHEAD, pin=False)
    first, second = (loader.results((number, [(number, [3])]) for number in range(start, start + 9)) for start in (0, 100))
    next(first)
    numbers = [next(second)[0]]
    with pytest.raises(RuntimeError, match="another one"):
        next(first)
    for number, [(parts, _, _)] in second:
        check(parts, (number, [3]))
        numbers.append(number)
    assert numbers == list(range(100, 109))


class Killing(Work):
    """A task is a signal that the process receives, or 0."""

    def result(self, task: int, empty: Empty) -> torch.Tensor:
        os.kill(os.getpid(), task)
        return empty(9).fill_(task)


@pytest.mark.slow  # torch looks for its workers every 5 seconds
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_killed_worker_is_reported_with_its_signal(number: signal.Signals):
    loader = TaskLoader(Killing(), 1, AHEAD, pin=False)
    results = loader.results((None, [task]) for task in (0, 0, int(number), 0))
    with pytest.raises(WorkerLost, match=number.name):
        list(results)


@pytest.mark.slow
def test_a_pool_that_lost_a_process_is_reported():
    def work() -> None:
        with worker_pool(THREADS_UP_TO_FILES + 1) as pool:
            pool.submit(signal.raise_signal, signal.SIGKILL).result()

    if worker_count() == 0:
        pytest.skip("one processor: there are no processes")
    with pytest.raises(WorkerLost):
        work()
