"""A dataloader whose indices are tasks, given out pass by pass with persistent workers."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, tee
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from bingo.runtime.workers import begin_worker, fork_server, worker_count

Item = TypeVar("Item")


class TaskLoader:
    """Runs tasks in order, some ahead of their use, in `workers` processes (0: in this one, when needed; None: chosen for the machine).

    `dataset[task]` is a task's result; its module is what workers are forked from. `pin`: results are in page-locked memory.
    """

    def __init__(self, dataset: Dataset, workers: int | None, tasks_ahead: int, pin: bool):
        workers = worker_count() if workers is None else workers
        self._feed = _Feed()
        self._loader = DataLoader(
            dataset,
            sampler=self._feed,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=tasks_ahead if workers else None,
            persistent_workers=workers > 0,
            multiprocessing_context=fork_server(type(dataset).__module__) if workers else None,
            worker_init_fn=begin_worker,
            pin_memory=pin,
            generator=torch.Generator(),  # its own, so that torch's global random state does not change
        )

    def results(self, work: Iterable[tuple[Item, Sequence[Any]]]) -> Iterator[tuple[Item, list[Any]]]:
        """One pass: yield each item of `work`, which comes with its tasks, together with their results. `work` is read ahead of use."""
        ahead, here = tee(work)
        self._feed.tasks = (task for _, tasks in ahead for task in tasks)
        try:
            results = iter(self._loader)
            for item, tasks in here:
                yield item, list(islice(results, len(tasks)))
        finally:
            self._feed.tasks = iter(())  # otherwise an abandoned pass is a reference cycle, and the workers end seconds late


class _Feed(Sampler):
    """The tasks of the current pass."""

    def __init__(self) -> None:
        self.tasks: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.tasks)


def _as_it_is(result: Any) -> Any:
    return result
