"""linear_eval: a linear layer on every network's frozen features, and on random crops for those that linear_eval.crops.nets names.

python -m stages.linear_eval reads params linear_eval; writes reports/linear.json, percent, last and best epoch
"""

from pathlib import Path

import typer

from stages import paths
from stages.common import Run, code_fingerprint, process_group, stage_run
from stages.state import state_folder

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main() -> None:
    """Linear evaluation by both protocols."""
    with stage_run("linear_eval") as run:
        from bingo.artefacts import write_json
        from bingo.data.listing import read_listing

        listing = read_listing(paths.LISTING)
        if not listing.labelled or listing.train_rows == len(listing):
            run.say("linear_eval: the listing has no labelled test images, so there is nothing to measure")
            write_json(paths.REPORTS / "linear.json", {})
            return
        with process_group(run) as device, state_folder("linear_eval", _identity(run, listing)) as folder:
            scores = {"cached": _cached(run, listing, device), "crops": _crops(run, listing, folder, device)}
            write_json(paths.REPORTS / "linear.json", scores)


def _identity(run: Run, listing) -> dict:
    """All that decides what the crops give: a checkpoint of anything else is not gone on from."""
    from stages.backbones import backbone_files, judged

    crops = run.params.linear_eval.crops
    return {
        "params": [judged(run, crops), run.params.distill.precision],
        "inputs": [listing.fingerprint, backbone_files(crops.nets)],
        "code": code_fingerprint("linear_eval"),
    }


def _cached(run: Run, listing, device) -> dict:
    from bingo.data.images import open_images
    from bingo.evals.linear import linear_on_features
    from stages.networks import features_of_networks

    train, labels, scores = listing.train_rows, listing.labels_N, {}
    images = open_images(listing, paths.IMAGES, run.params.dataset)
    for name, features in features_of_networks(run, listing, images, device):
        scores[name] = linear_on_features(
            features[:train], labels[:train], features[train:], labels[train:], len(listing.classes),
            run.params.linear_eval.cached, run.params.seed, device,
        )  # fmt: skip
        _say(run, name, "cached features", scores[name])
    return scores


def _crops(run: Run, listing, folder: Path, device) -> dict:
    import numpy as np
    import torch

    from bingo.checkpoints import Checkpoints
    from bingo.data.images import open_images
    from bingo.evals.linear import linear_on_crops
    from stages.backbones import backbones

    params, crops, scores = run.params, run.params.linear_eval.crops, {}
    train_rows, test_rows = np.split(np.arange(len(listing)), [listing.train_rows])
    images = open_images(listing, paths.IMAGES, params.dataset)
    for name, backbone in backbones(run, crops.nets).items():
        scores[name] = linear_on_crops(
            backbone.to(device, memory_format=torch.channels_last), images, listing.labels_N, train_rows, test_rows,
            len(listing.classes), crops, params.image, params.distill.precision, params.seed, device, Checkpoints(folder / name),
        )  # fmt: skip
        _say(run, name, "random crops", scores[name])
    return scores


def _say(run: Run, name: str, protocol: str, score: dict) -> None:
    run.say(f"linear_eval: {name}, {protocol}: top-1 {score['top1_last']:.1f} last epoch, {score['top1_best']:.1f} best")


if __name__ == "__main__":
    app()
