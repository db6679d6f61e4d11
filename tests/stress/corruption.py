"""Flipped bytes in every artefact of a short run: reading it must fail with its name, or return the same content as before.

python -m tests.stress.corruption --flips 1000       # first runs recipe digits-short in a temporary folder (about a minute)

Half of the flips are anywhere, half near the beginning or the end of a file, where headers and footers are. The readers are those of the
stages, in this process. The exit code is 1 if a flip was neither refused in one line that names the artefact nor without effect.
"""

import dataclasses
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.parser import Parser
from bingo.bags.index import read_bags
from bingo.browse.listing_rows import ListingRows
from bingo.embeddings.store import read_embeddings
from bingo.images.images import MemoryImages, open_images
from bingo.images.listing import Paths, read_listing
from bingo.nets.students import load_backbone
from bingo.params import read_yaml
from bingo.planning.recipes import lay_over, read_recipe
from bingo.report.inputs import read_network_facts
from bingo.runtime.checkpoints import Checkpoints
from bingo.runtime.errors import UserError
from bingo.runtime.progress import progress_bar
from bingo.teachers.teacher import load_teacher

ROOT = Path(__file__).parents[2]
STAGES = ("scan", "teacher", "extract", "bag", "distill")
EDGE_BYTES = 4096
OUTCOMES = ("refused", "harmless", "unnoticed", "traceback")


@dataclasses.dataclass(frozen=True)
class Artefact:
    """Files of one reader: `path` is a file or a folder, `read` returns everything that the reader returns for it."""

    name: str
    path: Path
    read: Callable[[], Any]


def artefacts(root: Path) -> list[Artefact]:
    """The artefacts in a workspace at `root`, each with the readers of stages and commands; including the checkpoint if it exists."""
    data, models = root / "data", root / "models"
    listing_file, images, embeddings, bags = (data / name for name in ("listing.parquet", "images.zarr", "embeddings.zarr", "bags.zarr"))
    listing = read_listing(listing_file)
    found = [
        Artefact("listing", listing_file, lambda: read_listing(listing_file)),
        Artefact("listing, row by row", listing_file, lambda: _rows(listing_file)),
        Artefact("images", images, lambda: _images(listing, images)),
        Artefact("embeddings", embeddings, lambda: _embeddings(embeddings, listing)),
        Artefact("embeddings, in blocks", embeddings, lambda: _blocks(embeddings, listing)),
        Artefact("bags", bags, lambda: _bags(bags, listing)),
        Artefact("teacher", models / "teacher.safetensors", lambda: _teacher(models / "teacher.safetensors")),
        Artefact("student", models / "student.safetensors", lambda: _student(models / "student.safetensors")),
        Artefact("student, header", models / "student.safetensors", lambda: read_network_facts(models / "student.safetensors")),
    ]
    for latest in root.rglob("checkpoints/latest.json"):
        folder = latest.parent
        found.append(Artefact("checkpoint", folder, lambda folder=folder: Checkpoints(folder, 0).load(torch.device("cpu"))))
    return found


def _rows(path: Path) -> Any:
    rows = ListingRows(path, str(path))
    return [len(rows), rows.train_rows, rows.dataset, rows.classes, rows.fingerprint, rows.labels_N, rows.rows(np.arange(len(rows)))]


def _images(listing: Any, path: Path) -> Any:
    images = open_images(listing, path, None)
    assert isinstance(images, MemoryImages)
    return images.images_NSS3


def _embeddings(path: Path, listing: Any) -> Any:
    embeddings = read_embeddings(path, listing)
    return [embeddings.attrs, embeddings.features_ND, embeddings.keys_TVP]


def _blocks(path: Path, listing: Any) -> Any:
    stored = read_embeddings(path, listing)
    return [stored.attrs, stored.train_features[:]]


def _bags(path: Path, listing: Any) -> Any:
    index = read_bags(path, listing)
    return [index.attrs, index.table]


def _teacher(path: Path) -> Any:
    teacher = load_teacher(path)
    return [teacher.metadata, teacher.state_dict()]


def _student(path: Path) -> Any:
    backbone, metadata = load_backbone(path)
    return [metadata, backbone.state_dict()]


def digest(value: Any) -> str:
    """The sha256 of a value, bitwise: arrays and tensors by dtype, shape and bytes."""
    hasher = hashlib.sha256()
    _feed(hasher, value)
    return hasher.hexdigest()


