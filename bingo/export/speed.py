"""python -m bingo.export.speed FILE BATCH PX: latency (median) and peak memory of one exported program on the CPU, in a process of its own.

It imports the program's library and nothing else of weight, so that the memory is what a user's process takes, library included.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_SECONDS, _FEWEST, _MOST = 1.0, 3, 200


def main(file: str, batch: str, px: str) -> None:
    """Print both as JSON, in ms and in MB of 2^20 bytes."""
    images_BCPP = np.random.default_rng(0).standard_normal((int(batch), 3, int(px), int(px)), dtype=np.float32)
    run = _program(file)
    run(images_BCPP)
    begun = time.perf_counter()
    times: list[float] = []
    while len(times) < _FEWEST or (time.perf_counter() - begun < _SECONDS and len(times) < _MOST):
        before = time.perf_counter()
        run(images_BCPP)
        times.append(time.perf_counter() - before)
    print(json.dumps({"latency": 1000 * statistics.median(times), "peak memory": _peak_memory_mb()}))


def _program(file: str) -> Callable[[np.ndarray], Any]:
    if file.endswith(".pt2"):
        import torch

        net = torch.export.load(file).module()
        return torch.no_grad()(lambda x_BCPP: net(torch.from_numpy(x_BCPP)))
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda x_BCPP: session.run(None, {"images": x_BCPP})


def _peak_memory_mb() -> float:
    """Linux counts the parent's memory in ru_maxrss, but not in VmHWM."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


if __name__ == "__main__":
    main(*sys.argv[1:])
