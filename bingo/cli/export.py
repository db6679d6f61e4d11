"""bingo export: write the trained backbone in another library's format, verify it with that library, and add a model card.

bingo export --to timm --out out/student.safetensors
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bingo.pipeline import paths
from bingo.pipeline.commands import as_seen_from_here, from_here
from bingo.pipeline.run import check_output, mistakes_as_lines, run_command

if TYPE_CHECKING:
    from bingo.export.model_card import Provenance
    from bingo.export.stored import StoredNetwork

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_REPORTS = {"linear_eval": paths.REPORTS / "linear", "knn_eval": paths.REPORTS / "knn"}  # what writes them, and where


@app.command()
def main(
    to: Annotated[str, typer.Option(help="safetensors, timm, torchvision, detectron2 or onnx.")],
    out: Annotated[Path, typer.Option(help="The file to write; its model card is written to OUT.md.")],
    student: Annotated[Path | None, typer.Option(help="File of a student or baseline; by default models/student.safetensors.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write the trained backbone in another library's format, read it back with that library, and write a model card."""
    with mistakes_as_lines():
        from bingo.export.contract import find_target
        from bingo.export.model_card import model_card
        from bingo.export.run import export_network
        from bingo.export.stored import read_student
        from bingo.runtime.artefacts import write_bytes
        from bingo.runtime.progress import progress_bar

        target, out = find_target(to), from_here("--out", out)
        student = from_here("--student", student) if student else paths.STUDENT
        check_output("--out", out, target.SUFFIXES, force)
        check_output("--out: model card", card := out.with_name(f"{out.name}.md"), [".md"], force)
        network = read_student(student)
        with progress_bar(f"export to {to}"):
            check = export_network(network, target, out)
        loading = target.loading(network, out.name)
        write_bytes(card, model_card(network, to, out.name, loading, check, _provenance(student, network)).encode())
        typer.echo(f"written {as_seen_from_here(out)}; {check}")
        if loading.remark:
            typer.echo(f"note: {loading.remark}")
        typer.echo(f"model card: {as_seen_from_here(card)}")


def _provenance(file: Path, network: "StoredNetwork") -> "Provenance":
    """What this workspace still has of the network's inputs; each part only if its fingerprint matches the network's."""
    from bingo.browse.listing_rows import ListingRows
    from bingo.export.model_card import Provenance

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
        scores=_scores(file, net) if net else (),
    )


def _teacher(metadata: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """The metadata and sha256 of the teacher's file, if the network's embeddings were made by it."""
    import hashlib

    from bingo.report.inputs import read_network_facts

    embeddings = _attributes(paths.EMBEDDINGS, metadata.get("embeddings"))
    facts = read_network_facts(paths.TEACHER) if embeddings else None
    if facts is None or embeddings is None:
        return None, None
    with open(paths.TEACHER, "rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    return (facts.metadata, sha256) if sha256.startswith(embeddings["teacher"]) else (None, None)


def _attributes(store: Path, fingerprint: str | None) -> dict[str, Any] | None:
    """The attributes of a store, if it is there and has this fingerprint."""
    from bingo.runtime.chunks import open_group

    if not store.exists():
        return None
    attributes = dict(open_group(store, str(store), "dvc repro").attrs)
    return attributes if fingerprint is not None and attributes.get("fingerprint") == fingerprint else None


def _name_in_reports(file: Path) -> str:
    """The name of this network in the reports. It is found by its bytes, so that copies are recognised; empty if it is unknown."""
    from bingo.runtime.artefacts import file_fingerprint

    known = {"student": paths.STUDENT, **{path.stem: path for path in sorted(paths.BASELINES.glob("*.safetensors"))}}
    wanted = file_fingerprint(file)
    return next((name for name, path in known.items() if path.exists() and file_fingerprint(path) == wanted), "")


def _scores(file: Path, net: str) -> "list[tuple[str, dict[str, float]]]":
    """The figures in reports/ for a network and those it is compared with. Its own are left out, with a note, if dvc.lock says that
    they were measured on another file."""
    from bingo.export.model_card import score_rows
    from bingo.report.inputs import by_protocol, read_optional_json

    found: dict[str, dict] = {}
    for stage, folder in _REPORTS.items():
        found[stage] = {name: read_optional_json(folder / f"{name}.json") for name in (net, "teacher", "untrained")}
        if found[stage][net] and _was_measured_on_another(stage, net, file):
            report = folder / f"{net}.json"
            typer.echo(f"note: {report} was measured on another {net} and is left out of the model card; run: dvc repro", err=True)
            found[stage][net] = {}
    return score_rows(by_protocol(found["linear_eval"]), found["knn_eval"])


def _was_measured_on_another(stage: str, net: str, file: Path) -> bool:
    """Whether dvc.lock has another md5 for the network that an evaluation read; False if DVC has no record of it."""
    import hashlib

    from bingo.params import read_yaml

    item, read = ("", paths.STUDENT) if net == "student" else ("_baseline", paths.BASELINES / f"{net}.safetensors")
    lock = read_yaml("dvc.lock") if Path("dvc.lock").exists() else {}
    deps = lock.get("stages", {}).get(f"{stage}{item}@{net}", {}).get("deps", [])
    with open(file, "rb") as content:
        md5 = hashlib.file_digest(content, "md5").hexdigest()
    return any(dep["md5"] != md5 for dep in deps if dep["path"] == read.as_posix())


if __name__ == "__main__":
    run_command(app)
