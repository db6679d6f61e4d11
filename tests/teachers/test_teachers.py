"""Teachers: frozen, equal to the networks of the files they were read from, and strict about those files."""

import copy
import os
import pickle
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from published import lively
from torch import nn
from torchvision import models as vision

from bingo.nets.backbones import build_backbone
from bingo.nets.checkpoint import save_network
from bingo.nets.heads import mlp_head
from bingo.params import load_params
from bingo.runtime.errors import UserError
from bingo.teachers.reading.foreign import Nothing, read_checkpoint
from bingo.teachers.reading.sources import make_teacher
from bingo.teachers.teacher import Teacher, load_teacher, save_teacher, teacher_metadata

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
IMAGENET = {"crop_px": 20, "resize_px": 20, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
IMAGE = PARAMS.image.model_copy(update=IMAGENET)
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def teacher_params(**changes):
    return PARAMS.teacher.model_copy(update={"arch": "resnet18", "width": 1.0, "stem": "imagenet", **changes})


def moco_params(path, **changes):
    return teacher_params(source="checkpoint", checkpoint=str(path), **{"width": 0.125, **changes})


def made_and_read(params, tmp_path) -> Teacher:
    save_teacher(tmp_path / "teacher.safetensors", *make_teacher(params, IMAGE, 0))
    return load_teacher(tmp_path / "teacher.safetensors")


def refusal(params) -> str:
    with pytest.raises(UserError) as caught:
        make_teacher(params, IMAGE, 0)
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


def moco_encoder(arch: str = "resnet18", version: int = 2) -> nn.Module:
    """The network of moco/builder.py: torchvision's with 128 outputs; v2 inserts a hidden layer before its `fc`."""
    net = getattr(vision, arch)(num_classes=128)
    if version == 2:
        net.fc = nn.Sequential(nn.Linear(net.fc.in_features, net.fc.in_features), nn.ReLU(), net.fc)
    return lively(net)


def narrow_encoder() -> nn.Module:
    """The same names with an eighth of the channels, for tests that do not depend on the network."""
    net = build_backbone("resnet18", 0.125, "imagenet", 0)
    net.fc = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 128))
    return lively(net)


def moco_content(query: nn.Module, rows: int = 32) -> dict:
    """A checkpoint as saved by main_moco.py."""
    other = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in query.state_dict().items()}
    state = {f"module.encoder_q.{name}": tensor for name, tensor in query.state_dict().items()}
    state |= {f"module.encoder_k.{name}": tensor for name, tensor in other.items()}
    state |= {"module.queue": torch.zeros(128, rows), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.03}]}}


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "version"), [("resnet18", 1), ("resnet18", 2), ("torchvision/resnet18", 2)])
def test_a_moco_checkpoint_gives_the_keys_of_its_query_encoder(tmp_path, arch, version):
    encoder = moco_encoder(arch.removeprefix("torchvision/"), version)
    torch.save(moco_content(encoder), tmp_path / "moco.pth.tar")
    teacher = made_and_read(moco_params(tmp_path / "moco.pth.tar", arch=arch, width=1.0), tmp_path)
    with torch.no_grad():
        expected = F.normalize(encoder(X), dim=1)
        encoder.fc = nn.Identity()
        features = encoder(X)
    torch.testing.assert_close(teacher.keys(X), expected)
    torch.testing.assert_close(teacher.features(X), features)
    assert torch.equal(teacher(X)[0], teacher.features(X))
    assert torch.equal(teacher(X)[1], teacher.keys(X))
    width = features.shape[1]
    assert teacher.metadata["head"] == ([width, width, 128] if version == 2 else [width, 128])
    assert teacher.metadata["left_out"] == ["module.encoder_k", "module.queue", "module.queue_ptr"]
    assert teacher.metadata["pretrained"] is True


