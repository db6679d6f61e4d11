"""MoCo-v1 and v2 (He et al. 2020, Chen et al. 2020), as facebookresearch/moco writes it: main_moco.py, moco/builder.py."""

from typing import Any

from bingo.teachers.contract import Parts, divide, entry, under

EXPECTED = "a state_dict with module.encoder_q.*"
KEY_WIDTH = 128
_QUERY = "module.encoder_q."
_PLAIN = {"weight": "0.weight", "bias": "0.bias"}  # v1's head is one layer, not a sequence
_OTHERS = ("module.encoder_k", "module.queue", "module.queue_ptr")


def parts(content: Any) -> Parts | None:
    """encoder_q and its head `fc`: v1's one layer, or v2's two with ReLU between them; encoder_k and the queue are left out.

    The released BINGO code also uses encoder_q (main_moco.py:303-310). The ResNet-50, 101 and 152 that SEED and DisCo trained as
    teachers have this format.
    """
    state = entry(content, "state_dict")
    if not under(state, _QUERY) or under(state, "module.teacher_encoder_q."):
        return None
    renamed = {f"{_QUERY}fc.{old}": f"{_QUERY}fc.{new}" for old, new in _PLAIN.items()}
    state = {renamed.get(name, name): tensor for name, tensor in state.items()}
    layers = ("linear", "relu", "linear") if under(state, f"{_QUERY}fc.2.") else ("linear",)
    return divide(state, _QUERY, f"{_QUERY}fc.", _OTHERS, layers=layers)
