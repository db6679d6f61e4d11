"""knn_eval: nearest-neighbour accuracy of a network's features, and their agreement with the teacher's, for every k, from one search.

    python -m stages.knn_eval [NET]     reads listing, images, embeddings, the network's own file and params knn_eval, image, student,
                                        seed; writes reports/knn/NET.json, percent
NET: student, a baseline in params.yaml, untrained, teacher or pixels; by default all. Without labels there is agreement only; an empty
report: there was nothing to measure.
"""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import typer

from bingo.pipeline import paths
from bingo.pipeline.run import Run, chosen_networks, in_words, item_name, process_group, run_command, stage_run

if TYPE_CHECKING:
    import torch

    from bingo.evals.agreement import TeacherAgreement
    from bingo.images.listing import Listing
    from bingo.pipeline.backbones import Networks

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(net: str | None = typer.Argument(None, help="student, a baseline, untrained, teacher or pixels; by default all.")) -> None:
    """Nearest-neighbour evaluation."""
    net = item_name(net) if net else None
    with stage_run(f"knn_eval-{net}" if net else "knn_eval") as run:
        from bingo.embeddings.store import read_embeddings
        from bingo.evals.agreement import TeacherAgreement
        from bingo.images.listing import read_listing
        from bingo.pipeline.backbones import Networks
        from bingo.runtime.artefacts import write_json

        names, listing = chosen_networks(run.params, net), read_listing(paths.LISTING)
        ks, agreement_ks = _ks(run, listing)
        teacher = read_embeddings(paths.EMBEDDINGS, listing) if agreement_ks or (ks and "teacher" in names) else None
        networks = Networks(run, names if ks or agreement_ks else [], listing, teacher)
        with process_group(run) if networks.backbones else nullcontext() as device:  # stored features need no torch
            agreement = TeacherAgreement(teacher, listing.train_rows, agreement_ks)
            for name in names:
                scores = _scores(run, name, networks, ks, agreement, device) if ks or agreement_ks else {}
                write_json(paths.REPORTS / "knn" / f"{name}.json", scores)


def _ks(run: Run, listing: "Listing") -> tuple[list[int], list[int]]:
    """Those of knn_eval.k and knn_eval.agreement_k for which there are enough images and labels."""
    train = listing.train_rows
    if train == len(listing):
        run.say("knn_eval: the listing has no test images, so there is nothing to measure")
        return [], []
    if not listing.labelled:
        run.say("knn_eval: the images have no labels, so only the agreement with the teacher is measured")
    wanted = {"k": run.params.knn_eval.k if listing.labelled else [], "agreement_k": run.params.knn_eval.agreement_k}
    for name, ks in wanted.items():
        if left_out := [str(k) for k in ks if k > train]:
            run.say(f"knn_eval: there are only {train} train images, so knn_eval.{name} {', '.join(left_out)} is left out")
    ks, agreement_ks = ([k for k in ks if k <= train] for ks in wanted.values())
    return ks, agreement_ks


def _scores(
    run: Run, name: str, networks: "Networks", ks: list[int], agreement: "TeacherAgreement", device: "torch.device | None"
) -> dict[str, float]:
    from bingo.evals.knn import nearest_train, voted_accuracies

    features, listing, scores = networks.features(name, run.params.knn_eval, device), networks.listing, {}
    if features is None:
        run.say(f"knn_eval: {name}: the images are not held in memory (dataset.store_px is null), so there is nothing to measure")
        return {}
    train, labels = listing.train_rows, listing.labels_N
    found = nearest_train(features[:train], features[train:], max([*ks, *agreement.ks]))
    if ks:
        scores = voted_accuracies(found, labels[:train], labels[train:], ks, run.params.knn_eval.temperature)
    if name != "teacher":
        scores |= agreement.of(found[0])
    run.say(f"knn_eval: {name}: {in_words(scores, '.1f')}")
    return scores


if __name__ == "__main__":
    run_command(app)
