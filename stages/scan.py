"""scan: the dataset becomes a listing, and small images one array.

python -m stages.scan        reads params dataset, seed; writes data/listing.parquet, data/images.zarr
"""

import typer

from bingo.pipeline import paths
from bingo.pipeline.run import run_command, stage_run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main() -> None:
    """List the dataset's images, and pack them where they are small."""
    with stage_run("scan") as run:
        from bingo.datasets.sources import scan
        from bingo.images.images import write_images
        from bingo.images.listing import write_listing
        from bingo.planning.limits import check_scan
        from bingo.runtime.progress import progress_bar

        listing, images = scan(run.params.dataset, run.params.seed, run.say)
        check_scan(run.params, listing.train_rows, listing.labelled)
        with progress_bar("writing the listing"):
            write_images(paths.IMAGES, listing, images)
            write_listing(paths.LISTING, listing)
        run.notes["images"] = len(listing)
        run.say(
            f"scan: {listing.dataset}: {listing.train_rows:,} train and {len(listing) - listing.train_rows:,} test images,"
            f" {len(listing.classes) or 'no'} classes, {len(listing.skipped):,} skipped"
        )


if __name__ == "__main__":
    run_command(app)
