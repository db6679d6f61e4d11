"""linear_eval: a linear layer on a network's frozen features, and on random crops for the networks in linear_eval.crops.nets.

python -m stages.linear_eval [NET]     writes reports/linear/NET.json: by protocol (cached, crops) percent, last and best epoch; and
                                       NET.npz: for `cached`, which test images are classified correctly after the last epoch;
                                       and that layer to models/linear/NET.safetensors. All are empty if there is nothing to measure
"""

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import Run, process_group, stage_run

if TYPE_CHECKING:
    import torch

    from bingo.images.listing import Listing
    from bingo.pipeline.judging.backbones import Networks


def main(
    net: Annotated[
        str | None, typer.Argument(help="student, ema, a baseline, untrained, start, supervised, teacher or pixels; by default all.")
    ] = None,
) -> None:
    """Linear evaluation with both protocols."""
    with stage_run("linear_eval", net) as run:
        from bingo.embeddings.store import read_embeddings
        from bingo.images.listing import read_judged_listing
        from bingo.pipeline.judging.backbones import NOT_ASKED_FOR, Networks, existing
        from bingo.runtime.artefacts import write_arrays, write_bytes, write_json

        names, listing = run.networks(), read_judged_listing(paths.LISTING, paths.LEFT_OUT)
        opened = existing(names) if listing.can_judge else []
        if not opened:
            run.idle = listing.unjudged or NOT_ASKED_FOR
        teacher = read_embeddings(paths.EMBEDDINGS, listing) if "teacher" in opened else None
        networks = Networks(run, opened, listing, teacher)
        with process_group(run) if opened else nullcontext() as device:
            for name in names:
                scores, hits, layer = _scores(run, name, networks, device) if device is not None else ({}, {}, {})
                write_json(paths.REPORTS / "linear" / f"{name}.json", scores)
                write_arrays(paths.REPORTS / "linear" / f"{name}.npz", hits)
                if layer:
                    _keep(name, layer, listing)
                else:
                    write_bytes(paths.LINEAR / f"{name}.safetensors", paths.NO_WEIGHTS)
                for protocol, score in scores.items():
                    top1 = f"top-1 {score['top1_last']:.1f} in the last epoch, {score['top1_best']:.1f} in the best"
                    run.say(f"linear_eval: {name}, {protocol}: {top1}")


def _scores(
    run: Run, name: str, networks: "Networks", device: "torch.device"
) -> tuple[dict[str, dict[str, Any]], dict[str, Any], dict[str, "torch.Tensor"]]:
    from bingo.evals.finetune import task_of
    from bingo.evals.linear import linear_on_crops, linear_on_features
    from bingo.pipeline.judging.backbones import state_of
    from bingo.pipeline.loggers import logged
    from bingo.runtime.checkpoints import Checkpoints

    params, listing, scores, hits = run.params, networks.listing, {}, {}
    layer: dict[str, torch.Tensor] = {}
    evaluation, train, test_N, labels_N = params.linear_eval, listing.train_rows, listing.test_rows_N, listing.labels_N
    features_ND = networks.features(name, evaluation, device)
    if features_ND is not None:
        split = features_ND[:train], labels_N[:train], features_ND[test_N], labels_N[test_N]
        cached = linear_on_features(*split, len(listing.classes), evaluation.cached, params.seed, device)
        scores["cached"], hits["cached"], layer = cached
    if name in networks.backbones and name in evaluation.crops.nets:
        assert networks.images is not None
        task, how = task_of(listing, networks.images, params.image, evaluation.crops), (evaluation.crops, evaluation.precision)
        with state_of(run, name, [name], [listing.fingerprint, listing.left_out_rows], *how) as folder:
            checkpoints = Checkpoints(folder / "checkpoints")
            loggers = partial(logged, run, name=f"{run.name}-{name}/crops")
            scores["crops"] = linear_on_crops(networks.backbones[name], task, *how, params.seed, device, checkpoints, loggers)
    return scores, hits, layer


def _keep(name: str, layer: dict[str, "torch.Tensor"], listing: "Listing") -> None:
    """Write the layer on stored features, with the names of the classes and the fingerprints of the listing and of the network's file."""
    from bingo.nets.checkpoint import save_network
    from bingo.pipeline.judging.backbones import file_of
    from bingo.runtime.artefacts import file_fingerprint

    backbone = {"backbone": file_fingerprint(file_of(name))} if file_of(name).exists() else {}
    metadata = {"kind": "linear layer", "classes": listing.classes, "listing": listing.fingerprint, **backbone}
    save_network(paths.LINEAR / f"{name}.safetensors", layer, metadata)


if __name__ == "__main__":
    run_command(main)
