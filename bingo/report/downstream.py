"""The report's sections on few labels and on transfer to other labelled images: measured figures, next to the published ones."""

from bingo.report.beside import ComparedSection, last_figures, net_rows, published_table
from bingo.report.inputs import Artefacts

_FEW_LABELS = {"finetune": "fine-tuned", "linear": "linear only"}
_FEW_LABELS_LEAD = (
    "Training on a share of the labels. Fine-tuned: the whole network is trained, with separate learning rates for "
    "backbone and linear layer. Linear only:"
    " the backbone is frozen, a linear layer learns on random crops. The published rows mix the two, so compare like with like."
)
_TRANSFER = {"linear_resized": "linear, enlarged", "linear_native": "linear", "finetune": "fine-tuned"}
_TRANSFER_LEAD = (
    "The student on another set of images than it was distilled on. Linear: a layer on the frozen student, on random crops, enlarged as in"
    " the papers or at the images' own size. Fine-tuned: the whole network learns, at their own size."
)


def sections(a: Artefacts) -> list[ComparedSection]:
    """The sections for which something was measured."""
    return [*([_few_labels(a)] if a.semi else []), *([_transfer(a)] if a.transfer else [])]


def _few_labels(a: Artefacts) -> ComparedSection:
    splits = sorted(a.semi.values(), key=lambda split: split["percent"])
    groups = [(f"{split['percent']:g}\u00a0%: {split['labels']:,} labels, {split['origin']}", len(_FEW_LABELS)) for split in splits]
    columns = [_column(split, protocol) for split in splits for protocol in _FEW_LABELS]
    headers = [*_FEW_LABELS.values()] * len(splits)
    rows, others = net_rows(a, columns), published_table("few_labels")
    return ComparedSection("few-labels", "Few labels", _FEW_LABELS_LEAD, groups, headers, rows, others)


def _transfer(a: Artefacts) -> ComparedSection:
    groups, headers, columns = [], [], []
    for name, result in a.transfer.items():
        shown = [protocol for protocol in _TRANSFER if protocol in result["protocols"]]
        train, test = result["images"]
        groups.append((f"{name}: {train:,} train, {test:,} test images", len(shown)))
        headers += [f"{_TRANSFER[protocol]}, {result['protocols'][protocol]['crop_px']}\u00a0px" for protocol in shown]
        columns += [_column(result, protocol) for protocol in shown]
    return ComparedSection("transfer", "Transfer", _TRANSFER_LEAD, groups, headers, net_rows(a, columns), published_table("transfer"))


def _column(result: dict, protocol: str) -> dict[str, dict]:
    """{net: scores} of one protocol."""
    return {net: scores[protocol] for net, scores in result["nets"].items() if protocol in scores}


def figures(a: Artefacts) -> dict[str, dict[str, float]]:
    """Measures for the comparison of experiments: {semi_SPLIT or transfer_NAME: {NET_PROTOCOL: percent after the last epoch}}."""
    results = {f"semi_{name}": split for name, split in a.semi.items()} | {
        f"transfer_{name}": result for name, result in a.transfer.items()
    }
    return {name: last_figures(result["nets"]) for name, result in results.items()}
