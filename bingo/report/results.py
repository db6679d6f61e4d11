"""The report's results: rows of networks, columns of measures, the headline, and caveats."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bingo.images.images import PIXELS_PX
from bingo.params import display_name
from bingo.report.inputs import Artefacts
from bingo.report.measures import measure_label, neighbor_order
from bingo.report.plots import accuracy_bars

_USUAL_KNN = ("knn_10", "knn_20_weighted")
_LINEAR_COLUMNS = {"top1_last": "top-1", "top5_last": "top-5", "top1_best": "top-1, best epoch, chosen on the test split"}
_PROTOCOLS = {"cached": "Linear layer on stored features", "crops": "Linear layer on random crops"}
_HEADLINES = (
    ("linear cached", "top1_last", measure_label("linear")),
    *(("knn", key, measure_label(key)) for key in _USUAL_KNN),
    ("agreement", "agreement_10", measure_label("agreement_10")),
)
_ROLES = {"teacher": "ceiling", "untrained": "floor", "pixels": "no network"}
_OTHERS = ("teacher", "student", "ema", "start", "supervised", "untrained", "pixels")  # networks that are not baselines
_FAMILY_COLORS = {"student": 0, "ema": 0, "teacher": 1, "start": 3, "untrained": 3, "pixels": 3}  # of plots.SERIES; the baselines' is 2
_SKIPPED_SHOWN = 10
_BAG_FIGURES = ("purity", "mutual_share", "view_overlap", "chance_share", "near_duplicates", "orphan_share", "recall")


@dataclass(frozen=True)
class Column:
    """One measure: `group` is "knn", "agreement" (both are in the file of k-NN) or "linear PROTOCOL", `key` the key in that file."""

    group: str
    key: str
    header: str


@dataclass(frozen=True)
class Cell:
    """One figure of the table, in percent; `note` is the number of the best epoch."""

    percent: float | None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One network: its key in the metrics files, its name, its role, and a cell for each column."""

    net: str
    label: str
    role: str
    cells: list[Cell]


def needs_teacher(a: Artefacts) -> bool:
    """Whether the student learned from the teacher: MoCo-v2 and ISD do not use one."""
    return a.params.methods.section(a.params.distill.method).needs_teacher


def network_label(a: Artefacts, net: str) -> str:
    """The name of a network, given its key in the metrics files."""
    method = a.params.distill.method
    fixed = {
        "teacher": "Teacher",
        "student": f"Student by {display_name(method)}{'' if needs_teacher(a) else ', no teacher'}",
        "ema": "Student, moving average (EMA)",
        "start": f"Student before {'distillation' if needs_teacher(a) else 'this training'}",
        "supervised": "Student, supervised",
        "untrained": "Student, untrained",
        "pixels": "Raw pixels",
    }
    return fixed.get(net, f"{'Baseline' if net == method else 'Student'} by {display_name(net)}, no teacher")


def columns(a: Artefacts) -> list[Column]:
    """The measures that at least one network has. For k-NN these are the two usual ones, or otherwise all that were measured; top-5 is
    included only with more than five classes."""
    keys = dict.fromkeys(key for scores in a.knn.values() for key in scores)
    knn_keys, agreements = ([key for key in keys if key.startswith(group)] for group in ("knn_", "agreement_"))
    usual = [key for key in _USUAL_KNN if key in knn_keys]
    found = [Column("knn", key, _short_header(key)) for key in usual or sorted(knn_keys, key=neighbor_order)]
    for protocol in _PROTOCOLS:
        measured = {key for scores in a.linear.get(protocol, {}).values() for key in scores}
        shown = [key for key in _LINEAR_COLUMNS if key in measured and (key != "top5_last" or len(a.listing.classes) > 5)]
        found += [Column(f"linear {protocol}", key, _LINEAR_COLUMNS[key]) for key in shown]
    return found + [Column("agreement", key, _short_header(key)) for key in agreements]


def column_groups(found: Sequence[Column]) -> list[tuple[str, int]]:
    """The header above the columns: the name of each group and its number of columns."""
    names = {"knn": "Nearest neighbours", "agreement": "Agreement with the teacher"}
    names |= {f"linear {protocol}": name for protocol, name in _PROTOCOLS.items()}
    groups = dict.fromkeys(column.group for column in found)
    return [(names[group], sum(column.group == group for column in found)) for group in groups]


def rows(a: Artefacts, found: Sequence[Column]) -> list[Row]:
    """The networks that were measured, in this order: teacher, student, its moving average, baselines, the network with supervised
    weights, the student before distillation, the untrained network, raw pixels."""
    return [
        Row(net, network_label(a, net), network_role(a, net), [_cell(a, net, column) for column in found]) for net in _nets(a)
    ]  # fmt: skip


