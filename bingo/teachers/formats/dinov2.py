"""DINOv2 (Oquab et al. 2023), the backbones that facebookresearch/dinov2 publishes: dinov2/models/vision_transformer.py."""

from typing import Any

from bingo.teachers.contract import ANY_IMAGE, Parts, divide, renamed, whole

EXPECTED = "the state dict of a vision transformer with mask_token and pos_embed"
KEY_WIDTH = None
_RENAMED = ((".mlp.w12.", ".mlp.fc1."), (".mlp.w3.", ".mlp.fc2."), ("register_tokens", "reg_token"))


def parts(content: Any) -> Parts | None:
    """The backbone, whose unit feature (its class token) is the key; the mask token is left out.

    arch is timm's vit_small_patch14_dinov2, ..., with registers vit_small_patch14_reg4_dinov2, .... With registers, timm adds no position
    to the class token, so the file's is added to it here. timm resamples position embeddings if image.crop_px is not 518: bicubic with
    antialiasing, which DINOv2's own code uses only for the networks with registers.
    """
    state = whole(content)
    if "mask_token" not in state or "pos_embed" not in state or "decoder_pos_embed" in state:  # the last is MAE's
        return None
    if "register_tokens" in state:
        position = state["pos_embed"]
        state = state | {"cls_token": state["cls_token"] + position[:, :1], "pos_embed": position[:, 1:]}
    return divide({renamed(name, _RENAMED): tensor for name, tensor in state.items()}, "", left_out=("mask_token",), options=ANY_IMAGE)
