"""python -m tests.pretended_gpu.stage NAME [ARGUMENT]: a stage on the simulated GPU, recorded in the file PRETENDED_RECORD."""

import json
import os
import runpy
import sys
from pathlib import Path

from tests.pretended_gpu.device import Record, pretended_gpu


def main(name: str, *arguments: str) -> None:
    """Run `python -m stages.NAME ARGUMENTS`, and save the record even if it fails."""
    sys.argv = [f"stages.{name}", *arguments]
    with pretended_gpu() as record:
        try:
            runpy.run_module(f"stages.{name}", run_name="__main__", alter_sys=True)
        finally:
            _save(Path(os.environ["PRETENDED_RECORD"]), " ".join([name, *arguments]), record)


def _save(path: Path, stage: str, record: Record) -> None:
    """One line of JSON: the stage, the number of launches, and by kind [what, place, number] of each fault."""
    faults = {kind: [[*key, count] for key, count in found.items()] for kind, found in record.faults.items()}
    with open(path, "a") as file:
        file.write(json.dumps({"stage": stage, "launches": record.launches.total(), **faults}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
