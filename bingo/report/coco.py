"""The report's COCO table: measured figures, next to those published for the same head and schedule."""

from dataclasses import dataclass

from markupsafe import Markup

from bingo.params import display_name
from bingo.report.beside import published
from bingo.report.inputs import Artefacts
from bingo.report.render import render

MEASURES = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_small": "small", "AP_medium": "medium", "AP_large": "large"}


@dataclass(frozen=True)
class CocoRow:
    """One network with one head and schedule: figures for boxes, then for masks, in the order of MEASURES; percent, None: unknown."""

    label: str
    origin: str
    figures: list[float | None]

    @property
    def measured(self) -> bool:
        """Whether the figures are of this run."""
        return self.origin.startswith("measured")


def coco_rows(a: Artefacts) -> list[CocoRow]:
    """For each measured run, its row and then the published ones."""
    rows = []
    for run, scores in a.coco.items():
        figures = [scores[kind][measure] for kind in ("box", "mask") for measure in MEASURES]
        network = f"{a.params.student.arch} by {display_name(a.params.distill.method)}"
        rows.append(CocoRow(network, f"measured, {run}", figures))
        key = "c4" if run.startswith("c4-") else run
        note = "head and schedule not stated" if key == "c4" else run
        for label, figures in published("coco").get(key, {}).items():
            rows.append(CocoRow(label, f"published, {note}", [*figures["box"], *figures["mask"]]))
    return rows


def coco_table(a: Artefacts) -> Markup:
    """The table with its heading as HTML, empty if no run was measured."""
    if not a.coco:
        return Markup("")
    return render("report_coco.html.j2", rows=coco_rows(a), measures=list(MEASURES.values()))
