"""Memory of the host for work on the CPU: what a step gives back, the next one gets without asking the system for it."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_BYTES, LARGEST_KEPT_BYTES = 2**31 - 1, 2**28


def keep_freed_memory() -> None:
    """Let glibc keep blocks of up to 256 MiB that are freed, 2 GiB in all, for the next ones; elsewhere nothing is done.

    By default it gives them back at once, and a step that asks for them again pays for every page: a sixth of the time of a
    ResNet-18's step at 224 px, batch 8, on two cores (benchmarks/RESULTS.md). The most memory that a process holds stays what it was.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
