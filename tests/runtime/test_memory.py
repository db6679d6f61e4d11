"""Freed memory, seen from outside: the resident memory of a process of its own."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import numpy as np
from bingo.runtime.memory import keep_freed_memory, release_freed_memory

def resident_mb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

keep_freed_memory()
x, above = np.ones(100 << 17), np.ones(1 << 17)  # 100 MB, and a block above it that stays
used = resident_mb()
del x
kept = resident_mb()
release_freed_memory()
print(used - kept, used - resident_mb())
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="needs glibc")
def test_freed_memory_is_kept_until_it_is_released():
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout.split()
    assert float(found[0]) < 10
    assert 90 < float(found[1]) < 110
