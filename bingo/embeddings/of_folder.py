"""Features of all images in a user's folder, by a stored network, from centre views as described in its file.

Each image is resized and cropped from its file (`image.resize_px`, `image.crop_px`); smaller images are enlarged, as in the pipeline. If
the pipeline first resizes images to `dataset.store_px`, results differ only by rounding, unless store_px is below resize_px.
Shape letters: B images of a batch, D feature width.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bingo.datasets.filecheck import check_files, common_bits
from bingo.datasets.folder import BAD_LINES
from bingo.datasets.layout import Say, find_images
from bingo.embeddings.files import check_names, write_embeddings
from bingo.export.stored import StoredNetwork
from bingo.images.images import FileImages
from bingo.images.listing import Paths
from bingo.images.loader import center_views
from bingo.params import image_values
from bingo.runtime.errors import UserError
from bingo.runtime.progress import progress_bar

_FEW_IMAGES = 512  # decoded by this process before workers would have started


def embed_folder(
    network: StoredNetwork,
    fingerprint: str,
    root: Path,
    out: Path,
    device: torch.device,
    batch_images: int,
    skip_bad: bool,
    follow_links: bool = False,
    say: Say = lambda line: None,
) -> tuple[int, list[str]]:
    """Write the features, float32, of all images under `root` to `out`, sorted by path; `fingerprint` identifies the network.

    Every file is decoded once in advance, so that unreadable files are known before the work starts; `say` is called with a line on
    skipped files. Returns the number of images in the file, and those left out. Raises UserError for an empty folder, images that cannot
    be read (unless `skip_bad`), links out of it (unless `follow_links`), and names that `out` cannot hold.
    """
    found = find_images(root, "FOLDER", follow_links, say)
    paths, bad, gray_bits = _readable(root, found, skip_bad)
    check_names(out, paths)
    metadata = {name: network.metadata[name] for name in ("kind", "arch", "width", "stem")}
    attributes = {**metadata, **image_values(network.image), "network": fingerprint, "precision": "fp32"}
    batches = _features(network, FileImages(str(root), paths, follow_links, gray_bits), device, batch_images)
    write_embeddings(out, paths, network.backbone.feature_width, batches, attributes)
    return len(paths), bad


def _readable(root: Path, paths: Paths, skip_bad: bool) -> tuple[Paths, list[str], int | None]:
    """The images that can be decoded, those that cannot, and `gray_bits` as in a Listing. Raises UserError with their names and reasons."""
    files = FileImages(str(root), paths, follow_links=True)  # links out of the root were refused when it was listed
    checks, _ = check_files(files, decode=True, store_px=None)
    reasons = {paths[row]: reason for row, reason in sorted(checks.reasons.items())}
    if reasons and (not skip_bad or len(reasons) == len(paths)):
        lines = [f"{path}: cannot be read ({reason})" for path, reason in list(reasons.items())[:BAD_LINES]]
        way_out = "repair or delete them" + ("" if skip_bad else ", or leave them out with --on-bad-image skip")
        raise UserError([*lines, f"FOLDER = {root}: {len(reasons)} of {len(paths)} images are unreadable; {way_out}"])
    return paths.take(np.flatnonzero(checks.readable_N)), list(reasons), common_bits(files, checks, None)


def _features(network: StoredNetwork, images: FileImages, device: torch.device, batch_images: int) -> Iterator[np.ndarray]:
    """Pooled features of each batch, float32 (B, D)."""
    backbone = network.backbone.to(device).to(memory_format=torch.channels_last)
    rows, workers = np.arange(len(images)), 0 if len(images) <= _FEW_IMAGES else None
    with progress_bar("embedding", len(images), "images") as bar, torch.inference_mode():
        for views_B in center_views(images, rows, network.image, device, batch_images, workers):
            yield backbone(views_B).float().cpu().numpy()
            bar.advance(len(views_B))
