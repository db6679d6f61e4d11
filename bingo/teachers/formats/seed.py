"""Students of SEED (Fang et al. 2021), as jacobswan1/SEED writes them: main.py, seed/builder.py. For checking evaluations."""

from typing import Any

from bingo.teachers.contract import Parts, divide, entry, under

EXPECTED = "a state_dict with module.student.* or (as released) module.encoder_q.*"
KEY_WIDTH = 128
_PLAIN = {"weight": "0.weight", "bias": "0.bias"}  # without --student_mlp the head is one layer, not a sequence
_OTHERS = ("teacher", "encoder_k", "queue", "small_queue", "queue_ptr")


def parts(content: Any) -> Parts | None:
    """student and its head `fc`, one layer or two with ReLU between them; the teacher and the queues are left out.

    The code writes student and teacher; in the released files the student is encoder_q (issue 3 of jacobswan1/SEED). ResNets only:
    SEED's EfficientNets and MobileNets have names and layers that no network of timm has.
    """
    state = entry(content, "state_dict")
    released = not under(state, "module.student.")
    student = "module.encoder_q." if released else "module.student."
    if not under(state, student) or under(state, "module.teacher_encoder_q."):
        return None
    renamed = {f"{student}fc.{old}": f"{student}fc.{new}" for old, new in _PLAIN.items()}
    state = {renamed.get(name, name): tensor for name, tensor in state.items()}
    layers = ("linear", "relu", "linear") if under(state, f"{student}fc.2.") else ("linear",)
    others = [f"module.{name}" for name in _OTHERS]
    return divide(state, student, f"{student}fc.", others, layers=layers, sure=not released)
