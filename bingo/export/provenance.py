"""The inputs of a stored network that are still in this workspace (data, teacher, bags and figures), for the model card."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bingo import paths
from bingo.browse.listing_rows import ListingRows
from bingo.export.model_card import COMPARED, Provenance, score_rows
from bingo.export.stored import StoredNetwork
from bingo.params import read_yaml
from bingo.report.inputs import by_protocol, read_network_facts, read_optional_json
from bingo.runtime.artefacts import file_fingerprint
from bingo.runtime.chunks import open_group

_REPORTS = {"linear_eval": paths.REPORTS / "linear", "knn_eval": paths.REPORTS / "knn"}  # what writes them, and where


def provenance(file: Path, network: StoredNetwork, note: Callable[[str], None]) -> Provenance:
    """The network's inputs that are still in this workspace; each only if its fingerprint matches the network's. `note` is called with a
    line on parts that are left out."""
    listing = ListingRows(paths.LISTING, str(paths.LISTING)) if paths.LISTING.exists() else None
    if listing is not None and listing.fingerprint != network.metadata.get("listing"):
        listing = None
    teacher, sha256 = _teacher(network.metadata)
    bags = _attributes(paths.BAGS, network.metadata.get("bags"))
    net = _name_in_reports(file)
    return Provenance(
        net=net,
        dataset=listing.dataset if listing else None,
        train_images=listing.train_rows if listing else None,
        teacher=teacher,
        teacher_sha256=sha256,
        bags=bags,
        scores=_scores(file, net, note) if net else (),
    )


def _teacher(metadata: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """The metadata and sha256 of the teacher's file, if the network's embeddings were made by it."""
    embeddings = _attributes(paths.EMBEDDINGS, metadata.get("embeddings"))
    facts = read_network_facts(paths.TEACHER) if embeddings else None
    if facts is None or embeddings is None:
        return None, None
    with open(paths.TEACHER, "rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    return (facts.metadata, sha256) if sha256.startswith(embeddings["teacher"]) else (None, None)


def _attributes(store: Path, fingerprint: str | None) -> dict[str, Any] | None:
    """The attributes of a store, if it is there and has this fingerprint."""
    if not store.exists():
        return None
    attributes = dict(open_group(store, str(store), "dvc repro").attrs)
    return attributes if fingerprint is not None and attributes.get("fingerprint") == fingerprint else None


def _name_in_reports(file: Path) -> str:
    """The name of this network in the reports. It is found by its bytes, so that copies are recognised; empty if it is unknown."""
    known = {"student": paths.STUDENT, **{path.stem: path for path in sorted(paths.BASELINES.glob("*.safetensors"))}}
    wanted = file_fingerprint(file)
    return next((name for name, path in known.items() if path.exists() and file_fingerprint(path) == wanted), "")


def _scores(file: Path, net: str, note: Callable[[str], None]) -> list[tuple[str, dict[str, float]]]:
    """The figures in reports/ for a network and those it is compared with. Its own are left out, with a note, if dvc.lock says that
    they were measured on another file."""
    found: dict[str, dict] = {}
    for stage, folder in _REPORTS.items():
        found[stage] = {name: read_optional_json(folder / f"{name}.json") for name in (net, *COMPARED)}
        if found[stage][net] and _was_measured_on_another(stage, net, file):
            report = folder / f"{net}.json"
            note(f"{report} was measured on another {net} and is left out of the model card; run: dvc repro")
            found[stage][net] = {}
    return score_rows(by_protocol(found["linear_eval"]), found["knn_eval"])


def _was_measured_on_another(stage: str, net: str, file: Path) -> bool:
    """Whether dvc.lock has another md5 for the network that an evaluation read; False if DVC has no record of it."""
    item, read = ("", paths.STUDENT) if net == "student" else ("_baseline", paths.BASELINES / f"{net}.safetensors")
    lock = read_yaml("dvc.lock") if Path("dvc.lock").exists() else {}
    deps = lock.get("stages", {}).get(f"{stage}{item}@{net}", {}).get("deps", [])
    with open(file, "rb") as content:
        md5 = hashlib.file_digest(content, "md5").hexdigest()
    return any(dep["md5"] != md5 for dep in deps if dep["path"] == read.as_posix())
