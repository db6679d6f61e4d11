"""teacher: train or convert the teacher to models/teacher.safetensors, a backbone with its projection head.

If teacher.source is `pretrain`, MoCo-v2 trains it on the images; a killed run resumes from its checkpoint. With teacher.key_width, the
head ends with a projection to the leading principal components of its keys.
"""

from typing import TYPE_CHECKING

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import Run, stage_run

if TYPE_CHECKING:
    from torch import nn

    from bingo.methods.contract import Method
    from bingo.nets.backbones import Backbone
    from bingo.params import ImageParams
    from bingo.training.loop import TrainingResult

REPORT = paths.REPORTS / "teacher.json"


def main() -> None:
    """Pretrain the teacher, or convert a checkpoint strictly."""
    with stage_run("teacher") as run:
        if run.params.teacher.source == "pretrain":
            run.launch()
            _pretrain(run)
        else:
            _convert(run)


def _pretrain(run: Run) -> None:
    from bingo.images.listing import read_listing
    from bingo.pipeline.training import TrainingInputs, train_method
    from bingo.teachers.teacher import save_teacher, teacher_metadata
    from bingo.training.assembly import pretraining

    teacher, listing = run.params.teacher, read_listing(paths.LISTING)

    def save(trained: "Method", _: "TrainingResult") -> None:
        made_from = {"source": "pretrain", "pretrained": True, "listing": listing.fingerprint, "epochs": teacher.pretrain.epochs}
        made_from |= {"options": teacher.options} if teacher.options else {}
        head = _narrowed(run, trained.student, trained.head, run.params.teacher_image) or trained.head  # type: ignore[arg-type]
        metadata = teacher_metadata(teacher, run.params.teacher_image, trained.student, head, made_from)  # type: ignore[arg-type]
        save_teacher(paths.TEACHER, trained.student, head, metadata)

    train_method(run, pretraining(run.params), TrainingInputs(listing), save, REPORT, {"pretrained": True})


def _convert(run: Run) -> None:
    from bingo.nets.heads import describe_head
    from bingo.params import seen_image
    from bingo.pipeline.training import write_curves
    from bingo.runtime.artefacts import write_json
    from bingo.runtime.progress import progress_bar
    from bingo.teachers.reading.sources import make_teacher
    from bingo.teachers.teacher import save_teacher

    params = run.params.teacher
    with progress_bar(f"converting {params.checkpoint or params.arch}"):
        backbone, head, metadata = make_teacher(params, run.params.teacher_image, run.params.seed)
    if narrow := _narrowed(run, backbone, head, seen_image(metadata)):
        head, metadata = narrow, metadata | {"head": describe_head(narrow), "key_width": params.key_width}
    save_teacher(paths.TEACHER, backbone, head, metadata)
    write_curves(run, [])
    write_json(REPORT, {"pretrained": metadata["pretrained"]})
    run.say(f"teacher: {params.arch} from {params.source}" + ("" if metadata["pretrained"] else ", WITHOUT trained weights"))


def _narrowed(run: Run, backbone: "Backbone", head: "nn.Sequential | None", image: "ImageParams") -> "nn.Sequential | None":
    """The head that ends with the principal components of its keys; None without `teacher.key_width`."""
    params = run.params
    if params.teacher.key_width is None:
        return None
    from bingo.images.images import open_images
    from bingo.images.listing import read_listing
    from bingo.pipeline.run import pick_device
    from bingo.training.narrow_keys import narrowed

    listing = read_listing(paths.LISTING)
    images = open_images(listing, paths.IMAGES, params.dataset)
    return narrowed(backbone, head, params.teacher, image, images, listing.train_rows, params.seed, pick_device())


if __name__ == "__main__":
    run_command(main)
