"""Whether this GPU reaches the goals for CIFAR-10: all stages run in a new folder, and 200 epochs are extrapolated from a few.

    python -m benchmarks.gpu_goals --root data/cifar10           on the GPU: about 3 minutes on one that reaches the goals
    python -m benchmarks.gpu_goals                               with 60,000 images of noise instead of CIFAR-10, at the same speed
    python -m benchmarks.gpu_goals --recipe digits-short --cpu   a test of this command without goals, half a minute

Goals (one H200): pretraining ResNet-50 for 200 epochs in 10 minutes, BINGO's ResNet-18 in 5, and the pipeline from scan to report in 20.
The time of an epoch comes from the record of the run: its anchors per second after `--epochs` epochs, including the warm-up of the first
steps. The time of a stage outside its training (start, one probe, outputs) is added unchanged. The evaluations run in full.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from ruamel.yaml import YAML

from benchmarks.parser import Parser
from bingo.images.listing import read_listing
from bingo.params import read_yaml, validate
from bingo.pipeline.process import mistakes_as_lines
from bingo.planning.recipes import lay_over, read_recipe
from bingo.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
STAGES = ("scan", "teacher", "extract", "bag", "distill", "linear_eval", "knn_eval", "report")
GOALS_MINUTES = {"teacher": 10, "distill": 5, "pipeline": 20}


def workspace(folder: Path, recipe: str, epochs: int, root: str | None) -> dict[str, int]:
    """Create a folder for the stages, with few epochs; returns the recipe's number of epochs for each training."""
    document = read_yaml(ROOT / "params.yaml")
    lay_over(document, read_recipe(ROOT / "recipes", recipe).overlay)
    whole = {"teacher": document["teacher"]["pretrain"]["epochs"], "distill": document["distill"]["epochs"]}
    few = {"epochs": epochs, "lr_warmup_epochs": 0}
    changes: dict[str, Any] = {"teacher": {"pretrain": few}, "distill": few, "baselines": []}
    changes["methods"] = {"bingo": {"inter_warmup_epochs": 0}}  # --epochs may be less; a step costs the same after it
    if root:
        changes["dataset"] = {"root": str(Path(root).absolute())}
    elif document["dataset"]["source"] == "cifar10":
        changes["dataset"] = {"source": "folder", "root": make_noise(folder / "noise")}
    lay_over(document, changes)
    validate(document, f"recipe {recipe}")
    if (source := document["teacher"]["source"]) != "pretrain":
        raise UserError(f"--recipe = {recipe}: its teacher.source is {source}; allowed is pretrain, because a goal is for pretraining")
    for name in ("bingo", "stages"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "dvc.yaml", folder)
    with open(folder / "params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(document, file)
    return whole


def make_noise(root: Path) -> str:
    """Write a folder of images with CIFAR-10's splits, classes and image size; each image contains different noise."""
    random = np.random.default_rng(0)
    for split, images in (("train", 50_000), ("test", 10_000)):
        for label in range(10):
            (root / split / str(label)).mkdir(parents=True)
        for row in range(images):
            image = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            image.save(root / split / str(row % 10) / f"{row}.bmp")
    return str(root)


def run_stage(folder: Path, stage: str, device: str) -> tuple[float, dict[str, Any]]:
    """Run a stage; returns its seconds from start to end, and its record."""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=folder, env=os.environ | {"BINGO_DEVICE": device}, check=False)
    if done.returncode:
        raise UserError(f"{stage} ended with exit code {done.returncode}: see above")
    return time.monotonic() - begun, json.loads((folder / f".bingo/runs/{stage}.json").read_text())


def measure(folder: Path, recipe: str, epochs: int, root: str | None, device: str) -> dict[str, float]:
    """Run and report the stages; returns minutes for all epochs of the recipe, of each training and of the whole pipeline."""
    whole = workspace(folder, recipe, epochs, root)
    minutes = {"pipeline": 0.0}
    for stage in STAGES:
        seconds, record = run_stage(folder, stage, device)
        if stage in whole:
            schedule = record["params"]["distill"] if stage == "distill" else record["params"]["teacher"]["pretrain"]
            train_rows = read_listing(folder / "data/listing.parquet").train_rows
            anchors = train_rows // schedule["batch_anchors"] * schedule["batch_anchors"]
            seconds += (whole[stage] - epochs) * anchors / record["anchors_per_second"]
            minutes[stage] = seconds / 60
            print(f"{stage}: {record['anchors_per_second']:,.0f} anchors/s, {whole[stage]} epochs extrapolated from {epochs}", flush=True)
        minutes["pipeline"] += seconds / 60
        print(f"{stage}: {seconds / 60:.1f} minutes on {record.get('device', device)}", flush=True)
    return minutes


def main() -> None:
    """Run the stages and print one line for each, and for each goal."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--root", help="where CIFAR-10 is (default: noise)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs to run of each training")
    parser.add_argument("--cpu", action="store_true", help="only test whether this command works")
    options = parser.parse_args()
    with mistakes_as_lines(), tempfile.TemporaryDirectory() as name:
        import torch

        if not options.cpu and not torch.cuda.is_available():
            raise UserError("the goals are for a GPU, but torch sees none; --cpu runs the stages without goals")
        minutes = measure(Path(name), options.recipe, options.epochs, options.root, "cpu" if options.cpu else "cuda")
        for part, goal in ({} if options.cpu else GOALS_MINUTES).items():
            print(f"{part}: {minutes[part]:.1f} minutes, goal {goal}: {'reached' if minutes[part] <= goal else 'missed'}")


if __name__ == "__main__":
    main()
