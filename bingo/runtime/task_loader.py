"""A dataloader whose indices are tasks, given out pass by pass with persistent workers.

Workers write results into shared memory that is used again: a fresh page costs several times what it costs to write to it.
"""

import math
import multiprocessing
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, tee
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from bingo.runtime.errors import WorkerLost
from bingo.runtime.workers import begin_worker, fork_server, worker_count

Item = TypeVar("Item")
_LESS = "lower the batch, use fewer workers (taskset -c 0-3 allows 3, one less than processors)"
_END_SECONDS = 1  # within which a worker whose connection is lost is known to have ended


class Empty(Protocol):
    """Makes uint8 tensors of a shape, uninitialised."""

    def __call__(self, *shape: int) -> Tensor: ...


class Work(Dataset):
    """What tasks are computed by, in subclasses; the module of a subclass is what workers are forked from."""

    _slots: tuple["_Slot", ...] = ()

    @abstractmethod
    def result(self, task: Any, empty: Empty) -> Any:
        """A task's result, whose large tensors `empty` makes: in a worker, memory that a later task uses again."""

    def __getitem__(self, given: "_Given") -> Any:
        if get_worker_info() is None:
            return self.result(given.task, _empty)
        slot = next((slot for slot in self._slots if slot.task_number < given.released), None)
        if slot is None:
            slot = _Slot()
            self._slots += (slot,)
        slot.begin(given.number)
        return self.result(given.task, slot.empty)


class TaskLoader:
    """Runs tasks in order, some ahead of their use, in `workers` processes (0: in this one, when needed; None: chosen for the machine).

    `pin`: results are in page-locked memory.
    """

    def __init__(self, work: Work, workers: int | None, tasks_ahead: int, pin: bool):
        workers = worker_count() if workers is None else workers
        self._feed, self._pin, self._ahead = _Feed(), pin, workers * tasks_ahead
        self._workers = list[BaseProcess]()
        self._loader = DataLoader(
            work,
            sampler=self._feed,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=tasks_ahead if workers else None,
            persistent_workers=workers > 0,
            multiprocessing_context=fork_server(type(work).__module__) if workers else None,
            worker_init_fn=begin_worker,
            pin_memory=pin,
            generator=torch.Generator(),  # its own, so that torch's global random state does not change
        )

    def results(self, items: Iterable[tuple[Item, Sequence[Any]]]) -> Iterator[tuple[Item, list[Any]]]:
        """One pass: yield each of `items`, which come with their tasks, together with these tasks' results. They are read ahead of use.

        Without `pin`, what was made by `empty` is overwritten once the next item, or another pass, is asked for. The first item of another
        pass ends this one: asking it for more raises RuntimeError, and closing it has no effect. Raises WorkerLost if a worker was killed.
        """
        ahead, here = tee(items)
        own = self._feed.begin(task for _, tasks in ahead for task in tasks)
        mapped = list[Any]()  # here, which costs pages too, as long as workers may use it again
        try:
            results = self._unless_lost(self._begin())
            for item, tasks in here:
                found = []
                for result in islice(results, len(tasks)):
                    found.append(result)
                    self._feed.released += self._pin
                yield item, found
                if self._feed.tasks is not own:
                    raise RuntimeError("this pass has ended, because another one of the same loader has begun")
                if not self._pin:
                    self._feed.released += len(tasks)
                    mapped = [*mapped, *found][-self._ahead - 2 * len(tasks) :]
        finally:
            if self._feed.tasks is own:
                self._feed.begin(())  # otherwise an abandoned pass is a reference cycle, and the workers end seconds late

    def _begin(self) -> Iterator[Any]:
        """The loader's results, which drop what workers still had to do for an abandoned pass."""
        earlier = multiprocessing.active_children()
        results = iter(self._loader)
        self._workers += [process for process in multiprocessing.active_children() if process not in earlier]
        return results

    def _unless_lost(self, results: Iterator[Any]) -> Iterator[Any]:
        """The results; whatever torch raises if a worker has ended becomes WorkerLost."""
        try:
            yield from results
        except (RuntimeError, OSError, EOFError):
            wait([worker.sentinel for worker in self._workers], _END_SECONDS)
            for worker in self._workers:
                if worker.exitcode is not None:
                    raise WorkerLost(_LESS, worker.exitcode) from None
            raise


class _Given(NamedTuple):
    """A task as it is given out: its number, counted over all passes, and how many tasks' results are no longer in use by then."""

    number: int
    released: int
    task: Any


class _Feed(Sampler):
    """The tasks of the current pass."""

    def __init__(self) -> None:
        self.tasks: Iterator[Any] = iter(())
        self._given = self.released = 0

    def begin(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Begin a pass, in which results of earlier ones are not in use, and return its tasks."""
        self.tasks, self.released = iter(tasks), self._given
        return self.tasks

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> _Given:
        task = next(self.tasks)
        self._given += 1
        return _Given(self._given - 1, self.released, task)


class _Slot:
    """A worker's memory for the result of one task at a time, by shared memory without a name, which ends with the processes."""

    def __init__(self) -> None:
        self._parts = list[Tensor]()

    def begin(self, task_number: int) -> None:
        """Forget what the slot holds."""
        self.task_number, self._used = task_number, 0

    def empty(self, *shape: int) -> Tensor:
        """As `Empty`: another part of the slot, made larger if necessary."""
        length = math.prod(shape)
        if self._used == len(self._parts):
            self._parts.append(torch.empty(0, dtype=torch.uint8))
        if len(self._parts[self._used]) < length:
            self._parts[self._used] = _empty(length + length // 4).share_memory_()
        self._used += 1
        return self._parts[self._used - 1][:length].view(shape)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)


def _as_it_is(result: Any) -> Any:
    return result
