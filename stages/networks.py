"""The networks that the evaluations compare, each as features of all rows: student, baselines, teacher, untrained student, raw pixels."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from stages import paths
from stages.backbones import backbones
from stages.common import Run

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bingo.data.images import Images
    from bingo.data.listing import Listing


def features_of_networks(run: Run, listing: "Listing", images: "Images", device: "torch.device") -> "Iterator[tuple[str, np.ndarray]]":
    """Name and features (N, width) of every row: every backbone's, the teacher's stored ones, pixels where they are stored."""
    import numpy as np
    import torch

    from bingo.data.embeddings import read_embeddings
    from bingo.data.images import MemoryImages
    from bingo.evals.features import backbone_features

    params, rows = run.params, np.arange(len(listing))
    teacher = read_embeddings(paths.EMBEDDINGS, listing)
    for name, backbone in backbones(run, ["student", *params.baselines, "untrained"]).items():
        module = backbone.to(device, memory_format=torch.channels_last)
        features = backbone_features(module, images, rows, params.image, device, params.distill.precision, params.extract.batch_images)
        yield name, features
    yield "teacher", teacher.features_ND.astype(np.float32)
    if isinstance(images, MemoryImages):
        yield "pixels", images.images_NSS3.reshape(len(listing), -1).astype(np.float32)
