"""transfer_cifar: the student on other labelled images (CIFAR-10 and CIFAR-100 in the papers): linear, enlarged and native, and fine-tuned.

    python -m stages.transfer_cifar [NAME]     writes reports/transfer/NAME.json, percent; without NAME: all of transfer.datasets
A killed run resumes from its checkpoints. Linear follows cifar_main_lincls.py and Reproduction.md of DisCo's repository.
"""

from typing import TYPE_CHECKING, Annotated

import typer

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import Run, process_group, stage_run

if TYPE_CHECKING:
    import torch


def main(name: Annotated[str | None, typer.Argument(help="One of transfer.datasets in params.yaml; by default all.")] = None) -> None:
    """Transfer to other labelled images."""
    with stage_run("transfer_cifar", name) as run:
        names = run.chosen("transfer.datasets", run.params.transfer.datasets)
        run.launch()
        with process_group(run) as device:
            for dataset in names:
                judge_dataset(run, dataset, device)


def judge_dataset(run: Run, name: str, device: "torch.device") -> None:
    """Write the report of one dataset of transfer.datasets."""
    from bingo.evals.transfer import protocols, scanned
    from bingo.pipeline.judging.backbones import backbones
    from bingo.pipeline.judging.classifying import judge

    transfer = run.params.transfer
    nets = backbones(run, transfer.nets)
    listing, images = scanned(run.params, name, run.say)
    counts = listing.train_rows, len(listing) - listing.train_rows
    run.say(f"transfer_cifar: {name}: {counts[0]:,} train and {counts[1]:,} test images, {len(listing.classes)} classes")
    found = protocols(run.params, listing, images)
    seen = {protocol: {"crop_px": used.task.image.crop_px} for protocol, used in found.items()}
    facts = {"dataset": listing.dataset, "images": counts, "protocols": seen}
    judge(run, name, nets, found, device, [listing.fingerprint], (transfer,), paths.REPORTS / "transfer" / f"{name}.json", facts)


if __name__ == "__main__":
    run_command(main)