def test_the_file_describes_the_teacher(tmp_path):
    torch.save(moco_content(narrow_encoder()), tmp_path / "moco.pth.tar")
    metadata = made_and_read(moco_params(tmp_path / "moco.pth.tar"), tmp_path).metadata
    assert len(metadata.pop("source_sha256")) == 64
    assert metadata == {
        "kind": "teacher", "arch": "resnet18", "width": 0.125, "stem": "imagenet", "crop_px": 20, "resize_px": 20,
        "mean": IMAGE.mean, "std": IMAGE.std, "feature_width": 64, "key_width": 128, "head": [64, 64, 128],
        "source": "checkpoint", "format": "moco", "pretrained": True,
        "left_out": ["module.encoder_k", "module.queue", "module.queue_ptr"],
    }  # fmt: skip


def test_old_files_that_are_not_archives_are_read_and_equal_teachers_have_equal_bytes(tmp_path):
    params = moco_params(tmp_path / "moco.pth.tar")
    torch.save(moco_content(narrow_encoder()), params.checkpoint, _use_new_zipfile_serialization=False)
    for name in ("one", "two"):
        save_teacher(tmp_path / name, *make_teacher(params, IMAGE, 0))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("dropped", ["layer4.1.conv2.weight", "fc.2.bias"])
def test_a_missing_key_is_named(tmp_path, dropped):
    content = moco_content(narrow_encoder())
    del content["state_dict"][f"module.encoder_q.{dropped}"]
    torch.save(content, tmp_path / "moco.pt")
    line = refusal(moco_params(tmp_path / "moco.pt"))
    assert f"missing {dropped.removeprefix('fc.')};" in line
    assert str(tmp_path) in line


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ("module.predictor.0.weight", "holds what no checkpoint of format moco has: module.predictor.0.weight"),
        ("module.encoder_q.layer5.0.conv1.weight", "does not fit resnet18: not expected layer5.0.conv1.weight"),
        ("module.encoder_q.fc.3.weight", "its projection head is not that of format moco: not expected 3.weight"),
    ],
)
def test_an_unexpected_key_is_named(tmp_path, added, says):
    content = moco_content(narrow_encoder())
    content["state_dict"][added] = torch.zeros(1)
    torch.save(content, tmp_path / "moco.pt")
    assert says in refusal(moco_params(tmp_path / "moco.pt"))


def test_another_network_or_no_head_is_refused(tmp_path):
    content = moco_content(narrow_encoder())
    torch.save(content, tmp_path / "moco.pt")
    assert "conv1.weight (8, 3, 7, 7) for (16, 3, 7, 7)" in refusal(moco_params(tmp_path / "moco.pt", width=0.25))
    line = refusal(moco_params(tmp_path / "moco.pt", arch="resnet34"))
    assert "its backbone does not fit resnet34: missing layer1.2.conv1.weight" in line
    state = {name: tensor for name, tensor in content["state_dict"].items() if ".fc." not in name}
    torch.save({"state_dict": state}, tmp_path / "moco.pt")
    assert "its projection head is not that of format moco: missing 0.weight, 0.bias" in refusal(moco_params(tmp_path / "moco.pt"))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("made by a pickle",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("extra", "named"), [(Hostile(), "mkdir"), (Path("x"), "pathlib"), (np.random.default_rng(0), "numpy.random")])
def test_pickled_code_is_named_and_never_run(tmp_path, monkeypatch, zipped, extra, named):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": extra}, "moco.pt", _use_new_zipfile_serialization=zipped)
    line = refusal(moco_params("moco.pt"))
    assert "holds pickled code (" in line
    assert named in line
    assert [path.name for path in tmp_path.iterdir()] == ["moco.pt"]


class Optimizer:
    """As stored by LARS in Barlow Twins and VICReg: with functions of the program that was run."""

    def __reduce__(self):
        return exclude_bias_and_norm, ()


def exclude_bias_and_norm():
    raise AssertionError("was run")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("extra", [Namespace(lr=1, nested=Namespace(a=[1])), np.float64(1), np.arange(3.0), Optimizer()])
def test_objects_pickled_beside_the_weights_are_ignored(tmp_path, monkeypatch, zipped, extra):
    monkeypatch.setattr(exclude_bias_and_norm, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "exclude_bias_and_norm", exclude_bias_and_norm, raising=False)
    content = moco_content(narrow_encoder())
    content["optimizer"]["param_groups"][0]["lr"] = extra
    torch.save(content, tmp_path / "moco.pt", _use_new_zipfile_serialization=zipped)
    read, _ = read_checkpoint(tmp_path / "moco.pt")
    assert (type(read["optimizer"]["param_groups"][0]["lr"]), vars(read["optimizer"]["param_groups"][0]["lr"])) == (Nothing, {})
    make_teacher(moco_params(tmp_path / "moco.pt"), IMAGE, 0)


