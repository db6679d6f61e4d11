"""What the three trainings share (teacher, student, baselines): build the method, train it from its checkpoint, write its curves."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bingo.pipeline import paths
from bingo.pipeline.run import Run, code_fingerprint
from bingo.pipeline.state import state_folder

if TYPE_CHECKING:
    import torch

    from bingo.bags.index import BagIndex, Bags
    from bingo.embeddings.store import Embeddings
    from bingo.images.listing import Listing
    from bingo.methods.contract import Context, Method
    from bingo.params import AugmentParams, MethodSection, NetworkParams, ScheduleParams
    from bingo.teachers.teacher import Teacher
    from bingo.training.batches import Batches, Stored
    from bingo.training.loop import TrainingResult


def train_method(
    run: Run,
    device: "torch.device",
    method_name: str,
    section: "MethodSection",
    network: "NetworkParams",
    schedule: "ScheduleParams",
    augment: "AugmentParams",
    listing: "Listing",
    finish: Callable[["Method", "TrainingResult"], None],
    keys: str = "momentum",
    embeddings: "Embeddings | None" = None,
    bags: "BagIndex | None" = None,
    teacher: "Teacher | None" = None,
) -> None:
    """Train `method_name` on `network`, going on from the last checkpoint of exactly this training; `finish` writes its outputs.

    The checkpoint is deleted only after `finish` has put the outputs in place.
    """
    from bingo.evals.collapse import feature_spread
    from bingo.evals.probe import KnnProbe
    from bingo.images.images import open_images
    from bingo.images.loader import ViewLoader
    from bingo.methods.contract import build_method
    from bingo.nets.batchnorm import own_groups
    from bingo.runtime import distributed
    from bingo.runtime.checkpoints import Checkpoints
    from bingo.runtime.progress import progress_bar
    from bingo.training.batches import Batches, steps_in_epoch
    from bingo.training.loop import Trainer

    params = run.params
    steps_in_epoch(listing.train_rows, schedule.batch_anchors, f"{_schedule_name(run)}.batch_anchors")
    groups = schedule.groups_for(section.momentum_keys(keys), distributed.world())
    own_groups(groups, f"{_schedule_name(run)}.batchnorm_groups")
    stored = _stored(run, section, embeddings, device) if embeddings is not None else None
    table = bags.table if bags is not None else None
    method = build_method(method_name, section, _context(run, device, network, schedule.precision, keys, stored, table, teacher))
    _check_bags(run, method, table)
    images = open_images(listing, paths.IMAGES, params.dataset)
    loader = ViewLoader(images, params.image, augment, params.seed, device)
    probe = KnnProbe(listing, images, params.image, params.seed, device, schedule.precision) if listing.labelled else None
    values = _identity(run, method_name, section, network, schedule, keys, [listing, embeddings, bags])
    with state_folder(run.stage, values) as folder:
        batches = Batches(method.needs, loader, params.seed, listing.train_rows, schedule.batch_anchors, table, stored)
        label = f"{run.stage}: {method_name}"
        trainer = Trainer(method, batches, schedule, device, Checkpoints(folder / "checkpoints"), probe, label, groups)
        if trainer.resumes():
            run.say(f"{run.stage}: going on from a checkpoint")
            run.notes["resumed"] = True
        with progress_bar("counting the cost of a step"):
            gflop_per_anchor = _gflop_per_anchor(trainer.method, batches)
        result = trainer.run()
        result.gflop_per_anchor = gflop_per_anchor
        if distributed.rank() == 0:
            result.spread = feature_spread(method.student, listing, images, params.image, params.seed, device, schedule.precision)
            finish(method, result)
    _say_result(run, method_name, schedule, result)


def _check_bags(run: Run, method: "Method", bags: "Bags | None") -> None:
    """Raises UserError where a method draws from bags that are all empty, and warns where many are."""
    if bags is None or not (method.needs.members or method.needs.companions):
        return
    if (warning := bags.empty_warning()) and os.environ.get("RANK", "0") == "0":
        print(f"warning: {run.stage}: {warning}", file=sys.stderr, flush=True)


def _context(
    run: Run,
    device: "torch.device",
    network: "NetworkParams",
    precision: str,
    keys: str,
    stored: "Stored | None",
    bags: "Bags | None",
    teacher: "Teacher | None",
) -> "Context":
    """What a method is built from: a new student, and what there is of teacher, stored outputs and bags."""
    from bingo import seeds
    from bingo.methods.contract import Context
    from bingo.nets.backbones import build_backbone, check_images

    student = build_backbone(network.arch, network.width, network.stem, seeds.torch_seed(run.params.seed, "student"), network.options)
    check_images(student, network.arch, run.params.image.crop_px)
    return Context(
        student=student,
        feature_width=student.feature_width,
        seed=run.params.seed,
        keys=keys,
        precision=precision,
        device=device,
        teacher=teacher,
        keys_TVP=stored.keys_TVP if stored is not None else None,
        features_TD=stored.features_TD if stored is not None else None,
        bags=bags,
    )


def _stored(run: Run, section: "MethodSection", embeddings: "Embeddings", device: "torch.device") -> "Stored":
    """The teacher's stored outputs on the device. Raises UserError where the stored views cannot be drawn again as they were."""
    import torch

    from bingo.params import AugmentParams
    from bingo.runtime.errors import UserError
    from bingo.training.batches import Stored

    recipe = embeddings.attrs["recipe"]
    if (recipe["image"], recipe["seed"]) != (run.params.image.model_dump(mode="json"), run.params.seed):
        raise UserError(f"{paths.EMBEDDINGS}: was made with another image section or seed than params.yaml has; run: dvc repro extract")
    features_TD = torch.from_numpy(embeddings.train_features_TD).to(device) if section.reads_features else None
    augment = AugmentParams.model_validate(recipe["extract"]["augment"])
    return Stored(torch.from_numpy(embeddings.keys_TVP).to(device), augment, features_TD)


