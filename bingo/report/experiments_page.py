"""The page on experiments: the tables of `bingo.report.experiments_table`, and charts of accuracy against training cost."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from bingo.params import display_name
from bingo.report.experiments import ACCURACIES, Experiment, Variant, spread
from bingo.report.experiments_table import Table, correlation_text
from bingo.report.measures import measure_label
from bingo.report.plots import Point, labelled_points
from bingo.report.render import render_page

_WITH_TEACHER, _WITHOUT = 0, 2  # of plots.SERIES, as on a run's page
_AXES = {
    "gflop_per_image": "GFLOP of training for each train image, all epochs",
    "minutes": "minutes of training, start-up included",
}
_FACTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "Dataset": lambda params: params["dataset"]["source"],
    "Teacher": lambda params: _network(params["teacher"]),
    "Student": lambda params: _network(params["student"]),
    "Epochs": lambda params: str(params["distill"]["epochs"]),
}


def build_page(
    commit: str,
    experiments: Sequence[Experiment],
    found: Sequence[Variant],
    tables: Mapping[str, Table],
    against: str | None,
    records: Sequence[Mapping[str, Any]],
) -> str:
    """The whole page. `tables` has summary, seeds and, if the experiments differ in parameters, settings; `against` is the name of the
    reference, None if it is not among the experiments."""
    context = {
        "commit": commit,
        "experiments": len(experiments),
        "against": against,
        "reference": next((variant.title for variant in found if variant.name == against), None),
        "facts": {name: _fact(experiments, read) for name, read in _FACTS.items()},
        "summary": tables["summary"],
        "settings": tables.get("settings"),
        "seeds": tables["seeds"],
        "correlation": correlation_text(found),
        "charts": [chart for measure in _AXES if (chart := _chart(found, measure))],
        "machines": sorted({_machine(record) for record in records}),
    }
    return render_page("report_experiments.html.j2", **context)


def _network(section: Mapping[str, Any]) -> str:
    return section["arch"] + ("" if section["width"] == 1 else f" × {section['width']:g} wide")


def _fact(experiments: Sequence[Experiment], read: Callable[[Mapping[str, Any]], str]) -> str:
    """The values in the experiments, the most frequent first."""
    values = [read(experiment.params) for experiment in experiments]
    return ", ".join(sorted(set(values), key=lambda value: (-values.count(value), value)))


def _machine(record: Mapping[str, Any]) -> str:
    processes = record.get("processes", 1)
    return f"{record.get('device', 'unknown device')}{f' × {processes}' if processes > 1 else ''}, {record.get('cores', '?')} cores"


def _chart(found: Sequence[Variant], cost: str) -> tuple[Markup, str] | None:
    """Accuracy against a cost, over the variants that have both, and the sentence under it; None if there are fewer than two."""
    measure = next((measure for measure in ACCURACIES if any(measure in variant.values for variant in found)), ACCURACIES[0])
    title = measure_label(measure)
    points = [point for variant in found if (point := _point(variant, cost, measure, _prefix(found)))]
    if len(points) < 2:
        return None
    labels = (f"{point.label} {point.y:.1f} percent at {point.x:.3g}" for point in points)
    ceiling = spread(value for variant in found for value in variant.values.get(f"teacher_{measure}", {}).values())
    line = (f"teacher {ceiling.mean:.1f}", ceiling.mean) if ceiling else None
    svg = labelled_points(
        f"cost-{cost.replace('_', '-')}", points, _AXES[cost], f"{title}, percent", line, f"{title} by {_AXES[cost]}: {'; '.join(labels)}."
    )
    shapes = "Circles: with a teacher; squares: without." if len({point.kind for point in points}) > 1 else ""
    return svg, f"Mean {title} against {_AXES[cost]}. Error bars: one standard deviation over the seeds. {shapes}".strip()


def _point(variant: Variant, cost: str, measure: str, prefix: str) -> Point | None:
    accuracy, price = variant.spread(measure), variant.spread(cost)
    if accuracy is None or price is None:
        return None
    kind = _WITH_TEACHER if variant.with_teacher else _WITHOUT
    return Point(_label(variant, prefix), price.mean, accuracy.mean, accuracy.deviation, kind)


def _label(variant: Variant, prefix: str) -> str:
    """A variant's name without the common prefix; for recipes method-NAME, the method's name as in its paper and the rest of the name."""
    name = variant.name.removeprefix(prefix)
    method, hyphen, rest = name.removeprefix("method-").partition("-")
    return f"{display_name(method)}{hyphen}{rest}" if method == variant.method else name


def _prefix(found: Sequence[Variant]) -> str:
    """The common prefix of all names, which carries no information on a chart: a base with its plus sign, then the first word with its
    hyphen."""
    bases = {variant.name.rpartition("+")[0] for variant in found}
    base = f"{bases.pop()}+" if len(bases) == 1 and all("+" in variant.name for variant in found) else ""
    names = [variant.name.removeprefix(base) for variant in found]
    words = {name.partition("-")[0] for name in names}
    return base + (f"{words.pop()}-" if len(words) == 1 and all("-" in name for name in names) else "")
