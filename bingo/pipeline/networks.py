"""The networks that linear_eval and knn_eval compare, each as features of all rows: backbones, the teacher, raw pixels.

An evaluation of one of them reads that network's own file alone: what it gives does not change with another network.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bingo.pipeline import paths
from bingo.pipeline.backbones import backbones
from bingo.pipeline.run import Run

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bingo.images.listing import Listing
    from bingo.params import FeatureParams

STORED = ("teacher", "pixels")  # no network is run for their features


class Networks:
    """Networks by name, opened before any work, so that a missing or damaged file is reported first.

    `backbones` are those that are run, on the CPU; raises UserError for a file that is missing or damaged, or another listing's.
    """

    def __init__(self, run: Run, names: Sequence[str], listing: "Listing"):
        from bingo.embeddings.store import read_embeddings
        from bingo.images.images import open_images

        self.run, self.listing = run, listing
        run_ones = [name for name in names if name not in STORED]
        self.backbones = backbones(run, run_ones) if run_ones else {}  # stored features need no timm
        self._teacher = read_embeddings(paths.EMBEDDINGS, listing) if "teacher" in names else None
        self.images = open_images(listing, paths.IMAGES, run.params.dataset) if set(names) - {"teacher"} else None

    def features(self, name: str, params: "FeatureParams", device: "torch.device | None") -> "np.ndarray | None":
        """Features (N, width) of every row, float32; None for pixels that are not held in memory. Stored ones need no device."""
        import numpy as np

        from bingo.images.images import MemoryImages

        if name == "teacher" and self._teacher is not None:
            return self._teacher.features_ND.astype(np.float32)
        if name == "pixels":
            pixels = self.images.images_NSS3 if isinstance(self.images, MemoryImages) else None
            return None if pixels is None else pixels.reshape(len(pixels), -1).astype(np.float32)
        return self._computed(name, params, device)

    def _computed(self, name: str, params: "FeatureParams", device: "torch.device | None") -> "np.ndarray":
        import numpy as np
        import torch

        from bingo.evals.features import backbone_features

        assert self.images is not None
        assert device is not None
        backbone = self.backbones[name].to(device).to(memory_format=torch.channels_last)
        rows, image = np.arange(len(self.listing)), self.run.params.image
        return backbone_features(backbone, self.images, rows, image, device, params.precision, params.batch_images)
