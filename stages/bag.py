"""bag: build bags from nearest neighbours, clusters or classes in the features of the teacher or of a baseline student: data/bags.zarr.

Their statistics go to reports/bags.json. data/left_out.json lists the held-out test images that no evaluation judges, as the teacher shows
near-duplicates of them among the train images.
"""

from typing import TYPE_CHECKING

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import Run, in_words, process_group, stage_run

if TYPE_CHECKING:
    import numpy as np

    from bingo.embeddings.store import Embeddings
    from bingo.images.listing import Listing

_LOW_RECALL = 0.95


def main() -> None:
    """Build the bag index of the train images, with its statistics."""
    with stage_run("bag") as run:
        from bingo.bags.builders import build_bags
        from bingo.bags.index import write_bags
        from bingo.bags.metrics import bag_metrics, view_overlap
        from bingo.bags.near_duplicates import near_duplicate_cosine
        from bingo.embeddings.store import read_embeddings
        from bingo.images.listing import read_listing
        from bingo.runtime.artefacts import write_json
        from bingo.runtime.gpus import gpu_unused_by_faiss

        params, listing = run.params.bagging, read_listing(paths.LISTING)
        embeddings, labels_T = read_embeddings(paths.EMBEDDINGS, listing), listing.labels_N[: listing.train_rows]
        if line := gpu_unused_by_faiss():
            run.warn(f"{line}; the search for neighbours runs on the CPU")
        features = embeddings.train_features if params.relation == "teacher" else _student_features(run, listing)
        bags = build_bags(params, features, labels_T, run.params.seed)
        if warning := bags.empty_warning():
            run.warn(warning)
        near_cosine = near_duplicate_cosine(features, params.near_duplicate_distance, run.params.seed)
        metrics = bag_metrics(bags, labels_T if listing.labelled else None, near_cosine)
        if params.method == "knn" and params.relation == "teacher" and embeddings.views > 1:
            metrics["view_overlap"] = view_overlap(embeddings.view_keys(0), embeddings.view_keys(1), params.k, run.params.seed)
        if params.relation != "teacher":
            near_cosine = near_duplicate_cosine(embeddings.train_features, params.near_duplicate_distance, run.params.seed)
        metrics["test_near_duplicates"] = _leave_out(run, listing, embeddings, near_cosine)
        write_bags(paths.BAGS, bags, listing.fingerprint, embeddings.fingerprint)
        write_json(paths.REPORTS / "bags.json", metrics)
        figures = in_words({name: value for name, value in metrics.items() if isinstance(value, float)})
        lists = f" by {metrics['probes']} of {metrics['lists']} lists" if "recall" in metrics else ""
        run.say(f"bag: {params.method} bags of {listing.train_rows:,} images{lists}: {figures}")
        if metrics.get("recall", 1) < _LOW_RECALL:
            run.warn(f"recall {metrics['recall']:g}: the search misses many of the nearest images; raise bagging.probes")


def _leave_out(run: Run, listing: "Listing", embeddings: "Embeddings", cosine: float) -> int:
    """The number of test images with a near-duplicate among the train images: a cosine above `cosine` in the teacher's features. Write
    those of them that no evaluation judges: all, where the test images were held out of the train images, and otherwise none."""
    from bingo.bags.near_duplicates import rows_near
    from bingo.images.listing import write_left_out

    rows = listing.train_rows + rows_near(embeddings.features[listing.train_rows :], embeddings.train_features, cosine)
    left_out = [] if listing.held_out is None else rows.tolist()
    write_left_out(paths.LEFT_OUT, listing, left_out)
    if left_out:
        of = f"{len(left_out):,} of {len(listing) - listing.train_rows:,} held-out test images have near-duplicates among the train images"
        run.say(f"bag: {of} (cosines above {cosine:.4g} by the teacher): no evaluation judges them")
    if left_out and len(left_out) == len(listing) - listing.train_rows:
        run.warn("no test image is left to judge; lower bagging.near_duplicate_distance, or keep a test split of other images")
    return len(rows)


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
