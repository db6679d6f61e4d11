"""Four images of COCO learned by heart on a CPU: whether detector, losses, targets and evaluation fit together.

python benchmarks/overfit_coco.py --root FOLDER     # with annotations/instances_train2017.json; a few minutes on one core

The student is an untrained ResNet-18 of a quarter of the width; images and heads are small. The images are the first four, by id,
with two to eight instances; they are trained on and measured on, so the figures say nothing about detection.
"""

import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from bingo.detection.coco import CocoImages, Instances, read_instances, training_targets
from bingo.detection.detector import DetectorSettings, build_detector
from bingo.detection.loop import DetectorTrainer
from bingo.detection.scores import coco_scores, detect
from bingo.nets.backbones import build_backbone
from bingo.params import CocoParams, load_params
from bingo.pipeline.commands import Parser
from bingo.runtime.checkpoints import Checkpoints

CPU = torch.device("cpu")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SMALL = {
    "fpn": DetectorSettings(((16,), (32,), (64,), (128,), (256,)), (500, 300), (300, 200), 128, 48, channels=64, hidden=256),
    "c4": DetectorSettings(((16, 32, 64, 128, 256),), (500, 300), (300, 200), 128, 48, channels=64),
}


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of COCO")
    parser.add_argument("--images", default="train2017", help="folder of the training images, under --root")
    parser.add_argument("--head", choices=list(SMALL), default="fpn")
    parser.add_argument("--steps", type=int, default=240)
    chosen = parser.parse_args()
    found = _four(read_instances(chosen.root / "annotations/instances_train2017.json", chosen.root / chosen.images, "--root"))
    student = build_backbone("resnet18", 0.25, "imagenet", 0)
    detector = build_detector(student, chosen.head, len(found.category_ids), MEAN, STD, 0, SMALL[chosen.head])
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), every_seconds=1e9)
        schedule = [chosen.steps * 3 // 4, chosen.steps]
        trainer = DetectorTrainer(detector, found.images, training_targets(found), _params(), schedule, 0, CPU, checkpoints, workers=0)
        begun = time.monotonic()
        history = trainer.run().history
    print(f"{chosen.head}: {len(found.annotations)} instances, {chosen.steps} steps of 4 images, {time.monotonic() - begun:.0f} s")
    for record in history[:: max(1, len(history) // 8)]:
        print(f"step {record['step']}: loss {record['loss']:.3f}")
    for kind, figures in coco_scores(found, detect(detector, found, _params(), CPU, "test", workers=0)).items():
        print(f"{kind}: " + ", ".join(f"{name} {'-' if value is None else f'{value:.1f}'}" for name, value in figures.items()))


def _four(found: Instances) -> Instances:
    """The first four images, by id, with two to eight instances."""
    counts = Counter(annotation["image_id"] for annotation in found.annotations)
    entries = [image for image in found.images.entries if 2 <= counts[image["id"]] <= 8][:4]
    ids = {image["id"] for image in entries}
    kept = [annotation for annotation in found.annotations if annotation["image_id"] in ids]
    return Instances(CocoImages(entries, found.images.folder), kept, found.category_ids, found.fingerprint)


def _params() -> CocoParams:
    shipped = load_params().transfer_coco
    small = {
        "batch_images": 4,
        "lr_warmup_steps": 20,
        "min_side_px": [192],
        "max_side_px": 320,
        "test_min_side_px": 192,
        "precision": "fp32",
    }
    return shipped.model_copy(update=small)


if __name__ == "__main__":
    main()
