"""bag: neighbours, clusters or classes of the teacher's features become bags.

python -m stages.bag         reads params bagging, seed and data/embeddings.zarr; writes data/bags.zarr, reports/bags.json
"""

from typing import TYPE_CHECKING

import typer

from stages import paths
from stages.common import Run, stage_run

if TYPE_CHECKING:
    from bingo.bags import Bags

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main() -> None:
    """Build the bag index of the train images, with its statistics."""
    with stage_run("bag") as run:
        from bingo.artefacts import write_json
        from bingo.bag_metrics import bag_metrics
        from bingo.bags import write_bags
        from bingo.data.embeddings import read_embeddings
        from bingo.data.listing import read_listing

        listing = read_listing(paths.LISTING)
        embeddings = read_embeddings(paths.EMBEDDINGS, listing)
        bags = _build(run, embeddings.train_features_TD, listing.labels_N[: listing.train_rows])
        metrics = bag_metrics(bags, listing.labels_N[: listing.train_rows] if listing.labelled else None)
        write_bags(paths.BAGS, bags, listing.fingerprint, embeddings.fingerprint)
        write_json(paths.REPORTS / "bags.json", metrics)
        figures = ", ".join(f"{name} {value:g}" for name, value in metrics.items() if isinstance(value, float))
        run.say(f"{run.params.bagging.method} bags of {listing.train_rows} images: {figures}")


def _build(run: Run, features, labels) -> "Bags":
    from bingo.bag_builders import build_kmeans, build_knn, build_label

    params = run.params.bagging
    if params.method == "knn":
        return build_knn(features, params.k)
    if params.method == "kmeans":
        return build_kmeans(features, params.clusters, params.iterations, params.k, run.params.seed)
    return build_label(labels, features, params.k)


if __name__ == "__main__":
    app()
