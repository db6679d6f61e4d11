"""Small versions of everything else that BINGO does on a device: each work computes numbers on a given device."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from coco_data import make_split
from PIL import Image

from bingo.datasets.sources import memory_listing
from bingo.detection.coco import read_instances, training_targets
from bingo.detection.detector import DetectorSettings, build_detector
from bingo.detection.loop import DetectorTrainer
from bingo.detection.scores import detect
from bingo.embeddings.extract import extract_embeddings
from bingo.embeddings.store import read_embeddings
from bingo.evals.collapse import feature_spread
from bingo.evals.finetune import ClassifierTrainer, Protocol, Task, random_crops
from bingo.evals.linear import linear_on_crops, linear_on_features
from bingo.evals.probe import Probe
from bingo.images.images import FileImages
from bingo.images.loader import Request, ViewLoader, center_views
from bingo.methods.contract import Progress
from bingo.methods.parts.losses import negative_logsumexp
from bingo.nets.backbones import build_backbone
from bingo.nets.checkpoint import load_network, save_network
from bingo.params import ExtractParams
from bingo.planning.costs import saved_bytes, step_flops
from bingo.runtime.checkpoints import Checkpoints
from bingo.runtime.errors import Interrupted
from tests.pretended_gpu.steps import AUGMENT, IMAGE, PARAMS, ROWS, Case, images, small_teacher, trainer

Numbers = list[float]
Work = Callable[[torch.device, Path], Numbers]
BINGO = Case("bingo", precision="bf16", changes={"terms": "symmetric_mix"})
LISTING = memory_listing("made", [f"{row}.png" for row in range(ROWS)], np.arange(ROWS) % 4, 48, ["a", "b", "c", "d"], images().images_NSS3)
TASK = Task(images(), LISTING.labels_N, np.arange(48), np.arange(48, ROWS), 4, IMAGE, random_crops([0.5, 1.0], 0.5))
TUNED = {"epochs": 2, "batch_images": 16}
SIDES = {"min_side_px": [64, 80], "max_side_px": 160, "test_min_side_px": 64}
COCO = PARAMS.transfer_coco.model_copy(update={"batch_images": 2, "lr": 0.02, "lr_warmup_steps": 2, **SIDES})
FPN = DetectorSettings(((16,), (32,), (64,), (128,), (256,)), (100, 50), (50, 30), 32, 8, channels=16, hidden=16)
C4 = replace(FPN, anchor_px=((16, 32, 64, 128, 256),))


def _values(records: list[dict[str, float]]) -> Numbers:
    return [value for record in records for value in record.values()]


def _backbone(device: torch.device) -> torch.nn.Module:
    return build_backbone("resnet18", 0.125, "small", 0).to(device, memory_format=torch.channels_last)


def training_with_probe(device: torch.device, folder: Path) -> Numbers:
    """Two epochs, each with a k-NN probe; the best weights are kept."""
    probe = Probe(LISTING, images(), IMAGE, 0, device, "bf16")
    result = trainer(folder, BINGO, device, probe=probe, keep_best=True, measure_start=True).run()
    return _values(result.history) + [float(value.double().sum()) for value in result.best["weights"].values()]


def interrupted_training(device: torch.device, folder: Path) -> Numbers:
    """A training that is stopped in its second epoch and resumes from its checkpoint in another trainer."""
    first = trainer(folder, Case("moco", "momentum", "bf16"), device)
    step = first._train_step

    def and_stop(batch, progress):
        step(batch, progress)
        first.checkpoints.stopping = first.step + 1 == 5

    first._train_step = and_stop
    try:
        first.run()
        raise AssertionError("it was not stopped")
    except Interrupted:
        return _values(trainer(folder, Case("moco", "momentum", "bf16"), device).run().history)


def _files(folder: Path) -> FileImages:
    """40 images, every second one a JPEG."""
    random = np.random.default_rng(0)
    names = [f"{number}.{'png' if number % 2 else 'jpg'}" for number in range(40)]
    for name in names:
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    return FileImages(str(folder), names)


def random_views(device: torch.device, folder: Path, workers: int = 0) -> Numbers:
    """Four epochs with two requests each, from files."""
    loader, rows = ViewLoader(_files(folder), IMAGE, AUGMENT, 0, device, workers), np.arange(40)
    plans = [[Request(rows[:35], rows[:35], "anchor", epoch, 0), Request(rows[5:], rows[5:], "member", epoch, 0)] for epoch in range(4)]
    return [float(view.sum()) for views in loader.views(plans) for view in views]


def centre_views(device: torch.device, folder: Path) -> Numbers:
    """Batches of centre views from files."""
    return [float(view.sum()) for view in center_views(_files(folder), np.arange(40), IMAGE, device, 16, 0)]


def extraction(device: torch.device, folder: Path) -> Numbers:
    """The store of a teacher's outputs, in chunks."""
    params = ExtractParams(views=3, batch_images=16, chunk_rows=32, precision="bf16", augment=AUGMENT)
    attrs = {"teacher": "t"}
    extract_embeddings(small_teacher(device, "fp32"), LISTING, images(), params, 0, folder / "state", folder / "out", device, attrs)
    stored = read_embeddings(folder / "out", LISTING)
    return [float(value) for array in (stored.features_ND, stored.keys_TVP) for value in np.asarray(array[:], np.float64).ravel()]


