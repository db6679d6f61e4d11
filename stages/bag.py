"""bag: build bags from nearest neighbours, clusters or classes in the features of the teacher or of a baseline student.

python -m stages.bag         reads params bagging, seed and data/embeddings.zarr (bagging.relation: baselines/NAME: that student and the
                             images); writes data/bags.zarr, reports/bags.json
"""

import sys
from typing import TYPE_CHECKING

import typer

from bingo.pipeline import paths
from bingo.pipeline.run import Run, in_words, process_group, run_command, stage_run

if TYPE_CHECKING:
    import numpy as np

    from bingo.bags.index import Bags
    from bingo.bags.rows import Rows
    from bingo.images.listing import Listing

_LOW_RECALL = 0.95
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main() -> None:
    """Build the bag index of the train images, with its statistics."""
    with stage_run("bag") as run:
        from bingo.bags.index import write_bags
        from bingo.bags.metrics import bag_metrics
        from bingo.embeddings.store import read_embeddings
        from bingo.images.listing import read_listing
        from bingo.runtime.artefacts import write_json

        listing = read_listing(paths.LISTING)
        embeddings = read_embeddings(paths.EMBEDDINGS, listing)
        from_teacher = run.params.bagging.relation == "teacher"
        features = embeddings.train_features if from_teacher else _student_features(run, listing)
        bags = _build(run, features, listing.labels_N[: listing.train_rows])
        if warning := bags.empty_warning():
            print(f"warning: bag: {warning}", file=sys.stderr, flush=True)
        metrics = bag_metrics(bags, listing.labels_N[: listing.train_rows] if listing.labelled else None)
        write_bags(paths.BAGS, bags, listing.fingerprint, embeddings.fingerprint)
        write_json(paths.REPORTS / "bags.json", metrics)
        figures = in_words({name: value for name, value in metrics.items() if isinstance(value, float)})
        lists = f" by {metrics['probes']} of {metrics['lists']} lists" if "recall" in metrics else ""
        run.say(f"bag: {run.params.bagging.method} bags of {listing.train_rows:,} images{lists}: {figures}")
        if metrics.get("recall", 1) < _LOW_RECALL:
            problem = f"recall {metrics['recall']:g}: the search misses many of the nearest images"
            print(f"warning: bag: {problem}; raise bagging.probes", file=sys.stderr, flush=True)


def _student_features(run: Run, listing: "Listing") -> "np.ndarray":
    """Features of the train rows, float32 (T, D), by the baseline student in bagging.relation (the paper's ablation)."""
    import numpy as np
    import torch

    from bingo.evals.features import backbone_features
    from bingo.images.images import open_images
    from bingo.nets.students import load_student

    params = run.params
    student, _ = load_student(paths.MODELS / f"{params.bagging.relation}.safetensors")
    images = open_images(listing, paths.IMAGES, params.dataset)
    with process_group(run) as device:
        student = student.to(device).to(memory_format=torch.channels_last)
        rows_T = np.arange(listing.train_rows)
        return backbone_features(student, images, rows_T, params.image, device, params.extract.precision, params.extract.batch_images)


def _build(run: Run, features: "Rows", labels_T: "np.ndarray") -> "Bags":
    from dataclasses import replace

    from bingo.bags.builders import build_kmeans, build_knn, build_label
    from bingo.bags.ivf import InvertedFile

    params = run.params.bagging
    if params.method == "knn":
        search = InvertedFile(params.lists, params.probes, run.params.seed) if params.search == "ivf" else None
        bags = build_knn(features, params.k, params.mutual, search)
    elif params.method == "kmeans":
        bags = build_kmeans(features, params.clusters, params.iterations, params.k, run.params.seed)
    else:
        bags = build_label(labels_T, features, params.k)
    return replace(bags, settings={**bags.settings, "relation": params.relation, "draw_temperature": params.draw_temperature})


if __name__ == "__main__":
    run_command(app)