def network_role(a: Artefacts, net: str) -> str:
    """The role of a network, or the source of its weights."""
    if net in a.origins:
        return a.origins[net]
    if net == "pixels" and a.params.dataset.store_px is None:
        return f"no network, {PIXELS_PX} px"
    return "not used for training" if net == "teacher" and not needs_teacher(a) else _ROLES.get(net, "")


def chance(a: Artefacts, column: Column) -> float:
    """The expected value of a measure by chance, in percent: for guessing one class (or five) of equal size, or for neighbours in random
    order."""
    if column.group == "agreement":
        return min(100.0, 100 * int(column.key.removeprefix("agreement_")) / max(1, a.listing.train_rows))
    classes = max(1, len(a.listing.classes))
    return 100 * min(5 if column.key.startswith("top5") else 1, classes) / classes


def bars(a: Artefacts) -> tuple[Markup, str] | None:
    """The bar chart next to the table and its caption: bars of the headline's measure, and of k-NN if that is a different one. None
    without scores."""
    found = headline_columns(a)
    measures = [column for column in found if column.key != "knn_20_weighted"][:2] or found[:1]
    if not measures:
        return None
    names, method = [column.header for column in measures], a.params.distill.method
    rows = [
        (_short_label(net, method), [_cell(a, net, column).percent for column in measures], _FAMILY_COLORS.get(net, 2)) for net in _nets(a)
    ]
    pale = f"; the pale bars are {names[1]}" if len(names) > 1 else ""
    return accuracy_bars("results", rows, names, chance(a, measures[0])), f"Percent, {names[0]}{pale}. The dashed line is chance."


def headline_figures(a: Artefacts) -> dict[str, float]:
    """The headline's figures, percent by network: student, its baselines, the teacher, the floor; empty without scores."""
    found = headline_columns(a)[:1]
    order = ["student", *_baselines(a), "supervised", "teacher", "start", "untrained"]
    return {net: percent for net in order for column in found if (percent := _cell(a, net, column).percent) is not None}


def warnings(a: Artefacts) -> list[str]:
    """Warnings about figures that may be misunderstood, shown in red."""
    found = []
    teacher = a.params.teacher
    converted = a.teacher.metadata if a.teacher else {}
    if teacher.source == "random" or False in (converted.get("pretrained"), a.terms.get("teacher", {}).get("pretrained")):
        found.append("The teacher has random weights (no trained weights were loaded), so the figures say nothing about distillation.")
    figures = headline_figures(a)
    teachers, untrained = figures.get("teacher", math.inf), figures.get("untrained", 0.0)
    if needs_teacher(a) and teachers <= untrained < 100:  # all are at 100 with a single class, for example
        both = f"The teacher ({teachers:.1f} %) is not better than the untrained student ({untrained:.1f} %)"
        found.append(f"{both}, so there is little to learn from it.")
    if a.listing.skipped:
        names, more = a.listing.skipped[:_SKIPPED_SHOWN], len(a.listing.skipped) - _SKIPPED_SHOWN
        rest = f" and {more:,} more" if more > 0 else ""
        found.append(f"Unreadable images left out: {len(a.listing.skipped):,} ({', '.join(names)}{rest}).")
    return found


def caveats(a: Artefacts) -> list[str]:
    """Limitations of the figures, in one or two sentences each."""
    found: list[str] = []
    dataset, test_images = a.params.dataset, len(a.listing.test_rows_N)
    if not _nets(a):
        return found
    if test_images:
        share = min(1.0, max(0.0, headline_figures(a).get("student", 50.0) / 100))
        found.append(
            f"This is one run with seed {a.params.seed}. With {test_images:,} test images, sampling alone changes the student's figure by"
            f" ±{196 * math.sqrt(share * (1 - share) / test_images):.1f} points (95 %) or more."
            " Intervals of differences are paired over the same images, and do not include the variation over seeds."
        )
    if any(column.key == "top1_best" for column in columns(a)):
        found.append("The best epoch was chosen on the test split, so its column is optimistic; the other columns are for the last epoch.")
    if dataset.source == "digits" and dataset.placements > 1:
        found.append(f"Each digit was drawn at {dataset.placements} positions, so the test images are not independent of each other.")
    parts = {"train": dataset.train_images, "test": None if a.listing.held_out else dataset.test_images}
    if drawn := " and ".join(f"{count:,} {split} images" for split, count in parts.items() if count):
        found.append(f"{drawn} were drawn with this seed; published figures use all images of the dataset.")
    found += _of_test_images(a)
    if leaking := _leaking_trainings(a):
        found.append(
            f"BatchNorm is over the whole batch of a process ({', '.join(leaking)}: 1 group). If one process trained, a query and its key "
            "are normalised with the same images, so the network can identify its key by their statistics."
        )
    if a.params.bagging.method == "label":
        found.append("The bags were made from labels, so this is an upper bound and not an unsupervised result.")
    return found


