"""The report's section on few labels: what was measured with each share of them, beside the published figures."""

from typing import Any

from bingo.report.beside import ComparedSection, Published, last_figures, net_rows
from bingo.report.inputs import Artefacts

_PROTOCOLS = {"finetune": "fine-tuned", "linear": "linear only"}
_LEAD = (
    "Training on a share of the labels. Fine-tuned: the whole network learns, backbone and layer at their own learning rates. Linear only:"
    " the backbone is frozen, a linear layer learns on random crops. The published rows mix the two, so compare like with like."
)
_PUBLISHED = Published(
    "ImageNet top-1, ResNet-18, from BINGO's slides; not measured here, last or best epoch not stated. How a row was trained: from released"
    " code (SEED, DisCo) or the figure's caption (BINGO).",
    ["1\u00a0%", "10\u00a0%"],
    [
        ("MoCo-v2", "no teacher, training not stated", ["30.9", "45.8"]),
        ("CompRess", "R50 67.4, training not stated", ["41.2", "47.6"]),
        ("SEED", "R50 67.4, linear only", ["39.1", "50.2"]),
        ("DisCo", "R50 67.4, linear only", ["39.2", "50.1"]),
        ("BINGO", "R50 67.4, fine-tuned", ["42.8", "57.5"]),
        ("SEED", "R152, linear only", ["44.3", "54.8"]),
        ("DisCo", "R152, linear only", ["47.1", "54.7"]),
        ("BINGO", "R152, fine-tuned", ["50.3", "61.2"]),
        ("BINGO", "R50×2, fine-tuned", ["48.2", "60.2"]),
    ],
)


def section(a: Artefacts) -> ComparedSection | None:
    """The section, None where nothing was measured."""
    if not a.semi:
        return None
    splits = sorted(a.semi.values(), key=lambda split: split["percent"])
    columns = [_column(split, protocol) for split in splits for protocol in _PROTOCOLS]
    return ComparedSection(
        id="few-labels",
        title="Few labels",
        lead=_LEAD,
        caption="Percent of the test images after the last epoch; below it the best epoch, which is chosen on the test split.",
        groups=[(f"{split['percent']:g}\u00a0%: {split['labels']:,} labels, {split['origin']}", len(_PROTOCOLS)) for split in splits],
        headers=[*_PROTOCOLS.values()] * len(splits),
        rows=net_rows(a, columns),
        published=_PUBLISHED,
    )


def figures(a: Artefacts) -> dict[str, dict[str, float]]:
    """What experiments are compared by: {semi_SPLIT: {NET_PROTOCOL: percent after the last epoch}}."""
    return {f"semi_{name}": last_figures(split["nets"]) for name, split in a.semi.items()}


def _column(split: dict[str, Any], protocol: str) -> dict[str, dict[str, Any]]:
    return {net: scores[protocol] for net, scores in split["nets"].items() if protocol in scores}
