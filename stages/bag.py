"""bag: build bags from nearest neighbours, clusters or classes in the features of the teacher or of a baseline student: data/bags.zarr.

Their statistics go to reports/bags.json. data/left_out.json lists the held-out test images that are left out of every evaluation because
they have near-duplicates among the train images, by the teacher's features. With 100,000 train images or more, several processes share the
work, and a killed run resumes.
"""

from typing import TYPE_CHECKING

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import Run, stage_run
from bingo.pipeline.sharing import launch_if_long, sharing_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bingo.bags.sharing import Sharing
    from bingo.images.listing import Listing


def main() -> None:
    """Build the bag index of the train images, with its statistics."""
    with stage_run("bag") as run:
        from bingo.images.listing import read_listing

        listing = read_listing(paths.LISTING)
        launch_if_long(run, listing.train_rows)
        from bingo.bags.builders import build_bags
        from bingo.bags.index import write_bags
        from bingo.bags.metrics import bag_metrics, shares_in_words, view_overlap
        from bingo.bags.near_duplicates import near_duplicate_cosine, rows_near
        from bingo.embeddings.store import read_embeddings
        from bingo.runtime.artefacts import write_json

        params = run.params.bagging
        embeddings, labels_T = read_embeddings(paths.EMBEDDINGS, listing), listing.labels_N[: listing.train_rows]
        with sharing_of(run, listing.train_rows, listing.fingerprint, embeddings.fingerprint) as (sharing, device):
            trained = embeddings.train_features
            features = trained if params.relation == "teacher" else _student_features(run, listing, sharing, device)
            bags = build_bags(params, features, labels_T, run.params.seed, sharing)
            for warning in filter(None, [bags.empty_warning(), bags.zeros_warning(), bags.recall_warning()] if bags else []):
                run.warn(warning)
            near = params.near_duplicate_distance, run.params.seed, sharing
            near_cosine = test_cosine = near_duplicate_cosine(features, *near)
            overlap = {}
            if params.relation != "teacher":
                test_cosine = near_duplicate_cosine(trained, *near, "distances by the teacher")
            elif params.method == "knn" and embeddings.views > 1:
                views = embeddings.view_keys(0), embeddings.view_keys(1)
                overlap["view_overlap"] = view_overlap(*views, params.k, run.params.seed, sharing)
            by_lists = run.params.seed if params.method == "knn" and params.search == "ivf" else None
            test_rows = rows_near(embeddings.features[listing.train_rows :], trained, test_cosine, sharing, by_lists)
            if bags is None:  # the first process does the rest
                return
            metrics = bag_metrics(bags, labels_T if listing.labelled else None, near_cosine) | overlap
            metrics["test_near_duplicates"] = len(test_rows)
            _leave_out(run, listing, listing.train_rows + test_rows, test_cosine)
            write_bags(paths.BAGS, bags, listing.fingerprint, embeddings.fingerprint)
            write_json(paths.REPORTS / "bags.json", metrics)
        lists = f" by {metrics['probes']} of {metrics['lists']} lists" if "probes" in metrics else ""
        run.say(f"bag: {params.method} bags of {listing.train_rows:,} images{lists}: {shares_in_words(metrics)}")


def _leave_out(run: Run, listing: "Listing", rows: "np.ndarray", cosine: float) -> None:
    """Write the test images that evaluations leave out: all `rows`, which have a near-duplicate among the train images (a cosine above
    `cosine` in the teacher's features), if the test images were held out from the train images, otherwise none."""
    from bingo.images.listing import write_left_out

    left_out = [] if listing.held_out is None else rows.tolist()
    write_left_out(paths.LEFT_OUT, listing, left_out)
    if left_out:
        of = f"{len(left_out):,} of {len(listing) - listing.train_rows:,} held-out test images have near-duplicates among the train images"
        run.say(f"bag: {of} (cosines above {cosine:.4g} by the teacher) and are left out of every evaluation")
    if left_out and len(left_out) == len(listing) - listing.train_rows:
        run.warn("no test image is left; lower bagging.near_duplicate_distance, or use a test split of other images")


def _student_features(run: Run, listing: "Listing", sharing: "Sharing", device: "torch.device") -> "np.ndarray":
    """Features of the train rows, float32 (T, D), by the baseline student in bagging.relation (the paper's ablation)."""
    from bingo.evals.features import backbone_features
    from bingo.images.images import open_images
    from bingo.nets.students import load_backbone

    params, how = run.params, (run.params.extract.precision, run.params.extract.batch_images)
    student, _ = load_backbone(paths.MODELS / f"{params.bagging.relation}.safetensors")
    images = open_images(listing, paths.IMAGES, params.dataset)

    def features(rows: slice) -> tuple["np.ndarray"]:  # in whole batches, because the last bits depend on their size
        return (backbone_features(student, images, range(rows.start, rows.stop), params.image, device, *how),)

    (features_TD,) = sharing.of_rows("features", sharing.parts(listing.train_rows, how[1]), features, everywhere=True) or ()
    return features_TD


if __name__ == "__main__":
    run_command(main)