def _gflop_per_anchor(method: "Method", batches: "Batches") -> float:
    """What a training step costs for each anchor, forward and backward, counted on the first batch."""
    from bingo.methods.contract import Progress
    from bingo.planning.costs import step_flops
    from bingo.runtime import distributed

    batch = next(batches.epoch(0, 0))
    return round(step_flops(method.train(), batch, Progress(0, 0)) * distributed.world() / batches.batch_anchors / 1e9, 6)


def _identity(
    run: Run, method_name: str, section: "MethodSection", network: "NetworkParams", schedule: "ScheduleParams", keys: str, inputs: list[Any]
) -> dict[str, Any]:
    """All that decides a training's outcome: a checkpoint of anything else is not gone on from."""
    return {
        "params": [
            run.params.seed,
            *(part.model_dump(exclude={"method", "keys"}) for part in (run.params.image, network, schedule, section)),
            keys,
        ],
        "inputs": [artefact.fingerprint if artefact else None for artefact in inputs],
        "method": method_name,
        "code": code_fingerprint(run.stage.partition("-")[0], method_name),
    }


def _say_result(run: Run, method_name: str, schedule: "ScheduleParams", result: "TrainingResult") -> None:
    """Print and note the speed and the last epoch's figures, and warn of a collapsed network."""
    from bingo.evals.collapse import collapse_warning

    rate = result.anchors / max(result.seconds, 1e-9)
    run.notes |= {"anchors_per_second": round(rate, 1), "data_wait": round(result.wait_seconds / max(result.seconds, 1e-9), 3)}
    last = ", ".join(f"{name} {value:g}" for name, value in result.history[-1].items() if name not in ("epoch", "lr"))
    if result.spread and (warning := collapse_warning(result.spread)):
        print(f"warning: {run.stage}: {warning}", file=sys.stderr, flush=True)
    run.say(f"{run.stage}: {method_name}, {schedule.epochs} epochs, {rate:,.0f} anchors/s; last epoch: {last}")


def _schedule_name(run: Run) -> str:
    return "teacher.pretrain" if run.stage == "teacher" else "distill"


def write_curves(path: Path, history: list[dict[str, float]]) -> None:
    """One line an epoch as CSV, which `dvc plots` reads; a figure that an epoch lacks is an empty field."""
    from bingo.runtime.artefacts import write_csv

    write_csv(path, history, ["epoch", "loss"])


def last_record(result: "TrainingResult") -> dict[str, float]:
    """The last epoch's terms and probe figures, the features' spread and what an anchor cost, as metrics."""
    last = {f"last_{name}": value for name, value in result.history[-1].items() if name not in ("epoch", "lr")}
    return {**last, **result.spread, "gflop_per_anchor": result.gflop_per_anchor}
