"""knn_eval: nearest-neighbour accuracy of every network's features, for every k, plain and weighted, from one search each.

python -m stages.knn_eval    reads params knn_eval; writes reports/knn.json, percent
"""

import typer

from stages import paths
from stages.common import process_group, stage_run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main() -> None:
    """Nearest-neighbour evaluation."""
    with stage_run("knn_eval") as run:
        from bingo.artefacts import write_json
        from bingo.data.images import open_images
        from bingo.data.listing import read_listing
        from bingo.evals.knn import knn_accuracies
        from stages.networks import features_of_networks

        params, listing = run.params, read_listing(paths.LISTING)
        train, scores = listing.train_rows, {}
        ks = [k for k in params.knn_eval.k if k <= train]
        if left_out := [str(k) for k in params.knn_eval.k if k > train]:
            run.say(f"knn_eval: there are only {train} train images, so knn_eval.k {', '.join(left_out)} is left out")
        if not listing.labelled or train == len(listing):
            run.say("knn_eval: the listing has no labelled test images, so there is nothing to measure")
        elif ks:
            images = open_images(listing, paths.IMAGES, params.dataset)
            with process_group(run) as device:
                for name, features in features_of_networks(run, listing, images, device):
                    labels = listing.labels_N
                    scores[name] = knn_accuracies(
                        features[:train],
                        labels[:train],
                        features[train:],
                        labels[train:],
                        ks,
                        params.knn_eval.temperature,
                    )
                    run.say(f"knn_eval: {name}: " + ", ".join(f"{key} {value:.1f}" for key, value in scores[name].items()))
        write_json(paths.REPORTS / "knn.json", scores)


if __name__ == "__main__":
    app()
