"""linear_eval: a linear layer on a network's frozen features, and on random crops for the networks in linear_eval.crops.nets.

    python -m stages.linear_eval [NET]     reads listing, images, the network's own file and params linear_eval, image, student, seed;
                                           writes reports/linear/NET.json: by protocol (cached, crops) percent, last and best epoch
NET: student, a baseline in params.yaml, untrained, teacher or pixels; by default all. The report is empty if there was nothing to measure.
"""

from typing import TYPE_CHECKING

import typer

from bingo.pipeline import paths
from bingo.pipeline.run import Run, chosen_networks, code_fingerprint, item_name, process_group, run_command, stage_run
from bingo.pipeline.state import state_folder

if TYPE_CHECKING:
    import torch

    from bingo.images.listing import Listing
    from bingo.pipeline.backbones import Networks

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(net: str | None = typer.Argument(None, help="student, a baseline, untrained, teacher or pixels; by default all.")) -> None:
    """Linear evaluation with both protocols."""
    net = item_name(net) if net else None
    with stage_run(f"linear_eval-{net}" if net else "linear_eval") as run:
        from bingo.embeddings.store import read_embeddings
        from bingo.images.listing import read_listing
        from bingo.pipeline.backbones import Networks
        from bingo.runtime.artefacts import write_json

        names, listing = chosen_networks(run.params, net), read_listing(paths.LISTING)
        if not listing.labelled or listing.train_rows == len(listing):
            run.say("linear_eval: the listing has no labelled test images, so there is nothing to measure")
            for name in names:
                write_json(paths.REPORTS / "linear" / f"{name}.json", {})
            return
        teacher = read_embeddings(paths.EMBEDDINGS, listing) if "teacher" in names else None
        networks = Networks(run, names, listing, teacher)
        with process_group(run) as device:
            for name in names:
                scores = _cached(run, name, networks, listing, device) | _crops(run, name, networks, listing, device)
                write_json(paths.REPORTS / "linear" / f"{name}.json", scores)


def _cached(run: Run, name: str, networks: "Networks", listing: "Listing", device: "torch.device") -> dict[str, dict]:
    from bingo.evals.linear import linear_on_features

    features, train, labels = networks.features(name, run.params.linear_eval, device), listing.train_rows, listing.labels_N
    if features is None:
        run.say(f"linear_eval: {name}: the images are not held in memory (dataset.store_px is null), so there is nothing to measure")
        return {}
    score = linear_on_features(
        features[:train], labels[:train], features[train:], labels[train:], len(listing.classes),
        run.params.linear_eval.cached, run.params.seed, device,
    )  # fmt: skip
    _say(run, name, "cached features", score)
    return {"cached": score}


def _crops(run: Run, name: str, networks: "Networks", listing: "Listing", device: "torch.device") -> dict[str, dict]:
    import numpy as np

    if name not in networks.backbones or name not in run.params.linear_eval.crops.nets:
        return {}
    import torch

    from bingo.evals.linear import linear_on_crops
    from bingo.runtime.checkpoints import Checkpoints

    assert networks.images is not None
    params, evaluation = run.params, run.params.linear_eval
    train_rows, test_rows = np.split(np.arange(len(listing)), [listing.train_rows])
    backbone = networks.backbones[name].to(device).to(memory_format=torch.channels_last)
    with state_folder(f"linear_eval-{name}", _identity(run, name, listing)) as folder:
        score = linear_on_crops(
            backbone, networks.images, listing.labels_N, train_rows, test_rows, len(listing.classes), evaluation.crops, params.image,
            evaluation.precision, params.seed, device, Checkpoints(folder / "checkpoints"),
        )  # fmt: skip
    _say(run, name, "random crops", score)
    return {"crops": score}


def _identity(run: Run, name: str, listing: "Listing") -> dict:
    """Everything that determines the result of the crops; only checkpoints with the same values are resumed."""
    from bingo.pipeline.backbones import backbone_files, judged

    return {
        "params": [judged(run, run.params.linear_eval.crops), run.params.linear_eval.precision],
        "inputs": [listing.fingerprint, backbone_files([name])],
        "code": code_fingerprint("linear_eval"),
    }


def _say(run: Run, name: str, protocol: str, score: dict) -> None:
    run.say(f"linear_eval: {name}, {protocol}: top-1 {score['top1_last']:.1f} in the last epoch, {score['top1_best']:.1f} in the best")


if __name__ == "__main__":
    run_command(app)
