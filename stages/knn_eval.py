"""knn_eval: nearest-neighbour accuracy of a network's features, and their agreement with the teacher's, for every k, from one search.

python -m stages.knn_eval [NET]     writes reports/knn/NET.json, percent; NET.npz, results for each test image (hits, and for agreement_K
                                    how many of the K); and reports/failures/NET.json, the test images whose neighbours differ most
                                    from the teacher's; all empty if there is nothing to measure
"""

from contextlib import nullcontext
from typing import Annotated

import typer

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import in_words, process_group, stage_run


def main(
    net: Annotated[
        str | None, typer.Argument(help="student, ema, a baseline, untrained, start, supervised, teacher or pixels; by default all.")
    ] = None,
) -> None:
    """Nearest-neighbour evaluation."""
    with stage_run("knn_eval", net) as run:
        from bingo.embeddings.store import read_embeddings
        from bingo.evals.agreement import neighbor_hits, neighbor_scores, usable_ks
        from bingo.evals.failures import COMPARED, least_agreement
        from bingo.evals.knn import nearest_in_blocks
        from bingo.images.listing import read_judged_listing
        from bingo.pipeline.judging.backbones import NOT_ASKED_FOR, Networks, existing
        from bingo.runtime.artefacts import write_arrays, write_json

        params, listing, names = run.params.knn_eval, read_judged_listing(paths.LISTING, paths.LEFT_OUT), run.networks()
        ks, agreement_ks = usable_ks(params, listing, run.say)
        teacher = read_embeddings(paths.EMBEDDINGS, listing) if agreement_ks or (ks and "teacher" in names) else None
        opened = existing(names) if ks or agreement_ks else []
        if not opened:
            run.idle = (
                NOT_ASKED_FOR
                if ks or agreement_ks
                else listing.unjudged or "knn_eval.k and knn_eval.agreement_k select nothing that can be measured"
            )
        networks = Networks(run, opened, listing, teacher)
        with process_group(run) if networks.backbones else nullcontext() as device:  # stored features need no torch
            k = max([*ks, *agreement_ks, min(COMPARED, listing.train_rows)])
            teacher_QK = None
            if teacher is not None and set(opened) - {"teacher"}:  # first, before there are worker processes
                teacher_QK = nearest_in_blocks(networks.blocks_of_teacher(), k)[0]
            for name in names:
                hits, failures = {}, {}
                if (blocks := networks.blocks(name, params, device)) is not None:
                    found, of_teacher_QK = nearest_in_blocks(blocks, k), None if name == "teacher" else teacher_QK
                    if teacher is not None and of_teacher_QK is not None:
                        failures = least_agreement(found[0], of_teacher_QK, teacher.features, listing.test_rows_N)
                    hits = neighbor_hits(found, of_teacher_QK, listing, ks, params.temperature, agreement_ks)
                scores = neighbor_scores(hits)
                if scores:  # without labels there are none for the teacher
                    run.say(f"knn_eval: {name}: {in_words(scores, '.1f')}")
                write_json(paths.REPORTS / "knn" / f"{name}.json", scores)
                write_arrays(paths.REPORTS / "knn" / f"{name}.npz", hits)
                write_json(paths.REPORTS / "failures" / f"{name}.json", failures)


if __name__ == "__main__":
    run_command(main)
