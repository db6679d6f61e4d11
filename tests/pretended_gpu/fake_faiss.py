"""FAISS's GPU functions without a GPU: NumPy searches, and resources, devices and simultaneous use are recorded.

It replaces faiss.knn_gpu, K-means with gpu=... and copying of an index to GPUs, with FAISS's checks of arguments. Rows in float16 are
rounded as in FAISS, so that near-duplicates change places; a GPU sums in another order and may round more.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Lock
from unittest import mock

import faiss
import numpy as np
from faiss import extra_wrappers, gpu_wrappers

from bingo.runtime.gpus import faiss_resources

MOST_NEIGHBOURS = 2048  # GPU_MAX_SELECTION_K of faiss/gpu/impl/IndexUtils.h
SCRATCH_BYTES = 1536 << 20  # of a set of resources on each GPU where it is used, faiss/gpu/StandardGpuResources.cpp


class FakeResources:
    """faiss.StandardGpuResources: memory and streams on each GPU that it is used on; two threads must not use it at once."""

    def __init__(self, calls: "GpuCalls"):
        self.scratch_bytes, self.in_use = SCRATCH_BYTES, Lock()
        calls.resources.append(self)

    def setTempMemory(self, size_bytes: int) -> None:
        """As in FAISS."""
        self.scratch_bytes = size_bytes

    def noTempMemory(self) -> None:
        """As in FAISS."""
        self.scratch_bytes = 0


@dataclass
class GpuCalls:
    """`resources`: all sets that were created. `used`: for each GPU the sets used on it. `searches`: for each GPU the shapes (queries,
    rows, k) of its searches. `indexes`: for each GPU the number of indexes copied to it (K-means copies one)."""

    gpus: int
    resources: list[FakeResources] = field(default_factory=list)
    used: dict[int, set[FakeResources]] = field(default_factory=lambda: defaultdict(set))
    searches: dict[int, list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))
    indexes: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def devices(self) -> set[int]:
        """The GPUs that were used."""
        return set(self.used)

    def scratch_bytes(self, gpu: int) -> int:
        """Scratch memory of all sets of resources on one GPU."""
        return sum(resources.scratch_bytes for resources in self.used[gpu])

    def use(self, resources: FakeResources, gpu: int) -> None:
        """Record the use of a set on a GPU."""
        assert isinstance(resources, FakeResources), f"{type(resources).__name__} is not a set of GPU resources"
        if not 0 <= gpu < self.gpus:
            raise RuntimeError(f"Error: 'device >= 0 && device < getNumDevices()' failed: invalid device {gpu}")
        self.used[gpu].add(resources)

    def knn_gpu(self, res, xq, xb, k, metric, device=-1, vectorsMemoryLimit=0, queriesMemoryLimit=0):
        """faiss.knn_gpu for inner products, highest first, with equal ones in any order."""
        assert metric == faiss.METRIC_INNER_PRODUCT, "only inner products are implemented"
        gpu = 0 if device == -1 else device
        self.use(res, gpu)
        if k > MOST_NEIGHBOURS:
            raise RuntimeError(f"Error: GPU index only supports min/max-K selection up to {MOST_NEIGHBOURS} (requested {k})")
        for name, x in (("xq", xq), ("xb", xb)):
            if x.dtype not in (np.float16, np.float32):
                raise TypeError(f"{name} must be float32 or float16")
        if not res.in_use.acquire(blocking=False):
            raise RuntimeError("a set of GPU resources is used by two threads at once")
        try:
            self.searches[gpu].append((len(xq), len(xb), k))
            return _nearest(xq.astype(np.float32) @ xb.astype(np.float32).T, k)
        finally:
            res.in_use.release()

    def copied(self, index: faiss.Index, resources: list[FakeResources], gpus: list[int]) -> faiss.Index:
        """An index on some GPUs: the same index, on the CPU."""
        for one, gpu in zip(resources, gpus, strict=True):
            self.use(one, gpu)
            self.indexes[gpu] += 1
        return index


def _nearest(scores_QN: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores float32 (Q, k), places int64 (Q, k)); -1 and the smallest float32 where there are too few rows."""
    places_QK = np.argsort(-scores_QN, axis=1)[:, :k]
    best_QK = np.take_along_axis(scores_QN, places_QK, axis=1)
    missing = ((0, 0), (0, k - places_QK.shape[1]))
    lowest = np.finfo(np.float32).min
    return np.pad(best_QK, missing, constant_values=lowest), np.pad(places_QK.astype(np.int64), missing, constant_values=-1)


@contextmanager
def fake_faiss_gpus(gpus: int) -> Iterator[GpuCalls]:
    """In the body FAISS has `gpus` GPUs (0: none), which the process has not used yet."""
    calls = GpuCalls(gpus)
    replaced = {
        "get_num_gpus": lambda: gpus,
        "StandardGpuResources": lambda: FakeResources(calls),
        "knn_gpu": calls.knn_gpu,
        "index_cpu_to_gpu": lambda res, device, index, options=None: calls.copied(index, [res], [device]),
        "index_cpu_to_gpu_multiple_py": lambda resources, index, co=None, gpus=None: calls.copied(
            index, list(resources), list(range(len(resources)) if gpus is None else gpus)
        ),
    }  # fmt: skip
    with ExitStack() as patches:
        for module in (faiss, extra_wrappers, gpu_wrappers):  # they contain the functions that they call under their own names
            known = {name: value for name, value in replaced.items() if hasattr(module, name)}
            patches.enter_context(mock.patch.multiple(module, **known))
        faiss_resources.cache_clear()
        patches.callback(faiss_resources.cache_clear)
        yield calls
