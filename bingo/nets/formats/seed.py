"""Students of SEED (Fang et al. 2021), as jacobswan1/SEED writes them: main.py, seed/builder.py. Anchors for our evaluations."""

from typing import Any

from bingo.nets.parts import Parts, divide, entry, under

EXPECTED = "a state_dict with module.student.*"
_STUDENT = "module.student."
_PLAIN = {"weight": "0.weight", "bias": "0.bias"}  # without --student_mlp the head is one layer, not a sequence


def parts(content: Any) -> Parts | None:
    """student and its head `fc`, one layer or two with ReLU between them; the teacher and the queue are left out.

    ResNets only: SEED's EfficientNets and MobileNets have names and layers of their own, which no network of timm has.
    """
    state = entry(content, "state_dict")
    if not under(state, _STUDENT):
        return None
    renamed = {f"{_STUDENT}fc.{old}": f"{_STUDENT}fc.{new}" for old, new in _PLAIN.items()}
    state = {renamed.get(name, name): tensor for name, tensor in state.items()}
    layers = ("linear", "relu", "linear") if under(state, f"{_STUDENT}fc.2.") else ("linear",)
    return divide(state, _STUDENT, f"{_STUDENT}fc.", ("module.teacher", "module.queue", "module.queue_ptr"), layers=layers)
