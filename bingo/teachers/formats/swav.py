"""SwAV and DeepCluster-v2 (Caron et al. 2020), as facebookresearch/swav writes it: main_swav.py, src/resnet50.py."""

from typing import Any

from bingo.teachers.contract import Parts, divide, entry, under, whole

EXPECTED = "names module.projection_head.* beside module.conv1.weight, in the file itself or its state_dict"
KEY_WIDTH = 128


def parts(content: Any) -> Parts | None:
    """The network and its projection head: Linear, BatchNorm (RN50w5 has none), ReLU, Linear. The prototypes are left out.

    The published files (swav_800ep_pretrain.pth.tar, swav_RN50w2_400ep_pretrain.pth.tar) are the state dict itself, checkpoints of
    your own training contain it under `state_dict`. resnet50w2, w4 and w5 multiply all channels: arch resnet50, width 2.0, 4.0, 5.0. The
    first convolution pads by 1 (in a separate layer) and by 2, together torchvision's 3. The code normalises by a std of 0.228 in
    red where ImageNet's is 0.229, which the released BINGO code uses as well.
    """
    state = entry(content, "state_dict") or whole(content)
    if not under(state, "module.projection_head.") or "module.conv1.weight" not in state:
        return None
    normalised = "module.projection_head.1.running_mean" in state  # all but RN50w5 (issue 35 of facebookresearch/swav)
    layers = ("linear", "batchnorm", "relu", "linear") if normalised else ("linear", "relu", "linear")
    return divide(state, "module.", "module.projection_head.", ("module.prototypes",), layers=layers)
