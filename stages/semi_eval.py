"""semi_eval: train on a share of the labels: fine-tune the whole network, and train a linear layer on the frozen network.

    python -m stages.semi_eval [SPLIT]     reads listing, images, the networks in semi_eval.nets (the student only from its
                                           file) and params semi_eval, image, student, seed; writes reports/semi/SPLIT.json, percent
Without SPLIT: all of semi_eval.splits. A killed run resumes from its checkpoints. SEED's and DisCo's published rows are linear only.
"""

from typing import TYPE_CHECKING

import typer

from bingo.pipeline import paths
from bingo.pipeline.launch import launch
from bingo.pipeline.run import Run, chosen_items, code_fingerprint, item_name, process_group, run_command, stage_run
from bingo.pipeline.state import state_folder

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bingo.images.listing import Listing
    from bingo.params import SplitParams
    from bingo.pipeline.classifying import Protocol

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(split: str | None = typer.Argument(None, help="One of semi_eval.splits in params.yaml; by default all.")) -> None:
    """Fine-tuning and linear evaluation with few labels."""
    split = item_name(split) if split else None
    with stage_run(f"semi_eval-{split}" if split else "semi_eval") as run:
        names = chosen_items("semi_eval.splits", run.params.semi_eval.splits, split)
        launch("semi_eval", *([split] if split else []))
        with process_group(run) as device:
            for name in names:
                _judge(run, name, run.params.semi_eval.splits[name], device)


def _judge(run: Run, name: str, split: "SplitParams", device: "torch.device") -> None:
    from bingo.images.listing import read_listing
    from bingo.pipeline.backbones import backbone_files, backbones, judged
    from bingo.pipeline.classifying import scores_by_net
    from bingo.runtime import distributed
    from bingo.runtime.artefacts import write_json
    from bingo.runtime.errors import UserError

    listing, semi = read_listing(paths.LISTING), run.params.semi_eval
    if not listing.labelled or listing.train_rows == len(listing):
        raise UserError("semi_eval: the listing has no labelled test images; sort the images into classes, or empty semi_eval.splits")
    nets, rows_L = backbones(run, semi.nets), _labelled_rows(run, listing, name, split)
    run.say(f"semi_eval: {name}: {len(rows_L):,} of {listing.train_rows:,} labels")
    rates = split.model_copy(update={"list_file": None})  # its rows are among the inputs, whatever its path
    values = {
        "params": [judged(run, semi.finetune, semi.linear, rates), semi.crop_scale, semi.flip_p, semi.precision],
        "inputs": [listing.fingerprint, backbone_files(semi.nets), rows_L.tolist()],
        "code": code_fingerprint("semi_eval"),
    }
    with state_folder(f"semi_eval-{name}", values) as folder:
        scores = scores_by_net(run, nets, _protocols(run, listing, rows_L, split), semi.precision, folder, device)
        if distributed.rank() == 0:
            origin = "drawn" if split.list_file is None else "listed"
            result = {"percent": split.percent, "labels": len(rows_L), "origin": origin, "nets": scores}
            write_json(paths.REPORTS / "semi" / f"{name}.json", result)


def _labelled_rows(run: Run, listing: "Listing", name: str, split: "SplitParams") -> "np.ndarray":
    from bingo.evals.few_labels import drawn_rows, listed_rows

    if split.list_file is None:
        return drawn_rows(listing, split.percent, run.params.seed)
    return listed_rows(listing, split.list_file, f"semi_eval.splits.{name}.list_file", run.say)


def _protocols(run: Run, listing: "Listing", rows_L: "np.ndarray", split: "SplitParams") -> "dict[str, Protocol]":
    import numpy as np

    from bingo.evals.finetune import Task, random_crops
    from bingo.images.images import open_images
    from bingo.pipeline.classifying import Protocol

    params, semi = run.params, run.params.semi_eval
    images, test_rows = open_images(listing, paths.IMAGES, params.dataset), np.arange(listing.train_rows, len(listing))
    crops = random_crops(semi.crop_scale, semi.flip_p)
    task = Task(images, listing.labels_N, rows_L, test_rows, len(listing.classes), params.image, crops)
    return {
        "linear": Protocol(task, semi.linear, split.linear_lr, None),
        "finetune": Protocol(task, semi.finetune, split.head_lr, split.trunk_lr),
    }


if __name__ == "__main__":
    run_command(app)
