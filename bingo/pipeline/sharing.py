"""Whether the stage `bag` runs in one process or in a group, and where it stores the results of a long search."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from bingo import paths
from bingo.pipeline.run import Run, code_fingerprint, process_group
from bingo.pipeline.state import state_folder
from bingo.planning.limits import search_mistakes
from bingo.runtime.errors import UserError

_LONG_ROWS = 100_000  # a GPU searches fewer rows in the time that processes need to start and connect


def launch_if_long(run: Run, train_rows: int) -> None:
    """Become the launcher if several processes are wanted and the search is long enough to gain from them. Raises UserError if the
    parameters select a search whose package is not installed."""
    if lines := search_mistakes(run.params):
        raise UserError(lines)
    if train_rows >= _LONG_ROWS:
        run.launch()


@contextmanager
def sharing_of(run: Run, train_rows: int, *inputs: str) -> Iterator[tuple[Any, Any]]:
    """(bingo.bags.sharing.Sharing, torch.device for the features of a student) for the processes of the launcher's group, or for this
    process alone, which stores nothing and does not import torch for a short search. `inputs`: fingerprints of the inputs of the bags."""
    from bingo.bags.sharing import ALONE, Sharing
    from bingo.runtime.artefacts import file_fingerprint
    from bingo.runtime.gpus import gpu_unused_by_faiss, wanted_device

    if line := gpu_unused_by_faiss():
        run.warn(f"{line}; the search for neighbours runs on the CPU")
    bagging, long = run.params.bagging, train_rows >= _LONG_ROWS or "RANK" in os.environ
    with ExitStack() as stack:
        asking = long or bagging.relation != "teacher" or bagging.search == "cuvs"
        device = stack.enter_context(process_group(run, gloo=True)) if asking else None
        if bagging.search == "cuvs" and device is not None and device.type != "cuda":
            raise UserError(f"bagging.search = cuvs: needs a GPU, and BINGO_DEVICE = {wanted_device()} gives none here; set it to ivf")
        if not long:
            yield ALONE, device
            return
        student = [] if bagging.relation == "teacher" else [file_fingerprint(paths.MODELS / f"{bagging.relation}.safetensors")]
        params = run.params.model_dump(mode="json", include={"seed", "image", "bagging"})
        passed = run.params.extract.precision, run.params.extract.batch_images
        values = {"params": [params, *passed], "inputs": [*inputs, *student], "code": code_fingerprint("bag")}
        yield Sharing(stack.enter_context(state_folder("bag", values))), device
