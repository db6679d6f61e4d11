"""The inputs of the report: metrics, curves, network headers. Outputs that a run does not have are absent.

Does not import torch, so that a page takes a second or two. Shape letters: E epochs of a training.
"""

import csv
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from bingo import paths
from bingo.bags.index import BagIndex, read_bags
from bingo.images.images import Images, open_images
from bingo.images.listing import Listing, read_judged_listing
from bingo.params import Params
from bingo.runtime.artefacts import read_json
from bingo.runtime.checksums import Damaged, check_safetensors
from bingo.runtime.errors import UserError

Curves = dict[str, list[float]]
_OUTCOME = re.compile(r"cached|knn_\d+(_weighted)?|agreement_[1-9]\d*")  # what evaluations store for each test image
_BUFFERS = ("running_mean", "running_var")  # BatchNorm's statistics are stored with the weights, but are not parameters


@dataclass(frozen=True)
class NetworkFacts:
    """A stored network's metadata, and its backbone's number of parameters (no counters, no BatchNorm statistics)."""

    metadata: dict[str, Any]
    backbone_parameters: int


@dataclass(frozen=True)
class Artefacts:
    """Everything that the page shows; scores are in percent.

    `terms` and `curves` have a key for each training: teacher, distill, baseline-METHOD.
    `knn` is {net: {knn_K, knn_K_weighted}}, `linear` is {protocol: {net: {top1_last, top5_last, top1_best, top5_best,
    best_epoch}}} with the protocols cached and crops, `bag_metrics` is what `bag_metrics.bag_metrics` returns.
    `failures` is what `failures.least_agreement` returns for the student.
    `semi` and `transfer` are by name what reports/semi and reports/transfer hold, each {nets: {net: {protocol: {top1_last, ..}}}, ..}.
    `origins` names the sources of the weights of the networks `start` and `supervised`, if these exist.
    `outcomes` is {net: {measure: percent of each test image, float64 (Q,)}} with the measures linear, knn_K, knn_K_weighted, agreement_K.
    `coco` is {run: {kind: {measure: percent}}} with the kinds box and mask.
    """

    params: Params
    params_text: str
    listing: Listing
    images: Images | None = None
    bags: BagIndex | None = None
    bag_metrics: dict[str, Any] = field(default_factory=dict)
    teacher: NetworkFacts | None = None
    student: NetworkFacts | None = None
    knn: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, Any] = field(default_factory=dict)
    linear: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    terms: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, Curves] = field(default_factory=dict)
    semi: dict[str, dict[str, Any]] = field(default_factory=dict)
    transfer: dict[str, dict[str, Any]] = field(default_factory=dict)
    coco: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def read_artefacts(params: Params, nets: Sequence[str]) -> Artefacts:
    """The artefacts of the workspace's run; `nets` are the networks that may have been evaluated."""
    listing = read_judged_listing(paths.LISTING, paths.LEFT_OUT)
    terms = {name: read_optional_json(paths.REPORTS / f"{name}.json") for name in ("teacher", "distill")}
    terms |= {f"baseline-{method}": read_optional_json(paths.REPORTS / f"baselines/{method}.json") for method in params.baselines}
    return Artefacts(
        params=params,
        params_text=Path("params.yaml").read_text(encoding="utf-8"),
        listing=listing,
        images=open_images(listing, paths.IMAGES, params.dataset) if paths.IMAGES.exists() else None,
        bags=read_bags(paths.BAGS, listing) if paths.BAGS.exists() else None,
        bag_metrics=read_optional_json(paths.REPORTS / "bags.json"),
        teacher=read_network_facts(paths.TEACHER, "backbone."),
        student=read_network_facts(paths.STUDENT),
        knn=_measured("knn", nets),
        failures=read_optional_json(paths.REPORTS / "failures/student.json"),
        linear=by_protocol(_measured("linear", nets)),
        terms=terms,
        semi=_measured("semi", params.semi_eval.splits),
        transfer=_measured("transfer", params.transfer.datasets),
        curves={name: read_curves(paths.PLOTS / f"{name}.csv") for name in terms},
        coco=_measured("coco", params.transfer_coco.runs),
        origins=_origins(),
        outcomes={net: _outcomes(net) for net in nets},
    )


