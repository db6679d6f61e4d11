"""Common code of the three trainings (teacher, student, baselines): build the method, train it from its checkpoint, write the results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bingo import paths
from bingo.evals.collapse import collapse_warning, feature_spread
from bingo.evals.probe import Probe
from bingo.images.images import open_images
from bingo.images.listing import Listing
from bingo.methods.contract import Method, Progress
from bingo.nets.backbones import Backbone
from bingo.nets.batchnorm.groups import counting_layers, own_groups
from bingo.nets.checkpoint import weights_sha256
from bingo.nets.precision import resolve_precision
from bingo.params import AugmentParams
from bingo.pipeline.loggers import bag_pictures, logged
from bingo.pipeline.run import Run, code_fingerprint, in_words, process_group
from bingo.pipeline.state import state_folder
from bingo.planning.costs import step_flops
from bingo.runtime import distributed
from bingo.runtime.artefacts import write_csv, write_json
from bingo.runtime.checkpoints import Checkpoints
from bingo.runtime.errors import UserError
from bingo.runtime.progress import progress_bar
from bingo.schedules import steps_in_epoch
from bingo.training.assembly import TrainingSetup
from bingo.training.batches import Batches, Stored
from bingo.training.loop import Trainer, TrainingResult

if TYPE_CHECKING:  # a training without them does not depend on them
    from bingo.bags.index import BagIndex
    from bingo.embeddings.store import Embeddings
    from bingo.teachers.teacher import Teacher


@dataclass(frozen=True)
class TrainingInputs:
    """Inputs of a training: the listing and its images; for distillation also the teacher's outputs and bags; for live keys the teacher;
    and the network with the student's initial weights, if these are not random."""

    listing: Listing
    embeddings: "Embeddings | None" = None
    bags: "BagIndex | None" = None
    teacher: "Teacher | None" = None
    start: Backbone | None = None


