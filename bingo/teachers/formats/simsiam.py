"""SimSiam (Chen and He 2021), as facebookresearch/simsiam writes it: main_simsiam.py, simsiam/builder.py."""

from typing import Any

from bingo.teachers.contract import Parts, divide, entry, under

EXPECTED = "a state_dict with module.encoder.*"
KEY_WIDTH = 2048
_ENCODER = "module.encoder."


def parts(content: Any) -> Parts | None:
    """encoder with its projector `fc`: three linear layers, each followed by a BatchNorm, the last of which has no weights.

    The key is the output of the last BatchNorm, the target of SimSiam's loss. The predictor is left out.
    """
    state = entry(content, "state_dict")
    if not under(state, _ENCODER):
        return None
    layers = ("linear_no_bias", "batchnorm", "relu") * 2 + ("linear", "batchnorm_no_affine")
    return divide(state, _ENCODER, f"{_ENCODER}fc.", ("module.predictor",), layers=layers)