def _feed(hasher: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else np.empty(0)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Paths):
        value = list(value)
    if isinstance(value, np.ndarray):
        hasher.update(f"{value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, dict | list | tuple):
        hasher.update(f"{type(value).__name__} {len(value)}".encode())
        for item in value.items() if isinstance(value, dict) else value:
            _feed(hasher, item)
    else:
        hasher.update(repr(value).encode())


def flip_bytes(artefact: Artefact, flips: int, seed: int) -> tuple[Counter, list[str]]:
    """Flip one byte at a time; returns the number of each of OUTCOMES, and a line for each flip that was not noticed."""
    draw = random.Random(f"{artefact.name} {seed}")
    files = sorted(file for file in artefact.path.rglob("*") if file.is_file() and file.stat().st_size) or [artefact.path]
    files = [file for file in files if file.name != "lock"]
    whole, counts, lines = digest(artefact.read()), Counter(), []
    with progress_bar(artefact.name, flips, "flips") as bar:
        for _ in range(flips):
            file = draw.choice(files)
            place, mask = _place(draw, file.stat().st_size), draw.randrange(1, 256)
            with _flipped(file, place, mask):
                outcome, reason = _outcome(artefact, whole)
            counts[outcome] += 1
            if outcome in ("unnoticed", "traceback"):
                lines.append(f"{artefact.name}: {file.name}, byte {place} ^ {mask:#04x}: {outcome} {reason}")
            bar.advance()
    assert digest(artefact.read()) == whole
    return counts, lines


def _place(draw: random.Random, file_bytes: int) -> int:
    edge = min(EDGE_BYTES, file_bytes)
    return draw.choice(
        [draw.randrange(file_bytes), draw.randrange(file_bytes), draw.randrange(edge), file_bytes - 1 - draw.randrange(edge)]
    )


@contextmanager
def _flipped(path: Path, place: int, mask: int) -> Iterator[None]:
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, place)
        os.pwrite(file.fileno(), bytes([byte[0] ^ mask]), place)
        try:
            yield
        finally:
            os.pwrite(file.fileno(), byte, place)


def _outcome(artefact: Artefact, whole: str) -> tuple[str, str]:
    try:
        return ("harmless", "") if digest(artefact.read()) == whole else ("unnoticed", "")
    except UserError as error:
        (line, *others) = error.lines
        named = artefact.path.name in line and not others and "\n" not in line
        return ("refused", line) if named else ("traceback", f"{error.lines}")
    except Exception as error:  # unexpected errors are the faults to be found
        return "traceback", repr(error)[:200]


def prepare(root: Path) -> None:
    """A workspace at `root` after the stages up to distill with recipe digits-short, and a checkpoint of a second distill."""
    from ruamel.yaml import YAML

    for name in ("bingo", "stages"):
        (root / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "dvc.yaml", root)
    params = read_yaml(ROOT / "params.yaml")
    lay_over(params, read_recipe(ROOT / "recipes", "digits-short").overlay)
    with (root / "params.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(params, file)
    for stage in STAGES:
        subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=root, check=True)
    again = subprocess.Popen([sys.executable, "-m", "stages.distill"], cwd=root, env={**os.environ, "BINGO_CHECKPOINT_SECONDS": "0"})
    while not list(root.rglob("checkpoints/latest.json")):
        assert again.poll() is None, "distill ended too early"
        time.sleep(0.01)
    again.send_signal(signal.SIGTERM)
    again.wait()


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--flips", type=int, default=1000, help="flips for each artefact and reader")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        print(f"\n| artefact | bytes | flips | {' | '.join(OUTCOMES)} | ms per reading |\n|---|{'---|' * (len(OUTCOMES) + 3)}")
        through = []
        for artefact in artefacts(Path(folder)):
            files = [artefact.path] if artefact.path.is_file() else artefact.path.rglob("*")
            begun = time.monotonic()
            counts, lines = flip_bytes(artefact, given.flips, given.seed)
            ms = 1000 * (time.monotonic() - begun) / given.flips
            cells = [artefact.name, f"{sum(file.stat().st_size for file in files if file.is_file()):,}", f"{given.flips:,}"]
            print(f"| {' | '.join([*cells, *(f'{counts[outcome]:,}' for outcome in OUTCOMES), f'{ms:.1f}'])} |", flush=True)
            through += lines
    print("".join(f"{line}\n" for line in through), end="")
    raise SystemExit(bool(through))


if __name__ == "__main__":
    main()
