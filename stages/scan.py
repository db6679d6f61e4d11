"""scan: make a listing of the dataset, data/listing.parquet, and pack small images into one array, data/images.zarr."""

from typing import TYPE_CHECKING

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import Run, stage_run
from bingo.planning.limits import batch_mistakes, image_mistakes, list_mistakes, weights_mistakes
from bingo.runtime.errors import UserError

if TYPE_CHECKING:
    from bingo.datasets.subset import Counts


def main() -> None:
    """List the images of the dataset, and pack them if they are small."""
    with stage_run("scan", raises_limits=True) as run:
        from bingo.datasets.sources import scan
        from bingo.images.images import write_images
        from bingo.images.listing import write_listing
        from bingo.runtime.progress import progress_bar

        try:
            listing, images = scan(run.params.dataset, run.params.seed, run.say, lambda found: _judge(run, found))
        except UserError as error:
            raise UserError(list(dict.fromkeys([*run.mistakes, *error.lines]))) from None
        if lines := batch_mistakes(run.params, listing.train_rows):  # images that cannot be read were left out
            raise UserError(lines)
        with progress_bar("writing the listing"):
            write_images(paths.IMAGES, listing, images)
            write_listing(paths.LISTING, listing)
        run.notes["images"] = len(listing)
        run.say(
            f"scan: {listing.dataset}: {listing.train_rows:,} train and {len(listing) - listing.train_rows:,} test images,"
            f" {len(listing.classes) or 'no'} classes, {len(listing.skipped):,} skipped"
        )


def _judge(run: Run, found: "Counts") -> None:
    """Raises UserError with all limits that the parameters break, by themselves and on so many images."""
    if lines := run.mistakes + image_mistakes(run.params, found) + list_mistakes(run.params) + weights_mistakes(run.params):
        raise UserError(lines)


if __name__ == "__main__":
    run_command(main)
