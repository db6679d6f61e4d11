"""A study: every method tuned by one rule, then compared over seeds at equal anchors and at equal FLOPs.

    python -m benchmarks.study --root FOLDER        FOLDER/train/CLASS/*, FOLDER/test/CLASS/*; started again, it goes on
    python -m benchmarks.study --print              the tables of what has been run

The plan is a YAML file (benchmarks/study.yaml explains its keys). Each run is one line of JSON that is added to a file in
benchmarks/results with the name of the plan, and what that file has is not run again: the next run is a function of the plan and that file.
Runs are DVC experiments in a clone of the last commit, one at a time, as `benchmarks.compare` does them.
"""

import json
import signal
import time
from pathlib import Path
from typing import Any

from benchmarks.compare import FOLDER, Lane, QueuedRun, clean_commit, clock, last_lines, log_of, only_one, overrides
from benchmarks.parser import Parser
from benchmarks.study_plan import StudyPlan, Wanted, Wishes, nested, read_plan, read_results
from benchmarks.study_tables import print_tables
from bingo.params import read_yaml
from bingo.pipeline.process import mistakes_as_lines
from bingo.runtime.errors import UserError

DIVERGED = "lower lr"  # what a training says whose loss or weights are not finite
RESULTS = Path("benchmarks/results")


def main() -> None:
    """The command line."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--plan", type=Path, default=Path("benchmarks/study.yaml"))
    parser.add_argument("--root", help="folder of the images: train/CLASS/* and test/CLASS/*; not for digits")
    parser.add_argument("--print", action="store_true", help="print the tables of what has been run")
    given = parser.parse_args()
    with mistakes_as_lines():
        plan, results = read_plan(given.plan), RESULTS / f"{given.plan.stem}.jsonl"
        if given.print:
            print_tables(Wishes(plan, read_results(results)))
            return
        study = Study(plan, results, given.root)
        study.check()
        with only_one():
            study.run()


class Study:
    """Runs what a plan lacks, and adds each run to the results."""

    def __init__(self, plan: StudyPlan, results: Path, root: str | None):
        self.plan, self.results, self.root = plan, results, root
        self.commit = clean_commit(str(results))

    def check(self) -> None:
        """Raises UserError if a run would not be allowed."""
        wishes = Wishes(self.plan, read_results(self.results))
        wishes.next()
        for recipe in self.plan.recipes:
            for lr in self.plan.tuning.first_lr:
                self.queued(wishes.at(recipe, lr, 1.0))
            self.queued(Wanted("anchors", recipe, 0, self.plan.fixed(recipe, "anchors")))

    def run(self) -> None:
        """Run all. An interrupt ends what runs, with a checkpoint."""
        for number in (signal.SIGTERM, signal.SIGINT):  # also where the shell started this with SIGINT ignored (`&`)
            signal.signal(number, signal.default_int_handler)
        lane = Lane(FOLDER.resolve() / "clone-0")
        try:
            while wanted := Wishes(self.plan, read_results(self.results)).next():
                lane.start(self.queued(wanted), self.commit, Path.cwd())
                self.take(lane, wanted)
        finally:
            lane.close()

    def queued(self, wanted: Wanted) -> QueuedRun:
        """The run as DVC takes it."""
        root = str(Path(self.root) / "train") if self.root and wanted.part == "tuning" else self.root
        settings = [nested(key, value) for key, value in wanted.settings.items()]
        return QueuedRun(
            wanted.name, wanted.seed, overrides(self.plan.recipe_of(wanted.recipe), wanted.seed, self.plan.base, root, settings)
        )

    def take(self, lane: Lane, wanted: Wanted) -> None:
        """Wait for a run and add it to the results. Raises UserError if it failed for another reason than a learning rate."""
        experiment = lane.running
        assert experiment is not None
        code = lane.finish(self.commit)
        seconds = round(time.monotonic() - lane.begun, 1)
        log = log_of(experiment)
        if not lane.fresh and DIVERGED not in log.read_text(errors="replace"):
            raise UserError([f"{experiment.name}: failed with exit code {code}; {log} ends:", *last_lines(log)])
        line = {"part": wanted.part, "recipe": wanted.recipe, "seed": wanted.seed, "settings": wanted.settings, "commit": self.commit}
        line |= (figures(lane.folder) if lane.fresh else {"linear": None}) | {"seconds": seconds}
        with open(self.results, "a") as file:
            file.write(json.dumps(line) + "\n")
        linear = f"linear {line['linear']['student']:.1f}" if line["linear"] else "diverged"
        print(f"{time.strftime('%H:%M')} {experiment.name}: {linear}; {clock(seconds)}", flush=True)


def figures(folder: Path) -> dict[str, Any]:
    """What a run has found, percent by measure and network, and what it cost."""
    from bingo.images.listing import read_listing

    results, params = json.loads((folder / "reports/results.json").read_text()), read_yaml(str(folder / "params.yaml"))
    batch, rows = params["distill"]["batch_anchors"], read_listing(folder / "data/listing.parquet").train_rows
    few = {path.stem: json.loads(path.read_text())["nets"] for path in sorted((folder / "reports/semi").glob("*.json"))}
    return {
        **{measure: results[measure] for measure in ("linear", "knn_10", "agreement_10") if measure in results},
        **{split: {net: scores["linear"]["top1_last"] for net, scores in nets.items()} for split, nets in few.items()},
        "gflop_per_anchor": json.loads((folder / "reports/distill.json").read_text())["gflop_per_anchor"],
        "anchors": params["distill"]["epochs"] * (rows // batch * batch),
    }


if __name__ == "__main__":
    main()
