"""BYOL (Grill et al. 2020), DeepMind's JAX weights as ajtejankar/byol-convert writes them for PyTorch: convert.py, resnet.py."""

from typing import Any

from bingo.teachers.contract import Parts, bare, divide

EXPECTED = "the state dict of a ResNet with its classifier, as convert.py writes it"
KEY_WIDTH = None


def parts(content: Any) -> Parts | None:
    """The online network's backbone under torchvision's names; its classifier is left out, and its projector was not converted.

    The unit feature is the key. The network pads as TensorFlow does (resnet.py, `pad_same`), which the teacher keeps. The file of
    pretrain_res200x2 is arch resnet200, width 2.0. DeepMind's own pretrain_*.pkl is a pickle, which is never run: convert it first.
    """
    state = bare(content)
    if not state or "cls_token" in state:
        return None
    return divide(state, "", left_out=("fc",), options={"padding": "same"}, sure=False)
