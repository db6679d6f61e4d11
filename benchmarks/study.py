"""A study: every method is tuned by the same rule, then compared over seeds at equal anchors and at equal FLOPs.

    python -m benchmarks.study --root FOLDER        FOLDER/train/CLASS/*, FOLDER/test/CLASS/*; can be resumed
    python -m benchmarks.study --root FOLDER --lanes 8 --out FILE      eight runs at a time, without DVC; results go to FILE
    python -m benchmarks.study --print              the tables of the finished runs; differences from another row, in another measure:
                                                    --against lean-half-flops --measure percent_1

The plan is a YAML file (benchmarks/study.yaml explains its keys). Each run adds a line of JSON to a file in benchmarks/results that is
named after the plan, and runs in that file are not repeated: the next run is a function of the plan and the file. Runs are DVC experiments
in a clone of the last commit, one at a time, as in `benchmarks.compare`.
"""

import argparse
import json
import signal
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from benchmarks.compare import FOLDER, Lane, QueuedRun, clean_commit, clock, laid_over, last_lines, log_of, only_one, overrides
from benchmarks.parser import Parser, count
from benchmarks.study_lanes import LaneRun, log_of_run, place_of, run_in_lanes
from benchmarks.study_plan import StudyPlan, Wanted, Wishes, nested, read_plan, read_results
from benchmarks.study_tables import MEASURES, print_tables
from bingo.datasets.layout import find_splits
from bingo.params import read_yaml
from bingo.pipeline.commands import check_place
from bingo.pipeline.process import mistakes_as_lines
from bingo.runtime.artefacts import fingerprint
from bingo.runtime.errors import UserError

DIVERGED = "lower lr"  # printed by a training whose loss or weights are not finite
RESULTS = Path("benchmarks/results")


