"""The GPUs that this process may use according to its environment, and FAISS's resources on them. Does not import torch."""

import os
import re
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from bingo.runtime.errors import UserError

_DEVICE_FILES = Path("/dev")


def wanted_device() -> str:
    """BINGO_DEVICE: auto (the default), cpu or cuda. Raises UserError for another value."""
    wanted = os.environ.get("BINGO_DEVICE", "auto")
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"BINGO_DEVICE = {wanted}: allowed are auto, cpu, cuda")
    return wanted


def unusable_gpu(library: str, reason: str = "") -> str | None:
    """A message if this machine has a GPU that `library` does not find, otherwise None; without it, the work could take weeks unnoticed.

    There is a GPU if `reason` says why the library rejects it, or if this process can open its device file (a cluster job may see the
    files of GPUs that are not its own), unless CUDA_VISIBLE_DEVICES hides it.
    """
    if not re.match(r"\d|GPU-|MIG-", os.environ.get("CUDA_VISIBLE_DEVICES", "0")):
        return None
    file = None if reason else _open_device_file()
    found = f"{file} is here, but its driver is too old or missing, or {library} is built without CUDA" if file else reason
    way_out = "update or repair the driver (nvidia-smi shows its state), or set BINGO_DEVICE=cpu to work without it"
    return f"BINGO_DEVICE = {wanted_device()}: {library} cannot use this machine's GPU ({found}); {way_out}" if found else None


def _open_device_file() -> Path | None:
    for file in sorted(_DEVICE_FILES.glob("nvidia[0-9]*")):
        try:
            os.close(os.open(file, os.O_RDWR))
            return file
        except OSError:
            continue
    return None


def faiss_gpus() -> list[int]:
    """The numbers of the GPUs on which FAISS may work: none with BINGO_DEVICE=cpu, this process's own in a group, otherwise all."""
    import faiss

    gpus = range(0 if wanted_device() == "cpu" else faiss.get_num_gpus())
    return [gpu for gpu in gpus if os.environ.get("LOCAL_RANK", str(gpu)) == str(gpu)]


def gpu_unused_by_faiss() -> str | None:
    """A warning if FAISS runs on the CPU although there is a GPU that it is built for and allowed to use; otherwise None."""
    import faiss

    wants = wanted_device() != "cpu" and hasattr(faiss, "StandardGpuResources")
    return unusable_gpu("FAISS") if wants and not faiss_gpus() else None


@cache
def faiss_resources(gpu: int) -> tuple[Any, Lock]:
    """FAISS's streams and 1.5 GB of scratch memory on a GPU, created once, and a lock for them, since only one thread may use them."""
    import faiss

    return faiss.StandardGpuResources(), Lock()
