"""bingo embed: embeddings of the images in a folder, by the student or its teacher.

bingo embed ~/photos --out photos.parquet
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from bingo import paths
from bingo.pipeline.commands import as_seen_from_here, check_output, from_here


def main(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of images, also in its sub-folders.")],
    out: Annotated[Path, typer.Option(help="The file to write, float32: .npy (with the paths in a .txt file) or .parquet.")],
    student: Annotated[Path | None, typer.Option(help="File of a student or baseline; by default models/student.safetensors.")] = None,
    teacher: Annotated[bool, typer.Option("--teacher", help="Use the teacher instead of the student.")] = False,
    batch_images: Annotated[int, typer.Option(min=1, max=65536, help="Batch size.")] = 256,
    on_bad_image: Annotated[Literal["stop", "skip"], typer.Option(help="Unreadable images: stop and list them, or skip them.")] = "stop",
    follow_links: Annotated[bool, typer.Option("--follow-links", help="Follow links that lead out of FOLDER.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write the embeddings of all images in a folder, sorted by path."""
    from bingo.embeddings.files import SUFFIXES, files_of
    from bingo.embeddings.of_folder import embed_folder
    from bingo.export.stored import read_student, read_teacher
    from bingo.pipeline.run import pick_device
    from bingo.runtime.artefacts import file_fingerprint
    from bingo.runtime.errors import UserError

    folder, out = from_here("FOLDER", folder), from_here("--out", out)
    student = student and from_here("--student", student)
    if teacher and student:
        raise UserError(f"--student = {student}: --teacher embeds with {paths.TEACHER}; give one of the two")
    check_output("--out", out, SUFFIXES, force)
    for beside in files_of(out)[1:]:
        check_output("--out: list of paths", beside, [beside.suffix], force)
    file = paths.TEACHER if teacher else student or paths.STUDENT
    network = read_teacher(file) if teacher else read_student(file)
    how = pick_device(), batch_images, on_bad_image == "skip", follow_links, typer.echo
    images, bad = embed_folder(network, file_fingerprint(file), folder, out, *how)
    made = f"{images:,} x {network.backbone.feature_width} float32, by {as_seen_from_here(file)}"
    typer.echo(f"written {as_seen_from_here(out)}: {made}")
    if bad:
        typer.echo(f"left out, unreadable: {len(bad)} ({', '.join(ascii(path) for path in bad[:5])}{', ...' if len(bad) > 5 else ''})")
