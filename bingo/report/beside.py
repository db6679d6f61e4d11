"""A section of the report that shows measured next to published figures: two tables, and how far they can be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bingo.params import read_yaml
from bingo.report.inputs import Artefacts
from bingo.report.render import render
from bingo.report.results import Cell, Row, network_label, network_role


@dataclass(frozen=True)
class Published:
    """A published table: its caption, the headings of its columns, and for each row the method, a remark and figures."""

    caption: str
    headers: list[str]
    rows: list[tuple[str, str, list[str]]]


@dataclass(frozen=True)
class ComparedSection:
    """One section: id, title, a sentence; the measured table (groups of columns with their span, headers, rows), the published one."""

    id: str
    title: str
    lead: str
    groups: list[tuple[str, int]]
    headers: list[str]
    rows: list[Row]
    published: Published

    @property
    def html(self) -> Markup:
        """The section as HTML."""
        return render("report_beside.html.j2", section=self)


@cache
def published(part: str) -> Any:
    """A part of recipes/published/figures.yaml, which holds what others report."""
    return read_yaml(Path(__file__).parents[2] / "recipes/published/figures.yaml")[part]


def published_table(part: str) -> Published:
    """A part that is a table: figures with one decimal, without line breaks between numbers and units."""
    table = published(part)
    rows = [(method, remark, [f"{figure:.1f}" for figure in figures]) for method, remark, *figures in table["rows"]]
    return Published(table["caption"], [header.replace(" ", "\u00a0") for header in table["headers"]], rows)


def net_rows(a: Artefacts, columns: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[Row]:
    """A row for each network; `columns` are {net: scores} as reports/semi and reports/transfer have them. The best epoch is the note."""
    measured = {net for column in columns for net in column}
    order = ["student", *sorted(measured - {"student", "untrained"}), "untrained"]
    return [
        Row(net, network_label(a, net), network_role(a, net), [_cell(column.get(net)) for column in columns])
        for net in order
        if net in measured
    ]


def last_figures(nets: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """{NET_PROTOCOL: top-1 after the last epoch, percent, four places}."""
    return {f"{net}_{protocol}": round(score["top1_last"], 4) for net, scores in nets.items() for protocol, score in scores.items()}


def _cell(scores: Mapping[str, Any] | None) -> Cell:
    return Cell(None) if scores is None else Cell(scores["top1_last"], f"best {scores['top1_best']:.1f}")
