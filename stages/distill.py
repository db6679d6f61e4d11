"""distill: train the student from the teacher's keys and bags, by the method in distill.method.

    python -m stages.distill     reads listing, images, embeddings, bags (live keys: the teacher too) and params image, student, distill,
                                 seed and the method's own section; writes models/student.safetensors and its head, curves, metrics.
A killed run resumes from its checkpoint when it is started again.
"""

from typing import TYPE_CHECKING

import typer

from bingo.pipeline import paths
from bingo.pipeline.launch import launch
from bingo.pipeline.run import run_command, stage_run

if TYPE_CHECKING:
    from bingo.methods.contract import Method
    from bingo.training.loop import TrainingResult

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main() -> None:
    """Train the student."""
    with stage_run("distill") as run:
        launch("distill")
        import torch

        from bingo.bags.index import read_bags
        from bingo.embeddings.store import read_embeddings
        from bingo.images.listing import read_listing
        from bingo.nets.precision import resolve_precision
        from bingo.nets.students import save_student
        from bingo.pipeline.run import process_group
        from bingo.pipeline.training import TrainingInputs, last_record, train_method, write_curves
        from bingo.runtime.artefacts import write_json
        from bingo.teachers.teacher import load_teacher
        from bingo.training.assembly import distillation

        params, listing = run.params, read_listing(paths.LISTING)
        embeddings = read_embeddings(paths.EMBEDDINGS, listing)
        bags = read_bags(paths.BAGS, listing, embeddings.fingerprint)
        setup = distillation(params)

        def finish(method: "Method", result: "TrainingResult") -> None:
            made_from = {
                "method": params.distill.method,
                "listing": listing.fingerprint,
                "embeddings": embeddings.fingerprint,
                "bags": bags.fingerprint,
                "epochs": params.distill.epochs,
                "params": {"distill": params.distill.model_dump(), params.distill.method: setup.section.model_dump()},
            }
            save_student(paths.STUDENT, paths.STUDENT_HEAD, method.student, method.head, params.student, params.image, made_from)
            write_curves(paths.PLOTS / "distill.csv", result.history)
            write_json(paths.REPORTS / "distill.json", last_record(result))

        with process_group(run) as device:
            teacher = None
            if params.distill.keys == "live":
                teacher = load_teacher(paths.TEACHER).weights_for(resolve_precision(params.distill.precision, device))
                teacher.to(device).to(memory_format=torch.channels_last)
            train_method(run, device, setup, TrainingInputs(listing, embeddings, bags, teacher), finish)


if __name__ == "__main__":
    run_command(app)
