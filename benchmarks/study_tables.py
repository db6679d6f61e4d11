"""The tables of a study, in Markdown, from the lines of its results."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, get_args

from benchmarks.study_plan import LR, Part, Wishes
from bingo.report.experiments import paired_difference, rank_correlation, spread
from bingo.runtime.errors import UserError

MEASURES = {"linear": "linear", "knn_10": "k-NN, k = 10", "agreement_10": "agreement, k = 10", "percent_1": "1 % of the labels"}
OTHERS = {"teacher": "teacher", "untrained": "untrained", "pixels": "raw pixels"}
Lines = Sequence[Mapping[str, Any]]
_SAME = ("part", "recipe", "seed", "settings")


def print_tables(wishes: Wishes, against: str | None = None, measure: str = "linear") -> None:
    """Print the tables of equal anchors, of equal FLOPs and of tuning. Differences are in `measure`, from the row `against` (None: the
    reference). Raises UserError for an unknown row."""
    plan = wishes.plan
    against = against or plan.reference
    if against not in plan.recipes:
        raise UserError(f"--against = {against}: allowed are {', '.join(plan.recipes)}")
    for part, heading in (("anchors", "Equal anchors"), ("flops", f"Equal FLOPs, those of {plan.reference}, or fewer")):
        if rows := list(_compared(wishes, part, against, measure)):
            means = "Means ± standard deviations over seeds, percent; runs of a seed on several devices are averaged first"
            print(f"## {heading}\n\n{means}. Differences are paired by seed: the mean, and the 95 % interval or two seeds\n")
            print_table(["recipe", "seeds", *MEASURES.values(), "GFLOP/anchor", "PFLOP", f"{MEASURES[measure]} − {against}"], rows)
            print()
    print(f"## Tuning\n\nSeed {plan.tuning.seed}: the best values, and the linear accuracy of all runs\n")
    print_table(["recipe", "lr", "other values", "linear", "k-NN, k = 10", "lr × factor of the other values: linear"], _tuning(wishes))
    if rows := list(_screened(wishes)):
        print("\n## Variants\n\nOn the images of tuning, at the tuned values of another recipe: means, and differences from it\n")
        print_table(["variant", "of", "seeds", "linear", "k-NN, k = 10", "GFLOP/anchor", "difference in linear"], rows)
    if found := list(_correlations(wishes)):
        print("\n## Agreement and accuracy\n\nSpearman's rank correlation of the students' agreement with the teacher, k = 10,")
        print("and their linear accuracy, with its 95 % interval\n")
        print("\n".join(f"- {line}" for line in found))
    if len(apart := list(_between_devices(wishes))) > 1:
        error = stdev(apart) / len(apart) ** 0.5
        print(f"\n## Devices\n\nLinear accuracy on the second device minus that on the first, {len(apart)} pairs of runs for the tables:")
        print(f"mean {fmean(apart):+.2f} (standard error {error:.2f}), standard deviation {stdev(apart):.2f}")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print one table."""
    for cells in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(cells)} |")


def _tuning(wishes: Wishes) -> Iterator[list[str]]:
    plan = wishes.plan
    for recipe in plan.recipes:
        if best := wishes.best(recipe):
            lr, factor = wishes.place(best)
            tuned = wishes.tuned(plan.tuned_as(recipe), lr, factor).items()
            others = [f"{key.rpartition('.')[2]} {value:g}" for key, value in tuned if key != LR]
            tried = sorted(((wishes.place(line), line["linear"]) for line in wishes.tuning(recipe)), key=lambda run: run[0])
            text = [f"{lr:g} × {factor:g}: {linear['student']:.1f}" if linear else f"{lr:g}: diverged" for (lr, factor), linear in tried]
            yield [recipe, f"{lr:g}", ", ".join(others), *_means({0: best}), "; ".join(text)]


def _screened(wishes: Wishes) -> Iterator[list[str]]:
    """A row for each variant that is in no round: means over seeds, and its difference from the recipe whose values it takes."""
    for variant in wishes.plan.screened:
        other, lines = wishes.plan.tuned_as(variant), _by_variant_seed(wishes, variant)
        ours, theirs = by_seed(lines, "linear", "student"), by_seed(_by_variant_seed(wishes, other), "linear", "student")
        if seeds := len(ours.keys() & theirs.keys()):
            cost = f"{next(iter(lines.values()))['gflop_per_anchor']:.3f}"
            yield [variant, other, str(seeds), *_means(lines), cost, difference(ours, theirs)]


