"""semi_eval: train on a share of the labels: fine-tune the whole network, and train a linear layer on the frozen network.

    python -m stages.semi_eval [SPLIT]     writes reports/semi/SPLIT.json, percent; without SPLIT: all of semi_eval.splits
A killed run resumes from its checkpoints. SEED's and DisCo's published rows are linear only.
"""

from typing import TYPE_CHECKING, Annotated

import typer

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import Run, process_group, stage_run

if TYPE_CHECKING:
    import torch


def main(split: Annotated[str | None, typer.Argument(help="One of semi_eval.splits in params.yaml; by default all.")] = None) -> None:
    """Fine-tuning and linear evaluation with few labels."""
    with stage_run("semi_eval", split) as run:
        names = run.chosen("semi_eval.splits", run.params.semi_eval.splits)
        run.launch()
        with process_group(run) as device:
            for name in names:
                _judge(run, name, device)


def _judge(run: Run, name: str, device: "torch.device") -> None:
    from bingo.evals.few_labels import labelled_rows, protocols
    from bingo.images.images import open_images
    from bingo.images.listing import read_judged_listing
    from bingo.pipeline.judging.backbones import backbones
    from bingo.pipeline.judging.classifying import judge

    params, listing = run.params, read_judged_listing(paths.LISTING, paths.LEFT_OUT)
    semi, split = params.semi_eval, params.semi_eval.splits[name]
    nets, rows_L = backbones(run, semi.nets), labelled_rows(listing, split, name, params.seed)
    run.say(f"semi_eval: {name}: {len(rows_L):,} of {listing.train_rows:,} labels")
    found = protocols(params, listing, open_images(listing, paths.IMAGES, params.dataset), rows_L, split)
    inputs = listing.fingerprint, listing.left_out_rows, rows_L.tolist()
    sections = semi.model_copy(update={"splits": {}}), split.model_copy(update={"list_file": None})  # its path does not matter
    facts = {"percent": split.percent, "labels": len(rows_L), "origin": "drawn" if split.list_file is None else "listed"}
    judge(run, name, nets, found, device, inputs, sections, paths.REPORTS / "semi" / f"{name}.json", facts)


if __name__ == "__main__":
    run_command(main)
