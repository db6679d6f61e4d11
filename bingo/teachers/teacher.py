"""The frozen teacher and its file, models/teacher.safetensors: a backbone and its projection head, from any source.

The sources of teachers are in bingo/teachers/reading/sources.py, so that reading a teacher does not depend on how it was obtained.
Shape letters: B images of a batch, D feature width, P key width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from bingo.nets.backbones import Backbone, build_backbone
from bingo.nets.checkpoint import building, check_fits, load_network, load_strictly, save_network
from bingo.nets.heads import describe_head, described_head, head_widths, unit
from bingo.params import ImageParams, NetworkParams, image_values, seen_image
from bingo.runtime.errors import UserError


class Teacher(nn.Module):
    """A backbone with its projection head (or none: then the unit feature is the key); parameters never change.

    It stays in eval mode, whatever is passed to `train`. After `batch_statistics(True)`, its BatchNorm layers normalise by the
    statistics of the batch, as in the released code (main_moco.py never calls `.eval()` on it). There the running statistics
    drift; here they are constant, so a key depends only on its batch and a restart needs no state of the teacher.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module | None, metadata: Mapping[str, Any]):
        super().__init__()
        self.backbone, self.head, self.metadata = backbone, head, dict(metadata)
        self._batch_statistics = False
        self.requires_grad_(False)
        for layer in self._batch_norms():
            layer.momentum = 0.0
        self.eval()

    @property
    def image(self) -> ImageParams:
        """Size and normalisation of its images, as recorded in its file."""
        return seen_image(self.metadata)

    def _batch_norms(self) -> list[nn.modules.batchnorm._BatchNorm]:
        return [layer for layer in self.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever `mode`; BatchNorm as set by `batch_statistics`."""
        super().train(False)
        for layer in self._batch_norms():
            layer.train(self._batch_statistics)
        return self

    def batch_statistics(self, on: bool) -> None:
        """Let BatchNorm layers normalise by the statistics of each batch, or by the stored ones again."""
        self._batch_statistics = on
        self.train()

    def weights_for(self, dtype: torch.dtype) -> Self:
        """Keep the weights of convolutions and linear layers in `dtype`, as `autocast` would cast them in each pass: outputs are the same
        bit by bit and take half the memory, but from now on the teacher works only within that context."""
        for layer in self.modules():
            if type(layer) in (nn.Conv2d, nn.Linear):  # modules derived from them may use their weights in forward
                layer.to(dtype)
        return self

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Pooled backbone features, float32 (B, D), of normalised images (B, 3, H, W); not of unit length."""
        return self.backbone(x).float()

    @torch.no_grad()
    def keys(self, x: Tensor) -> Tensor:
        """Unit keys, float32 (B, P), of normalised images (B, 3, H, W)."""
        return self(x)[1]

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and keys from a single pass, as returned by `features` and `keys`."""
        pooled = self.backbone(x)
        return pooled.float(), unit(pooled if self.head is None else self.head(pooled))


def teacher_metadata(
    network: NetworkParams, image: ImageParams, backbone: Backbone, head: nn.Sequential | None, source: Mapping[str, Any]
) -> dict[str, Any]:
    """The metadata of a teacher's file; `source` adds at least `source` and `pretrained`, and `options` of the backbone, if any."""
    return {
        "kind": "teacher",
        **{name: getattr(network, name) for name in ("arch", "width", "stem")},
        **image_values(image),
        "feature_width": backbone.feature_width,
        "head": None if head is None else describe_head(head),
        "key_width": backbone.feature_width if head is None else head_widths(head)[-1],
        "source_sha256": None,
        **source,
    }


def untrained_backbone(metadata: Mapping[str, Any], seed_value: int) -> Backbone:
    """The network of a teacher's backbone with seeded initial weights."""
    return build_backbone(metadata["arch"], metadata["width"], metadata["stem"], seed_value, metadata.get("options"))


def save_teacher(path: Path | str, backbone: nn.Module, head: nn.Module | None, metadata: Mapping[str, Any]) -> None:
    """Write the teacher with the names backbone.* and head.*, and the metadata of `teacher_metadata`."""
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    if head is not None:
        state |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    save_network(path, state, metadata)


def load_teacher(path: Path | str) -> Teacher:
    """Load the frozen teacher from a file that `save_teacher` wrote, on the CPU. Its `features` and `keys` map normalised images (B, 3, P,
    P), float32, to features (B, D) and to keys (B, P) of unit length.

    Raises UserError for a file that is not a teacher's, and if the installed timm or torchvision builds a different network.

    >>> import torch
    >>> from bingo import load_teacher
    >>> teacher = load_teacher("models/teacher.safetensors")
    >>> side_px = teacher.image.crop_px
    >>> teacher.keys(torch.zeros(2, 3, side_px, side_px)).shape
    torch.Size([2, 16])
    """
    state, metadata = load_network(path)
    if metadata.get("kind") != "teacher":
        raise UserError(f"{path}: holds a {metadata.get('kind', 'network of no kind')}, not a teacher; run: dvc repro teacher")
    with building(path):
        if metadata["head"]:
            with torch.device("meta"):  # a head that does not belong to the tensors may have any size
                described = described_head(metadata["head"]).state_dict(prefix="head.")
            check_fits(described, {name: tensor for name, tensor in state.items() if name.startswith("head.")}, str(path))
        head = described_head(metadata["head"]) if metadata["head"] else None
        teacher = Teacher(untrained_backbone(metadata, seed_value=0), head, metadata)
        load_strictly(teacher, state, str(path))
    return teacher