def _means(lines: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """The student's means of linear and k-NN accuracy; empty without the latter, which needs 10 in knn_eval.k."""
    known = [by_seed(lines, measure, "student").values() for measure in ("linear", "knn_10")]
    return [f"{fmean(percents):.1f}" if percents else "" for percents in known]


def _by_variant_seed(wishes: Wishes, name: str) -> dict[int, Mapping[str, Any]]:
    """The runs of a recipe or variant on the images of tuning, by seed."""
    wanted = [run for seed in wishes.plan.variant_seeds if (run := wishes.tuned_run(name, seed))]
    found = {run.seed: [line for line in wishes.lines_of(run) if line["linear"]] for run in wanted}
    return {seed: averaged(lines) for seed, lines in found.items() if lines}


def _correlations(wishes: Wishes) -> Iterator[str]:
    """How well agreement orders the students as linear accuracy does; runs with different numbers of images are not mixed."""
    for part in get_args(Part):
        lines = [line for line in wishes.lines if line["part"] == part and line["linear"]]
        pairs = [(line["agreement_10"]["student"], line["linear"]["student"]) for line in lines if "agreement_10" in line]
        if found := rank_correlation(pairs):
            low, high = found.bounds
            yield f"{part}: {found.value:.2f} ({low:.2f} to {high:.2f}) over {found.runs} runs"


def _between_devices(wishes: Wishes) -> Iterator[float]:
    """Differences in points between the runs for the tables that were made on two devices, the CPU first."""
    for line in wishes.lines:
        if line["part"] != "tuning" and line["linear"]:
            same = [other for other in wishes.lines if other["linear"] and all(line[key] == other[key] for key in _SAME)]
            if len(same) == 2 and line is same[0]:
                first, second = sorted(same, key=lambda run: "NVIDIA" in str(run.get("device")))
                yield second["linear"]["student"] - first["linear"]["student"]


def _compared(wishes: Wishes, part: Part, against: str | None = None, measure: str = "linear") -> Iterator[list[str]]:
    """A row for each recipe, the most accurate first, then the teacher, an untrained network and raw pixels, with differences in `measure`
    from the row `against`. At equal FLOPs, a run at equal anchors counts if its FLOPs are equal anyway."""
    against = against or wishes.plan.reference
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for recipe in (recipe for recipe in wishes.plan.recipes if part == "flops" or not wishes.plan.own_epochs(recipe)):
        for seed in wishes.plan.tables.seeds:
            wanted = wishes.compared(part, recipe, seed) or wishes.compared("anchors", recipe, seed)
            if wanted and (lines := [line for line in wishes.lines_of(wanted) if line["linear"]]):
                found.setdefault(recipe, {})[seed] = averaged(lines)
    reference = by_seed(found.get(against, {}), measure, "student")
    for recipe, lines in sorted(found.items(), key=lambda row: -fmean(by_seed(row[1], "linear", "student").values())):
        line = next(iter(lines.values()))
        cost = [f"{line['gflop_per_anchor']:.3f}", f"{line['gflop_per_anchor'] * line['anchors'] / 1e6:.2g}"]
        compared = "" if recipe == against else difference(by_seed(lines, measure, "student"), reference)
        runs = sum(line["runs"] for line in lines.values())
        seeds = f"{len(lines)}" + (f" ({runs} runs)" if runs > len(lines) else "")
        yield [recipe, seeds, *_figures(lines, "student"), *cost, compared]
    every = {seed: line for lines in found.values() for seed, line in lines.items()}
    for net, name in OTHERS.items():
        if every:
            known = by_seed(found.get(against, {}), measure, net)  # of the runs of `against` itself
            yield [name, str(len(every)), *_figures(every, net), "", "", difference(known, reference)]


def averaged(lines: Lines) -> dict[str, Any]:
    """A run whose figures are the means of several runs that differ only in their device, and their number as `runs`."""
    first, means = lines[0], {}
    for measure in [measure for measure in MEASURES if first.get(measure)]:
        means[measure] = {net: fmean(line[measure][net] for line in lines if net in line[measure]) for net in first[measure]}
    return {**first, **means, "runs": len(lines)}


def by_seed(lines: Mapping[int, Mapping[str, Any]], measure: str, net: str) -> dict[int, float]:
    """Figures of a network by seed; seeds without a figure are left out."""
    return {seed: line[measure][net] for seed, line in lines.items() if net in (line.get(measure) or {})}


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    """The mean difference in points over the common seeds, with its interval in brackets, or of two seeds each one in parentheses."""
    found = paired_difference(ours, theirs)
    if found is None or found.bounds is None:
        return f"{found.mean:+.1f}" if found else ""
    each = [f"{ours[seed] - theirs[seed]:+.1f}" for seed in ours if seed in theirs]
    low, high = found.bounds
    return f"{found.mean:+.1f} " + (f"({', '.join(each)})" if len(each) == 2 else f"[{low:+.1f}, {high:+.1f}]")


def _figures(lines: Mapping[int, Mapping[str, Any]], net: str) -> list[str]:
    cells = []
    for measure in MEASURES:
        known = spread(by_seed(lines, measure, net).values())
        cells.append("" if known is None else f"{known.mean:.1f}" + (f" ± {known.deviation:.1f}" if known.deviation is not None else ""))
    return cells
