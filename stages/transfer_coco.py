"""transfer_coco: Mask R-CNN on COCO with the student as backbone, fine-tuned from all layers; average precision of boxes and masks.

python -m stages.transfer_coco fpn-1x    writes reports/coco/NAME.json (percent), models/detectors/NAME.safetensors and curves. A killed
                                         run resumes from its checkpoint when it is started again.
"""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import Run, code_fingerprint, in_words, process_group, stage_run
from bingo.pipeline.state import state_folder

if TYPE_CHECKING:
    import torch

    from bingo.nets.backbones import Backbone

# Paths do not matter, since the hashes of the files are part of the inputs.
WHERE = ("runs", "root", "train_images", "train_annotations", "val_images", "val_annotations")


def main(name: Annotated[str, typer.Argument(help="HEAD-SCHEDULE, one of transfer_coco.runs in params.yaml.")]) -> None:
    """Train and evaluate Mask R-CNN on COCO with the student as backbone."""
    with stage_run("transfer_coco", name) as run:
        (chosen,) = run.chosen("transfer_coco.runs", run.params.transfer_coco.runs)
        run.launch()
        from bingo.detection.detector import check_student
        from bingo.nets.students import load_backbone

        student, _ = load_backbone(paths.STUDENT, run.params.student)
        check_student(student)
        with process_group(run) as device:
            _transfer(run, chosen, student, device)


def _transfer(run: Run, name: str, student: "Backbone", device: "torch.device") -> None:
    from bingo import seeds
    from bingo.detection.coco import read_pair, training_targets
    from bingo.detection.detector import build_detector, student_inside
    from bingo.detection.loop import DetectorTrainer
    from bingo.detection.scores import coco_scores, detect
    from bingo.nets.checkpoint import save_network, weights_sha256
    from bingo.pipeline.loggers import logged
    from bingo.runtime import distributed
    from bingo.runtime.artefacts import file_fingerprint, write_csv, write_json
    from bingo.runtime.checkpoints import Checkpoints

    params, image, seed = run.params.transfer_coco, run.params.image, run.params.seed
    head, _, schedule = name.partition("-")
    train, val = read_pair(params, run.params.dataset.follow_links, run.say)
    targets, images = training_targets(train), train.images
    run.say(f"{run.stage}: {len(targets.rows)} training images; left out: {targets.in_words()}")
    made_from: dict[str, Any] = {
        "run": name,
        "steps": params.schedules[schedule],
        "params": {"seed": seed, "transfer_coco": params.model_dump(exclude={*WHERE, "schedules"})},
        "image": {"mean": image.mean, "std": image.std},
        "student": {**run.params.student.model_dump(), "fingerprint": file_fingerprint(paths.STUDENT)},
        "category_ids": train.category_ids,
        "annotations": {"train": train.fingerprint, "val": val.fingerprint},
    }
    del train  # COCO's annotations take gigabytes
    detector = build_detector(student, head, len(val.category_ids), image.mean, image.std, seeds.torch_seed(seed, "detector"))
    made_from["student"]["weights_sha256"] = weights_sha256(student_inside(detector))
    run.say(f"{run.stage}: starts from the student's weights, sha256 {made_from['student']['weights_sha256']}")
    with state_folder(run.stage, {**made_from, "code": code_fingerprint("transfer_coco", name)}) as folder:
        checkpoints = Checkpoints(folder / "checkpoints")
        trainer = DetectorTrainer(detector, images, targets, params, params.schedules[schedule], seed, device, checkpoints, run.stage)
        if trainer.resumes():
            run.say(f"{run.stage}: resuming from a checkpoint")
        with logged(run, trainer):
            result = trainer.run()
        run.notes["images_per_second"] = round(result.images / max(result.seconds, 1e-9), 1)
        detections = detect(trainer.detector, val, params, device, f"{run.stage}: test")
        if distributed.rank() == 0:
            scores = coco_scores(val, detections)
            save_network(paths.DETECTORS / f"{name}.safetensors", trainer.detector.state_dict(), {"kind": "detector", **made_from})
            write_csv(paths.PLOTS / f"coco-{name}.csv", result.history, ["step", "loss"])
            write_json(paths.REPORTS / "coco" / f"{name}.json", scores)
            for kind, figures in scores.items():
                run.say(f"{run.stage}: {kind}: {in_words(figures, '.1f')}")


if __name__ == "__main__":
    run_command(main)
