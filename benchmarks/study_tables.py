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
    """Print the tables of tuning, of equal anchors and of equal FLOPs."""
    plan = wishes.plan
    print(f"Tuning, seed {plan.tuning.seed}: the best values, and the linear accuracy of all runs\n")
    print_table(["recipe", "lr", "other values", "linear", "k-NN, k = 10", "lr × factor of the other values: linear"], _tuning(wishes))
    if rows := list(_screened(wishes)):
        print("\nVariants on the images of tuning, at the tuned values of another recipe: means, and differences (of each seed)\n")
        print_table(["variant", "of", "seeds", "linear", "k-NN, k = 10", "GFLOP/anchor", "difference in linear"], rows)
    parts: dict[Part, str] = {"anchors": "anchors", "flops": f"FLOPs, those of {plan.reference}"}
    for part, words in parts.items():
        if not (rows := list(_compared(wishes, part))):
            continue
        print(f"\nEqual {words}: means ± standard deviations over seeds, percent; difference paired by seed, with its 95 % interval\n")
        header = ["recipe", "seeds", *MEASURES.values(), "GFLOP/anchor", "PFLOP", f"linear − {plan.reference}"]
        print_table(header, rows)
    if found := list(_correlations(wishes)):
        print("\nStudents' agreement with the teacher, k = 10, and linear accuracy: Spearman's rank correlation, 95 % interval\n")
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
        if found := spread(differences := [ours[seed] - theirs[seed] for seed in ours if seed in theirs]):
            each = f" ({', '.join(f'{one:+.1f}' for one in differences)})" if len(differences) > 1 else ""
            cost = f"{next(iter(lines.values()))['gflop_per_anchor']:.3f}"
            yield [variant, other, str(len(differences)), *_means(lines), cost, f"{found.mean:+.1f}{each}"]


def _means(lines: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """The student's means of linear and k-NN accuracy; empty without the latter, which needs 10 in knn_eval.k."""
    known = [by_seed(lines, measure, "student").values() for measure in ("linear", "knn_10")]
    return [f"{fmean(percents):.1f}" if percents else "" for percents in known]


def _by_variant_seed(wishes: Wishes, name: str) -> dict[int, Mapping[str, Any]]:
    """The runs of a recipe or variant on the images of tuning, by seed."""
    wanted = [run for seed in wishes.plan.variant_seeds if (run := wishes.tuned_run(name, seed))]
    return {run.seed: line for run in wanted if (line := wishes.line_of(run)) and line["linear"]}


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
            if wanted and (line := wishes.line_of(wanted)) and line["linear"]:
                found.setdefault(recipe, {})[seed] = line
    reference = by_seed(found.get(wishes.plan.reference, {}), "linear", "student")
    rows = [(by_seed(lines, "linear", "student"), recipe, lines) for recipe, lines in found.items()]
    for linear, recipe, lines in sorted(rows, key=lambda row: -sum(row[0].values()) / len(row[0])):
        line = next(iter(lines.values()))
        cost = [f"{line['gflop_per_anchor']:.3f}", f"{line['gflop_per_anchor'] * line['anchors'] / 1e6:.2f}"]
        yield [recipe, str(len(lines)), *_figures(lines, "student"), *cost, difference(linear, reference, recipe == wishes.plan.reference)]
    every = {seed: line for lines in found.values() for seed, line in lines.items()}
    for net, name in OTHERS.items():
        if every:
            yield [name, str(len(every)), *_figures(every, net), "", "", ""]


def by_seed(lines: Mapping[int, Mapping[str, Any]], measure: str, net: str) -> dict[int, float]:
    """Figures of a network by seed; seeds without a figure are left out."""
    return {seed: line[measure][net] for seed, line in lines.items() if net in (line.get(measure) or {})}


def difference(ours: Mapping[int, float], theirs: Mapping[int, float], same: bool) -> str:
    """The difference in points, with its interval in brackets if there are at least two seeds."""
    found = None if same else paired_difference(ours, theirs)
    if found is None:
        return ""
    return f"{found.mean:+.1f}" + (f" [{found.bounds[0]:+.1f}, {found.bounds[1]:+.1f}]" if found.bounds else "")


def _figures(lines: Mapping[int, Mapping[str, Any]], net: str) -> list[str]:
    cells = []
    for measure in MEASURES:
        known = spread(by_seed(lines, measure, net).values())
        cells.append("" if known is None else f"{known.mean:.1f}" + (f" ± {known.deviation:.1f}" if known.deviation is not None else ""))
    return cells
