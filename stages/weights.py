"""weights: read external weights for the student's network: its initial weights (student.weights) and supervised ones (supervised).

They go to models/start.safetensors and models/supervised.safetensors, which contain the text `none` if they are not configured.
"""

from pathlib import Path

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import Run, stage_run


def main() -> None:
    """Convert external weights, strictly."""
    with stage_run("weights") as run:
        if not run.params.student.weights and not run.params.supervised:
            run.idle = "student.weights and supervised are null"
        _convert(run, "student.weights", run.params.student.weights, paths.START)
        _convert(run, "supervised", run.params.supervised, paths.SUPERVISED)


def _convert(run: Run, key: str, value: str | None, path: Path) -> None:
    from bingo.runtime.artefacts import write_bytes

    if value is None:
        write_bytes(path, paths.NO_WEIGHTS)
        return
    from bingo.nets.students import save_backbone
    from bingo.runtime.progress import progress_bar
    from bingo.teachers.weights import student_weights

    params = run.params
    with progress_bar(f"reading {value}"):
        backbone, facts = student_weights(key, value, params.student, params.image)
        save_backbone(path, backbone.state_dict(), params.student, params.image, facts)
    run.say(f"weights: {key}: {params.student.arch} with {facts['weights']}")


if __name__ == "__main__":
    run_command(main)
