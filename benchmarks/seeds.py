"""The default run (or any params.yaml) with several seeds, as DVC experiments, and the mean and standard deviation of its figures.

python -m benchmarks.seeds --seeds 0 1 2        # about 4.5 minutes per seed on 2 shared cores; cached results are reused
"""

import json
import statistics
import subprocess
import time
from pathlib import Path

from benchmarks.parser import Parser

RESULTS = Path("reports/results.json")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    runs = [_run(seed) for seed in seeds]
    for measure in runs[0]:
        print(f"\n{measure}, mean ± standard deviation over seeds {seeds} (each seed)")
        for name in runs[0][measure]:
            values = [run[measure][name] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"| {name} | {statistics.mean(values):.2f} ± {spread:.2f} | {', '.join(f'{value:.2f}' for value in values)} |")


def _run(seed: int) -> dict[str, dict[str, float]]:
    begun = time.monotonic()
    subprocess.run(["dvc", "exp", "run", "--quiet", "-S", f"seed={seed}"], check=True)
    print(f"seed {seed}: {time.monotonic() - begun:.0f} s")
    return json.loads(RESULTS.read_text())


if __name__ == "__main__":
    main()
