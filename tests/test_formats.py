"""Published checkpoints of every format: fabricated with the names, wrappers and layouts of the code that writes them, read strictly,
and equal in their features and keys to that code's own network."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from published import Swav, WideResNet50, lively
from torch import Tensor, nn

from bingo.errors import UserError
from bingo.nets.backbones import build_backbone
from bingo.nets.teacher_sources import make_teacher
from bingo.nets.teachers import Teacher, load_teacher, save_teacher
from bingo.params import load_params

PARAMS = load_params(Path(__file__).parent.parent / "params.yaml")
IMAGENET = {"crop_px": 64, "resize_px": 64, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
IMAGE = PARAMS.image.model_copy(update=IMAGENET)
X = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
NARROW = 0.125  # of all channels: the layouts do not depend on it


def params_of(teacher_format: str, path, **changes):
    own = {"arch": "resnet50", "width": NARROW, "stem": "imagenet", "source": "checkpoint"}
    return PARAMS.teacher.model_copy(update={**own, "format": teacher_format, "checkpoint": str(path), **changes})


def teacher_of(tmp_path, teacher_format: str, content, image=IMAGE, **changes) -> Teacher:
    """The checkpoint written, read, written as a teacher and read again."""
    torch.save(content, tmp_path / "checkpoint.pth")
    made = make_teacher(params_of(teacher_format, tmp_path / "checkpoint.pth", **changes), image, 0)
    save_teacher(tmp_path / "teacher.safetensors", *made)
    return load_teacher(tmp_path / "teacher.safetensors")


def refusal(tmp_path, teacher_format: str, content, **changes) -> str:
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError) as caught:
        make_teacher(params_of(teacher_format, tmp_path / "checkpoint.pth", **changes), IMAGE, 0)
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


def prefixed(net: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in net.state_dict().items()}


@torch.no_grad()
def assert_same(teacher: Teacher, features_BD: Tensor, keys_BP: Tensor, x: Tensor = X) -> None:
    torch.testing.assert_close(teacher.features(x), features_BD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher.keys(x), F.normalize(keys_BP, dim=1), rtol=1e-5, atol=1e-5)
    assert teacher.metadata["feature_width"] == features_BD.shape[1]
    assert teacher.metadata["key_width"] == keys_BP.shape[1]


@pytest.mark.parametrize("wrapped", [False, True], ids=["published", "own training"])
def test_swav(tmp_path, wrapped):
    net = lively(Swav(NARROW, hidden=48))
    state = prefixed(net, "module.")
    teacher = teacher_of(tmp_path, "swav", {"state_dict": state, "epoch": 3, "amp": {"loss_scaler0": {}}} if wrapped else state)
    with torch.no_grad():
        assert_same(teacher, *net(X))
    assert teacher.metadata["left_out"] == ["module.prototypes"]
    assert teacher.metadata["head"] == {"layers": ["linear", "batchnorm", "relu", "linear"], "widths": [256, 48, 128]}


@pytest.mark.parametrize("widen", [1, 2, 4, 5])
def test_wide_networks_of_swav_have_all_channels_multiplied(widen):
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in WideResNet50(widen, split_padding=True).state_dict().items()}
        net = build_backbone("resnet50", float(widen), "imagenet", 0)
    assert {name: tensor.shape for name, tensor in net.state_dict().items()} == expected
    assert net.feature_width == 2048 * widen
