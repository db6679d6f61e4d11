"""The report's section on transfer to other labelled images, next to the published CIFAR figures."""

from bingo.report.beside import ComparedSection, last_figures, net_rows, published_table
from bingo.report.inputs import Artefacts

_PROTOCOLS = {"linear_resized": "linear, enlarged", "linear_native": "linear", "finetune": "fine-tuned"}
_LEAD = (
    "The student on another set of images than it was distilled on. Linear: a layer on the frozen student, on random crops, enlarged as in"
    " the papers or at the images' own size. Fine-tuned: the whole network learns, at their own size."
)


def section(a: Artefacts) -> ComparedSection | None:
    """The section, None if nothing was measured."""
    if not a.transfer:
        return None
    groups, headers, columns = [], [], []
    for name, result in a.transfer.items():
        shown = [protocol for protocol in _PROTOCOLS if protocol in result["protocols"]]
        train, test = result["images"]
        groups.append((f"{name}: {train:,} train, {test:,} test images", len(shown)))
        headers += [f"{_PROTOCOLS[protocol]}, {result['protocols'][protocol]['crop_px']}\u00a0px" for protocol in shown]
        columns += [{net: scores[protocol] for net, scores in result["nets"].items()} for protocol in shown]
    return ComparedSection(
        id="transfer",
        title="Transfer",
        lead=_LEAD,
        groups=groups,
        headers=headers,
        rows=net_rows(a, columns),
        published=published_table("transfer"),
    )


def figures(a: Artefacts) -> dict[str, dict[str, float]]:
    """Measures for the comparison of experiments: {transfer_NAME: {NET_PROTOCOL: percent after the last epoch}}."""
    return {f"transfer_{name}": last_figures(result["nets"]) for name, result in a.transfer.items()}
