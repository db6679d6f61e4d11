"""The networks that the evaluations compare, each as features of all rows: student, baselines, teacher, untrained student, raw pixels."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from stages import paths
from stages.common import Run

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from bingo.data.images import Images
    from bingo.data.listing import Listing


def backbones(run: Run) -> "dict[str, nn.Module]":
    """The trained student, each baseline, and the same student untrained, on the CPU: all of them, so that a missing one is told first."""
    from bingo import seeds
    from bingo.nets.backbones import build_backbone
    from bingo.nets.students import load_student

    network = run.params.student
    files = {"student": paths.STUDENT, **{method: paths.BASELINES / f"{method}.safetensors" for method in run.params.baselines}}
    untrained = build_backbone(network.arch, network.width, network.stem, seeds.torch_seed(run.params.seed, "student")).eval()
    return {**{name: load_student(path, network)[0] for name, path in files.items()}, "untrained": untrained}


def features_of_networks(run: Run, listing: "Listing", images: "Images", device: "torch.device") -> "Iterator[tuple[str, np.ndarray]]":
    """Name and features (N, width) of every row: `backbones`, then the teacher's stored features, then pixels where they are stored."""
    import numpy as np
    import torch

    from bingo.data.embeddings import read_embeddings
    from bingo.data.images import MemoryImages
    from bingo.evals.features import backbone_features

    params, rows = run.params, np.arange(len(listing))
    teacher = read_embeddings(paths.EMBEDDINGS, listing)
    for name, backbone in backbones(run).items():
        backbone = backbone.to(device, memory_format=torch.channels_last)
        yield (
            name,
            backbone_features(backbone, images, rows, params.image, device, params.distill.precision, params.extract.batch_images),
        )
    yield "teacher", teacher.features_ND.astype(np.float32)
    if isinstance(images, MemoryImages):
        yield "pixels", images.images_NSS3.reshape(len(listing), -1).astype(np.float32)
