"""The text output of the `bags` commands: a bag, statistics and a comparison as aligned columns."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.cells import cell_len

from bingo.browse.diff import BagDiff
from bingo.cli.browse_source import BagSource, same_label
from bingo.report.measures import VIEW_OVERLAP_NEEDS
from bingo.runtime.errors import printable


def members_table(source: BagSource, members: np.ndarray, cosines: np.ndarray, anchor_label: int | None) -> str:
    """One line for each member, nearest first; without the column `same` if the anchor is not in the dataset (None), and without columns
    of labels if there are none."""
    if not len(members):
        return "the bag is empty"
    listed_paths, labels = source.listing.rows(members)
    words = {True: "yes", False: "no", None: "?"}
    rows = []
    for place, (row, cosine, label, path) in enumerate(zip(members.tolist(), cosines, labels.tolist(), listed_paths, strict=True), 1):
        same = [] if anchor_label is None or not source.listing.classes else [words[same_label(label, anchor_label)]]
        rows.append([str(place), str(row), f"{cosine:.4f}", *_labels(source, source.class_name(label)), *same, printable(path)])
    heads = ["#", "row", "similarity", *_labels(source, "label"), *(["same"] if same else []), "path"]
    return table(heads, rows, "rrr")


def stats_text(source: BagSource, metrics: dict[str, Any]) -> str:
    """`bag_metrics` as two columns, and its hubs and closest pairs with their paths."""
    index = source.index
    rows = [(name.replace("_", " "), _value(value)) for name, value in metrics.items() if not isinstance(value, list)]
    hubs = metrics["hubs"]
    listed_paths, labels = source.listing.rows([hub["row"] for hub in hubs])
    lines = [
        (str(hub["row"]), str(hub["count"]), *_labels(source, source.class_name(label)), printable(path))
        for hub, path, label in zip(hubs, listed_paths, labels.tolist(), strict=True)
    ]
    heads = ("row", "row", "similarity", "path", "path")
    pairs = [
        (*map(str, pair["rows"]), f"{pair['cosine']:.4f}", *map(printable, source.listing.rows(pair["rows"])[0]))
        for pair in metrics.get("closest_pairs", [])  # earlier revisions have none
    ]
    head = f"{index.name}: {index.method} bags of {index.train_rows} rows of {printable(source.listing.dataset)}, k {index.k}"
    return "\n".join(
        [
            head,
            table(("figure", "value"), rows),
            "chance share: the value of mutual share and view overlap if members were drawn at random; good bags are many times above it",
            *([] if "view_overlap" in metrics else [f"view overlap: not measured; it needs {VIEW_OVERLAP_NEEDS}"]),
            "",
            "hubs: the rows in most bags",
            table(("row", "bags", *_labels(source, "label"), "path"), lines, "rr"),
            *(["", "the most similar pairs of an anchor and a member", table(heads, pairs, "rrr")] if pairs else []),
        ]
    )


def _labels(source: BagSource, cell: str) -> list[str]:
    """The cell of a column that needs labels, which images without labels do not have."""
    return [printable(cell)] if source.listing.classes else []


def diff_text(sources: tuple[BagSource, BagSource], found: BagDiff, rows_R: np.ndarray) -> str:
    """The figures of the comparison, and one line for each of the anchors `rows_R`."""
    before, after = sources
    lines = [(name.replace("_", " "), _value(value)) for name, value in found.summary().items()]
    listed_paths, labels = before.listing.rows(rows_R)
    anchors = [
        (str(row), f"{found.jaccard_T[row]:.3f}", *_labels(before, _share(found.purity_before_T[row])),
         *_labels(before, _share(found.purity_after_T[row])), *_labels(before, before.class_name(label)), printable(path))
        for row, path, label in zip(rows_R.tolist(), listed_paths, labels.tolist(), strict=True)
    ]  # fmt: skip
    heads = ("row", "jaccard", *(head for name in ("purity before", "purity after", "label") for head in _labels(before, name)), "path")
    return "\n".join(
        [f"before: {before.title}", f"after: {after.title}", table(("figure", "value"), lines), "", "anchors that changed most",
         table(heads, anchors, "rrrr")]
    )  # fmt: skip


def _value(value: Any) -> str:
    return ", ".join(f"{key} {_number(x)}" for key, x in value.items()) if isinstance(value, dict) else _number(value)


def _number(x: float) -> str:
    if isinstance(x, int):
        return f"{x:,}"
    return f"{x:.4f}".rstrip("0").rstrip(".") if x else "0"


def _share(x: float) -> str:
    return "?" if x != x else f"{x:.2f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Columns separated by two spaces, with headings; `right` has an `r` at the position of each right-aligned column."""
    cells = [heads, *rows]
    columns = [_padded([line[place] for line in cells], right[place : place + 1] == "r") for place in range(len(heads))]
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _padded(column: Sequence[str], right: bool) -> list[str]:
    """The cells of a column at equal width in a terminal, where some characters take two places, and some none."""
    width = max(map(cell_len, column))
    spaces = [" " * (width - cell_len(cell)) for cell in column]
    return [space + cell if right else cell + space for cell, space in zip(column, spaces, strict=True)]
