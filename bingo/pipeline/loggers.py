"""Loggers of a training, as listed in BINGO_LOGGERS, and the bags that they show. No stage's output depends on this file."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from bingo.paths import LOGS
from bingo.pipeline.process import is_first
from bingo.pipeline.run import Run
from bingo.planning.recipes import flattened
from bingo.runtime.artefacts import read_json, write_json
from bingo.runtime.loggers import LoggedRun, TrainingLog, wanted_loggers

if TYPE_CHECKING:
    from PIL.Image import Image

    from bingo.bags.index import BagIndex
    from bingo.images.images import Images
    from bingo.images.listing import Listing
    from bingo.runtime.checkpoints import Resumable

ANCHORS, MEMBERS = 4, 10


@contextmanager
def logged(
    run: Run,
    trainer: "Resumable",
    name: str = "",
    measure: Callable[[Any], Mapping[str, float]] | None = None,
    pictures: Callable[[], "Mapping[str, Image]"] | None = None,
) -> Iterator[None]:
    """Context manager in which `trainer` reports to the loggers on the first process, as EXPERIMENT/NAME (`name`: by default the stage's).

    EXPERIMENT is DVC's name of the experiment, or `workspace`. Name and id are stored with the checkpoints, so that a training that resumes
    continues the same run. `measure` and `pictures`: see `TrainingLog`.
    """
    names = wanted_loggers()
    if not names or not is_first():
        yield
        return
    known = trainer.checkpoints.folder / "log.json"
    if not known.exists():
        started = {"id": f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid4().hex[:6]}"}
        write_json(known, {**started, "name": f"{os.environ.get('DVC_EXP_NAME', 'workspace')}/{name or run.stage}"})
    root = Path(os.environ.get("DVC_ROOT", ".")) / LOGS
    params = dict(flattened(run.params.model_dump()))
    trainer.log = TrainingLog(names, LoggedRun(**read_json(known), params=params, root=root), run.warn, measure, pictures)
    whole = False
    try:
        yield
        whole = True
    finally:
        trainer.log.close(whole)


def bag_pictures(bags: "BagIndex", listing: "Listing", images: "Images") -> "dict[str, Image]":
    """Bags of some anchors, spread over the listing, as contact sheets; the frames show whether the classes are the same."""
    from bingo.browse.sheets import Tile, contact_sheet
    from bingo.report.pictures import picture_of

    def tile(row: int, anchor: int, caption: str) -> Tile:
        labels = listing.labels_N[[row, anchor]].tolist()
        return Tile(picture_of(images, row), f"row {row}", caption, labels[0] == labels[1] if row != anchor and min(labels) >= 0 else None)

    found = {}
    for anchor in sorted({bags.train_rows * part // ANCHORS for part in range(ANCHORS)}):
        members = zip(bags.members(anchor).tolist()[:MEMBERS], bags.similarity(anchor).tolist(), strict=False)
        tiles = [tile(row, anchor, f"{cosine:.3f}") for row, cosine in members]
        found[f"bags/row-{anchor}"] = contact_sheet(f"{listing.paths[anchor]} and its bag", tile(anchor, anchor, "the anchor"), tiles)
    return found
