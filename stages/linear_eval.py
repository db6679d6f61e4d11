"""linear_eval: a linear layer on every network's frozen features, and on random crops for those that linear_eval.crops.nets names.

python -m stages.linear_eval reads params linear_eval; writes reports/linear.json, percent, last and best epoch
"""

import typer

from stages import paths
from stages.common import Run, process_group, stage_run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main() -> None:
    """Linear evaluation by both protocols."""
    with stage_run("linear_eval") as run:
        from bingo.artefacts import write_json
        from bingo.data.listing import read_listing

        listing = read_listing(paths.LISTING)
        scores: dict = {}
        if not listing.labelled or listing.train_rows == len(listing):
            run.say("linear_eval: the listing has no labelled test images, so there is nothing to measure")
        else:
            with process_group(run) as device:
                scores = {"cached": _cached(run, listing, device), "crops": _crops(run, listing, device)}
        write_json(paths.REPORTS / "linear.json", scores)


def _cached(run: Run, listing, device) -> dict:
    from bingo.data.images import open_images
    from bingo.evals.linear import linear_on_features
    from stages.networks import features_of_networks

    train, labels, scores = listing.train_rows, listing.labels_N, {}
    images = open_images(listing, paths.IMAGES, run.params.dataset.root)
    for name, features in features_of_networks(run, listing, images, device):
        scores[name] = linear_on_features(
            features[:train], labels[:train], features[train:], labels[train:], len(listing.classes),
            run.params.linear_eval.cached, run.params.seed, device,
        )  # fmt: skip
        _say(run, name, "cached features", scores[name])
    return scores


def _crops(run: Run, listing, device) -> dict:
    import numpy as np
    import torch

    from bingo.data.images import open_images
    from bingo.evals.linear import linear_on_crops
    from stages.networks import backbones

    params, scores = run.params, {}
    train_rows, test_rows = np.split(np.arange(len(listing)), [listing.train_rows])
    images = open_images(listing, paths.IMAGES, params.dataset.root)
    for name, backbone in backbones(run).items():
        if name in params.linear_eval.crops.nets:
            scores[name] = linear_on_crops(
                backbone.to(device, memory_format=torch.channels_last), images, listing.labels_N, train_rows, test_rows,
                len(listing.classes), params.linear_eval.crops, params.image, params.distill.precision, params.seed, device,
            )  # fmt: skip
            _say(run, name, "random crops", scores[name])
    return scores


def _say(run: Run, name: str, protocol: str, score: dict) -> None:
    run.say(f"linear_eval: {name}, {protocol}: top-1 {score['top1_last']:.1f} last epoch, {score['top1_best']:.1f} best")


if __name__ == "__main__":
    app()
