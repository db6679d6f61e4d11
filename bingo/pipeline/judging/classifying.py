"""Common code of semi_eval and transfer_cifar: evaluate several networks with several protocols, resuming from checkpoints after a kill."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bingo.evals.finetune import ClassifierTrainer, Protocol
from bingo.nets.backbones import Backbone
from bingo.params import Section, SemiEvalParams, TransferParams
from bingo.pipeline.judging.backbones import state_of
from bingo.pipeline.loggers import logged
from bingo.pipeline.run import Run
from bingo.runtime import distributed
from bingo.runtime.artefacts import write_json
from bingo.runtime.checkpoints import Checkpoints


def judge(
    run: Run,
    item: str,
    nets: Mapping[str, Backbone],
    protocols: Mapping[str, Protocol],
    device: torch.device,
    inputs: Sequence[Any],
    sections: tuple[SemiEvalParams | TransferParams, *tuple[Section, ...]],
    report: Path,
    facts: Mapping[str, Any],
) -> None:
    """Write `facts` and {nets: {net: {protocol: scores}}} to `report`. Besides the networks, `inputs` and `sections` determine the scores.

    Finished evaluations of a killed run are read from its checkpoints, unfinished ones are resumed.
    """
    with state_of(run, item, list(nets), inputs, *sections) as folder:
        scores = {
            net: {
                name: _score(run, backbone, protocol, sections[0].precision, folder / net / name, device, f"{net}, {name}")
                for name, protocol in protocols.items()
            }
            for net, backbone in nets.items()
        }
        if distributed.rank() == 0:
            write_json(report, {**facts, "nets": scores})


def _score(
    run: Run, backbone: Backbone, protocol: Protocol, precision: str, folder: Path, device: torch.device, name: str
) -> dict[str, float | int]:
    checkpoints, label = Checkpoints(folder), f"{run.stage}: {name}"
    if checkpoints.exists():
        run.say(f"{label}: resuming from a checkpoint")
    trainer = ClassifierTrainer(backbone, protocol, precision, run.params.seed, device, checkpoints, label)
    with logged(run, trainer, f"{run.stage}/{name.replace(', ', '/')}"):
        score = trainer.run()
    run.say(f"{label}: top-1 {score['top1_last']:.1f} in the last epoch, {score['top1_best']:.1f} in the best")
    return score
