"""python -m tests.pretended_gpu [--operations] [METHOD ...]: launches of one step on the simulated GPU, by case and part."""

import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from tests.pretended_gpu.steps import CASES, launches_by_part


def main(arguments: list[str]) -> None:
    """Print one line for each case, and with --operations its most frequent operations."""
    methods = [argument for argument in arguments if not argument.startswith("--")]
    print(f"{'launches':>8} {'views':>6} {'forward':>8} {'backward':>9} {'optimizer':>10} {'after_step':>11}  case")
    for case in (case for case in CASES if not methods or case.method in methods):
        with tempfile.TemporaryDirectory() as folder:
            parts = launches_by_part(Path(folder), case)
        counts = [sum(part.values()) for part in parts.values()]
        print("{:8} {:6} {:8} {:9} {:10} {:11}  {}".format(sum(counts), *counts, case.name), flush=True)
        if "--operations" in arguments:
            print("         ", ", ".join(f"{name} {count}" for name, count in sum(parts.values(), Counter()).most_common(20)))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
