"""ViT-Ti for small images: timm's vit_tiny_patch16_224 with patches of 4 pixels: 16 patches for digits of 16 px, 64 for images of 32 px."""

import timm
from torch import nn


def tiny_patch4() -> tuple[nn.Module, int]:
    """The network and its feature width; its position embedding is resampled for images of any whole number of patches."""
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=0, dynamic_img_size=True), 192
