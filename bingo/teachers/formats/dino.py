"""DINO (Caron et al. 2021), as facebookresearch/dino writes it: main_dino.py, vision_transformer.py; utils.py wraps both networks."""

from typing import Any

from bingo.teachers.contract import ANY_IMAGE, Parts, bare, depth_of, divide, entry, under, wrapper

EXPECTED = "a teacher with backbone.* and head.mlp.* beside a student, or a ResNet-50 or vision transformer alone"
KEY_WIDTH = 256


def parts(content: Any) -> Parts | None:
    """The teacher network of a full checkpoint, with its head; or a backbone alone, whose unit feature is the key.

    The key is the output of the head's MLP (width 256 in the published files), which the head normalises to unit length before the last
    layer to the prototypes. That layer and the student are left out. The MLP has three linear layers with GELU between them, that of the
    published ResNet-50 two and a BatchNorm (issue 189 of facebookresearch/dino). The feature of a transformer is its class token.
    DINO's ViT-S and ViT-B are timm's of patch size 16 and 8 (vit_small_patch16_224, ...).
    """
    if state := bare(content):
        return divide(state, "", options=_options(state), sure=False)
    state = entry(content, "teacher")
    ddp = wrapper(state, "backbone")  # main_dino.py wraps a teacher with BatchNorm, but the published ResNet-50 is not wrapped
    head = under(state, f"{ddp}head.mlp.")
    if not head or not under(state, f"{ddp}backbone."):
        return None
    hidden = ("linear", "batchnorm", "gelu") if "1.running_mean" in head else ("linear", "gelu")
    student = {f"student.{name}": tensor for name, tensor in entry(content, "student").items()}
    return divide(
        state | student,
        f"{ddp}backbone.",
        f"{ddp}head.mlp.",
        (f"{ddp}head.last_layer", "student"),
        layers=hidden * (depth_of(head) - 1) + ("linear",),
        options=_options(under(state, f"{ddp}backbone.")),
    )


def _options(trunk: dict[str, Any]) -> dict[str, Any]:
    return dict(ANY_IMAGE) if "cls_token" in trunk else {}