def main() -> None:
    """The command line."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--plan", type=Path, default=Path("benchmarks/study.yaml"))
    parser.add_argument("--root", help="folder of the images: train/CLASS/* and test/CLASS/*; not for digits")
    parser.add_argument("--print", action="store_true", help="print the tables of the finished runs")
    parser.add_argument("--against", help="with --print: the row from which differences are printed (default: the plan's reference)")
    parser.add_argument("--measure", choices=list(MEASURES), help="with --print: what differences are in (default: linear)")
    parser.add_argument("--out", type=Path, help="file of the results (default: in benchmarks/results, named after the plan)")
    parser.add_argument("--lanes", type=count, help="number of runs at a time, without DVC, on one machine with at most one GPU")
    parser.add_argument("--commit", help="with --lanes and without git: the commit of the code")
    given = parser.parse_args()
    with mistakes_as_lines():
        check_used(given)
        plan, results = read_plan(given.plan), given.out or RESULTS / f"{given.plan.stem}.jsonl"
        if given.print:
            print_tables(Wishes(plan, read_results(results)), given.against, given.measure or "linear")
            return
        study = Study(plan, results, given.root, given.commit or clean_commit(str(results)))
        study.check()
        for number in (signal.SIGTERM, signal.SIGINT):  # even if the shell started this with SIGINT ignored (`&`)
            signal.signal(number, signal.default_int_handler)
        with only_one():
            study.run_in_lanes(given.lanes) if given.lanes else study.run()


def check_used(given: argparse.Namespace) -> None:
    """Raises UserError for options that have no effect."""
    lines = (
        [f"--commit = {given.commit}: has no effect without --lanes; add that, or leave --commit out"]
        if given.commit and not given.lanes
        else []
    )
    for name in ("against", "measure"):
        if (value := getattr(given, name)) and not given.print:
            lines.append(f"--{name} = {value}: has no effect without --print; add that, or leave --{name} out")
    if given.print and given.lanes:
        lines.append(f"--lanes = {given.lanes}: has no effect with --print, which runs nothing; leave one of the two out")
    if lines:
        raise UserError(lines)


class Study:
    """Runs the missing runs of a plan, and adds each to the results."""

    def __init__(self, plan: StudyPlan, results: Path, root: str | None, commit: str):
        self.plan, self.results, self.root, self.commit = plan, results, root, commit

    def check(self) -> None:
        """Raises UserError if a run is not allowed, if its images have no labels, or if its result cannot be written."""
        check_place("--out", self.results)
        wishes = Wishes(self.plan, read_results(self.results))
        wishes.next()
        for recipe in self.plan.recipes:
            for lr in self.plan.tuning.first_lr:
                self.queued(wishes.at(recipe, lr, 1.0))
            self.queued(Wanted("anchors", recipe, 0, self.plan.fixed(recipe, "anchors")))
        of_files = self.root and wishes.documents[self.plan.reference]["dataset"]["source"] == "folder"
        if of_files and not find_splits(Path(str(self.root), "train").expanduser(), name="--root")[0].classes:
            raise UserError(f"--root = {self.root}: train/ has no class folders, but a study needs labels; give train/CLASS/*")
        for variant in self.plan.screened:
            self.queued(Wanted("tuning", variant, self.plan.tuning.seed, self.plan.fixed(variant, "tuning")))

    def run(self) -> None:
        """Run everything. An interrupt ends the current run, which saves a checkpoint."""
        lane = Lane(FOLDER.resolve() / "clone-0")
        try:
            while wanted := Wishes(self.plan, read_results(self.results)).next():
                lane.start(self.queued(wanted), self.commit, Path.cwd())
                self.take(lane, wanted)
        finally:
            lane.close()

    def run_in_lanes(self, lanes: int) -> None:
        """Run everything, several runs at a time and without DVC. Interrupted runs start from the beginning next time."""

        def ready(under_way: Collection[Wanted]) -> Iterator[LaneRun]:
            for wanted in Wishes(self.plan, read_results(self.results)).ready(under_way):
                yield LaneRun(wanted, laid_over(*self.laid(wanted))[0])

        def take(run: LaneRun, seconds: float | None) -> None:
            name, log = f"{run.wanted.name}-s{run.wanted.seed}", log_of_run(run, folder)
            if seconds is None and DIVERGED not in log.read_text(errors="replace"):
                raise UserError([f"{name}: failed; {log} ends:", *last_lines(log)])
            self.add(run.wanted, name, None if seconds is None else place_of(run, folder), round(seconds or 0.0, 1))

        folder = FOLDER.resolve() / "lanes" / fingerprint([self.commit])[:12]  # only runs of the same code share results
        run_in_lanes(lanes, folder, ready, take)

    def laid(self, wanted: Wanted) -> tuple[str, int, str | None, str | None, list[dict[str, Any]]]:
        """The changes to params.yaml for a run: its recipe, seed, base, folder of images, and settings."""
        root = str(Path(self.root) / "train") if self.root and wanted.part == "tuning" else self.root
        settings = [nested(key, value) for key, value in wanted.settings.items()]
        return self.plan.recipe_of(wanted.recipe), wanted.seed, self.plan.base, root, settings

    def queued(self, wanted: Wanted) -> QueuedRun:
        """The run in the form that DVC takes."""
        return QueuedRun(wanted.name, wanted.seed, overrides(*self.laid(wanted)))

    def take(self, lane: Lane, wanted: Wanted) -> None:
        """Wait for a run and add it to the results. Raises UserError if it failed for another reason than the learning rate."""
        experiment = lane.running
        assert experiment is not None
        code = lane.finish(self.commit)
        seconds = round(time.monotonic() - lane.begun, 1)
        log = log_of(experiment)
        if not lane.fresh and DIVERGED not in log.read_text(errors="replace"):
            raise UserError([f"{experiment.name}: failed with exit code {code}; {log} ends:", *last_lines(log)])
        self.add(wanted, experiment.name, lane.folder if lane.fresh else None, seconds)

    def add(self, wanted: Wanted, name: str, folder: Path | None, seconds: float) -> None:
        """Add the run in `folder` to the results; None for a run that diverged."""
        line = {"part": wanted.part, "recipe": wanted.recipe, "seed": wanted.seed, "settings": wanted.settings, "commit": self.commit}
        line |= (figures(folder) if folder else {"linear": None}) | {"seconds": seconds}
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with open(self.results, "a") as file:
            file.write(json.dumps(line) + "\n")
        linear = f"linear {line['linear']['student']:.1f}" if line["linear"] else "diverged"
        print(f"{time.strftime('%H:%M')} {name}: {linear}; {clock(seconds)}", flush=True)


def figures(folder: Path) -> dict[str, Any]:
    """Results of a run, in percent by measure and network, and its cost."""
    from bingo.images.listing import read_listing

    results, params = json.loads((folder / "reports/results.json").read_text()), read_yaml(str(folder / "params.yaml"))
    batch, rows = params["distill"]["batch_anchors"], read_listing(folder / "data/listing.parquet").train_rows
    few = {path.stem: json.loads(path.read_text())["nets"] for path in sorted((folder / "reports/semi").glob("*.json"))}
    return {
        **{measure: results[measure] for measure in ("linear", "knn_10", "agreement_10") if measure in results},
        **{split: {net: scores["linear"]["top1_last"] for net, scores in nets.items()} for split, nets in few.items()},
        "gflop_per_anchor": json.loads((folder / "reports/distill.json").read_text())["gflop_per_anchor"],
        "device": json.loads((folder / ".bingo/runs/distill.json").read_text())["device"],
        "anchors": params["distill"]["epochs"] * (rows // batch * batch),
    }


if __name__ == "__main__":
    main()
