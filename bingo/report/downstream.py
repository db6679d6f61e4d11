"""The report's sections on few labels, on transfer to other labelled images and on COCO: measured figures, next to the published ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bingo.params import display_name, read_yaml
from bingo.report.inputs import Artefacts
from bingo.report.render import render
from bingo.report.results import Cell, Row, network_label, network_role

_FEW_LABELS = {"finetune": "fine-tuned", "linear": "linear only"}
_FEW_LABELS_LEAD = (
    "Training on a share of the labels. Fine-tuned: the whole network is trained, with separate learning rates for "
    "backbone and linear layer. Linear only:"
    " the backbone is frozen, and a linear layer is trained on random crops. Compare each only with published rows of the same kind."
)
_TRANSFER = {"linear_resized": "linear, enlarged", "linear_native": "linear", "finetune": "fine-tuned"}
_TRANSFER_LEAD = (
    "The student on images other than those it was distilled on. Linear: a linear layer on the frozen student is trained on random crops,"
    " enlarged as in the papers or at the images' own size. Fine-tuned: the whole network is trained, at the images' own size."
)
MEASURES = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_small": "small", "AP_medium": "medium", "AP_large": "large"}


@dataclass(frozen=True)
class DownstreamSection:
    """One section of the page."""

    id: str
    title: str
    html: Markup


def sections(a: Artefacts) -> Iterator[DownstreamSection]:
    """The sections for which something was measured."""
    if a.semi:
        yield _few_labels(a)
    if a.transfer:
        yield _transfer(a)
    if a.coco:
        yield DownstreamSection("coco", "COCO", render("report_coco.html.j2", rows=coco_rows(a), measures=list(MEASURES.values())))


@cache
def _published(part: str) -> Any:
    """A part of recipes/published/figures.yaml, which contains figures published by others."""
    return read_yaml(Path(__file__).parents[2] / "recipes/published/figures.yaml")[part]


def _few_labels(a: Artefacts) -> DownstreamSection:
    splits = sorted(a.semi.values(), key=lambda split: split["percent"])
    groups = [(f"{split['percent']:g}\u00a0%: {split['labels']:,} labels, {split['origin']}", len(_FEW_LABELS)) for split in splits]
    columns = [_column(split, protocol) for split in splits for protocol in _FEW_LABELS]
    return _beside(a, "few-labels", "Few labels", _FEW_LABELS_LEAD, groups, [*_FEW_LABELS.values()] * len(splits), columns)


def _transfer(a: Artefacts) -> DownstreamSection:
    groups, headers, columns = [], [], []
    for name, result in a.transfer.items():
        shown = [protocol for protocol in _TRANSFER if protocol in result["protocols"]]
        train, test = result["images"]
        groups.append((f"{name}: {train:,} train, {test:,} test images", len(shown)))
        headers += [f"{_TRANSFER[protocol]}, {result['protocols'][protocol]['crop_px']}\u00a0px" for protocol in shown]
        columns += [_column(result, protocol) for protocol in shown]
    return _beside(a, "transfer", "Transfer", _TRANSFER_LEAD, groups, headers, columns)


def _column(result: Mapping[str, Any], protocol: str) -> dict[str, dict]:
    """{net: scores} of one protocol."""
    return {net: scores[protocol] for net, scores in result["nets"].items() if protocol in scores}


def _beside(
    a: Artefacts, section_id: str, title: str, lead: str, groups: Sequence[tuple[str, int]], headers: Sequence[str], columns: list[dict]
) -> DownstreamSection:
    """A table with a row for each network and these columns, in groups of the given sizes, beside the published table with the same
    title."""
    measured = {net for column in columns for net in column}
    nets = [net for net in ("student", *sorted(measured - {"student", "untrained"}), "untrained") if net in measured]
    rows = [Row(net, network_label(a, net), network_role(a, net), [_cell(column.get(net)) for column in columns]) for net in nets]
    table = _published(section_id.replace("-", "_"))
    published = {
        "caption": table["caption"],
        "headers": [header.replace(" ", "\u00a0") for header in table["headers"]],
        "rows": [(method, remark, [f"{figure:.1f}" for figure in figures]) for method, remark, *figures in table["rows"]],
    }
    names = {"id": section_id, "title": title, "lead": lead, "groups": groups, "headers": headers, "rows": rows}
    return DownstreamSection(section_id, title, render("report_beside.html.j2", section=names, published=published))


def _cell(scores: Mapping[str, Any] | None) -> Cell:
    return Cell(None) if scores is None else Cell(scores["top1_last"], f"best {scores['top1_best']:.1f}")


def coco_rows(a: Artefacts) -> list[tuple[str, str, list[float | None]]]:
    """For each measured run its row, then the published ones with its head and schedule: the network, their origin ("measured, ..." or
    "published, ..."), and the figures for boxes, then for masks, in the order of MEASURES; percent, None: unknown."""
    rows = []
    for run, scores in a.coco.items():
        network = f"{a.params.student.arch} by {display_name(a.params.distill.method)}"
        rows.append((network, f"measured, {run}", [scores[kind][measure] for kind in ("box", "mask") for measure in MEASURES]))
        key, note = ("c4", "head and schedule not stated") if run.startswith("c4-") else (run, run)
        for label, figures in _published("coco").get(key, {}).items():
            rows.append((label, f"published, {note}", [*figures["box"], *figures["mask"]]))
    return rows


def figures(a: Artefacts) -> dict[str, dict[str, float]]:
    """Measures for the comparison of experiments: {semi_SPLIT or transfer_NAME: {NET_PROTOCOL: percent after the last epoch}}, rounded to
    four places."""
    results = {f"semi_{name}": split for name, split in a.semi.items()} | {f"transfer_{name}": found for name, found in a.transfer.items()}

    def last(nets: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
        return {f"{net}_{name}": round(score["top1_last"], 4) for net, scores in nets.items() for name, score in scores.items()}

    return {name: last(result["nets"]) for name, result in results.items()}
