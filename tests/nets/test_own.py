"""Networks of the user's own: a function in a file builds the student, or the teacher with its normalisation and image size."""

import pytest
import torch
from torch import nn

from bingo.nets.backbones import build_backbone
from bingo.nets.own import example
from bingo.nets.students import load_backbone, save_student
from bingo.params import arch_names, read_yaml, validate
from bingo.planning.limits import check_limits
from bingo.runtime.errors import UserError
from bingo.teachers.reading.sources import make_teacher
from bingo.teachers.teacher import load_teacher, save_teacher
from tests.workspace import ROOT

SHIPPED = read_yaml(ROOT / "params.yaml")
NET = """
from torch import nn
def make():
    return nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 6{more}
def other():
    {other}
"""


def params_of(teacher=None, student=None):
    changed = {"teacher": SHIPPED["teacher"] | (teacher or {}), "student": SHIPPED["student"] | (student or {})}
    return validate(SHIPPED | changed, "params.yaml")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes mine.py into a folder that replaces bingo/nets/own."""
    for module in ("bingo.params.arch_names", "bingo.nets.backbones", "bingo.teachers.reading.sources"):
        monkeypatch.setattr(f"{module}.OWN", tmp_path)
    return lambda more="", other="return 1": (tmp_path / "mine.py").write_text(NET.format(more=more, other=other))


def test_a_teacher_provides_its_normalisation_and_size_and_is_read_back(own, tmp_path):
    own(", [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 24")
    params = params_of({"factory": "mine.py:make"})
    save_teacher(tmp_path / "t.safetensors", *make_teacher(params.teacher, params.teacher_image, 0))
    teacher = load_teacher(tmp_path / "t.safetensors")
    seen = teacher.image
    assert (seen.crop_px, seen.resize_px, seen.mean, seen.std) == (24, 24, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (teacher.metadata["key_width"], teacher.metadata["source"], teacher.metadata["pretrained"]) == (6, "factory", True)
    x = torch.randn(2, 3, 24, 24)
    weight, bias = teacher.backbone.state_dict()["0.weight"], teacher.backbone.state_dict()["0.bias"]
    torch.testing.assert_close(teacher.features(x), nn.functional.conv2d(x, weight, bias, 4).mean(dim=(2, 3)))
    before = teacher.metadata["source_sha256"]
    own(", [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 24 ")
    assert make_teacher(params.teacher, params.teacher_image, 0)[2]["source_sha256"] != before, "an edit changes the teacher's file"
    larger = params_of({"factory": "mine.py:make", "image": SHIPPED["teacher"]["image"] | {"crop_px": 48}})
    assert make_teacher(larger.teacher, larger.teacher_image, 0)[2]["resize_px"] == 48


def test_a_student_is_trained_and_read_back_like_any_other(own, tmp_path):
    own()
    params = params_of(student={"factory": "mine.py:make"})
    assert (params.student.arch, params.student.width, params.student.stem) == ("mine.py:make", 1.0, "imagenet")
    check_limits(params, 1)
    nets = [build_backbone(params.student.arch, 1.0, "imagenet", seed) for seed in (3, 3, 4)]
    assert torch.equal(nets[0][0].weight, nets[1][0].weight)
    assert not torch.equal(nets[0][0].weight, nets[2][0].weight)
    files = tmp_path / "s.safetensors", tmp_path / "h.safetensors"
    save_student(*files, nets[0], nn.Linear(6, 4), params.student, params.image, {})
    read, _ = load_backbone(files[0], params.student)
    assert torch.equal(read[0].weight, nets[0][0].weight)
    assert read.feature_width == 6


@pytest.mark.parametrize("factory", ["no.py:make", "mine.py", "mine.py:mak", "../mine.py:make"])
def test_a_missing_factory_is_an_error_in_one_line_with_its_key(own, factory):
    own()
    with pytest.raises(UserError) as caught:
        params_of(student={"factory": factory})
    (line,) = caught.value.lines
    assert f"student.factory = '{factory}'" in line


@pytest.mark.parametrize("other", ["raise OSError('no file')", "return 1", "return None, 5", "return nn.Flatten(), 'x'"])
def test_a_mistake_of_a_function_is_an_error_in_one_line(own, other):
    own(other=other)
    with pytest.raises(UserError, match=r"^factory = mine\.py:other: "):
        build_backbone("mine.py:other", 1.0, "imagenet", 0)


def test_a_teacher_needs_a_normalisation_and_the_parameters_are_valid_for_any_factory(own):
    own()
    params = params_of({"factory": "mine.py:make"})
    with pytest.raises(UserError, match=r"^teacher\.factory = mine\.py:make: returns no mean"):
        make_teacher(params.teacher, params.teacher_image, 0)
    assert arch_names.own_mistake("mine.py:make") is None


def test_the_examples_have_the_feature_width_that_they_state():
    for made, extra in ((example.student(), 0), (example.teacher(), 3)):
        assert len(made) == 2 + extra
        assert made[0](torch.zeros(2, 3, 32, 32)).shape == (2, made[1])
