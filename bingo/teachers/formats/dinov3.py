"""DINOv3 (Simeoni et al. 2025), the backbones that facebookresearch/dinov3 publishes: dinov3/models/vision_transformer.py."""

from typing import Any

from torch import Tensor

from bingo.teachers.contract import ANY_IMAGE, Parts, divide, renamed, whole

EXPECTED = "the state dict of a vision transformer with storage_tokens and rope_embed.periods"
KEY_WIDTH = None
_RENAMED = (
    ("storage_tokens", "reg_token"),
    (".ls1.gamma", ".gamma_1"),
    (".ls2.gamma", ".gamma_2"),
    (".mlp.w1.", ".mlp.fc1_g."),
    (".mlp.w2.", ".mlp.fc1_x."),
    (".mlp.w3.", ".mlp.fc2."),
)
_BIAS, _MASK = ".attn.qkv.bias", ".attn.qkv.bias_mask"


def parts(content: Any) -> Parts | None:
    """The backbone, whose unit feature is the key: its class token, as in DINOv3 (timm's default differs).

    arch is timm's vit_small_patch16_dinov3_qkvb, ...: all published transformers except the largest (vit_7b_patch16_dinov3) have biases
    of queries and values; the bias of the keys is masked out, as in DINOv3's code. The mask token, the norm of local crops and the
    periods of the rotary embedding, which timm computes, are left out.
    """
    state = whole(content)
    if "storage_tokens" not in state or "rope_embed.periods" not in state:
        return None
    timms: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(_BIAS):
            block = name.removesuffix(_BIAS)
            query, _, value = (tensor * state.get(f"{block}{_MASK}", 1)).chunk(3)
            timms |= {f"{block}.attn.q_bias": query, f"{block}.attn.v_bias": value}
        elif not name.endswith(_MASK):
            timms[renamed(name, _RENAMED)] = tensor
    options = ANY_IMAGE | {"global_pool": "token"}
    return divide(timms, "", left_out=("mask_token", "local_cls_norm", "rope_embed"), options=options)