def _origins() -> dict[str, str]:
    """The sources of the weights of `start` and `supervised`, by network; only for those that are configured."""
    files = {net: path for net, path in {"start": paths.START, "supervised": paths.SUPERVISED}.items() if path.exists()}
    facts = {net: read_network_facts(path) for net, path in files.items() if path.stat().st_size > len(paths.NO_WEIGHTS)}
    return {net: found.metadata["weights"] for net, found in facts.items() if found is not None}


def _outcomes(net: str) -> dict[str, np.ndarray]:
    """The results for each test image in reports/linear/NET.npz and reports/knn/NET.npz, in percent."""
    linear, neighbors = (read_outcomes(paths.REPORTS / folder / f"{net}.npz") for folder in ("linear", "knn"))
    found = {"linear": linear["cached"]} if "cached" in linear else {}
    possible = {name: int(name.removeprefix("agreement_")) if name.startswith("agreement_") else 1 for name in neighbors}
    return {name: 100.0 * hits_Q / possible.get(name, 1) for name, hits_Q in {**found, **neighbors}.items()}


def read_outcomes(path: Path) -> dict[str, np.ndarray]:
    """The results for each test image in a file that an evaluation wrote; {} if there is no file. Raises UserError if it is damaged."""
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        for name, array in arrays.items():
            if not _OUTCOME.fullmatch(name) or array.ndim != 1 or array.dtype.kind not in "biu":
                raise ValueError(f"{name} is of {array.dtype} {array.shape}")
        return arrays
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: is damaged ({' '.join(str(error).split())}); delete it and run: dvc repro") from None


def _measured(folder: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The content of the existing files reports/FOLDER/NAME.json."""
    found = {name: read_optional_json(paths.REPORTS / folder / f"{name}.json") for name in names}
    return {name: value for name, value in found.items() if value}


def read_optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file. Raises UserError if the file is damaged or does not hold an object."""
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, wanted an object; delete it and run: dvc repro")
    return value


def by_protocol(linear: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{protocol: {net: scores}} of what reports/linear holds, {net: {protocol: scores}}."""
    protocols = dict.fromkeys(protocol for scores in linear.values() for protocol in scores)
    return {protocol: {net: scores[protocol] for net, scores in linear.items() if protocol in scores} for protocol in protocols}


def read_curves(path: Path) -> Curves:
    """The columns of a training's CSV, each E numbers, nan if a field is empty; {} if there is no file or no epoch in it.

    Raises UserError if a field is not a number.
    """
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    try:
        return {name: [float(record[name] or math.nan) for record in records] for name in (records[0] if records else ())}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}); delete it and run: dvc repro") from None


def read_network_facts(path: Path, prefix: str = "") -> NetworkFacts | None:
    """The header of a network's file, None if there is no file; the backbone is the tensors whose names start with `prefix`.

    Raises UserError if the file is damaged or holds no metadata of BINGO.
    """
    if not path.exists():
        return None
    try:
        check_safetensors(path)
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {})["bingo"])
            names = [name for name in file.keys() if name.startswith(prefix) and not name.endswith(_BUFFERS)]  # noqa: SIM118 (no mapping)
            slices = [file.get_slice(name) for name in names]
            counts = [math.prod(part.get_shape()) for part in slices if "F" in part.get_dtype()]  # F32, F16, BF16
            if not isinstance(metadata, dict):
                raise Damaged("its metadata are not a dict")
    except (Damaged, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not a BINGO network ({' '.join(str(error).split())}); delete it and run: dvc repro") from None
    return NetworkFacts(metadata, sum(counts))
