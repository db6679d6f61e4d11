"""One process or many, by the environment alone: the topology is in no parameter and no command line, so it changes no hash.

BINGO_PROCESSES: processes on this machine (default: one for each GPU). BINGO_LAUNCH: further arguments of torchrun, for example
"--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=host:29400" (default: one machine).
"""

import os
import shlex
import sys

from bingo.errors import UserError


def launch(stage: str, *arguments: str) -> None:
    """Become torchrun where several processes are wanted; return where this process is to do the work."""
    if "LOCAL_RANK" in os.environ:
        return
    extra = shlex.split(os.environ.get("BINGO_LAUNCH", ""))
    processes = _processes()
    if processes == 1 and not extra:
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", *(extra or ["--standalone"])]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.execv(sys.executable, [*torchrun, f"--nproc-per-node={processes}", "-m", f"stages.{stage}", *arguments])


def _processes() -> int:
    wanted = os.environ.get("BINGO_PROCESSES")
    if wanted is None:
        if os.environ.get("BINGO_DEVICE") == "cpu" or not os.path.exists("/dev/nvidiactl"):  # noqa: PTH110 - no torch needed to know
            return 1
        import torch

        return max(1, torch.cuda.device_count())
    if not wanted.isdigit() or int(wanted) < 1:
        raise UserError(f"BINGO_PROCESSES = {wanted}: allowed is a whole number from 1")
    return int(wanted)
