"""The tables of a comparison as text, for Markdown and for the page. Unknown values are shown as a dash."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bingo.params import display_name
from bingo.report.experiments import ACCURACIES, UNREAD, Difference, Experiment, Variant, differing, paired_difference, rank_correlation
from bingo.report.measures import measure_label
from bingo.runtime.errors import printable

ABSENT = "–"
_ACCURACIES = {measure: measure_label(measure) for measure in ACCURACIES}


@dataclass(frozen=True)
class Table:
    """Headers, and rows of as many cells; the first cell of a row is its name."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table as Markdown, with numbers aligned right."""
        escaped = "\\|"
        lines = [self.headers, ["---", *("---:" for _ in self.headers[1:])], *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', escaped) for cell in line)} |" for line in lines)


def summary(found: Sequence[Variant], against: str | None) -> Table:
    """A row for each variant: accuracies as mean ± standard deviation, paired differences to the variant `against`, and costs.

    Columns without any figure are left out.
    """
    reference = next((variant for variant in found if variant.name == against), None)
    columns = {"variant": [variant.title for variant in found], "method": [display_name(variant.method) for variant in found]}
    columns["seeds"] = [str(len(variant.seeds)) for variant in found]
    columns |= {header: [_accuracy(variant, measure) for variant in found] for measure, header in _ACCURACIES.items()}
    if reference:
        for measure, header in _ACCURACIES.items():
            columns[f"{header}, minus {against}"] = [_difference(variant, reference, measure) for variant in found]
    for measure, header, form in _COSTS:
        means = (variant.spread(measure) for variant in found)
        columns[header] = [ABSENT if known is None else format(known.mean, form) for known in means]
    shown = {header: cells for header, cells in columns.items() if set(cells) != {ABSENT}}
    return Table(list(shown), list(zip(*shown.values(), strict=True)))


def settings(found: Sequence[Variant], experiments: Sequence[Experiment]) -> Table | None:
    """A row for each variant, a column for each parameter in which the experiments differ (see `differing`); None without such a parameter.
    Values are written as in params.yaml; if the runs of a variant differ, all are given."""
    columns = differing(experiments)
    if not columns:
        return None

    def cell(variant: Variant, values: Sequence[Any]) -> str:
        own = (value for experiment, value in zip(experiments, values, strict=True) if experiment.variant == variant.name)
        return " or ".join(dict.fromkeys(_setting(value) for value in own))

    return Table(["variant", *columns], [[variant.title, *(cell(variant, values) for values in columns.values())] for variant in found])


def _setting(value: Any) -> str:
    if value is UNREAD:
        return ABSENT
    return printable(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False).replace('"', "")


_COSTS = (
    ("of_teacher", "linear, top-1, % of its teacher", ",.1f"),
    ("gflop_per_anchor", "GFLOP per anchor", ".3g"),
    ("anchors_per_second", "anchors/s", ",.0f"),
    ("peak_memory_mb", "peak memory, MB", ",.0f"),
    ("peak_gpu_memory_mb", "peak GPU memory, MB", ",.0f"),
    ("minutes", "minutes", ",.2f"),
)


def by_seed(found: Sequence[Variant]) -> Table:
    """A row for each variant, a column for each seed: its accuracies, percent, those that any variant has."""
    measured = [measure for measure in ACCURACIES if any(measure in variant.values for variant in found)]
    seeds = sorted({seed for variant in found for seed in variant.seeds})
    rows = [[variant.title, *(_figures(variant, seed, measured) for seed in seeds)] for variant in found]
    return Table([" / ".join(_ACCURACIES[measure] for measure in measured), *(f"seed {seed}" for seed in seeds)], rows)


def _figures(variant: Variant, seed: int, measured: Sequence[str]) -> str:
    values = [variant.values.get(measure, {}).get(seed) for measure in measured]
    known = [ABSENT if value is None else f"{value:.1f}" for value in values]
    return ABSENT if seed not in variant.seeds else " / ".join(known)


def _accuracy(variant: Variant, measure: str) -> str:
    known = variant.spread(measure)
    if known is None:
        return ABSENT
    return f"{known.mean:.1f}" + ("" if known.deviation is None else f" ± {known.deviation:.1f}")


def _difference(variant: Variant, reference: Variant, measure: str) -> str:
    if variant is reference:
        return ABSENT
    found = paired_difference(variant.values.get(measure, {}), reference.values.get(measure, {}))
    return ABSENT if found is None else difference_text(found, len(variant.seeds))


def correlation_text(found: Sequence[Variant]) -> str:
    """The rank correlation of agreement with the teacher, which needs no labels, and linear accuracy; empty for too few runs."""
    runs = [[variant.values.get(measure, {}) for measure in ("agreement_10", "linear")] for variant in found]
    known = rank_correlation([(xs[seed], ys[seed]) for xs, ys in runs for seed in xs.keys() & ys.keys()])
    if known is None:
        return ""
    measured = f"{_ACCURACIES['agreement_10']}, against {_ACCURACIES['linear']}, over {known.runs} runs"
    value, low, high = (f"{number:.2f}".replace("-", "−") for number in (known.value, *known.bounds))
    return f"{measured}: Spearman's rank correlation {value} ({low} to {high})"


def difference_text(found: Difference, seeds: int) -> str:
    """For example "+15.1 (+8.2 to +22.0)", with the number of pairs if not every seed has a counterpart."""
    bounds = "" if found.bounds is None else f" ({_signed(found.bounds[0])} to {_signed(found.bounds[1])})"
    return f"{_signed(found.mean)}{bounds}" + (f", {found.pairs} of {seeds} seeds" if found.pairs < seeds else "")


def _signed(points: float) -> str:
    """The number with its sign (a minus sign, not a hyphen); without a sign if it rounds to 0.0."""
    text = f"{points:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")
