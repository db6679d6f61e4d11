"""The tables of a study, in Markdown, from the lines of its results."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, get_args

from benchmarks.study_plan import LR, Part, Wishes
from bingo.report.experiments import paired_difference, rank_correlation, spread

MEASURES = {"linear": "linear", "knn_10": "k-NN, k = 10", "agreement_10": "agreement, k = 10", "percent_1": "1 % of the labels"}
OTHERS = {"teacher": "teacher", "untrained": "untrained", "pixels": "raw pixels"}
Lines = Sequence[Mapping[str, Any]]


def print_tables(wishes: Wishes) -> None:
    """Print the tables of equal anchors, of equal FLOPs and of tuning."""
    plan = wishes.plan
    for part, heading in (("anchors", "Equal anchors"), ("flops", f"Equal FLOPs, those of {plan.reference}, or fewer")):
        if rows := list(_compared(wishes, part)):
            means = "Means ± standard deviations over seeds, percent; runs of a seed on several devices are averaged first"
            print(f"## {heading}\n\n{means}. Differences are paired by seed: the mean, and the 95 % interval or two seeds\n")
            print_table(["recipe", "seeds", *MEASURES.values(), "GFLOP/anchor", "PFLOP", f"linear − {plan.reference}"], rows)
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


def _compared(wishes: Wishes, part: Part) -> Iterator[list[str]]:
    """A row for each recipe, the most accurate first, then the teacher, an untrained network and raw pixels. At equal FLOPs, a run at equal
    anchors counts if its FLOPs are equal anyway."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for recipe in (recipe for recipe in wishes.plan.recipes if part == "flops" or not wishes.plan.own_epochs(recipe)):
        for seed in wishes.plan.tables.seeds:
            wanted = wishes.compared(part, recipe, seed) or wishes.compared("anchors", recipe, seed)
            if wanted and (lines := [line for line in wishes.lines_of(wanted) if line["linear"]]):
                found.setdefault(recipe, {})[seed] = averaged(lines)
    reference = by_seed(found.get(wishes.plan.reference, {}), "linear", "student")
    rows = [(by_seed(lines, "linear", "student"), recipe, lines) for recipe, lines in found.items()]
    for linear, recipe, lines in sorted(rows, key=lambda row: -sum(row[0].values()) / len(row[0])):
        line = next(iter(lines.values()))
        cost = [f"{line['gflop_per_anchor']:.3f}", f"{line['gflop_per_anchor'] * line['anchors'] / 1e6:.2g}"]
        compared = "" if recipe == wishes.plan.reference else difference(linear, reference)
        runs = sum(line["runs"] for line in lines.values())
        seeds = f"{len(lines)}" + (f" ({runs} runs)" if runs > len(lines) else "")
        yield [recipe, seeds, *_figures(lines, "student"), *cost, compared]
    every = {seed: line for lines in found.values() for seed, line in lines.items()}
    for net, name in OTHERS.items():
        if every:
            yield [name, str(len(every)), *_figures(every, net), "", "", ""]


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
