"""The fuzzed surfaces, in the order of the table."""

import os
from pathlib import Path

from tests.stress.fuzz import checkpoints, coco, images, parameters
from tests.stress.fuzz.harness import Tally, fuzz

SURFACES = (
    parameters.PARAMS_VALUES,
    parameters.PARAMS_TEXT,
    parameters.TAKEN_ON,
    parameters.RECIPES,
    images.DAMAGED,
    images.BOMBED,
    images.FOLDERS,
    coco.EDITED,
    coco.INSTANCES,
    coco.DAMAGED,
    checkpoints.FOREIGN,
    checkpoints.OWN,
    checkpoints.TRAININGS,
)


def run(number: int, cases: int, seed: int, folder: str) -> Tally:
    """The cases of one surface; `folder` is empty. Output of C libraries about damaged files is discarded."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return fuzz(SURFACES[number], cases, seed, Path(folder))
