"""baseline: train the same student with the same budget by a method without a teacher, which distillation has to beat.

python -m stages.baseline moco     reads listing, images and params image, student, distill (except method and keys), seed and
                                   the method's own section; writes models/baselines/METHOD.safetensors, curves, metrics
"""

from typing import TYPE_CHECKING

import typer

from bingo.pipeline import paths
from bingo.pipeline.launch import launch
from bingo.pipeline.run import check_item, item_name, process_group, run_command, stage_run

if TYPE_CHECKING:
    from bingo.methods.contract import Method
    from bingo.training.loop import TrainingResult

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(method: str = typer.Argument(help="One of `baselines` in params.yaml.")) -> None:
    """Train the student without a teacher."""
    method = item_name(method)
    with stage_run(f"baseline-{method}") as run:
        check_item("method", method, run.params, "baselines")
        launch("baseline", method)
        from bingo.images.listing import read_listing
        from bingo.nets.students import save_student
        from bingo.pipeline.training import TrainingInputs, last_record, train_method, write_curves
        from bingo.runtime.artefacts import write_json
        from bingo.training.assembly import baseline

        params, listing = run.params, read_listing(paths.LISTING)

        def finish(trained: "Method", result: "TrainingResult") -> None:
            made_from = {"method": method, "listing": listing.fingerprint, "epochs": params.distill.epochs}
            files = paths.BASELINES / f"{method}.safetensors", paths.BASELINES / f"{method}_head.safetensors"
            save_student(*files, trained.student, trained.head, params.student, params.image, made_from)
            write_curves(paths.PLOTS / f"baseline-{method}.csv", result.history)
            write_json(paths.REPORTS / "baselines" / f"{method}.json", last_record(result))

        with process_group(run) as device:
            train_method(run, device, baseline(params, method), TrainingInputs(listing), finish)


if __name__ == "__main__":
    run_command(app)
