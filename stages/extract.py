"""extract: the teacher's pass over all images: features of centre views, keys of seeded random views.

    python -m stages.extract     reads listing, images, teacher and params extract, image, seed; writes data/embeddings.zarr
It uses any number of GPUs, and a killed run resumes with the missing chunks. If there are labels, it prints the teacher's k-NN accuracy,
that
of the same network untrained, and chance: a teacher that is not better than these is broken.
"""

import typer

from bingo.pipeline import paths
from bingo.pipeline.launch import launch
from bingo.pipeline.run import code_fingerprint, process_group, run_command, stage_run
from bingo.pipeline.state import state_folder

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main() -> None:
    """Cache the teacher's embeddings."""
    with stage_run("extract") as run:
        launch("extract")
        import torch

        from bingo.embeddings.extract import extract_embeddings
        from bingo.embeddings.store import read_embeddings
        from bingo.evals.teacher_check import teacher_quality
        from bingo.images.images import open_images
        from bingo.images.listing import read_listing
        from bingo.runtime import distributed
        from bingo.runtime.artefacts import file_fingerprint
        from bingo.teachers.teacher import load_teacher

        params, listing = run.params, read_listing(paths.LISTING)
        images = open_images(listing, paths.IMAGES, params.dataset)
        fingerprint = file_fingerprint(paths.TEACHER)
        values = {
            "params": [params.seed, params.image.model_dump(), params.extract.model_dump()],
            "inputs": [listing.fingerprint, fingerprint],
            "code": code_fingerprint("extract"),
        }
        with process_group(run) as device, state_folder("extract", values) as folder:
            teacher = load_teacher(paths.TEACHER).to(device).to(memory_format=torch.channels_last)
            rate = extract_embeddings(
                teacher, listing, images, params.extract, params.image, params.seed, folder / "store", paths.EMBEDDINGS, device,
                {"teacher": fingerprint},
            )  # fmt: skip
            run.notes["images_per_second"] = round(rate, 1)
            run.say(f"extract: {len(listing)} images, {params.extract.views} stored views of {listing.train_rows}; {rate:,.0f} views/s")
            if distributed.rank() == 0 and listing.labelled:
                embeddings = read_embeddings(paths.EMBEDDINGS, listing)
                quality = teacher_quality(embeddings, listing, images, teacher, params.image, params.seed, device)
                run.notes |= quality
                run.say(
                    f"extract: k-NN {quality['teacher_knn']:.1f} %, untrained {quality['random_knn']:.1f} %,"
                    f" chance {quality['chance']:.1f} %"
                )


if __name__ == "__main__":
    run_command(app)
