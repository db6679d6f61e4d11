"""transfer_cifar: the student on other labelled images (CIFAR-10 and CIFAR-100 in the papers): linear, enlarged and native, and fine-tuned.

    python -m stages.transfer_cifar [NAME]     reads the images of transfer.datasets.NAME, the networks in transfer.nets (the
                                               student only from its file) and params transfer, dataset, image, student, seed;
                                               writes reports/transfer/NAME.json, percent
Without NAME: all of transfer.datasets. A killed run resumes from its checkpoints. Linear follows cifar_main_lincls.py and
Reproduction.md of DisCo's repository.
"""

from typing import TYPE_CHECKING

import typer

from bingo.pipeline import paths
from bingo.pipeline.launch import launch
from bingo.pipeline.run import Run, chosen_items, code_fingerprint, item_name, process_group, run_command, stage_run
from bingo.pipeline.state import state_folder

if TYPE_CHECKING:
    import torch

    from bingo.images.images import Images
    from bingo.images.listing import Listing
    from bingo.params import ImageParams
    from bingo.pipeline.classifying import Protocol

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(name: str | None = typer.Argument(None, help="One of transfer.datasets in params.yaml; by default all.")) -> None:
    """Transfer to other labelled images."""
    name = item_name(name) if name else None
    with stage_run(f"transfer_cifar-{name}" if name else "transfer_cifar") as run:
        names = chosen_items("transfer.datasets", run.params.transfer.datasets, name)
        launch("transfer_cifar", *([name] if name else []))
        with process_group(run) as device:
            for dataset in names:
                _judge(run, dataset, device)


def _judge(run: Run, name: str, device: "torch.device") -> None:
    from bingo.pipeline.backbones import backbone_files, backbones, judged
    from bingo.pipeline.classifying import scores_by_net
    from bingo.runtime import distributed
    from bingo.runtime.artefacts import write_json

    transfer = run.params.transfer
    nets = backbones(run, transfer.nets)
    listing, images = _scan(run, name)
    test_images = len(listing) - listing.train_rows
    run.say(f"transfer_cifar: {name}: {listing.train_rows:,} train and {test_images:,} test images, {len(listing.classes)} classes")
    protocols = _protocols(run, listing, images)
    values = {
        "params": judged(run, transfer),
        "inputs": [listing.fingerprint, backbone_files(transfer.nets)],
        "code": code_fingerprint("transfer_cifar"),
    }
    with state_folder(f"transfer_cifar-{name}", values) as folder:
        scores = scores_by_net(run, nets, protocols, transfer.precision, folder, device)
        if distributed.rank() == 0:
            seen = {protocol: {"crop_px": used.task.image.crop_px} for protocol, used in protocols.items()}
            result = {"dataset": listing.dataset, "images": [listing.train_rows, test_images], "protocols": seen, "nets": scores}
            write_json(paths.REPORTS / "transfer" / f"{name}.json", result)


def _scan(run: Run, name: str) -> "tuple[Listing, Images]":
    """The dataset's listing and images. The first process goes first, since it may have to download them."""
    from bingo.datasets.sources import scan
    from bingo.images.images import FileImages, MemoryImages
    from bingo.runtime import distributed
    from bingo.runtime.errors import UserError

    dataset, own = run.params.transfer_set(name), f"transfer.datasets.{name}."
    if distributed.rank() > 0:
        distributed.barrier()
    try:
        listing, images_NSS3 = scan(dataset, run.params.seed, lambda line: run.say(line.replace("dataset.", own)))
    except UserError as error:
        raise UserError([line.replace("dataset.", own) for line in error.lines]) from None
    if distributed.rank() == 0:
        distributed.barrier()
    if images_NSS3 is None:
        return listing, FileImages(str(dataset.root), listing.paths, dataset.follow_links, listing.gray_bits)
    return listing, MemoryImages(images_NSS3)


def _protocols(run: Run, listing: "Listing", images: "Images") -> "dict[str, Protocol]":
    import numpy as np

    from bingo.evals.finetune import Task, random_crops
    from bingo.params import BicubicImageParams
    from bingo.pipeline.classifying import Protocol

    transfer = run.params.transfer
    found: dict[str, Protocol] = {}
    train_rows, test_rows = np.split(np.arange(len(listing)), [listing.train_rows])
    crops = random_crops(transfer.crop_scale, transfer.flip_p)
    seen = BicubicImageParams(**run.params.image.model_dump()) if transfer.interpolation == "bicubic" else run.params.image
    for protocol in transfer.protocols:
        image = _image(seen, images, transfer.resized_px if protocol == "linear_resized" else None)
        _check(run, protocol, image)
        task = Task(images, listing.labels_N, train_rows, test_rows, len(listing.classes), image, crops)
        if protocol == "finetune":
            found[protocol] = Protocol(task, transfer.finetune, transfer.finetune.head_lr, transfer.finetune.trunk_lr)
        else:
            found[protocol] = Protocol(task, transfer.linear, transfer.linear.lr, None)
    return found


def _image(image: "ImageParams", images: "Images", resized_px: int | None) -> "ImageParams":
    """Views of `resized_px`, or of the native size: that of images in memory, which are used whole; for files, that of params image."""
    from bingo.images.images import MemoryImages

    if isinstance(images, MemoryImages):
        side_px = resized_px or images.side_px
        return image.model_copy(update={"crop_px": side_px, "resize_px": side_px})
    if resized_px is None:
        return image
    return image.model_copy(update={"crop_px": resized_px, "resize_px": round(resized_px * image.resize_px / image.crop_px)})


def _check(run: Run, protocol: str, image: "ImageParams") -> None:
    """Raises UserError if the student's architecture does not accept images of a protocol's size."""
    from bingo.nets.backbones import build_backbone, check_images
    from bingo.runtime.errors import UserError

    network = run.params.student
    try:
        check_images(build_backbone(network.arch, network.width, network.stem, 0), network.arch, image.crop_px)
    except UserError:
        line = f"transfer.protocols = {protocol}: {network.arch} does not accept images of {image.crop_px} px"
        raise UserError(f"{line}; leave {protocol} out, or set transfer.resized_px") from None


if __name__ == "__main__":
    run_command(app)
