"""The inputs of transfer_cifar: the images of another dataset, and the tasks for its protocols."""

import re
from collections.abc import Callable

import numpy as np

from bingo.datasets.sources import scan
from bingo.evals.finetune import Protocol, task_of
from bingo.images.images import FileImages, Images, MemoryImages
from bingo.images.listing import Listing
from bingo.nets.backbones import build_backbone, check_images
from bingo.params import BicubicImageParams, ImageParams, NetworkParams, Params
from bingo.params.places import images_folder
from bingo.runtime import distributed
from bingo.runtime.errors import UserError


def scanned(params: Params, name: str, say: Callable[[str], None]) -> tuple[Listing, Images]:
    """The listing and images of `transfer.datasets.NAME`. The first process reads them first, since it may have to download them."""
    dataset, own = params.transfer_set(name), f"transfer.datasets.{name}."
    if distributed.rank() > 0:
        distributed.barrier()
    try:
        listing, images = scan(dataset, params.seed, lambda line: say(line.replace("dataset.", own)))
    except UserError as error:
        lines = [re.sub(r"set dataset\.\w+_column to one of:", "save it with one of these alone:", line) for line in error.lines]
        raise UserError([line.replace("dataset.", own) for line in lines]) from None
    if distributed.rank() == 0:
        distributed.barrier()
    if isinstance(images, np.ndarray):
        return listing, MemoryImages(images)
    root = images_folder(str(dataset.root))
    return listing, FileImages(root, listing.paths, dataset.follow_links, listing.gray_bits, dataset.jpeg_decoder, images)


def protocols(params: Params, listing: Listing, images: Images) -> dict[str, Protocol]:
    """The protocols in `transfer.protocols`. Raises UserError if the student's architecture does not accept images of a protocol's size."""
    transfer, found = params.transfer, dict[str, Protocol]()
    seen = BicubicImageParams(**params.image.model_dump()) if transfer.interpolation == "bicubic" else params.image
    for protocol in transfer.protocols:
        image = _image(seen, images, transfer.resized_px if protocol == "linear_resized" else None)
        _check(params.student, protocol, image)
        task = task_of(listing, images, image, transfer)
        if protocol == "finetune":
            found[protocol] = Protocol(task, transfer.finetune, transfer.finetune.head_lr, transfer.finetune.trunk_lr)
        else:
            found[protocol] = Protocol(task, transfer.linear, transfer.linear.lr, None)
    return found


def _image(image: ImageParams, images: Images, resized_px: int | None) -> ImageParams:
    """Views of `resized_px`, or of the native size: for images in memory, their whole size; for files, that of the section `image`."""
    if isinstance(images, MemoryImages):
        side_px = resized_px or images.side_px
        return image.model_copy(update={"crop_px": side_px, "resize_px": side_px})
    if resized_px is None:
        return image
    return image.model_copy(update={"crop_px": resized_px, "resize_px": round(resized_px * image.resize_px / image.crop_px)})


def _check(network: NetworkParams, protocol: str, image: ImageParams) -> None:
    try:
        check_images(build_backbone(network.arch, network.width, network.stem, 0), network.arch, image.crop_px)
    except UserError:
        line = f"transfer.protocols = {protocol}: {network.arch} does not accept images of {image.crop_px} px"
        raise UserError(f"{line}; leave {protocol} out, or set transfer.resized_px") from None
