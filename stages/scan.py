"""scan: make a listing of the dataset, data/listing.parquet, and pack small images into one array, data/images.zarr.

With `dataset.pack_px`, that folder contains smaller copies of photographs. A killed run resumes.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import Run, code_fingerprint, stage_run
from bingo.pipeline.state import state_folder, state_root
from bingo.planning.limits import batch_mistakes, image_mistakes, list_mistakes, weights_mistakes
from bingo.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from bingo.datasets.subset import Counts
    from bingo.images.listing import Listing
    from bingo.images.positions import Positions

    Found = np.ndarray | Positions | None


def main() -> None:
    """List the images of the dataset, and pack them if they are small."""
    with stage_run("scan", raises_limits=True) as run:
        import PIL

        from bingo.datasets.known import KnownFiles
        from bingo.datasets.sources import scan
        from bingo.images.images import write_images
        from bingo.images.listing import write_listing
        from bingo.runtime.artefacts import fingerprint
        from bingo.runtime.progress import progress_bar

        known = KnownFiles(state_root() / "scan", fingerprint([code_fingerprint("scan"), PIL.__version__]))
        try:
            listing, found = scan(run.params.dataset, run.params.seed, run.say, lambda found: _judge(run, found), known)
        except UserError as error:
            raise UserError(list(dict.fromkeys([*run.mistakes, *error.lines]))) from None
        if lines := batch_mistakes(run.params, listing.train_rows):  # images that cannot be read were left out
            raise UserError(lines)
        with _packed(run, listing, found) as (images, pack), progress_bar("writing the listing"):
            write_images(paths.IMAGES, listing, images, pack)
            write_listing(paths.LISTING, listing)
            known.keep()
        run.notes["images"] = len(listing)
        run.say(
            f"scan: {listing.dataset}: {listing.train_rows:,} train and {len(listing) - listing.train_rows:,} test images,"
            f" {len(listing.classes) or 'no'} classes, {len(listing.skipped):,} skipped"
        )


@contextmanager
def _packed(run: Run, listing: "Listing", found: "Found") -> Iterator[tuple["Found", Path | None]]:
    """What `scan` returned or, with `dataset.pack_px`, the positions of smaller photographs, and the folder of their files."""
    dataset = run.params.dataset
    if dataset.pack_px is None:
        yield found, None
        return
    from bingo.datasets.known import identity_of
    from bingo.datasets.packing import pack_images
    from bingo.images.images import FileImages
    from bingo.images.positions import Positions
    from bingo.params.places import images_folder

    positions = found if isinstance(found, Positions) else None
    files = FileImages(images_folder(str(dataset.root)), listing.paths, dataset.follow_links, listing.gray_bits, positions=positions)
    kept_for = {"listing": listing.fingerprint, "root": dataset.root, "code": code_fingerprint("scan")}
    if dataset.check == "header":  # the listing then does not depend on the content of files
        large = positions.files if positions else listing.paths
        kept_for["files"] = hashlib.sha256(identity_of(files.root, large).tobytes()).hexdigest()
    with state_folder("scan", kept_for) as folder:
        yield pack_images(files, dataset.pack_px, folder, run.say), folder


def _judge(run: Run, found: "Counts") -> None:
    """Raise UserError with all limits that the parameters exceed, by themselves or with this number of images."""
    if lines := run.mistakes + image_mistakes(run.params, found) + list_mistakes(run.params) + weights_mistakes(run.params):
        raise UserError(lines)


if __name__ == "__main__":
    run_command(main)
