"""Matrices of features, in memory or read block by block from a store: norms, normalised rows, and the free memory.

Shape letters: N rows, D feature width, n rows of a block or of a selection.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil

from bingo.runtime.progress import progress_bar

_READ_ROWS, _THREAD_ROWS = 8192, 512
_FLOAT32_BYTES = 4
_LEAST_SQUARE = 1e-76  # of the length of a row: 1 / length is less than float32's largest number
_LEAST_BUDGET_BYTES = 256 << 20  # with less, a search would have so many blocks that it would not finish
_OWN_CGROUPS, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class Rows(Protocol):
    """The interface of a matrix (N, D) of any float type that a search needs: a numpy array, or `bingo.runtime.chunks.StoredRows`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


def memory_budget() -> int:
    """Bytes that a stage may use: half of the free memory of this machine or of its control group (containers, SLURM), divided by the
    number of processes on it, at least 256 MiB. It affects only how often a store is read, not results."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of a group, on this machine
    return max(_LEAST_BUDGET_BYTES, min([psutil.virtual_memory().available, *_cgroup_room()]) // 2 // processes)


def _cgroup_room() -> Iterator[int]:
    """Free memory of each control group of this process; its page cache counts as free."""
    try:
        own = {names: path for _, names, path in (line.split(":", 2) for line in _OWN_CGROUPS.read_text().splitlines())}
    except OSError:
        return
    kinds = [("", _CGROUPS, "memory.max", "memory.current", "inactive_file")]
    kinds += [("memory", _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")]
    for names, top, limit, used, cache in kinds:
        folder = Path(own.get(names, "/"))
        for group in (top / level.relative_to("/") for level in (folder, *folder.parents)):
            try:
                most, taken = int((group / limit).read_text()), int((group / used).read_text())
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield most - taken + int(statistics.get(cache, 0))
            except (OSError, ValueError):  # no such group here, or no limit ("max")
                continue


class Chosen:
    """Selected rows of a matrix, read on access."""

    def __init__(self, features: Rows, rows_n: np.ndarray):
        self._features, self._rows_n = features, rows_n
        self.shape, self.dtype = (len(rows_n), features.shape[1]), features.dtype

    def __len__(self) -> int:
        return len(self._rows_n)

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray:
        return self._features[self._rows_n[rows]]


def held(x: Rows, budget_bytes: int) -> Rows:
    """The rows in memory if they and a normalised float32 copy fit the budget, otherwise unchanged."""
    numbers = len(x) * x.shape[1]
    if numbers * (x.dtype.itemsize + _FLOAT32_BYTES) > budget_bytes:
        return x
    with progress_bar("reading the features"):
        return x[:]


def blocks(x: Rows, block_rows: int = _READ_ROWS, first: int = 0, end: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows (n, D)) of every block of a matrix, or of the blocks that hold the rows from `first` to before `end`."""
    for start in range(first // block_rows * block_rows, len(x) if end is None else end, block_rows):
        yield start, x[start : start + block_rows]


def in_threads(work: Callable[[int], None], starts: Sequence[int], threads: int) -> None:
    """Call `work` for every start, in threads, since numpy releases Python's lock."""
    if len(starts) == 1 or threads == 1:
        for start in starts:
            work(start)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, starts))


def in_single_threads(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    """Call `work` for every item, each in a thread that computes all its products alone. Threads that share a product keep the cores busy
    until the next one, and its last bits depend on their number."""
    import faiss
    from threadpoolctl import threadpool_limits

    threads = max(1, min(len(items), faiss.omp_get_max_threads()))
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        list(pool.map(work, items))


def inverse_norms(x: Rows, threads: int = 1) -> np.ndarray:
    """1 / length of each row, float32 (N,), and 0 for a row of zeros or one so short that 1 / length overflows float32. Raises ValueError
    if a number is not finite."""
    inverse_N = np.empty(len(x), np.float32)
    with progress_bar("lengths of the features", len(x), "rows") as bar:
        for first, x_nD in blocks(x):

            def one_part(start: int, first: int = first, x_nD: np.ndarray = x_nD) -> None:
                part_nD = x_nD[start : start + _THREAD_ROWS].astype(np.float64)
                squares_n = np.vecdot(
                    part_nD, part_nD
                )  # a dot product for each row: equal rows have equal norms, independently of their position
                if not np.isfinite(squares_n).all():
                    raise ValueError(f"row {first + start + int((~np.isfinite(squares_n)).argmax())} of the features is not finite")
                long_n = squares_n > _LEAST_SQUARE
                inverse_N[first + start : first + start + len(part_nD)] = np.where(long_n, 1 / np.sqrt(np.where(long_n, squares_n, 1)), 0)

            in_threads(one_part, range(0, len(x_nD), _THREAD_ROWS), threads)
            bar.advance(len(x_nD))
    return inverse_N


def unit_rows(x_ND: np.ndarray, dtype: type = np.float32, inverse_N: np.ndarray | None = None, threads: int = 1) -> np.ndarray:
    """A contiguous copy of the rows, normalised to length 1; rows of zeros stay zeros. Raises ValueError if a number is not finite.

    `inverse_N`: their `inverse_norms`, where they are known.
    """
    known_N = inverse_norms(x_ND, threads) if inverse_N is None else inverse_N
    unit_ND: np.ndarray = np.empty(x_ND.shape, dtype)

    def one_part(start: int) -> None:
        part = slice(start, start + _THREAD_ROWS)
        unit_ND[part] = x_ND[part].astype(np.float32) * known_N[part, None]

    in_threads(one_part, range(0, len(x_ND), _THREAD_ROWS), threads)
    return unit_ND
