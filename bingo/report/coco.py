"""The report's table of COCO: what was measured here, beside what was published for the same head and schedule.

The published figures are those on BINGO's slides. Of the ResNet-34 rows, schedule and head are not stated; the methods that they are
compared with used C4 heads, so they stand beside ours of that kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bingo.params import display_name
from bingo.report.inputs import Artefacts
from bingo.report.render import render

MEASURES = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_small": "small", "AP_medium": "medium", "AP_large": "large"}
_Figures = Sequence[float | None]
_UNKNOWN = (None,) * 3
_PUBLISHED: dict[str, dict[str, tuple[_Figures, _Figures]]] = {
    "fpn-1x": {
        "ResNet-18 by MoCo-v2": ((31.3, 50.0, 33.5, 16.5, 33.1, 41.1), (28.8, 47.2, 30.6, 12.2, 29.7, 42.7)),
        "ResNet-18 by BINGO": ((32.0, 51.0, 34.7, 17.1, 34.1, 42.0), (29.6, 48.2, 31.5, 12.8, 30.8, 43.0)),
    },
    "fpn-2x": {
        "ResNet-18 by MoCo-v2": ((34.4, 53.9, 37.0, 18.9, 36.8, 45.5), (31.5, 51.1, 33.6, 14.1, 32.9, 46.9)),
        "ResNet-18 by BINGO": ((34.9, 54.2, 37.7, 20.0, 37.1, 46.0), (31.9, 51.7, 33.9, 14.9, 33.1, 47.2)),
    },
    "c4": {
        "ResNet-34 by MoCo-v2": ((38.1, 56.8, 40.7, *_UNKNOWN), (33.0, 53.2, 35.3, *_UNKNOWN)),
        "ResNet-34 by SEED": ((38.4, 57.0, 41.0, *_UNKNOWN), (33.3, 53.7, 35.3, *_UNKNOWN)),
        "ResNet-34 by DisCo": ((39.4, 58.7, 42.7, *_UNKNOWN), (34.4, 55.4, 36.7, *_UNKNOWN)),
        "ResNet-34 by BINGO": ((39.9, 59.4, 43.5, 22.8, 43.3, 52.1), (35.7, 56.5, 38.2, 16.8, 37.9, 51.6)),
    },
}


@dataclass(frozen=True)
class CocoRow:
    """One network under one head and schedule: figures of boxes, then of masks, in the order of MEASURES; percent, None: unknown."""

    label: str
    origin: str
    figures: list[float | None]

    @property
    def measured(self) -> bool:
        """Whether the figures are of this run."""
        return self.origin.startswith("measured")


def coco_rows(a: Artefacts) -> list[CocoRow]:
    """For each run that was measured, its row and then the published ones."""
    rows = []
    for run, scores in a.coco.items():
        figures = [scores[kind][measure] for kind in ("box", "mask") for measure in MEASURES]
        network = f"{a.params.student.arch} by {display_name(a.params.distill.method)}"
        rows.append(CocoRow(network, f"measured, {run}", figures))
        key = "c4" if run.startswith("c4-") else run
        note = "head and schedule not stated" if key == "c4" else run
        for label, (box, mask) in _PUBLISHED.get(key, {}).items():
            rows.append(CocoRow(label, f"published, {note}", [*box, *mask]))
    return rows


def coco_table(a: Artefacts) -> Markup:
    """The table with its heading as HTML, empty where no run was measured."""
    if not a.coco:
        return Markup("")
    return render("report_coco.html.j2", rows=coco_rows(a), measures=list(MEASURES.values()))
