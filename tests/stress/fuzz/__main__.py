"""Random hostile input to every surface of the program, which must not cause tracebacks, hangs or unbounded memory.

python -m tests.stress.fuzz --cases 10000 --seed 0 [--only images coco]

Each surface runs in a separate process. The exit code is 1 if a case failed; its description and the place of the error are then printed.
"""

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from benchmarks.parser import Parser
from bingo.runtime.progress import progress_bar
from tests.stress.fuzz.harness import LAST, Tally
from tests.stress.fuzz.surfaces import SURFACES, run


def tally_of(number: int, cases: int, seed: int) -> Tally:
    """Run the cases of one surface in a separate process, which may die."""
    with (
        progress_bar(f"{SURFACES[number].name}, {cases:,} cases"),
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        try:
            return pool.submit(run, number, cases, seed, folder).result()
        except BrokenProcessPool:
            last = Path(folder, LAST)
            where = last.read_text() if last.exists() else "its start"
            return Tally(failures={"death": [f"{SURFACES[number].name}: the process died at {where}"]})


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="least number of cases over all surfaces")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="only surfaces whose names begin with one of these")
    given = parser.parse_args()
    chosen = [n for n, surface in enumerate(SURFACES) if not given.only or surface.name.startswith(tuple(given.only))]
    if not chosen:
        parser.error(f"--only {' '.join(given.only)}: allowed are beginnings of {'; '.join(surface.name for surface in SURFACES)}")
    shares, tallies = sum(SURFACES[n].share for n in chosen), []
    print("| surface | cases | accepted | refused | failed | longest s | most MB |\n|---|---|---|---|---|---|---|", flush=True)
    for n in chosen:
        tallies.append(t := tally_of(n, -(-given.cases * SURFACES[n].share // shares), given.seed))
        counts = " | ".join(f"{count:,}" for count in (t.cases, t.accepted, t.refused, t.failed))
        print(f"| {SURFACES[n].name} | {counts} | {t.seconds:.1f} | {t.mb:.0f} |", flush=True)
    causes = [texts for t in tallies for texts in t.failures.values()]
    print(f"\n{sum(t.cases for t in tallies):,} cases, {sum(map(len, causes))} failed")
    print("".join(f"\n{len(texts)} times, once by {min(texts, key=len)}\n" for texts in causes), end="")
    raise SystemExit(bool(causes))


if __name__ == "__main__":
    main()
