"""The report: one HTML page that needs no network. The same artefacts give the same bytes; timings are in a separate file, run.js.

Its layout is in report.html.j2 and report.css. Text is escaped by the template; only charts are already HTML.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bingo import paths
from bingo.params import NetworkParams, display_name
from bingo.params.places import images_folder
from bingo.report import bags as report_bags
from bingo.report import results as report_results
from bingo.report.downstream import sections
from bingo.report.inputs import Artefacts, Curves, NetworkFacts
from bingo.report.measures import measure_label
from bingo.report.plots import SERIES, lines
from bingo.report.render import render_page
from bingo.report.worth import headline
from bingo.runtime.artefacts import file_fingerprint

_STAGE_ORDER = (
    "scan", "teacher", "extract", "bag", "weights", "distill", "baseline", "linear_eval", "knn_eval", "semi_eval", "transfer_cifar",
    "transfer_coco",
)  # fmt: skip
_COLORS, _BASELINE_COLOR = {"distill": 0, "teacher": 1}, 2  # of plots.SERIES, as in the results
_DATASETS = {"digits": "Handwritten digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}  # by dataset.source
_PROBES = {"knn_10": "k-NN accuracy, percent", "agreement_10": "Agreement with the teacher, k = 10, percent"}
_PROBE_COLORS = [0, 2, 4, 1, 3]
_RUN_KEYS = (
    "stage", "seconds", "images_per_second", "anchors_per_second", "data_wait", "probe", "device", "processes", "cores",
    "revision", "ended", "python", "versions",
)  # fmt: skip


TrainingCharts = tuple[str, str, list[Markup]]  # of one training: its name, a sentence on its last epoch, and the charts


def build_page(a: Artefacts) -> str:
    """The whole page. Sections report missing artefacts."""
    found = report_results.columns(a)
    context = {
        "a": a,
        "teacher": _network(a.params.teacher, a.teacher),
        "student": _network(a.params.student, a.student),
        "shrinkage": _shrinkage(a),
        "method": display_name(a.params.distill.method),
        "student_file": paths.STUDENT.as_posix(),
        "student_fingerprint": file_fingerprint(paths.STUDENT) if paths.STUDENT.exists() else "",
        "title": a.params.report.title or f"{_dataset_name(a)}: {_images(a)}",
        "with_teacher": report_results.needs_teacher(a),
        "dataset": _dataset(a),
        "headline": headline(a),
        "measure": next((column.header for column in report_results.headline_columns(a)), ""),
        "tiles": [(net, report_results.network_label(a, net), percent) for net, percent in report_results.headline_figures(a).items()],
        "warnings": report_results.warnings(a),
        "caveats": report_results.caveats(a),
        "columns": found,
        "column_groups": report_results.column_groups(found),
        "rows": report_results.rows(a, found),
        "chance": [report_results.chance(a, column) for column in found],
        "bars": report_results.bars(a),
        "downstream": list(sections(a)),
        "trainings": _trainings(a),
        "probes": _probes(a),
        "bags": report_bags.gallery(a),
        "failures": report_bags.failures(a),
        "hubs": report_bags.hubs(a),
        "pairs": report_bags.closest_pairs(a),
        "statistics": report_bags.statistics(a.bag_metrics),
    }
    return render_page("report.html.j2", **context)


def run_script(records: Iterable[Mapping[str, Any]]) -> str:
    """The text of run.js: the last run of each stage, in the order of the stages, without parameters."""
    kept = [{key: record[key] for key in _RUN_KEYS if record.get(key) is not None} for record in records]
    order = {stage: number for number, stage in enumerate(_STAGE_ORDER)}
    kept.sort(key=lambda record: (order.get(record["stage"].partition("-")[0], len(order)), record["stage"]))
    return f"window.bingoRuns = {json.dumps(kept, indent=1)};\n"


def _network(network: NetworkParams, facts: NetworkFacts | None) -> str:
    """Architecture, width if it is not 1, and the number of parameters if it is known."""
    width = "" if network.width == 1 else f" × {network.width:g} wide"
    return f"{network.arch}{width}" + (f", {_rounded(facts.backbone_parameters)} parameters" if facts else "")


def _shrinkage(a: Artefacts) -> str:
    """How much smaller the student is, or an empty string if that is unknown or it is not smaller."""
    if not a.teacher or not a.student or a.student.backbone_parameters >= a.teacher.backbone_parameters:
        return ""
    return f"{a.teacher.backbone_parameters / a.student.backbone_parameters:.3g} times smaller"


def _rounded(count: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6), ("thousand", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _dataset_name(a: Artefacts) -> str:
    """The name of a published dataset, or of the folder."""
    dataset = a.params.dataset
    given = dataset.root or "."
    root = Path(given if dataset.source == "folder" else images_folder(given))  # a folder's name even if it no longer exists
    return _DATASETS.get(dataset.source) or (root.resolve() if root.name in ("", "..") else root).name or dataset.source


def _images(a: Artefacts) -> str:
    test_images = len(a.listing.test_rows_N)
    train = f"{a.listing.train_rows:,} train" + (f" and {test_images:,} test" if test_images else "")
    return f"{train} image{'s' if len(a.listing) > 1 else ''}"


def _dataset(a: Artefacts) -> str:
    classes = f"{len(a.listing.classes):,} classes" if a.listing.labelled else "no labels"
    return f"{_dataset_name(a)}: {_images(a)}, {classes}"


def _trainings(a: Artefacts) -> list[TrainingCharts]:
    """The charts of each training: teacher, student, baselines."""
    trained = [(name, curves) for name, curves in a.curves.items() if curves]
    return [
        _training(name, _training_title(a, name), curves, a.terms.get(name, {}), name == "distill" and a.params.distill.keep_best)
        for name, curves in trained
    ]


def _training_title(a: Artefacts, name: str) -> str:
    if name == "teacher":
        return f"Teacher, pretrained by {display_name('moco')}"
    return report_results.network_label(a, "student" if name == "distill" else name.removeprefix("baseline-"))


def _training(name: str, title: str, curves: Curves, terms: dict[str, Any], keeps_best: bool) -> TrainingCharts:
    best = _best_probe(curves)
    epochs, final = curves["epoch"], terms.get("last_loss", curves.get("loss", [math.nan])[-1])
    losses = [column for column in curves if column not in ("epoch", "lr", *_PROBES)]
    panels = {"Loss": losses, "Learning rate": ["lr"]} | {panel: [column] for column, panel in _PROBES.items()}
    own_color = _COLORS.get(name, _BASELINE_COLOR)
    colors, charts = [own_color, *(color for color in range(len(SERIES)) if color != own_color)], []
    for panel, names in panels.items():
        series = {column: (epochs, curves[column]) for column in names if any(map(math.isfinite, curves.get(column, [])))}
        if series:
            summary = f"{title}: {panel} by epoch. {_ends(series)}"
            charts.append(lines(f"{name}-{panel.split()[0].lower()}", panel, series, colors, summary))
    kept = f" Its weights are in {paths.BEST / 'student.safetensors'}." if keeps_best else ""
    return title, f"{max(epochs):.0f} epochs; the loss ended at {final:.4g}.{best}{kept if best else ''}", charts


def _best_probe(curves: Curves) -> str:
    """A sentence on the epoch with the highest figure of the probe, the first of equal ones; empty without a probe."""
    name = next((column for column in curves if column.startswith(("knn_", "agreement_"))), "")
    measured = [(percent, -epoch) for epoch, percent in zip(curves["epoch"], curves.get(name, []), strict=False) if math.isfinite(percent)]
    if not measured:
        return ""
    percent, epoch = max(measured)
    return f" Best by the probe: epoch {-epoch:.0f} with {percent:.1f} % ({measure_label(name)})."


def _ends(series: Mapping[str, tuple[list[float], list[float]]]) -> str:
    """The first and last value of each line, for screen readers."""
    parts = []
    for label, (_, values) in series.items():
        known = [value for value in values if math.isfinite(value)]
        parts.append(f"{label} from {known[0]:.4g} to {known[-1]:.4g}")
    return "; ".join(parts) + "."


def _probes(a: Artefacts) -> str:
    """The k-NN accuracy of the student and its baselines during training; empty if fewer than two were measured. Agreement with the
    teacher is measured only for the student."""
    series = {
        _training_title(a, name): (curves["epoch"], curves["knn_10"])
        for name, curves in a.curves.items()
        if name != "teacher" and any(map(math.isfinite, curves.get("knn_10", [])))
    }
    return (
        lines("probes", "k-NN accuracy, percent", series, _PROBE_COLORS, f"k-NN accuracy by epoch. {_ends(series)}")
        if len(series) > 1
        else ""
    )
