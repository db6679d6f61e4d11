"""Functions of the Python API that combine several packages: running the pipeline, its bags, its student, and features by either network.

Shape letters: N images, D feature width.
"""

import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import chdir
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bingo import paths
from bingo.runtime.errors import UserError, printable, short

if TYPE_CHECKING:
    import numpy as np

    from bingo.cli.browse_source import BagSource
    from bingo.export.stored import StoredNetwork
    from bingo.images.images import FileImages, Images
    from bingo.teachers.teacher import Teacher

_LAST_LINES = 8  # of a run's output, in its error message


def run_pipeline(workspace: Path | str = ".", images: Path | str | None = None, **changes: Any) -> dict[str, Any]:
    """Set parameters, run every stage that is out of date (`dvc repro`), and return the figures of reports/results.json.

    If `images` is given, everything is first set up for this folder of images, as by `bingo init`; `workspace` may then be an empty
    folder. `changes` are sections of params.yaml with the values to change. The output of the stages is printed as they run.

    DVC runs in a separate process, because it changes the current folder, the environment and the loggers of its process, and so that
    stopping a notebook cell also ends its stages. Raises UserError for wrong parameters, which are then not written, and if a stage fails.

    >>> from bingo import run_pipeline
    >>> results = run_pipeline(distill={"epochs": 2}, bagging={"k": 3})  # doctest: +SKIP
    """
    from bingo.cli.recipe import PARAMS, write_params
    from bingo.params import read_yaml, validate
    from bingo.planning.recipes import lay_over
    from bingo.runtime.artefacts import read_json

    root = Path(workspace).expanduser()
    if not root.is_dir():
        raise UserError(f"workspace = {root}: is not a folder; give the one that contains params.yaml, or with `images` an empty one")
    if images is not None:
        place = Path(images).expanduser()
        _run(root, "-m", "bingo.cli", "init", str(place) if place.is_absolute() else os.path.relpath(place, root))
    with chdir(root):
        params = read_yaml(PARAMS)
        lay_over(params, changes)
        validate(params, f"{PARAMS} with changes")
        if changes:
            write_params(changes, params)
    _run(root, "-m", "dvc", "repro")
    return read_json(root / paths.REPORTS / "results.json")


def _run(root: Path, *arguments: str) -> None:
    """Run Python in a workspace and print its output. Raises UserError with the last lines if it fails."""
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
    command, lines = [sys.executable, *arguments], []
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        try:
            for line in running.stdout or ():
                print(line, end="", flush=True)
                lines.append(printable(line.rstrip()))
        except BaseException:
            running.terminate()
            raise
    if running.returncode:
        raise UserError([*filter(None, lines[-_LAST_LINES:]), f"{' '.join(arguments[1:])}: failed in {root.absolute()}"])


def open_bags(rev: str | None = None) -> "BagSource":
    """The bags of the current workspace, or those of a Git revision or DVC experiment, read from the disk on access.

    `bags[row]` is the bag of a train row: its `path`, `members` (int32 (K,), nearest first) and their `similarity`; `len(bags)` is the
    number of bags. A notebook shows `bags` and `bags[row]` as pictures. `bags.index.table` has all bags as arrays. Raises UserError if
    there are none.

    >>> from bingo import open_bags
    >>> bags = open_bags()
    >>> bag = bags[5]
    >>> len(bags), bag.members.shape, bool(bag.similarity[0] >= bag.similarity[1])
    (400, (5,), True)
    """
    from bingo.cli.browse_source import BagSource

    source = BagSource(rev)
    source.index  # noqa: B018 (raises what it does)
    return source


def load_student(path: Path | str = paths.STUDENT) -> "StoredNetwork":
    """Load a student or baseline, on the CPU: `backbone` (a torch module in eval mode that maps normalised images (B, 3, P, P) to
    features (B, D)), `metadata`, and `image`, which describes how its images are cropped and normalised. Raises UserError for other files.

    >>> from bingo import load_student
    >>> student = load_student("models/student.safetensors")
    >>> student.arch, student.width, student.backbone.feature_width
    ('resnet10t', 0.125, 64)
    """
    from bingo.export.stored import read_student

    return read_student(Path(path))


def embed(network: "StoredNetwork | Teacher", images: "Images | Iterable[Path | str]", batch_images: int = 256) -> "np.ndarray":
    """Features, float32 (N, D), of images by a network from `load_student` or `load_teacher`, computed on the device of its weights.

    `images` are image files, in any iterable, or the result of `open_images`. Each image is resized, cropped to its centre and normalised
    as recorded in the network's file; the features are not normalised. `bingo embed` writes the same features to a file. More than 256
    files are decoded by worker processes, so a script must call this below `if __name__ == "__main__":`.
    Raises UserError with the names of all files that cannot be read, and for wrong arguments.

    >>> from bingo import embed, load_params, load_student, open_images, read_listing
    >>> listing = read_listing("data/listing.parquet")
    >>> images = open_images(listing, "data/images.zarr", load_params().dataset)
    >>> embed(load_student(), images).shape
    (500, 64)
    """
    from bingo.evals.features import backbone_features
    from bingo.images.images import FileImages, MemoryImages
    from bingo.params import seen_image

    if not isinstance(batch_images, Integral) or batch_images < 1:
        raise UserError(f"batch_images = {short(batch_images)}: allowed is a whole number from 1")
    if not hasattr(network, "backbone"):
        raise UserError(f"network = {short(network)}: give the result of load_student or load_teacher")
    held = images if isinstance(images, (MemoryImages, FileImages)) else _files(images)
    device = next(network.backbone.parameters()).device
    return backbone_features(network.backbone, held, range(len(held)), seen_image(network.metadata), device, "fp32", batch_images)


def _files(images: "Iterable[Path | str]") -> "FileImages":
    """Image files in any folders, all of which can be decoded."""
    from bingo.datasets.filecheck import check_files, common_bits
    from bingo.datasets.folder import BAD_LINES
    from bingo.images.images import FileImages

    files = list(images) if isinstance(images, Iterable) and not isinstance(images, (str, bytes)) else []
    if not files or not all(isinstance(file, (str, Path)) for file in files):
        raise UserError(f"images = {short(images)}: give a list of image files, e.g. sorted(Path('photos').rglob('*.jpg'))")
    names = [str(Path(file).expanduser().resolve())[1:] for file in files]
    found = FileImages("/", names, follow_links=True)
    checks, _ = check_files(found, decode=True, store_px=None)
    if bad := [f"{files[row]}: cannot be read ({reason})" for row, reason in sorted(checks.reasons.items())]:
        raise UserError([*bad[:BAD_LINES], f"images: {len(bad)} of {len(files)} files are unreadable; repair them, or leave them out"])
    return FileImages("/", names, follow_links=True, gray_bits=common_bits(found, checks, None))
