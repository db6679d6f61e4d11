"""distill: train the student from the teacher's keys and bags, by the method in distill.method.

It writes models/student.safetensors and its head, curves, reports/distill.json; models/best, which with distill.keep_best contains
the student of the best epoch by the probe; and models/ema.safetensors, which with distill.student_ema contains its moving average. A killed
run resumes from its checkpoint.
"""

from typing import TYPE_CHECKING

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import stage_run

if TYPE_CHECKING:
    from bingo.methods.contract import Method
    from bingo.training.loop import TrainingResult


def main() -> None:
    """Train the student."""
    with stage_run("distill") as run:
        run.launch()
        from bingo.bags.index import read_bags
        from bingo.embeddings.store import read_embeddings
        from bingo.images.listing import read_listing
        from bingo.nets.students import load_start, save_average, save_best, save_student
        from bingo.pipeline.training import TrainingInputs, train_method
        from bingo.teachers.teacher import load_teacher
        from bingo.training.assembly import distillation

        params, listing = run.params, read_listing(paths.LISTING)
        embeddings = read_embeddings(paths.EMBEDDINGS, listing)
        bags = read_bags(paths.BAGS, listing, embeddings.fingerprint)
        teacher = load_teacher(paths.TEACHER) if params.distill.keys == "live" else None
        setup, (start, start_facts) = distillation(params), load_start(params.student)

        def save(trained: "Method", result: "TrainingResult") -> None:
            made_from = {
                "method": params.distill.method,
                "listing": listing.fingerprint,
                "embeddings": embeddings.fingerprint,
                "bags": bags.fingerprint,
                "epochs": params.distill.epochs,
                "params": {"distill": params.distill.recorded(), params.distill.method: setup.section.model_dump()},
                **start_facts,
            }
            save_student(paths.STUDENT, paths.STUDENT_HEAD, trained.student, trained.head, params.student, params.image, made_from)
            save_best(paths.BEST, result.best, params.student, params.image, made_from)
            save_average(paths.EMA, result.average, params.student, params.image, made_from)

        train_method(run, setup, TrainingInputs(listing, embeddings, bags, teacher, start), save, paths.REPORTS / "distill.json")


if __name__ == "__main__":
    run_command(main)
