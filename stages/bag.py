"""bag: build bags from nearest neighbours, clusters or classes in the features of the teacher or of a baseline student: data/bags.zarr.

Their statistics go to reports/bags.json.
"""

from typing import TYPE_CHECKING

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import Run, in_words, process_group, stage_run

if TYPE_CHECKING:
    import numpy as np

    from bingo.images.listing import Listing

_LOW_RECALL = 0.95


def main() -> None:
    """Build the bag index of the train images, with its statistics."""
    with stage_run("bag") as run:
        from bingo.bags.builders import build_bags
        from bingo.bags.index import write_bags
        from bingo.bags.metrics import bag_metrics
        from bingo.embeddings.store import read_embeddings
        from bingo.images.listing import read_listing
        from bingo.runtime.artefacts import write_json

        params, listing = run.params.bagging, read_listing(paths.LISTING)
        embeddings, labels_T = read_embeddings(paths.EMBEDDINGS, listing), listing.labels_N[: listing.train_rows]
        features = embeddings.train_features if params.relation == "teacher" else _student_features(run, listing)
        bags = build_bags(params, features, labels_T, run.params.seed)
        if warning := bags.empty_warning():
            run.warn(warning)
        metrics = bag_metrics(bags, labels_T if listing.labelled else None)
        write_bags(paths.BAGS, bags, listing.fingerprint, embeddings.fingerprint)
        write_json(paths.REPORTS / "bags.json", metrics)
        figures = in_words({name: value for name, value in metrics.items() if isinstance(value, float)})
        lists = f" by {metrics['probes']} of {metrics['lists']} lists" if "recall" in metrics else ""
        run.say(f"bag: {params.method} bags of {listing.train_rows:,} images{lists}: {figures}")
        if metrics.get("recall", 1) < _LOW_RECALL:
            run.warn(f"recall {metrics['recall']:g}: the search misses many of the nearest images; raise bagging.probes")


def _student_features(run: Run, listing: "Listing") -> "np.ndarray":
    """Features of the train rows, float32 (T, D), by the baseline student in bagging.relation (the paper's ablation)."""
    from bingo.evals.features import backbone_features
    from bingo.images.images import open_images
    from bingo.nets.students import load_student

    params = run.params
    student, _ = load_student(paths.MODELS / f"{params.bagging.relation}.safetensors")
    images = open_images(listing, paths.IMAGES, params.dataset)
    with process_group(run) as device:
        rows = range(listing.train_rows)
        return backbone_features(student, images, rows, params.image, device, params.extract.precision, params.extract.batch_images)


if __name__ == "__main__":
    run_command(main)
