"""How the building of bags is shared: one process does it alone, or the processes of a group take blocks of rows until none are left.

The result of a block is a file in a folder that all processes see. So no process holds the results of the others, a slow process delays
the others by one block at most, and an interrupted search resumes with the missing blocks. Cosines do not depend on blocks
(see bingo.bags.neighbors), so the bags are those of one process. Two kinds of work are divided differently:
  queries of all rows   by queries: each process needs the whole base;
  a few queries         by rows of the base: each process reads only its blocks (`Sharing.nearest`).
For K-means, each process holds a span of the training rows, and sums pass through the processes in turn (`in_turn`).
"""

import io
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bingo.bags.neighbors import Blocks, Found, best_of, cut, search_blocks, top_k
from bingo.bags.rows import Chosen, Rows
from bingo.runtime.artefacts import taken_first, write_bytes
from bingo.runtime.errors import UserError

_TAKEN = "taken"  # folder of files, one for each block that a process has taken
_BLOCKS_A_PROCESS = 4  # a slow process delays the others by a quarter of its share
_LEAST_BLOCKS, _MOST_QUERIES = 64, 131072  # of a search of all rows among all, which may take hours


class Sharing:
    """The processes of this run. All of them call the same methods in the same order. `folder` is where blocks are stored, to which only
    the group writes (None: this process works alone, and stores nothing). Results are None on all but the first process, unless they are
    documented as returned everywhere."""

    def __init__(self, folder: Path | None = None):
        self._folder, self._processes, self._rank = folder, 1, 0
        if folder is not None:
            from bingo.runtime import distributed

            self._processes, self._rank = distributed.world(), distributed.rank()
            if self._rank == 0:
                shutil.rmtree(folder / _TAKEN, ignore_errors=True)
                (folder / _TAKEN).mkdir(parents=True)
        self._wait()

    @property
    def first(self) -> bool:
        """Whether this process is the first, which gets the results."""
        return self._rank == 0

    def _wait(self) -> None:
        if self._processes > 1:
            from bingo.runtime import distributed

            distributed.barrier()

    def parts(self, rows: int, multiple: int = 1, least: int = 1, most_rows: int | None = None) -> list[slice]:
        """Divide `rows` rows into blocks of a multiple of `multiple` rows and of at most `most_rows`: at least four for each process if
        there are several, and at least `least`."""
        blocks = max(least, _BLOCKS_A_PROCESS * self._processes if self._processes > 1 else 1)
        return cut(slice(0, rows), min(most_rows or rows, multiple * -(-rows // (blocks * multiple))))

    def all_nearest(self, name: str, features: Rows, k: int, by_graph: bool = False) -> Found | None:
        """`top_k` of all rows among all rows, excluding each row itself; `by_graph`: see `search_blocks`."""
        parts = self.parts(len(features), least=_LEAST_BLOCKS, most_rows=_MOST_QUERIES)
        return self._search(name, parts, features, features, k, np.arange(len(features)), by_graph=by_graph)

    def nearest_centroid(self, name: str, features: Rows, centroids_CD: np.ndarray) -> np.ndarray:
        """The row of `top_k` with k = 1 for each row of the features, int32 (T,), everywhere."""
        found = self._search(name, self.parts(len(features)), features, centroids_CD, 1, everywhere=True)
        assert found is not None
        return found[0][:, 0]

    def _search(
        self,
        name: str,
        parts: list[slice],
        queries: Rows,
        base: Rows,
        k: int,
        query_rows_Q: np.ndarray | None = None,
        everywhere: bool = False,
        by_graph: bool = False,
    ) -> Found | None:
        if self._folder is None:
            whole = Blocks(len(queries), k)
            search_blocks(whole, queries, base, k, query_rows_Q, by_graph=by_graph)
            return whole.found
        task = _BlockFiles(self._folder / name, parts)
        if task.missing():
            search_blocks(task, queries, base, k, query_rows_Q, by_graph=by_graph)
        found = self._result(task, everywhere)
        return None if found is None else (found[0], found[1])

    def nearest(
        self,
        name: str,
        queries_QD: np.ndarray,
        base: Rows,
        k: int,
        query_rows_Q: np.ndarray | None = None,
        floor_Q: np.ndarray | None = None,
    ) -> Found:
        """`top_k` of a few queries, everywhere."""
        if self._folder is None:
            return top_k(queries_QD, base, k, query_rows_Q, floor_Q=floor_Q)
        own_Q = np.full(len(queries_QD), -1) if query_rows_Q is None else query_rows_Q

        def among(block: slice) -> Found:
            rows = base[block] if isinstance(base, np.ndarray) else Chosen(base, np.arange(block.start, block.stop))
            inside_Q = np.where((own_Q >= block.start) & (own_Q < block.stop), own_Q - block.start, -1)
            rows_QK, cosines_QK = top_k(queries_QD, rows, k, inside_Q, floor_Q=floor_Q)
            return np.where(rows_QK >= 0, rows_QK + block.start, -1).astype(np.int32), cosines_QK

        task = _BlockFiles(self._folder / name, self.parts(len(base)))
        task.run(among)
        self._wait()
        rows_QM, cosines_QM = (np.concatenate(found, axis=1) for found in zip(*(task.read(block) for block in task.parts), strict=True))
        return best_of(rows_QM, cosines_QM, k)

    def of_rows(
        self, name: str, parts: list[slice], work: Callable[[slice], tuple[np.ndarray, ...]], everywhere: bool = False
    ) -> tuple[np.ndarray, ...] | None:
        """The arrays that `work` returns for consecutive blocks of rows, concatenated; for all rows at once if nothing is stored."""
        if self._folder is None:
            return work(slice(0, parts[-1].stop))
        task = _BlockFiles(self._folder / name, parts)
        task.run(work)
        return self._result(task, everywhere)

    def once(self, name: str, work: Callable[[], tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        """The result of `work` on the first process, returned everywhere. It is stored, and read by a resumed run, because on a GPU
        `work` would not give the same result again."""
        if self._folder is None:
            return work()
        task = _BlockFiles(self._folder / name, [slice(0, 1)])
        missing = task.missing()
        self._wait()  # no process writes before all have looked
        if missing and (found := work()) and self.first:
            task.keep(task.parts[0], found)
        self._wait()
        return task.read(task.parts[0])

    def _result(self, task: "_BlockFiles", everywhere: bool) -> tuple[np.ndarray, ...] | None:
        self._wait()
        return task.result() if everywhere or self.first else None

    def span(self, rows: int, multiple: int) -> tuple[int, int]:
        """The first row of this process's share of consecutive rows, and the row after its last. Shares begin at multiples of `multiple`;
        the last is not shorter than that if there are enough rows."""
        blocks = max(1, rows // multiple)
        first, end = (multiple * (blocks * rank // self._processes) for rank in (self._rank, self._rank + 1))
        return first, rows if self._rank == self._processes - 1 else end

    def in_turn(self, x: np.ndarray, work: Callable[[np.ndarray], None]) -> np.ndarray:
        """`x` of the first process after every process has worked on it in place, in their order; returned everywhere."""
        if self._processes == 1:
            work(x)
            return x
        import torch

        from bingo.runtime import distributed

        distributed.in_turn(torch.from_numpy(x), lambda: work(x))
        return x


class _BlockFiles(Blocks):
    """Blocks of a group of processes, each of which is a file in `folder`."""

    def __init__(self, folder: Path, parts: list[slice]):
        self.parts, self._folder = parts, folder

    def _file(self, block: slice) -> Path:
        return self._folder / f"{block.start}-{block.stop}.npz"

    def missing(self) -> bool:
        """Whether a block is missing."""
        return not all(self._file(block).exists() for block in self.parts)

    def blocks(self, most_rows: int) -> list[slice]:
        return self.parts

    def take(self, number: int, worker: int, workers: int) -> bool:
        """Whether this process is the first of the group to take a missing block."""
        block, marks = self.parts[number], self._folder.parent / _TAKEN
        return not self._file(block).exists() and taken_first(marks / f"{self._folder.name}-{block.start}")

    def keep(self, block: slice, found: tuple[np.ndarray, ...]) -> None:
        """Write the arrays of a block, each with a CRC."""
        content = io.BytesIO()
        np.savez(content, *found)
        write_bytes(self._file(block), content.getvalue())

    def run(self, work: Callable[[slice], tuple[np.ndarray, ...]]) -> None:
        """Work on the blocks that this process takes."""
        for number, block in enumerate(self.parts):
            if self.take(number, 0, 1):
                self.keep(block, work(block))

    def read(self, block: slice) -> tuple[np.ndarray, ...]:
        """The arrays of a block. Raises UserError if its file is damaged."""
        try:
            with open(self._file(block), "rb") as file, np.load(file) as arrays:
                return tuple(arrays[name] for name in arrays.files)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{self._file(block)}: is damaged ({error}); delete it and run: dvc repro bag") from None

    def result(self) -> tuple[np.ndarray, ...]:
        """The arrays of all blocks, concatenated."""
        whole: tuple[np.ndarray, ...] = ()
        for block in self.parts:
            found = self.read(block)
            whole = whole or tuple(np.empty((self.parts[-1].stop, *x.shape[1:]), x.dtype) for x in found)
            for x, part in zip(whole, found, strict=True):
                x[block] = part
        return whole


def of_all(block: slice, rows_T: Sequence[int] | np.ndarray) -> str:
    """The description of a block of rows for a progress bar; empty if it has all rows."""
    return "" if block.stop - block.start == len(rows_T) else f" of {block.start:,} to {block.stop - 1:,}"


ALONE = Sharing()