def test_ignored_objects_cannot_be_weights(tmp_path):
    content = moco_content(narrow_encoder())
    content["state_dict"]["module.queue"] = Namespace(shape=(128, 32))
    torch.save(content, tmp_path / "moco.pt")
    assert "is not a checkpoint of format moco" in refusal(moco_params(tmp_path / "moco.pt"))
    assert not any(Nothing in named for named in torch.serialization.get_safe_globals() if isinstance(named, tuple))


def test_files_that_are_not_checkpoints_are_refused(tmp_path):
    path = tmp_path / "moco.pt"
    assert "the file does not exist" in refusal(moco_params(path))
    assert "is a folder without weights" in refusal(moco_params(tmp_path))
    torch.save(moco_content(narrow_encoder()), path)
    whole = path.read_bytes()
    noise = np.random.default_rng(0).bytes(5000)
    texts = (b"", b"<html>Not found", b"version https://git-lfs", b"\x80\x02")
    for content in (whole[: len(whole) // 2], whole[:-100], noise, pickle.dumps([1]), *texts):
        path.write_bytes(content)
        assert "is not a checkpoint of torch.save" in refusal(moco_params(path))
    (tmp_path / "x.safetensors").write_bytes(b"<html>")
    assert "is not a whole safetensors file" in refusal(moco_params(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"module.conv1.weight": torch.zeros(1), "module.bn1.bias": torch.zeros(1)}, "2: module.conv1.weight, module.bn1.bias"),
        ({"student": {"a": torch.zeros(1)}, "teacher": {}, "epoch": 3}, "a dict of 3: student, teacher, epoch"),
        ({"state_dict": {"backbone.conv1.weight": torch.zeros(1)}}, "a dict of 1: backbone.conv1.weight"),
        ([1, 2], "found a list"),
    ],
    ids=["swav", "dino", "other", "list"],
)
def test_other_formats_are_refused_with_the_names_found(tmp_path, content, found):
    torch.save(content, tmp_path / "other.pt")
    line = refusal(moco_params(tmp_path / "other.pt"))
    assert "expected a state_dict with module.encoder_q.*" in line
    assert found in line


@pytest.mark.parametrize(
    ("source", "wrapped"),
    [("timm", wrapped) for wrapped in ("plain", "state_dict", "model", "ddp", "safetensors")] + [("torchvision", "plain")],
)
def test_a_local_file_of_a_library_is_a_teacher_without_a_head(tmp_path, source, wrapped):
    arch, width = ("resnet18", 0.125) if source == "timm" else ("torchvision/resnet18", 1.0)
    net = lively(narrow_encoder() if source == "timm" else vision.resnet18())
    if source == "timm":
        net.fc = nn.Linear(64, 10)
    state, path = net.state_dict(), tmp_path / "net.pt"
    if wrapped == "safetensors":
        path = tmp_path / "net.safetensors"
        safetensors.torch.save_file(state, path)
    elif wrapped == "ddp":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        torch.save(state if wrapped == "plain" else {wrapped: state, "epoch": 1}, path)
    teacher = made_and_read(teacher_params(source=source, arch=arch, width=width, checkpoint=str(path)), tmp_path)
    net.fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(teacher.features(X), net(X))
        torch.testing.assert_close(teacher.keys(X), F.normalize(net(X), dim=1))
    assert teacher.metadata["left_out"] == ["fc.bias", "fc.weight"]
    assert (teacher.metadata["head"], teacher.metadata["key_width"]) == (None, int(512 * width))
    assert len(teacher.metadata["source_sha256"]) == 64


