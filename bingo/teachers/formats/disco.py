"""Students of DisCo (Gao et al. 2022), as Yuting-Gao/DisCo-pytorch writes them: DisCo/main.py and
DisCo/moco/builder_kq_mse_largeembedding_2048.py. Published students, on which evaluations can be checked.
"""

from typing import Any

from bingo.teachers.contract import Parts, divide, entry, under

EXPECTED = "a state_dict with module.encoder_q.* and module.teacher_encoder_q.*"
KEY_WIDTH = 128
_STUDENT = "module.encoder_q."
_OTHERS = ("encoder_k", "teacher_encoder_q", "teacher_encoder_k", "queue", "queue_ptr")


def parts(content: Any) -> Parts | None:
    """encoder_q, the student, with its head of two linear layers and ReLU; all other encoders and the queue are left out.

    The head is `fc` in a ResNet (torchvision's names), `classifier` in an EfficientNet (timm's names: efficientnet_b0).
    """
    state = entry(content, "state_dict")
    if not under(state, _STUDENT) or not under(state, "module.teacher_encoder_q."):
        return None
    head = "classifier" if under(state, f"{_STUDENT}classifier.") else "fc"
    others = [f"module.{name}" for name in _OTHERS]
    return divide(state, _STUDENT, f"{_STUDENT}{head}.", others, layers=("linear", "relu", "linear"))
