"""The model card of exported weights: architecture, training, accuracies, licences to check, and how to load the file.

It contains no time or path, and names a machine only for measurements, so that apart from these, the same network in the same workspace
gives the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm

from bingo.export.contract import Loading
from bingo.export.measured import ExportFigures
from bingo.export.stored import StoredNetwork
from bingo.params import display_name, method_names, method_section
from bingo.report.measures import measure_label, neighbor_order

_PROTOCOLS = {"cached": "linear layer on stored features", "crops": "linear layer on random crops"}
COMPARED = {  # networks beside this one
    "teacher": "teacher",
    "ema": "the student's moving average (EMA)",
    "start": "the same network before this training",
    "supervised": "the same network with supervised weights",
    "untrained": "the same network untrained",
}
_HUB_DATASETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}  # by the listing's name
_UNKNOWN = "not known: it is no longer in this workspace"


@dataclass(frozen=True)
class Provenance:
    """How a network was made; parts are None or empty if the workspace no longer contains exactly the inputs of the network.

    `teacher` is the metadata of the teacher's file, `bags` the attributes of the bag index, `scores` are rows of a measure's name
    and each network's percent, this network's under `net`.
    """

    net: str = ""
    dataset: str | None = None
    train_images: int | None = None
    teacher: Mapping[str, Any] | None = None
    teacher_sha256: str | None = None
    bags: Mapping[str, Any] | None = None
    scores: Sequence[tuple[str, Mapping[str, float]]] = field(default_factory=tuple)


def score_rows(linear: Mapping[str, Any], knn: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """(measure, {network: percent}) of linear scores by protocol and network, and of k-NN scores by network; the last epoch's figures."""
    rows = []
    for protocol, name in _PROTOCOLS.items():
        for key, top in (("top1_last", "top-1"), ("top5_last", "top-5")):
            rows.append((f"{name}, {top}", {net: scores[key] for net, scores in linear.get(protocol, {}).items()}))
    for key in sorted({key for scores in knn.values() for key in scores}, key=neighbor_order):
        rows.append((measure_label(key), {net: scores[key] for net, scores in knn.items() if key in scores}))
    return rows


def hub_header(network: StoredNetwork, provenance: Provenance, license_id: str) -> str:
    """The YAML at the top of a card for the Hugging Face Hub, which its pages and filters read. `license_id` is its name of a licence."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset = provenance.dataset or "unknown"
    results = [
        EvalResult(
            task_type="image-classification", dataset_type=_HUB_DATASETS.get(dataset, dataset), dataset_name=dataset,
            metric_type="accuracy", metric_name=name, metric_value=round(percents[provenance.net], 2),
        )
        for name, percents in provenance.scores
        if provenance.net in percents and not name.startswith("agreement")
    ]  # fmt: skip
    data = ModelCardData(
        license=license_id,
        library_name="timm",
        pipeline_tag="image-classification" if network.classifier else "image-feature-extraction",
        tags=["timm", "self-supervised-learning", "knowledge-distillation", "bingo"],
        datasets=[_HUB_DATASETS[dataset]] if dataset in _HUB_DATASETS else None,
        base_model=_base_models(network, provenance) or None,
        metrics=["accuracy"] if results else None,
        model_name=f"{network.arch}, trained by {_method(network.metadata)}" if results else None,
        eval_results=results or None,
    )
    return f"---\n{data}\n---\n\n"


def _base_models(network: StoredNetwork, provenance: Provenance) -> list[str]:
    """timm's repositories of the weights that the training started from and of the teacher's, if they are timm's."""
    start, teacher = network.metadata.get("start"), provenance.teacher
    named = [start["weights"]] if start and not start["source_sha256"] else []
    named += [teacher["weights"]] if teacher and teacher["source"] == "timm" and "weights" in teacher else []
    return [f"timm/{name}" for name in named if timm.is_model(name.partition(".")[0])]


