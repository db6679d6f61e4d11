"""One or several processes, as set by the environment. The topology is neither a parameter nor part of a command, so it changes no hash.

BINGO_PROCESSES: processes on each machine (default: one for each GPU). BINGO_LAUNCH: further arguments of torchrun, for example
"--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=host:29400" (default: one machine). BINGO_LAUNCH_PREFIX: a command that runs its
arguments on every machine, for example "srun --ntasks-per-node=1" (default: none, which runs only here). See docs/clusters.md.
"""

import os
import re
import shlex
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from bingo.pipeline.process import die_with_parent, mistakes_as_lines
from bingo.runtime.errors import FAILED, INTERRUPTED, USER_MISTAKE, UserError


def launch(stage: str, *arguments: str) -> None:
    """Replace this process by torchrun if several processes are requested; return if this process is to do the work."""
    if "LOCAL_RANK" in os.environ:
        return
    prefix, extra = _words("BINGO_LAUNCH_PREFIX", "a command"), _words("BINGO_LAUNCH", "arguments of torchrun")
    if prefix and not extra:
        way_out = "set BINGO_LAUNCH to connect them, for example --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400"
        raise UserError(f"BINGO_LAUNCH_PREFIX = {shlex.join(prefix)}: would start one group on each machine; {way_out}")
    processes = _processes()
    if processes == 1 and not extra:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    meeting = f"--rdzv-id={'-'.join([stage, *arguments])}"  # so that a machine that is still at another stage does not join
    torchrun = [meeting, *(extra or ["--standalone"]), f"--nproc-per-node={processes}", "-m", f"stages.{stage}", *arguments]
    command = [*prefix, sys.executable, "-m", "bingo.pipeline.launch", *torchrun]
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise UserError(f"BINGO_LAUNCH_PREFIX = {shlex.join(prefix)}: cannot be started ({error.strerror}); give a command") from None


def expected_processes() -> int:
    """Number of processes of a training, as far as it is known without torch: from the environment and this machine's GPUs."""
    wanted, here = os.environ.get("BINGO_PROCESSES", ""), 1
    if wanted.isdecimal():
        here = max(1, int(wanted))
    elif not wanted and os.environ.get("BINGO_DEVICE") != "cpu":
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        here = max(1, len(list(Path("/dev").glob("nvidia[0-9]*"))) if seen is None else len([gpu for gpu in seen.split(",") if gpu]))
    machines = re.search(r"--nnodes[= ](?:\d+:)?(\d+)", os.environ.get("BINGO_LAUNCH", ""))
    return here * max(1, int(machines[1]) if machines else 1)


def _words(variable: str, wanted: str) -> list[str]:
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise UserError(f"{variable} = {os.environ[variable]}: {error}; give {wanted}") from None


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


def run_torchrun(arguments: list[str]) -> int:
    """Run torchrun here and return the exit code of the process that failed first, which has already printed its error."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main

    # Each round of a group gets its own store. The launcher's, which would be shared, still holds the addresses of the previous round,
    # and a restarted process may try to connect to one of them for half an hour (pytorch/pytorch issue 135712).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    logging.disable(logging.ERROR)  # the launcher's own reports, which are summarised below in one line
    given = os.environ.get("BINGO_LAUNCH", "")
    try:
        _check(arguments)
        main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: process {rank} was killed by {failure.signal_name()}; start again to resume", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else FAILED
    except RendezvousError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(
            f"error: BINGO_LAUNCH = {given}: the machines could not connect ({reason}); start the same command on each of them",
            file=sys.stderr,
        )
        return FAILED
    except SignalException:
        return INTERRUPTED
    except (ValueError, LookupError, OSError, ImportError) as error:
        if not _in_preparation(error):
            raise
        print(f"error: BINGO_LAUNCH = {given}: {' '.join(str(error).split())}; give arguments of torchrun", file=sys.stderr)
        return USER_MISTAKE
    return 0


def _in_preparation(error: Exception) -> bool:
    """Whether torchrun raised this while it processed its arguments, for example because of an invalid address, log folder or backend;
    errors that it raises while it starts and monitors processes have other reasons."""
    names = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    return "_invoke_run" not in names or "reify" in names  # the agent's loop; in it, the making of log folders


def _check(arguments: list[str]) -> None:
    """Raise ValueError with torchrun's message for invalid arguments, for which torchrun would print its whole usage, or a traceback."""
    from torch.distributed import run

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    parser = run.get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    try:
        parsed = parser.parse_args(arguments)
        if not parsed.training_script.startswith("stages."):
            refuse(f"{parsed.training_script} is none")
        run.config_from_args(parsed)
    except SystemExit:  # --help, which it prints
        raise ValueError("they only request help") from None
    except (AssertionError, RuntimeError, OSError, LookupError) as error:
        raise ValueError(str(error)) from None


if __name__ == "__main__":
    die_with_parent()  # of a prefix, which may be ended before the command it runs
    with mistakes_as_lines():
        raise SystemExit(run_torchrun(sys.argv[1:]))