def train_method(
    run: Run,
    setup: TrainingSetup,
    inputs: TrainingInputs,
    save: Callable[[Method, TrainingResult], None],
    report: Path,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Run the training that `setup` describes on `inputs`, resuming from the last checkpoint of exactly this training.

    `save` writes the network; this function writes the curves, and to `report` the last figures and `facts`. The checkpoint is deleted only
    after all outputs are in place.
    """
    params, schedule, listing = run.params, setup.schedule, inputs.listing
    with process_group(run) as device:
        steps_in_epoch(listing.train_rows, schedule.batch_anchors, f"{setup.place}.batch_anchors")
        groups = schedule.groups_for(setup.section.momentum_keys(setup.keys), distributed.world())
        own_groups(groups, f"{setup.place}.batchnorm_groups", parts=schedule.accumulate_steps)
        stored = _stored(run, setup, inputs.embeddings, device) if inputs.embeddings is not None else None
        bags, teacher = inputs.bags.table if inputs.bags is not None else None, inputs.teacher
        if teacher is not None:
            teacher = teacher.weights_for(resolve_precision(schedule.precision, device)).to(device).to(memory_format=torch.channels_last)
        method = setup.build(device, schedule.precision, stored, bags, teacher, inputs.start)
        if bags is not None and method.needs.bags and (warning := bags.empty_warning()):
            run.warn(warning)
        images = open_images(listing, paths.IMAGES, params.dataset)
        watched = listing, images, setup.image, params.seed, device, schedule.precision
        probe = Probe(*watched, inputs.embeddings)
        if setup.keep_best and not probe.measures:
            problem = f"{listing.train_rows} train images are too few to probe the student on"
            raise UserError(f"{setup.place}.keep_best = true: {problem}; set {setup.place}.keep_best: false, or add images")
        loader = setup.loader(images, device, teacher)
        batches = Batches(
            method.needs, loader, params.seed, listing.train_rows, schedule.batch_anchors, bags, stored, schedule.accumulate_steps
        )
        _check_parts(run, setup, method, groups)
        with state_folder(run.stage, _identity(run, setup, inputs)) as folder:
            label = f"{run.stage}: {setup.method}"
            checkpoints, measured = Checkpoints(folder / "checkpoints"), probe if probe.measures else None
            kept = setup.keep_best, inputs.start is not None, setup.student_ema
            trainer = Trainer(method, batches, schedule, device, checkpoints, measured, label, groups, *kept)
            if trainer.resumes():
                run.say(f"{run.stage}: resuming from a checkpoint")
                run.notes["resumed"] = True
            with progress_bar("counting the cost of a step"):
                gflop_per_anchor = _gflop_per_anchor(trainer.method, batches)
            pictures = partial(bag_pictures, inputs.bags, listing, images) if inputs.bags is not None else None
            with logged(run, trainer, measure=lambda student: feature_spread(student, *watched), pictures=pictures):
                result = trainer.run()
            if distributed.rank() == 0:
                result.spread = feature_spread(method.student, *watched)
                save(method, result)
                write_curves(run, result.history)
                last = {f"last_{name}": value for name, value in result.history[-1].items() if name not in ("epoch", "lr")}
                write_json(report, {**(facts or {}), **last, **result.spread, "gflop_per_anchor": gflop_per_anchor})
        _say_result(run, setup, result)


def _check_parts(run: Run, setup: TrainingSetup, method: Method, groups: int) -> None:
    """Warn if a batch in parts is normalised differently from the whole batch."""
    schedule, differs = setup.schedule, list[str]()
    if schedule.accumulate_steps == 1 or not counting_layers(method):
        return
    if schedule.batchnorm_groups is None:
        images = schedule.batch_anchors // max(groups, schedule.accumulate_steps * distributed.world())
        differs.append(f"BatchNorm's statistics are those of {images} images, as with {setup.place}.batchnorm_groups: {groups}")
    if setup.section.momentum_keys(setup.keys):
        differs.append("the moving average's keys are shuffled within a part")
    if differs:
        run.warn(
            f"{setup.place}.accumulate_steps = {schedule.accumulate_steps}: {'; '.join(differs)}; the loss is not that of the whole batch"
        )


def _stored(run: Run, setup: TrainingSetup, embeddings: "Embeddings", device: torch.device) -> Stored:
    """The teacher's stored outputs on the device. Raises UserError if the stored views cannot be reproduced."""
    recipe = embeddings.attrs["recipe"]
    if recipe["seed"] != run.params.seed:
        line = f"{paths.EMBEDDINGS}: was made with seed {recipe['seed']}, params.yaml has {run.params.seed}"
        raise UserError(f"{line}; run: dvc repro extract")
    features_TD = torch.from_numpy(embeddings.train_features_TD).to(device) if setup.reads_features else None
    augment = AugmentParams.model_validate(recipe["extract"]["augment"] | {"name": None})  # only the numbers matter, not their name
    return Stored(torch.from_numpy(embeddings.keys_TVP).to(device), augment, features_TD)


def _gflop_per_anchor(method: Method, batches: Batches) -> float:
    """The cost of a training step per anchor, forward and backward, counted on the first part of the first batch."""
    batch = next(batches.epoch(0, 0))
    return round(step_flops(method.train(), batch, Progress(0, 0)) * distributed.world() * batches.parts / batches.batch_anchors / 1e9, 6)


def _identity(run: Run, setup: TrainingSetup, inputs: TrainingInputs) -> dict[str, Any]:
    """Everything that determines the result of a training; only checkpoints with the same values are used."""
    sections = (setup.image, setup.network, setup.schedule, setup.section)
    artefacts = (inputs.listing, inputs.embeddings, inputs.bags)
    of_the_student = ("method", "keys", "keep_best", "student_ema")  # of section distill, but not of every training
    apart = {name: getattr(setup, name) for name in of_the_student}
    return {
        "params": [run.params.seed, *(section.model_dump(exclude=set(apart)) for section in sections), *apart.values()],
        "inputs": [artefact.fingerprint if artefact else None for artefact in artefacts],
        "start": weights_sha256(inputs.start.state_dict()) if inputs.start is not None else None,
        "code": code_fingerprint(run.name, setup.method),
    }


def _say_result(run: Run, setup: TrainingSetup, result: TrainingResult) -> None:
    """Print and record the speed and the last epoch's figures, and warn of a collapsed network."""
    rate = result.anchors / max(result.seconds, 1e-9)
    run.notes |= {"anchors_per_second": round(rate, 1), "data_wait": round(result.wait_seconds / max(result.seconds, 1e-9), 3)}
    if probed := {name: value for name, value in result.history[-1].items() if name.startswith(("knn_", "agreement_"))}:
        run.notes["probe"] = f"{in_words(probed, '.1f')} ({100 * result.probe_seconds / max(result.seconds, 1e-9):.1f} % of the time)"
    last = in_words({name: value for name, value in result.history[-1].items() if name not in ("epoch", "lr")})
    if result.spread and (warning := collapse_warning(result.spread)):
        run.warn(warning)
    run.say(f"{run.stage}: {setup.method}, {setup.schedule.epochs} epochs, {rate:,.0f} anchors/s; last epoch: {last}")


def write_curves(run: Run, history: list[dict[str, float]]) -> None:
    """One line per epoch as CSV for `dvc plots`; a missing figure is an empty field."""
    write_csv(paths.PLOTS / f"{run.stage}.csv", history, ["epoch", "loss"])
