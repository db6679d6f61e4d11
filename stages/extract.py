"""extract: the teacher's pass over all images, features of centre views and keys of seeded random views: data/embeddings.zarr.

It uses any number of GPUs, and a killed run resumes with the missing chunks. If there are labels, it prints the teacher's k-NN accuracy,
that of the same network untrained, and chance. A teacher that is not better than these is broken.
"""

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import code_fingerprint, process_group, stage_run
from bingo.pipeline.state import state_folder


def main() -> None:
    """Compute and store the teacher's embeddings."""
    with stage_run("extract") as run:
        run.launch()
        from bingo.embeddings.extract import extract_embeddings
        from bingo.embeddings.store import read_embeddings
        from bingo.evals.teacher_check import teacher_quality
        from bingo.images.images import open_images
        from bingo.images.listing import read_listing
        from bingo.runtime import distributed
        from bingo.runtime.artefacts import file_fingerprint
        from bingo.teachers.teacher import load_teacher

        params, listing = run.params, read_listing(paths.LISTING)
        images, fingerprint = open_images(listing, paths.IMAGES, params.dataset), file_fingerprint(paths.TEACHER)
        values = {
            "params": [params.seed, params.extract.model_dump()],
            "inputs": [listing.fingerprint, fingerprint],
            "code": code_fingerprint("extract"),
        }
        with process_group(run) as device, state_folder("extract", values) as folder:
            teacher, store = load_teacher(paths.TEACHER), folder / "store"
            how = params.extract, params.seed, store, paths.EMBEDDINGS, device, {"teacher": fingerprint}
            rate = extract_embeddings(teacher, listing, images, *how)
            run.notes["images_per_second"] = round(rate, 1)
            run.say(f"extract: {len(listing)} images, {params.extract.views} stored views of {listing.train_rows}; {rate:,.0f} views/s")
            if distributed.rank() == 0 and listing.labelled:
                embeddings = read_embeddings(paths.EMBEDDINGS, listing)
                quality = teacher_quality(embeddings, listing, images, teacher, params.seed, device)
                run.notes |= quality
                found = (quality[name] for name in ("teacher_knn", "random_knn", "chance"))
                run.say("extract: k-NN accuracy of the teacher {:.1f} %, untrained {:.1f} %, chance {:.1f} %".format(*found))


if __name__ == "__main__":
    run_command(main)