@pytest.mark.slow
def test_a_local_file_must_match_except_for_the_classifier(tmp_path):
    params = teacher_params(source="timm", width=0.125, checkpoint=str(tmp_path / "net.pt"))
    state = narrow_encoder().state_dict()
    torch.save({name: tensor for name, tensor in state.items() if name != "layer2.0.conv1.weight"}, params.checkpoint)
    assert "missing layer2.0.conv1.weight" in refusal(params)
    torch.save({**state, "head.weight": torch.zeros(1)}, params.checkpoint)
    assert "not expected head.weight" in refusal(params)
    torch.save({"weights": list(state.items()), "epoch": 1}, params.checkpoint)
    assert "holds no weights by name, but a dict of 2: weights, epoch" in refusal(params)


def test_a_student_can_be_a_teacher(tmp_path):
    params = teacher_params(source="random", width=0.125, stem="small")
    backbone, _, _ = make_teacher(params, IMAGE, 3)
    save_network(tmp_path / "student.safetensors", backbone.state_dict(), {"kind": "student"})
    local = params.model_copy(update={"source": "timm", "checkpoint": str(tmp_path / "student.safetensors")})
    teacher = made_and_read(local, tmp_path)
    with torch.no_grad():
        assert torch.equal(teacher.features(X), backbone.eval()(X))


def when_pretrained(create, instead):
    """`create`, except for calls that would download."""
    return lambda *args, **kwargs: (instead if kwargs.get("pretrained") or kwargs.get("weights") else create)(*args, **kwargs)


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_published_weights_lose_only_their_classifier(monkeypatch, source):
    published = lively(vision.resnet18())  # the same names in both libraries
    library, create = (timm, "create_model") if source == "timm" else (vision, "get_model")
    monkeypatch.setattr(library, create, when_pretrained(getattr(library, create), lambda *args, **kwargs: published))
    arch = "resnet18" if source == "timm" else "torchvision/resnet18"
    teacher = Teacher(*make_teacher(teacher_params(source=source, arch=arch), IMAGE, 0))
    assert teacher.metadata["weights"] == ("resnet18.a1_in1k" if source == "timm" else "ResNet18_Weights.IMAGENET1K_V1")
    assert teacher.metadata["left_out"] == ["fc.bias", "fc.weight"]
    published.fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(teacher.features(X), published(X))


def test_without_a_network_the_line_says_what_to_set(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known\nsecond line")

    monkeypatch.setattr(vision, "get_model", when_pretrained(vision.get_model, unreachable))
    line = refusal(teacher_params(source="torchvision", arch="torchvision/resnet18"))
    assert "no pretrained weights could be obtained (Name or service not known second line)" in line
    assert line.endswith("set teacher.checkpoint to a local file of them")


def test_published_weights_need_their_own_shape_normalisation_and_library(tmp_path, capsys):
    assert "teacher.width = 0.5, teacher.stem = imagenet: published weights" in refusal(teacher_params(source="timm", width=0.5))
    assert "teacher.stem = small: published weights" in refusal(teacher_params(source="timm", stem="small"))
    assert "set teacher.source: torchvision" in refusal(teacher_params(source="timm", arch="torchvision/resnet18"))
    assert "set teacher.arch: torchvision/resnet18" in refusal(teacher_params(source="torchvision", arch="resnet18"))
    vit = teacher_params(source="timm", arch="test_vit")
    assert "expect [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]; set teacher.image.mean and teacher.image.std to these" in refusal(vit)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pt")
    local = vit.model_copy(update={"checkpoint": str(tmp_path / "vit.pt")})
    assert "teacher.image.crop_px = 20: test_vit does not accept this size" in refusal(local)
    assert "ignore this if teacher.checkpoint was trained differently" in capsys.readouterr().err


def test_a_vision_transformer_accepts_any_number_of_patches(tmp_path, capsys):
    net = timm.create_model("test_vit", num_classes=0, img_size=160, dynamic_img_size=True).eval()
    torch.save(net.state_dict(), tmp_path / "vit.pt")
    params = teacher_params(source="timm", arch="test_vit", checkpoint=str(tmp_path / "vit.pt"))
    for side_px in (160, 48):
        image = IMAGE.model_copy(update={"crop_px": side_px, "resize_px": side_px})
        save_teacher(tmp_path / "teacher.safetensors", *make_teacher(params, image, 0))
        teacher = load_teacher(tmp_path / "teacher.safetensors")
        x = torch.randn(2, 3, side_px, side_px)
        with torch.no_grad():
            torch.testing.assert_close(teacher.features(x), net(x))
    assert (teacher.metadata["options"], teacher.metadata["feature_width"]) == ({"dynamic_img_size": True}, 64)
    assert "ignore this if teacher.checkpoint was trained differently" in capsys.readouterr().err


def test_a_random_teacher_depends_on_its_seed_and_is_marked_as_random():
    params = teacher_params(source="random", width=0.125)
    one, again, other = (make_teacher(params, IMAGE, seed) for seed in (0, 0, 1))
    assert one[2]["pretrained"] is False
    assert torch.equal(one[0].conv1.weight, again[0].conv1.weight)
    assert not torch.equal(one[0].conv1.weight, other[0].conv1.weight)


def small_teacher() -> Teacher:
    params = teacher_params(source="random", width=0.125, stem="small")
    backbone, head, metadata = make_teacher(params, IMAGE, 0)
    return Teacher(lively(backbone), head, metadata)


def test_a_teacher_is_frozen():
    teacher = small_teacher()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.train().modules())
    assert not teacher.keys(X.clone().requires_grad_()).requires_grad
    torch.testing.assert_close(teacher.keys(X).norm(dim=1), torch.ones(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {out.dtype for out in teacher(X)} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "efficientnet_b0", "resnetv2_50", "vit_tiny_patch16_224", "torchvision/mobilenet_v2"])
