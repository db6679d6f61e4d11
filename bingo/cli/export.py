"""bingo export: write the trained backbone in another library's format, verify it with that library, and add a model card.

bingo export --to timm --out out/student.safetensors
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bingo import paths
from bingo.pipeline.commands import as_seen_from_here, check_folder, check_output, from_here

if TYPE_CHECKING:
    from bingo.export.measured import ExportFigures, Sample
    from bingo.export.stored import StoredNetwork


def main(
    to: Annotated[str, typer.Option(help="safetensors, timm, hub, torchvision, detectron2, onnx or torch.")],
    out: Annotated[Path, typer.Option(help="The file to write; its model card is written to OUT.md. With --to hub, the folder.")],
    student: Annotated[
        Path | None,
        typer.Option(help="File of a student or baseline, e.g. models/best/student.safetensors; by default models/student.safetensors."),
    ] = None,
    head: Annotated[Literal["none", "linear"], typer.Option(help="linear: add the classifier that linear_eval has trained.")] = "none",
    int8: Annotated[bool, typer.Option("--int8", help="With --to onnx: quantise weights and activations to 8 bits.")] = False,
    calibration_images: Annotated[
        int | None, typer.Option(min=1, help="With --int8: number of train images for calibrating activations; by default 512.")
    ] = None,
    test_images: Annotated[
        int | None,
        typer.Option(min=1, help="With --int8 or --head linear: most images on which the file is compared; by default 1000."),
    ] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="With --to hub: upload the folder with your token.")] = None,
    license_id: Annotated[str | None, typer.Option("--license", help="With --to hub: the licence in the card, e.g. apache-2.0.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write the trained backbone in another library's format, read it back with that library, and write a model card."""
    from bingo.export.contract import find_target
    from bingo.export.links import add_link
    from bingo.export.model_card import hub_header, model_card
    from bingo.export.provenance import provenance
    from bingo.export.run import export_network
    from bingo.export.to_hub import check_push
    from bingo.export.to_hub import push as upload
    from bingo.runtime.artefacts import write_bytes
    from bingo.runtime.progress import progress_bar

    target, out = find_target(to), from_here("--out", out)
    student = from_here("--student", student) if student else paths.STUDENT
    linear = head == "linear"
    given = {
        "--int8": (int8 or None, to == "onnx", "--to onnx"),
        "--calibration-images": (calibration_images, int8, "--int8"),
        "--test-images": (test_images, int8 or linear, "--int8 or --head linear"),
        "--push": (push, to == "hub", "--to hub"),
        "--license": (license_id, to == "hub", "--to hub"),
    }
    _check_options(to, target.CLASSIFIES or not linear, given)
    if push is not None:
        check_push(push)
    card = _check_out(to, out, target.SUFFIXES, force)
    network, sample = _network_and_sample(student, linear, int8, calibration_images, test_images)
    with progress_bar(f"export to {to}"):
        check, measured = export_network(network, target, out, sample, int8)
    loading = target.loading(network, out.name)
    made_from = provenance(student, network, lambda line: typer.echo(f"note: {line}", err=True))
    header = hub_header(network, made_from, license_id or "unknown") if to == "hub" else ""
    write_bytes(card, (header + model_card(network, to, out.name, loading, check, made_from, measured)).encode())
    add_link(out, card, to, student, measured)
    typer.echo("\n".join(_written_lines(out, card, check, measured, loading.remark)))
    if push is not None:
        typer.echo(f"uploaded to {upload(out, push)}")


def _check_options(to: str, can_classify: bool, given: Mapping[str, tuple[object, bool, str]]) -> None:
    """Raise UserError for options that have no effect with the target. For each: its value (None: not given), whether it is used, and the
    option that it needs."""
    from bingo.runtime.errors import UserError

    lines = [] if can_classify else [f"--head = linear: --to {to} writes no classifier; export --to timm, hub, onnx or torch"]
    idle = {name: (value, wanted) for name, (value, used, wanted) in given.items() if value is not None and not used}
    lines += [f"{name} = {value}: has no effect without {wanted}; add that, or leave {name} out" for name, (value, wanted) in idle.items()]
    if lines:
        raise UserError(lines)


def _check_out(to: str, out: Path, suffixes: Sequence[str], force: bool) -> Path:
    """The file of the model card. Raises UserError if it or OUT cannot be written."""
    if to == "hub":
        from bingo.export.to_hub import FILES

        check_folder("--out", out, FILES, force)
        return out / "README.md"
    check_output("--out", out, suffixes, force)
    check_output("--out: model card", card := out.with_name(f"{out.name}.md"), [".md"], force)
    return card


def _network_and_sample(
    student: Path, linear: bool, int8: bool, calibration_images: int | None, test_images: int | None
) -> "tuple[StoredNetwork, Sample | None]":
    """The network to export, with its classifier if `linear`; and the images for calibration and comparison, if the export uses any."""
    from bingo.export.stored import layers_of, read_student, with_classifier

    network, listing = read_student(student), ""
    classified = network
    if linear or (int8 and layers_of(student)):
        classified, listing = with_classifier(network, student)
    sample = None
    if int8 or (linear and (test_images or paths.LISTING.exists())):
        sample = _sample(classified, listing, (calibration_images or 512) if int8 else 0, test_images or 1000)
    return classified if linear else network, sample


def _sample(classified: "StoredNetwork", listing: str, calibration_images: int, test_images: int) -> "Sample":
    """The workspace's images; `listing` is the fingerprint of the listing on which the classifier was trained."""
    from bingo.export.measured import open_sample

    sample = open_sample(classified.image, classified.classifier, listing, calibration_images, test_images)
    if calibration_images > (most := sample.listing.train_rows):
        typer.echo(f"note: --calibration-images = {calibration_images}: there are only {most:,} train images, which are all used", err=True)
    return sample


def _written_lines(out: Path, card: Path, check: str, measured: "ExportFigures", remark: str) -> list[str]:
    """Lines on the written files, what the export changed, and what to observe when loading it."""
    changed = [f"{name}: {f'{before} -> ' if before else ''}{after}" for name, before, after in measured.rows]
    remarks = [f"note: {remark}"] if remark else []
    return [f"written {as_seen_from_here(out)}; {check}", *changed, *remarks, f"model card: {as_seen_from_here(card)}"]
