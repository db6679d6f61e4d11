"""What semi_eval and transfer_cifar share: evaluation of several networks with several protocols, resumed from checkpoints after a kill."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bingo.pipeline.run import Run

if TYPE_CHECKING:
    import torch

    from bingo.evals.finetune import Task
    from bingo.nets.backbones import Backbone
    from bingo.params import TuneParams


@dataclass(frozen=True)
class Protocol:
    """One evaluation protocol: the task and how it is trained; `trunk_lr` None means a linear layer on the frozen network."""

    task: "Task"
    tune: "TuneParams"
    head_lr: float
    trunk_lr: float | None


def scores_by_net(
    run: Run, nets: "Mapping[str, Backbone]", protocols: Mapping[str, Protocol], precision: str, folder: Path, device: "torch.device"
) -> dict[str, dict[str, dict]]:
    """{net: {protocol: scores}}. What a killed run has finished is read from its checkpoints in `folder`; what it has begun is resumed."""
    import torch

    from bingo.evals.finetune import ClassifierTrainer
    from bingo.runtime.checkpoints import Checkpoints

    scores: dict[str, dict[str, dict]] = {}
    for net, backbone in nets.items():
        module, scores[net] = backbone.to(device).to(memory_format=torch.channels_last), {}
        for name, protocol in protocols.items():
            checkpoints, label = Checkpoints(folder / net / name), f"{run.stage}: {net}, {name}"
            if checkpoints.exists():
                run.say(f"{label}: resuming from a checkpoint")
            score = ClassifierTrainer(
                module, protocol.task, protocol.tune, protocol.head_lr, protocol.trunk_lr, precision, run.params.seed, device,
                checkpoints, label,
            ).run()  # fmt: skip
            run.say(f"{label}: top-1 {score['top1_last']:.1f} in the last epoch, {score['top1_best']:.1f} in the best")
            scores[net][name] = score
    return scores
