"""bingo export: write the trained backbone in another library's format, verify it with that library, and add a model card.

bingo export --to timm --out out/student.safetensors
"""

from pathlib import Path
from typing import Annotated

import typer

from bingo import paths
from bingo.pipeline.commands import as_seen_from_here, check_output, from_here


def main(
    to: Annotated[str, typer.Option(help="safetensors, timm, torchvision, detectron2 or onnx.")],
    out: Annotated[Path, typer.Option(help="The file to write; its model card is written to OUT.md.")],
    student: Annotated[
        Path | None,
        typer.Option(help="File of a student or baseline, e.g. models/best/student.safetensors; by default models/student.safetensors."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write the trained backbone in another library's format, read it back with that library, and write a model card."""
    from bingo.export.contract import find_target
    from bingo.export.model_card import model_card
    from bingo.export.provenance import provenance
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
    made_from = provenance(student, network, lambda line: typer.echo(f"note: {line}", err=True))
    write_bytes(card, model_card(network, to, out.name, loading, check, made_from).encode())
    typer.echo(f"written {as_seen_from_here(out)}; {check}")
    if loading.remark:
        typer.echo(f"note: {loading.remark}")
    typer.echo(f"model card: {as_seen_from_here(card)}")