def linear_on_stored_features(device: torch.device, folder: Path) -> Numbers:
    """Linear evaluation of features, one dimension of which is the class."""
    labels = np.arange(120) % 4
    features = np.random.default_rng(0).standard_normal((120, 12)).astype(np.float32)
    features[:, 0] += labels
    params = PARAMS.linear_eval.cached.model_copy(update={"epochs": 3, "batch_images": 32})
    scores, hits, layer = linear_on_features(features[:90], labels[:90], features[90:], labels[90:], 4, params, 0, device)
    return [*scores.values(), *map(float, hits), *layer["weight"].flatten().tolist(), *layer["bias"].tolist()]


def linear_on_random_crops(device: torch.device, folder: Path) -> Numbers:
    """Linear evaluation of a frozen network on random crops, with standardised features."""
    params = PARAMS.linear_eval.crops.model_copy(update=TUNED | {"standardise": True})
    return list(linear_on_crops(_backbone(device), TASK, params, "bf16", 0, device, Checkpoints(folder, 1e9)).values())


def fine_tuning(device: torch.device, folder: Path) -> Numbers:
    """A whole network trained on labels."""
    protocol = Protocol(TASK, PARAMS.semi_eval.finetune.model_copy(update=TUNED), 0.5, 0.05)
    return list(ClassifierTrainer(_backbone(device), protocol, "bf16", 5, device, Checkpoints(folder, 1e9), "test").run().values())


def features(device: torch.device, folder: Path) -> Numbers:
    """The spread of features of centre views."""
    return list(feature_spread(_backbone(device), LISTING, images(), IMAGE, 0, device, "bf16").values())


def costs(device: torch.device, folder: Path) -> Numbers:
    """FLOPs of a step and memory for its backward pass, which must not change anything."""
    run = trainer(folder, Case("bingo"), device)
    batch = next(run.batches.epoch(0, 0))
    return [step_flops(run.method.train(), batch, Progress(0, 0)), saved_bytes(run.method, batch, Progress(0, 0))]


def large_bank(device: torch.device, folder: Path) -> Numbers:
    """Negatives in one block on a GPU and in many on the CPU, up to rounding."""
    random = torch.Generator().manual_seed(0)
    query_BP = torch.nn.functional.normalize(torch.randn(64, 32, generator=random), dim=1).to(device)
    bank_JP = torch.nn.functional.normalize(torch.randn(20000, 32, generator=random), dim=1).half().to(device)
    hidden_BJ = (torch.rand(64, 20000, generator=random) < 0.1).to(device)
    found_B, mean_BP = negative_logsumexp(query_BP, bank_JP, 0.1, hidden_BJ)
    return [*found_B.tolist(), float(mean_BP.abs().sum())]


def saved_network(device: torch.device, folder: Path) -> Numbers:
    """A network that is written to a file and read again."""
    save_network(folder / "a.safetensors", _backbone(device).state_dict(), {"kind": "test"})
    return [float(value.double().sum()) for value in load_network(folder / "a.safetensors")[0].values()]


def detector(device: torch.device, folder: Path, head: str = "fpn", precision: str = "fp32") -> Numbers:
    """Two steps of Mask R-CNN, and its detections."""
    make_split(folder / "coco", "train", 4, 0, empty=(2,))
    found = read_instances(folder / "coco/annotations/instances_train.json", folder / "coco/train", "key")
    params = COCO.model_copy(update={"precision": precision})
    backbone = build_backbone("resnet18", 0.25, "imagenet", 0)
    network = build_detector(backbone, head, len(found.category_ids), IMAGE.mean, IMAGE.std, 0, {"fpn": FPN, "c4": C4}[head])
    checkpoints = Checkpoints(folder / "checkpoints", 1e9)
    run = DetectorTrainer(network, found.images, training_targets(found), params, [1, 2], 0, device, checkpoints, workers=0)
    history = run.run().history
    detections = detect(run.detector, found, params, device, "detections", 0)
    return _values(history) + [value for one in detections for value in (one["score"], *one["bbox"])]


WORKS: dict[str, Work] = {
    "training with probe": training_with_probe,
    "interrupted training": interrupted_training,
    "random views of files": random_views,
    "random views of files by a worker": lambda device, folder: random_views(device, folder, workers=1),
    "centre views of files": centre_views,
    "extraction": extraction,
    "linear layer on stored features": linear_on_stored_features,
    "linear layer on random crops": linear_on_random_crops,
    "fine-tuning": fine_tuning,
    "features": features,
    "costs": costs,
    "large bank": large_bank,
    "saved network": saved_network,
    "detector fpn fp32": detector,
    "detector c4 bf16": lambda device, folder: detector(device, folder, "c4", "bf16"),
}