def _of_test_images(a: Artefacts) -> list[str]:
    """How the test images were held out and how many of them are not evaluated, or, for a test split of the dataset, how many have
    near-duplicates."""
    near, drawn = a.bag_metrics.get("test_near_duplicates", 0), a.listing.held_out
    if drawn is None:
        said = f"{near:,} of the test images have near-duplicates among the train images by the teacher, so the figures are too high."
        return [said] if near else []
    balanced = ", balanced over the classes," if a.listing.labelled else ""
    said = f"The images have no test split; {drawn:,} of the train images were drawn with seed {a.params.seed}{balanced} and held out."
    reasons = {"byte-for-byte copies of train images": drawn - (len(a.listing) - a.listing.train_rows)}
    reasons["near-duplicates of train images by the teacher's features"] = len(a.listing.left_out_rows)
    left_out = " and ".join(f"{count:,} are {reason}" for reason, count in reasons.items() if count)
    return [f"{said} Of these {left_out}; no figure includes them." if left_out else said]


def _leaking_trainings(a: Artefacts) -> list[str]:
    """Parameters that leave BatchNorm ungrouped although a method with a momentum encoder is trained: for the teacher, and for the student
    or a baseline."""
    pretrain, distill, methods = a.params.teacher.pretrain, a.params.distill, a.params.methods
    baselines = [methods.section(name).momentum_keys("momentum") for name in a.params.baselines]
    student = methods.section(distill.method).momentum_keys(distill.keys) or any(baselines)
    trained = {
        "teacher.pretrain.batchnorm_groups": a.params.teacher.source == "pretrain"
        and pretrain.groups_for(True, 1) == pretrain.accumulate_steps,
        "distill.batchnorm_groups": student and distill.groups_for(True, 1) == distill.accumulate_steps,
    }
    return [name for name, leaks in trained.items() if leaks]


def _nets(a: Artefacts) -> list[str]:
    measured = {net for scores in (a.knn, *a.linear.values()) for net in scores}
    order = ["teacher", "student", "ema", *_baselines(a), "supervised", "start", "untrained", "pixels"]
    return [net for net in order if net in measured]


def _baselines(a: Artefacts) -> list[str]:
    others = {net for scores in (a.knn, *a.linear.values()) for net in scores}
    return sorted(others - set(_OTHERS))


def _cell(a: Artefacts, net: str, column: Column) -> Cell:
    scores = a.knn if column.group in ("knn", "agreement") else a.linear.get(column.group.removeprefix("linear "), {})
    of_net = scores.get(net, {})
    note = f"epoch {of_net['best_epoch']}" if column.key == "top1_best" and "best_epoch" in of_net else ""
    return Cell(of_net.get(column.key), note)


def headline_columns(a: Artefacts) -> list[Column]:
    """The student's measures that can be the headline, the preferred one first."""
    found = [Column(*headline) for headline in _HEADLINES]
    return [column for column in found if _cell(a, "student", column).percent is not None]


def _short_header(key: str) -> str:
    """Without the group's name, which is above it, and without line breaks at the equals sign."""
    return measure_label(key).removeprefix("k-NN, ").removeprefix("agreement with the teacher, ").replace(" = ", "\u00a0=\u00a0")


def _short_label(net: str, method: str) -> str:
    if net in _OTHERS:
        return {"student": display_name(method), "ema": "EMA"}.get(net, net.capitalize())
    return f"{display_name(net)} baseline" if net == method else display_name(net)


def compared_figures(a: Artefacts) -> dict[str, dict[str, float]]:
    """The figures by which experiments are compared: {measure: {network: percent}}, and shares for the bags."""
    figures = {"knn_10": {net: scores["knn_10"] for net, scores in a.knn.items() if "knn_10" in scores}}
    figures["linear"] = {net: scores["top1_last"] for net, scores in a.linear.get("cached", {}).items()}
    figures["linear_crops"] = {net: scores["top1_last"] for net, scores in a.linear.get("crops", {}).items()}
    figures["agreement_10"] = {net: scores["agreement_10"] for net, scores in a.knn.items() if "agreement_10" in scores}
    figures["bags"] = {name: a.bag_metrics[name] for name in _BAG_FIGURES if name in a.bag_metrics}
    return {name: {key: round(value, 4) for key, value in group.items()} for name, group in figures.items() if group}