def model_card(
    network: StoredNetwork,
    target: str,
    file_name: str,
    loading: Loading,
    check: str,
    provenance: Provenance,
    measured: ExportFigures,
) -> str:
    """The card of a file that `export_network` wrote for `target`; `check` and `measured` are its return values."""
    feature_width = network.backbone.feature_width
    kind, outputs = "without a classifier", f"{feature_width} pooled features"
    if network.classifier:
        kind = "and the linear layer that linear_eval trained on its frozen features"
        outputs = f"logits of {len(network.classes):,} classes, whose names are in the file's metadata or in config.json"
    parts = [
        f"# {network.arch}, trained by {_method(network.metadata)}",
        f"`{file_name}` is a backbone {kind}, exported to {target}. It maps normalised images to {outputs}. {check[0].upper()}{check[1:]}.",
        "## Usage",
        f"```{loading.language}\n{loading.text}\n```",
        "## Architecture",
        _table(_network_rows(network)),
        "## Preprocessing",
        _images(network),
        "## Training",
        _table(_training_rows(network, provenance)),
        "## Accuracy",
        _scores(provenance),
        "## This file",
        _deployed(measured),
        "## Licence",
        _licence(network, provenance),
    ]
    return "\n\n".join(parts) + "\n"


def _network_rows(network: StoredNetwork) -> list[tuple[str, str]]:
    stems = {"imagenet": "imagenet (standard)", "small": "small (stride 1; in ResNets without max pooling)"}
    parameters = sum(parameter.numel() for parameter in network.backbone.parameters())
    return [
        ("architecture", network.arch),
        ("width", f"{network.width:g} (channel multiplier)"),
        ("stem", stems[network.stem]),
        ("parameters", f"{parameters:,}"),
        ("features", str(network.backbone.feature_width)),
    ]


def _images(network: StoredNetwork) -> str:
    image = network.image
    resized = f"short side resized to {image.resize_px} pixels ({image.interpolation}, antialiased)"
    resize = f"{resized}, then a centre crop of {image.crop_px} x {image.crop_px}"
    return (
        f"RGB, {resize}, divided by 255, then normalised per channel with mean {_list(image.mean)} and standard deviation "
        f"{_list(image.std)}. The network takes float32 (batch, 3, {image.crop_px}, {image.crop_px})."
    )


def _training_rows(network: StoredNetwork, provenance: Provenance) -> list[tuple[str, str]]:
    metadata = network.metadata
    method = _method(metadata)
    params = metadata.get("params", {})
    rows = [("method", method), ("epochs", str(metadata.get("epochs", "unknown")))]
    if start := metadata.get("start"):
        sha256 = f"; sha256 of the file: {start['source_sha256']}" if start["source_sha256"] else ""
        rows.append(("started from", f"{start['weights']}{sha256}"))
    if best := dict(metadata.get("best", {})):
        epoch = best.pop("epoch")
        probe = ", ".join(f"{measure_label(key)}: {percent:.1f} %" for key, percent in best.items())
        rows.append(
            (
                "weights of epoch",
                f"{epoch}, the best by the probe during training ({probe}; optimistic, because the epoch was chosen by it)",
            )
        )
    if options := metadata.get("options"):
        rows.append(("its network while it was trained", _params(options)))
    rows += [(f"parameters: {section}", _params(values)) for section, values in sorted(params.items())]
    dataset = _UNKNOWN if provenance.dataset is None else f"{provenance.dataset}, {provenance.train_images:,} training images"
    rows += [("data", dataset), ("listing's fingerprint", str(metadata.get("listing", "unknown")))]
    if _has_teacher(metadata):
        rows += [("teacher", _teacher(provenance)), ("bags", _bags(provenance))]
    else:
        rows += [("teacher", f"none: {method} needs none")]
    return rows + [(name, str(metadata[name])) for name in ("revision",) if name in metadata]


def _method(metadata: Mapping[str, Any]) -> str:
    """The method's name as written in its paper."""
    return display_name(str(metadata.get("method", "an unknown method")))


