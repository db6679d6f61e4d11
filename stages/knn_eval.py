"""knn_eval: nearest-neighbour accuracy of a network's features, for every k, plain and weighted, from one search.

    python -m stages.knn_eval [NET]     reads listing, images, the network's own file and params knn_eval, image, student, seed;
                                        writes reports/knn/NET.json, percent
NET: student, a baseline of params.yaml, untrained, teacher or pixels; without it, all. An empty report: there was nothing to measure.
"""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import typer

from bingo.pipeline import paths
from bingo.pipeline.run import Run, chosen_networks, item_name, process_group, run_command, stage_run

if TYPE_CHECKING:
    import torch

    from bingo.images.listing import Listing
    from bingo.pipeline.backbones import Networks

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(net: str | None = typer.Argument(None, help="student, a baseline, untrained, teacher or pixels; without it, all.")) -> None:
    """Nearest-neighbour evaluation."""
    net = item_name(net) if net else None
    with stage_run(f"knn_eval-{net}" if net else "knn_eval") as run:
        from bingo.embeddings.store import read_embeddings
        from bingo.images.listing import read_listing
        from bingo.pipeline.backbones import Networks
        from bingo.runtime.artefacts import write_json

        names, listing = chosen_networks(run.params, net), read_listing(paths.LISTING)
        ks = _ks(run, listing)
        teacher = read_embeddings(paths.EMBEDDINGS, listing) if ks and "teacher" in names else None
        networks = Networks(run, names if ks else [], listing, teacher)
        with process_group(run) if networks.backbones else nullcontext() as device:  # stored features need no torch
            for name in names:
                scores = _scores(run, name, networks, listing, ks, device) if ks else {}
                write_json(paths.REPORTS / "knn" / f"{name}.json", scores)


def _ks(run: Run, listing: "Listing") -> list[int]:
    """Those of knn_eval.k for which there are enough train images; none where there is nothing to measure."""
    ks, train = run.params.knn_eval.k, listing.train_rows
    if not listing.labelled or train == len(listing):
        run.say("knn_eval: the listing has no labelled test images, so there is nothing to measure")
        return []
    if left_out := [str(k) for k in ks if k > train]:
        run.say(f"knn_eval: there are only {train} train images, so knn_eval.k {', '.join(left_out)} is left out")
    return [k for k in ks if k <= train]


def _scores(
    run: Run, name: str, networks: "Networks", listing: "Listing", ks: list[int], device: "torch.device | None"
) -> dict[str, float]:
    from bingo.evals.knn import knn_accuracies

    features, train, labels = networks.features(name, run.params.knn_eval, device), listing.train_rows, listing.labels_N
    if features is None:
        run.say(f"knn_eval: {name}: the images are not held in memory (dataset.store_px is null), so there is nothing to measure")
        return {}
    scores = knn_accuracies(features[:train], labels[:train], features[train:], labels[train:], ks, run.params.knn_eval.temperature)
    run.say(f"knn_eval: {name}: " + ", ".join(f"{key} {value:.1f}" for key, value in scores.items()))
    return scores


if __name__ == "__main__":
    run_command(app)
