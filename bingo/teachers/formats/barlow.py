"""Barlow Twins (Zbontar et al. 2021), as facebookresearch/barlowtwins writes it: main.py."""

from typing import Any

from bingo.teachers.contract import Parts, bare, depth_of, divide, entry, under, whole, wrapper

EXPECTED = "a model with module.backbone.*, module.projector.* and module.bn.*, or a ResNet-50 alone"
KEY_WIDTH = 8192


def parts(content: Any) -> Parts | None:
    """The backbone with its projector, or (resnet50.pth) the backbone alone.

    The projector consists of linear layers without bias, with BatchNorm and ReLU between them. The loss compares only its output
    standardised by `bn`, a BatchNorm without weights; so the output of `bn` is the key, of width 8,192 as published.
    """
    if state := bare(content):
        return divide(state, "", sure=False)
    state = entry(content, "model") or whole(content)
    ddp = wrapper(state, "backbone")
    head = under(state, f"{ddp}projector.")
    if not head or not under(state, f"{ddp}backbone.") or not under(state, f"{ddp}bn."):
        return None
    layers = ("linear_no_bias", "batchnorm", "relu") * (depth_of(head) - 1) + ("linear_no_bias",)
    joined = {name.replace(f"{ddp}bn.", f"{ddp}projector.{len(layers)}.", 1): tensor for name, tensor in state.items()}
    return divide(joined, f"{ddp}backbone.", f"{ddp}projector.", layers=(*layers, "batchnorm_no_affine"))
