"""MoCo-v3 (Chen et al. 2021), as facebookresearch/moco-v3 writes it: main_moco.py, moco/builder.py, vits.py."""

from typing import Any

from bingo.teachers.contract import ANY_IMAGE, Parts, divide, entry, under

EXPECTED = "a state_dict with module.base_encoder.*"
KEY_WIDTH = 256
_BASE = "module.base_encoder."
_HIDDEN = ("linear_no_bias", "batchnorm", "relu")
_LAST = ("linear_no_bias", "batchnorm_no_affine")
_SMALL_WIDTH = 384


def parts(content: Any) -> Parts | None:
    """base_encoder with its projector; momentum_encoder and predictor are left out.

    The projector is `fc` with two layers in a ResNet and `head` with three in a vision transformer; it ends in a BatchNorm without
    weights, whose output is the key. The feature of a transformer is its class token; its fixed sine-cosine position embedding is an
    ordinary `pos_embed` of the file. vits.py gives ViT-S twelve heads where timm's and DINO's have six.
    """
    state = entry(content, "state_dict")
    if not under(state, _BASE):
        return None
    others = ("module.momentum_encoder", "module.predictor")
    if f"{_BASE}cls_token" not in state:
        return divide(state, _BASE, f"{_BASE}fc.", others, layers=_HIDDEN + _LAST)
    small = state[f"{_BASE}cls_token"].shape[-1:] == (_SMALL_WIDTH,)
    options = ANY_IMAGE | ({"num_heads": 12} if small else {})
    return divide(state, _BASE, f"{_BASE}head.", others, layers=_HIDDEN * 2 + _LAST, options=options)