def test_weights_stored_in_autocasts_dtype_give_the_same_bits(arch):
    """resnetv2_50 standardises its weights in float32 before they are cast, so they must not be changed."""
    backbone = build_backbone(arch, 1.0, "imagenet", 0)
    teacher = Teacher(lively(backbone), mlp_head([backbone.feature_width, 32, 16], 1), {})
    kept = copy.deepcopy(teacher).weights_for(torch.bfloat16)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kept.features(images), teacher.features(images))
        assert torch.equal(kept.keys(images), teacher.keys(images))
    held, before = (sum(tensor.nbytes for tensor in network.state_dict().values()) for network in (kept, teacher))
    assert held < 0.56 * before or arch == "resnetv2_50"
    assert torch.equal(copy.deepcopy(teacher).weights_for(torch.float32).features(images), teacher.features(images))


def test_batch_statistics_normalise_by_the_batch_and_do_not_change_the_teacher():
    teacher = small_teacher()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    stored = teacher.keys(X)
    teacher.batch_statistics(True)
    teacher.eval()
    by_batch = teacher.keys(X)
    reference, _, _ = make_teacher(teacher_params(source="random", width=0.125, stem="small"), IMAGE, 0)
    reference.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in before.items()})
    with torch.no_grad():
        torch.testing.assert_close(by_batch, F.normalize(reference.train()(X), dim=1))
    assert torch.equal(teacher.keys(X), by_batch)
    for name, tensor in teacher.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(tensor, before[name]), name
    teacher.batch_statistics(False)
    assert torch.equal(teacher.keys(X), stored)


def test_a_pretrained_teacher_is_saved_with_its_own_source(tmp_path):
    params = teacher_params(source="pretrain", width=0.125, stem="small")
    backbone, head = make_teacher(teacher_params(source="random", width=0.125), IMAGE, 0)[0], mlp_head([64, 32, 16], 0)
    metadata = teacher_metadata(params, IMAGE, backbone, head, {"source": "pretrain", "pretrained": True, "listing": "ab"})
    assert (metadata["head"], metadata["key_width"], metadata["listing"]) == ([64, 32, 16], 16, "ab")
    save_teacher(tmp_path / "t", backbone, head, metadata)
    with pytest.raises(UserError, match=r"conv1.weight \(8, 3, 7, 7\) for \(8, 3, 3, 3\)"):
        load_teacher(tmp_path / "t")


def test_a_file_of_another_kind_is_not_a_teacher(tmp_path):
    save_network(tmp_path / "s", {"x": torch.zeros(1)}, {"kind": "student"})
    with pytest.raises(UserError, match="holds a student, not a teacher; run: dvc repro teacher"):
        load_teacher(tmp_path / "s")
