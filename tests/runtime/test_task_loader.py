"""The loader of tasks: results in memory that is used again are right for as long as they may be used."""

import os
import random
from pathlib import Path

import pytest
import torch

from bingo.runtime.task_loader import Empty, TaskLoader, Work

AHEAD, WORKERS = 2, 2


class Filled(Work):
    """Parts of the lengths that a task lists, filled with its first number; the worker's process; and how many slots it has."""

    def result(self, task: tuple[int, list[int]], empty: Empty) -> tuple[list[torch.Tensor], int, int]:
        number, lengths = task
        return [empty(2, length).fill_(number) for length in lengths], os.getpid(), len(self._slots)


def check(parts: list[torch.Tensor], task: tuple[int, list[int]]) -> None:
    """Shapes and values."""
    number, lengths = task
    assert [part.shape for part in parts] == [(2, length) for length in lengths]
    assert all(bool((part == number).all()) for part in parts)


@pytest.mark.slow
def test_results_are_whole_until_the_next_item_however_large_they_and_the_items_are():
    """Items of 0 to 9 tasks, parts of 0 to 50,000 bytes, a pass that is given up: many more results than there is memory for."""
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
    """Two items, kept."""
    tasks = [(number, [3, 0]) for number in range(4)]
    kept = list(TaskLoader(Filled(), 0, AHEAD, pin=False).results((None, [task]) for task in tasks))
    for (_, [(parts, pid, _)]), task in zip(kept, tasks, strict=True):
        check(parts, task)
        assert pid == os.getpid()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_that_another_one_replaced_neither_takes_its_results_nor_ends_it(workers: int):
    """The first pass is asked for more, which closes it, while the second is running."""
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