def _has_teacher(metadata: Mapping[str, Any]) -> bool:
    """Whether a teacher was used; assumed for methods that this version does not know."""
    method = metadata.get("method")
    return "embeddings" in metadata and (method not in method_names() or method_section(method).needs_teacher)


def _teacher(provenance: Provenance) -> str:
    teacher = provenance.teacher
    if teacher is None:
        return _UNKNOWN
    weights = f" ({teacher['weights']})" if "weights" in teacher else ""
    trained = "" if teacher.get("pretrained", True) else ", WITHOUT trained weights"
    checkpoint = f"; sha256 of the checkpoint it came from: {teacher['source_sha256']}" if teacher.get("source_sha256") else ""
    shape = f"{teacher['arch']}, width {teacher['width']:g}, stem {teacher['stem']}"
    return f"{shape}, from {teacher['source']}{weights}{trained}; sha256 {provenance.teacher_sha256}{checkpoint}"


def _bags(provenance: Provenance) -> str:
    if provenance.bags is None:
        return _UNKNOWN
    hidden = ("listing", "embeddings", "fingerprint")
    return _params({name: value for name, value in provenance.bags.items() if name not in hidden and not isinstance(value, dict)})


def _scores(provenance: Provenance) -> str:
    measured = [(name, percents) for name, percents in provenance.scores if provenance.net in percents]
    if not measured:
        return "Not measured in this workspace."
    others = [net for net in COMPARED if any(net in percents for _, percents in measured)]
    header = [
        "percent of the test images",
        "this network",
        *(COMPARED[net] for net in others),
    ]
    lines = [header, ["---", *["---:"] * (1 + len(others))]]
    for name, percents in measured:
        lines.append([name, *(f"{percents[net]:.2f}" if net in percents else "" for net in (provenance.net, *others))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _deployed(measured: ExportFigures) -> str:
    rows = "\n".join(f"| {' | '.join(row)} |" for row in measured.rows)
    note = f"\n\nMeasured on {measured.machine}." if measured.machine else ""
    if any("latency" in name for name, *_ in measured.rows):
        note += " Latency is the median of repeated runs; memory is the peak of a process that contains only the library and this file."
    latencies = [(name.partition(",")[0].removeprefix("latency at "), *both) for name, *both in measured.rows if name.startswith("latency")]
    if slower := [batch for batch, before, after in latencies if before and float(after) > float(before)]:
        note += (
            f" This file is slower there than the float32 network at {' and '.join(slower)}; measure it on the machine where it will run."
        )
    return f"| | float32 network | this file |\n| --- | ---: | ---: |\n{rows}{note}"


def _licence(network: StoredNetwork, provenance: Provenance) -> str:
    origin = f"the images ({provenance.dataset})" if provenance.dataset else "the images"
    if _has_teacher(network.metadata):
        teacher = provenance.teacher
        origin += " and the teacher's weights" + (f" ({teacher['source']}: {teacher['arch']})" if teacher else "")
    if start := network.metadata.get("start"):
        origin += f" and the initial weights of this training ({start['weights']})"
    return (
        f"BINGO's code is licensed under Apache-2.0, which does not apply to these weights. They are derived from {origin} "
        "and may inherit their terms. Before you distribute them, check the dataset's licence for models trained on it and for "
        "commercial use, the licence of the teacher's weights for derived networks, and the consent of people in the images."
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    escaped = [(name, value.replace("|", "\\|").replace("\n", " ")) for name, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in escaped)])


def _params(values: Mapping[str, Any]) -> str:
    """Nested parameters in one line: a 1, b.c 2."""
    return ", ".join(f"{name} {value}" for name, value in sorted(_flat(values, "")))


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    found = []
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        found += (
            _flat(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", _list(value) if isinstance(value, list) else str(value))]
        )
    return found


def _list(values: Sequence[Any]) -> str:
    return f"[{', '.join(f'{value:g}' if isinstance(value, float) else str(value) for value in values)}]"
