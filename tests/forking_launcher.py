"""`python -m bingo.pipeline.launch` with forks of this process instead of new processes: 0.5 s instead of 5 s each.

python -m forking_launcher TORCHRUN'S ARGUMENTS. Each process writes its id to `rank-N.pid`. FAIL_ON_RANK: the process of this rank raises a
UserError at the end of its first epoch, or when it stores its first block of bags. SLOW_RANK: the process of this rank takes half a second
longer for each.
"""

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from torch.distributed import run

from bingo.bags import sharing
from bingo.pipeline.launch import run_torchrun
from bingo.runtime.errors import UserError
from bingo.training import loop as train


def stage(module: str, *arguments: str) -> None:
    """Run a stage as one process of the group."""
    rank = os.environ["RANK"]
    Path(f"rank-{rank}.pid").write_text(str(os.getpid()))
    if os.environ.get("FAIL_ON_RANK") == rank:
        train.Trainer._end_epoch = sharing._BlockFiles.keep = fail  # type: ignore[method-assign]
    if os.environ.get("SLOW_RANK") == rank:
        keep = sharing._BlockFiles.keep
        sharing._BlockFiles.keep = lambda *given: (time.sleep(0.5), keep(*given))[1]  # type: ignore[method-assign]
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        if left.code:
            raise


def fail(*_: Any) -> None:
    """Replaces the end of an epoch."""
    raise UserError(f"a mistake that process {os.environ['RANK']} found")


def main() -> int:
    """Let torchrun fork its processes."""
    as_given = run.config_from_args

    def with_forks(args: Any) -> Any:
        config, _, _ = as_given(args)
        config.start_method = "fork"
        return config, stage, [args.training_script, *args.training_script_args]

    run.config_from_args = with_forks
    return run_torchrun(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
