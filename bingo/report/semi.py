"""The report's section on few labels: figures measured with each share of labels, next to the published ones."""

from typing import Any

from bingo.report.beside import ComparedSection, last_figures, net_rows, published_table
from bingo.report.inputs import Artefacts

_PROTOCOLS = {"finetune": "fine-tuned", "linear": "linear only"}
_LEAD = (
    "Training on a share of the labels. Fine-tuned: the whole network is trained, with separate learning rates for "
    "backbone and linear layer. Linear only:"
    " the backbone is frozen, a linear layer learns on random crops. The published rows mix the two, so compare like with like."
)


def section(a: Artefacts) -> ComparedSection | None:
    """The section, None if nothing was measured."""
    if not a.semi:
        return None
    splits = sorted(a.semi.values(), key=lambda split: split["percent"])
    columns = [_column(split, protocol) for split in splits for protocol in _PROTOCOLS]
    return ComparedSection(
        id="few-labels",
        title="Few labels",
        lead=_LEAD,
        groups=[(f"{split['percent']:g}\u00a0%: {split['labels']:,} labels, {split['origin']}", len(_PROTOCOLS)) for split in splits],
        headers=[*_PROTOCOLS.values()] * len(splits),
        rows=net_rows(a, columns),
        published=published_table("few_labels"),
    )


def figures(a: Artefacts) -> dict[str, dict[str, float]]:
    """Measures for the comparison of experiments: {semi_SPLIT: {NET_PROTOCOL: percent after the last epoch}}."""
    return {f"semi_{name}": last_figures(split["nets"]) for name, split in a.semi.items()}


def _column(split: dict[str, Any], protocol: str) -> dict[str, dict[str, Any]]:
    return {net: scores[protocol] for net, scores in split["nets"].items() if protocol in scores}
