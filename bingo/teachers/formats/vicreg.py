"""VICReg (Bardes et al. 2022), as facebookresearch/vicreg writes it: main_vicreg.py, resnet.py."""

from typing import Any

from bingo.teachers.contract import Parts, bare, depth_of, divide, entry, under, whole, wrapper

EXPECTED = "a model with module.backbone.* and module.projector.*, or a ResNet alone"
KEY_WIDTH = 8192


def parts(content: Any) -> Parts | None:
    """The backbone with its expander `projector`, or (resnet50.pth, resnet50x2.pth, resnet200x2.pth) the backbone alone.

    The expander consists of linear layers with BatchNorm and ReLU between them, the last without bias; its output, of width 8,192 as
    published, is the key. resnet50x2 and resnet200x2 multiply all channels by two: arch resnet50 and resnet200, width 2.0. The first
    convolution pads by 1 (in a separate layer) and by 2, together torchvision's 3.
    """
    if state := bare(content):
        return divide(state, "", sure=False)
    state = entry(content, "model") or whole(content)
    ddp = wrapper(state, "backbone")
    head = under(state, f"{ddp}projector.")
    if not head or not under(state, f"{ddp}backbone.") or under(state, f"{ddp}bn."):
        return None
    layers = ("linear", "batchnorm", "relu") * (depth_of(head) - 1) + ("linear_no_bias",)
    return divide(state, f"{ddp}backbone.", f"{ddp}projector.", layers=layers)
