"""teacher: train or convert the teacher to models/teacher.safetensors, a backbone with its projection head.

python -m stages.teacher     reads params teacher, image, seed; with source pretrain also the images (MoCo-v2, resumable)
"""

from typing import TYPE_CHECKING

import typer

from bingo.pipeline import paths
from bingo.pipeline.launch import launch
from bingo.pipeline.run import Run, process_group, run_command, stage_run

if TYPE_CHECKING:
    from bingo.methods.contract import Method
    from bingo.training.loop import TrainingResult

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main() -> None:
    """Pretrain the teacher, or convert a checkpoint strictly."""
    with stage_run("teacher") as run:
        if run.params.teacher.source == "pretrain":
            launch("teacher")
            _pretrain(run)
        else:
            _convert(run)


def _pretrain(run: Run) -> None:
    from torch import nn

    from bingo.images.listing import read_listing
    from bingo.pipeline.training import TrainingInputs, last_record, train_method, write_curves
    from bingo.runtime.artefacts import write_json
    from bingo.teachers.teacher import save_teacher, teacher_metadata
    from bingo.training.assembly import pretraining

    teacher, listing = run.params.teacher, read_listing(paths.LISTING)

    def finish(method: "Method", result: "TrainingResult") -> None:
        assert isinstance(method.head, nn.Sequential)  # moco's
        made_from = {"source": "pretrain", "pretrained": True, "listing": listing.fingerprint, "epochs": teacher.pretrain.epochs}
        metadata = teacher_metadata(teacher, run.params.image, method.student, method.head, made_from)
        save_teacher(paths.TEACHER, method.student, method.head, metadata)
        write_curves(paths.PLOTS / "teacher.csv", result.history)
        write_json(paths.REPORTS / "teacher.json", {"pretrained": True, **last_record(result)})

    with process_group(run) as device:
        train_method(run, device, pretraining(run.params), TrainingInputs(listing), finish)


def _convert(run: Run) -> None:
    from bingo.pipeline.training import write_curves
    from bingo.runtime.artefacts import write_json
    from bingo.runtime.progress import progress_bar
    from bingo.teachers.sources import make_teacher
    from bingo.teachers.teacher import save_teacher

    params = run.params.teacher
    with progress_bar(f"converting {params.checkpoint or params.arch}"):
        backbone, head, metadata = make_teacher(params, run.params.image, run.params.seed)
        save_teacher(paths.TEACHER, backbone, head, metadata)
    write_curves(paths.PLOTS / "teacher.csv", [])
    write_json(paths.REPORTS / "teacher.json", {"pretrained": metadata["pretrained"]})
    run.say(f"teacher: {params.arch} from {params.source}" + ("" if metadata["pretrained"] else ", WITHOUT trained weights"))


if __name__ == "__main__":
    run_command(app)
