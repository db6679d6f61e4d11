"""One process or many, by the environment alone: the topology is in no parameter and no command line, so it changes no hash.

BINGO_PROCESSES: processes on this machine (default: one for each GPU). BINGO_LAUNCH: further arguments of torchrun, for example
"--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=host:29400" (default: one machine).
"""

import os
import shlex
import sys

from bingo.errors import UserError

INTERRUPTED = 75  # the exit code of a stop with a checkpoint, as in stages/common.py


def launch(stage: str, *arguments: str) -> None:
    """Become torchrun where several processes are wanted; return where this process is to do the work."""
    if "LOCAL_RANK" in os.environ:
        return
    try:
        extra = shlex.split(os.environ.get("BINGO_LAUNCH", ""))
    except ValueError as error:
        raise UserError(f"BINGO_LAUNCH = {os.environ['BINGO_LAUNCH']}: {error}; give arguments of torchrun") from None
    processes = _processes()
    if processes == 1 and not extra:
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    torchrun = [*(extra or ["--standalone"]), f"--nproc-per-node={processes}", "-m", f"stages.{stage}", *arguments]
    os.execv(sys.executable, [sys.executable, "-m", "stages.launch", *torchrun])


def _processes() -> int:
    wanted = os.environ.get("BINGO_PROCESSES")
    if wanted is None:
        if os.environ.get("BINGO_DEVICE") == "cpu" or not os.path.exists("/dev/nvidiactl"):  # noqa: PTH110 - no torch needed to know
            return 1
        import torch

        return max(1, torch.cuda.device_count())
    if not wanted.isdecimal() or int(wanted) < 1:
        raise UserError(f"BINGO_PROCESSES = {wanted}: allowed is a whole number from 1")
    return int(wanted)


def _run_torchrun(arguments: list[str]) -> int:
    """Run torchrun here and give the exit code of the process that failed first; what that process had to say it has said itself."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.disable(logging.ERROR)  # the launcher's own reports: what it would say is said below, in one line
    try:
        main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: process {rank} was ended by {failure.signal_name()}; start again to go on", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    raise SystemExit(_run_torchrun(sys.argv[1:]))
