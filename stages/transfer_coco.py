"""transfer_coco: Mask R-CNN on COCO with the student as backbone, fine-tuned from all layers; average precision of boxes and masks.

python -m stages.transfer_coco fpn-1x    reads the student, COCO (transfer_coco.root) and params transfer_coco, image.mean, image.std,
                                         student, seed; writes reports/coco/NAME.json (percent), models/detectors/NAME.safetensors
                                         and curves. A killed run resumes from its checkpoint when it is started again.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bingo.pipeline import paths
from bingo.pipeline.launch import launch
from bingo.pipeline.run import Run, check_item, code_fingerprint, in_words, item_name, process_group, run_command, stage_run
from bingo.pipeline.state import state_folder

if TYPE_CHECKING:
    import torch

    from bingo.detection.coco import Instances
    from bingo.detection.loop import DetectorTrainer
    from bingo.nets.backbones import Backbone

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
WHERE = (
    "runs",
    "root",
    "train_images",
    "train_annotations",
    "val_images",
    "val_annotations",
)  # not their content, which is in the files' hashes


@app.command()
def main(name: str = typer.Argument(help="HEAD-SCHEDULE, one of transfer_coco.runs in params.yaml.")) -> None:
    """Train and evaluate Mask R-CNN on COCO with the student as backbone."""
    name = item_name(name)
    with stage_run(f"transfer_coco-{name}") as run:
        check_item("name", name, run.params, "transfer_coco.runs")
        launch("transfer_coco", name)
        from bingo.detection.detector import check_student
        from bingo.nets.students import load_student

        student, _ = load_student(paths.STUDENT, run.params.student)
        check_student(student)
        with process_group(run) as device:
            _transfer(run, name, student, device)


def _transfer(run: Run, name: str, student: "Backbone", device: "torch.device") -> None:
    from bingo import seeds
    from bingo.detection.coco import training_targets
    from bingo.detection.detector import build_detector, student_inside
    from bingo.detection.loop import DetectorTrainer
    from bingo.nets.checkpoint import weights_sha256
    from bingo.runtime.checkpoints import Checkpoints
    from bingo.runtime.errors import UserError

    params, image = run.params.transfer_coco, run.params.image
    head, _, schedule = name.partition("-")
    train, val = _instances(run)
    made_from = _made_from(run, name, train, val)
    targets, images = training_targets(train), train.images
    run.say(f"{run.stage}: {len(targets.rows)} training images; left out: {targets.in_words()}")
    if not len(targets.rows):
        way_out = "give annotations of instances with boxes and segmentations"
        raise UserError(f"transfer_coco.train_annotations: no image has targets ({targets.in_words()}); {way_out}")
    del train  # COCO's annotations take gigabytes
    seed_value = seeds.torch_seed(run.params.seed, "detector")
    detector = build_detector(student, head, len(val.category_ids), image.mean, image.std, seed_value)
    made_from["student"]["weights_sha256"] = weights_sha256(student_inside(detector))
    run.say(f"{run.stage}: starts from the student's weights, sha256 {made_from['student']['weights_sha256']}")
    with state_folder(run.stage, {**made_from, "code": code_fingerprint("transfer_coco", name)}) as folder:
        trainer = DetectorTrainer(
            detector, images, targets, params, params.schedules[schedule], run.params.seed, device,
            Checkpoints(folder / "checkpoints"), label=run.stage,
        )  # fmt: skip
        if trainer.resumes():
            run.say(f"{run.stage}: resuming from a checkpoint")
        _train_and_measure(run, name, trainer, val, made_from)


def _instances(run: Run) -> "tuple[Instances, Instances]":
    """COCO's training and validation instances, which must have the same categories."""
    from bingo.detection.coco import read_instances
    from bingo.runtime.errors import UserError

    params = run.params.transfer_coco
    assert params.root is not None  # the pattern of a run's name
    root, found = Path(params.root), []
    for split in ("train", "val"):
        key, images = f"transfer_coco.{split}_annotations", root / getattr(params, f"{split}_images")
        found.append(read_instances(root / getattr(params, f"{split}_annotations"), images, key, run.params.dataset.follow_links))
        if remarks := found[-1].in_words():
            run.say(f"{run.stage}: {key}: {remarks}")
    train, val = found
    if train.category_ids != val.category_ids:
        raise UserError("transfer_coco.val_annotations: its categories are not those of transfer_coco.train_annotations; give a pair")
    if all(annotation["iscrowd"] for annotation in val.annotations):
        raise UserError("transfer_coco.val_annotations: has no usable instance; give annotations that are not all crowds")
    return train, val


def _made_from(run: Run, name: str, train: "Instances", val: "Instances") -> dict[str, Any]:
    """Everything but the code that determines the result; only checkpoints with the same values are resumed."""
    from bingo.runtime.artefacts import file_fingerprint

    params = run.params.transfer_coco.model_dump(exclude={*WHERE, "schedules"})
    return {
        "run": name,
        "steps": run.params.transfer_coco.schedules[name.partition("-")[2]],
        "params": {"seed": run.params.seed, "transfer_coco": params},
        "image": {"mean": run.params.image.mean, "std": run.params.image.std},
        "student": {**run.params.student.model_dump(), "fingerprint": file_fingerprint(paths.STUDENT)},
        "category_ids": train.category_ids,
        "annotations": {"train": train.fingerprint, "val": val.fingerprint},
    }


def _train_and_measure(run: Run, name: str, trainer: "DetectorTrainer", val: "Instances", made_from: dict[str, Any]) -> None:
    """Train to the end, evaluate on the validation images, write the outputs."""
    from bingo.detection.scores import coco_scores, detect
    from bingo.nets.checkpoint import save_network
    from bingo.runtime import distributed
    from bingo.runtime.artefacts import write_csv, write_json

    result = trainer.run()
    run.notes["images_per_second"] = round(result.images / max(result.seconds, 1e-9), 1)
    detections = detect(trainer.detector, val, trainer.params, trainer.device, f"{run.stage}: test")
    if distributed.rank() == 0:
        scores = coco_scores(val, detections)
        save_network(paths.DETECTORS / f"{name}.safetensors", trainer.detector.state_dict(), {"kind": "detector", **made_from})
        write_csv(paths.PLOTS / f"coco-{name}.csv", result.history, ["step", "loss"])
        write_json(paths.REPORTS / "coco" / f"{name}.json", scores)
        for kind, figures in scores.items():
            run.say(f"{run.stage}: {kind}: {in_words(figures, '.1f')}")


if __name__ == "__main__":
    run_command(app)
