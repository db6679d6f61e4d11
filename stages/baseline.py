"""baseline: train the same student with the same budget by a method without a teacher, which distillation has to beat.

python -m stages.baseline moco     writes models/baselines/METHOD.safetensors and its head, curves, reports/baselines/METHOD.json
"""

from typing import TYPE_CHECKING, Annotated

import typer

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import stage_run

if TYPE_CHECKING:
    from bingo.methods.contract import Method
    from bingo.training.loop import TrainingResult


def main(method: Annotated[str, typer.Argument(help="One of `baselines` in params.yaml.")]) -> None:
    """Train the student without a teacher."""
    with stage_run("baseline", method) as run:
        (name,) = run.chosen("baselines", run.params.baselines)
        run.launch()
        from bingo.images.listing import read_listing
        from bingo.nets.students import load_start, save_student
        from bingo.pipeline.training import TrainingInputs, train_method
        from bingo.training.assembly import baseline

        params, listing = run.params, read_listing(paths.LISTING)
        start, start_facts = load_start(params.student)

        def save(trained: "Method", _: "TrainingResult") -> None:
            made_from = {"method": name, "listing": listing.fingerprint, "epochs": params.distill.epochs, **start_facts}
            files = paths.BASELINES / f"{name}.safetensors", paths.BASELINES / f"{name}_head.safetensors"
            save_student(*files, trained.student, trained.head, params.student, params.image, made_from)

        train_method(run, baseline(params, name), TrainingInputs(listing, start=start), save, paths.REPORTS / "baselines" / f"{name}.json")


if __name__ == "__main__":
    run_command(main)
