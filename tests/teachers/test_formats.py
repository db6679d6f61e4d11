"""Published checkpoints of every format: fabricated with the names, wrappers and layouts of the code that writes them, read strictly, and
equal to that code's own network in features and keys."""

import importlib
import re
from functools import cache
from pathlib import Path

import published
import pytest
import timm
import torch
import torch.nn.functional as F
from published import SimclrV2, Vit, WideResNet, lively
from timm.models.eva import checkpoint_filter_fn as timms_dinov3
from timm.models.vision_transformer import checkpoint_filter_fn as timms_dinov2
from torch import Tensor, nn

from bingo.nets.backbones import build_backbone
from bingo.nets.heads import describe_head, described_head
from bingo.params import format_names, load_params, method_names
from bingo.runtime.errors import UserError
from bingo.teachers.formats import dinov2
from bingo.teachers.reading.sources import make_teacher
from bingo.teachers.teacher import Teacher, load_teacher, save_teacher

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PARAMS = load_params(ROOT / "params.yaml")
NARROW = 0.125  # of all channels, because layouts do not depend on it
BACKBONES_ALONE = ("barlow", "dino", "vicreg")


def image_of(side_px: int, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    return PARAMS.image.model_copy(update={"crop_px": side_px, "resize_px": side_px, "mean": list(mean), "std": list(std)})


def images(side_px: int, number: int = 3) -> Tensor:
    return torch.randn(number, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))


def params_of(teacher_format: str, path, **changes):
    own = {"arch": "resnet50", "width": NARROW, "stem": "imagenet", "source": "checkpoint"}
    return PARAMS.teacher.model_copy(update={**own, "format": teacher_format, "checkpoint": str(path), **changes})


def teacher_of(tmp_path, teacher_format: str, content, image=None, **changes) -> Teacher:
    """The teacher after writing and reading the checkpoint, then writing and reading the teacher."""
    torch.save(content, tmp_path / "checkpoint.pth")
    made = make_teacher(params_of(teacher_format, tmp_path / "checkpoint.pth", **changes), image or image_of(64), 0)
    save_teacher(tmp_path / "teacher.safetensors", *made)
    return load_teacher(tmp_path / "teacher.safetensors")


def refusal(tmp_path, teacher_format: str, content, **changes) -> str:
    torch.save(content, tmp_path / "checkpoint.pth")
    return refusal_of(params_of(teacher_format, tmp_path / "checkpoint.pth", **changes))


def refusal_of(params, side_px: int = 64) -> str:
    with pytest.raises(UserError) as caught:
        make_teacher(params, image_of(side_px), 0)
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


@torch.no_grad()
def assert_same(teacher: Teacher, trunk: nn.Module, head: nn.Module, x: Tensor) -> None:
    """Features and keys equal those of the published network."""
    features_BD = trunk(x)
    keys_BP = head(features_BD)
    torch.testing.assert_close(teacher.features(x), features_BD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher.keys(x), F.normalize(keys_BP, dim=1), rtol=1e-5, atol=1e-5)
    assert (teacher.metadata["feature_width"], teacher.metadata["key_width"]) == (features_BD.shape[1], keys_BP.shape[1])


@cache
def small(teacher_format: str) -> dict:
    """A checkpoint of a ResNet-18 with an eighth of the channels, for tests that do not depend on the network."""
    trunk = lively(WideResNet(NARROW, blocks=(2, 2, 2, 2)))
    return (published.WITH_A_HEAD | {"simclr": published.simclr, "byol": published.byol})[teacher_format](trunk, 64)[0]


LEFT_OUT = {
    "barlow": [],
    "byol": ["fc"],
    "dino": ["module.head.last_layer", "student"],
    "disco": ["module.encoder_k", "module.queue", "module.queue_ptr", "module.teacher_encoder_k", "module.teacher_encoder_q"],
    "moco": ["module.encoder_k", "module.queue", "module.queue_ptr"],
    "moco_v3": ["module.momentum_encoder", "module.predictor"],
    "seed": ["module.queue", "module.queue_ptr", "module.teacher"],
    "simclr": ["fc"],
    "simsiam": ["module.predictor"],
    "swav": ["module.prototypes"],
    "vicreg": [],
}


@pytest.mark.parametrize("name", published.WITH_A_HEAD)
def test_a_resnet_with_its_head_equals_the_published_codes(tmp_path, name):
    trunk = lively(WideResNet(NARROW, split_padding=name in ("swav", "vicreg")))
    content, head = published.WITH_A_HEAD[name](trunk, 256)
    teacher = teacher_of(tmp_path, name, content)
    assert_same(teacher, trunk, head, images(64))
    assert teacher.metadata["left_out"] == LEFT_OUT[name]
    assert teacher.metadata["format"] == name
    assert "options" not in teacher.metadata


@pytest.mark.parametrize("name", BACKBONES_ALONE)
def test_a_backbone_alone_is_a_teacher_with_its_features_as_keys(tmp_path, name):
    trunk = lively(WideResNet(NARROW, split_padding=name == "vicreg"))
    teacher = teacher_of(tmp_path, name, trunk.state_dict())
    assert_same(teacher, trunk, nn.Identity(), images(64))
    assert (teacher.metadata["head"], teacher.metadata["left_out"]) == (None, [])


def test_a_training_checkpoint_of_swav_wraps_the_same_names(tmp_path):
    state = small("swav")
    content = {"epoch": 3, "state_dict": state, "amp": {"loss_scaler0": {"unskipped": 1}}}
    one, other = (teacher_of(tmp_path, "swav", each, arch="resnet18").state_dict() for each in (state, content))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_released_files_that_differ_from_the_released_code(tmp_path):
    """RN50w5 of SwAV (swav's issue 35), the ResNet-50 of DINO (dino's issue 189), SEED's students (SEED's issue 3)."""
    trunk = lively(WideResNet(NARROW, blocks=(2, 2, 2, 2)))
    head = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 24))
    state = published.under("module.", trunk) | published.under("module.projection_head.", head)
    assert_same(teacher_of(tmp_path, "swav", state, arch="resnet18"), trunk, head, images(64))
    mlp = lively(nn.Sequential(nn.Linear(64, 40), nn.BatchNorm1d(40), nn.GELU(), nn.Linear(40, 24)))
    state = published.under("backbone.", trunk) | published.under("head.mlp.", mlp) | {"head.last_layer.weight": torch.zeros(50, 24)}
    teacher = teacher_of(tmp_path, "dino", {"teacher": state, "student": published.empty("module.", state)}, arch="resnet18")
    assert_same(teacher, trunk, mlp, images(64))
    assert teacher.metadata["left_out"] == ["head.last_layer", "student"]
    fc = nn.Linear(64, 24)
    state = published.under("module.encoder_q.", trunk) | published.under("module.encoder_q.fc.", fc)
    state |= {"module.encoder_k.fc.0.weight": torch.zeros(1), "module.small_queue": torch.zeros(1), "module.queue": torch.zeros(1)}
    teacher = teacher_of(tmp_path, "seed", {"state_dict": state}, arch="resnet18")
    assert_same(teacher, trunk, fc, images(64))
    assert teacher.metadata["left_out"] == ["module.encoder_k", "module.queue", "module.small_queue"]


@pytest.mark.parametrize("name", ["barlow", "vicreg"])
def test_weights_without_the_prefix_of_ddp_are_read_too(tmp_path, name):
    state = {key.removeprefix("module."): tensor for key, tensor in small(name)["model"].items()}
    one, other = (teacher_of(tmp_path, name, content, arch="resnet18").state_dict() for content in (small(name), state))
    assert all(torch.equal(one[key], other[key]) for key in one | other)


def test_disco_has_efficientnets_too(tmp_path):
    trunk = lively(timm.create_model("efficientnet_b0", num_classes=0))
    content, head = published.disco(trunk, 1280, "classifier")
    assert_same(teacher_of(tmp_path, "disco", content, arch="efficientnet_b0", width=1.0), trunk, head, images(64))


@pytest.mark.parametrize("widen", [1, 2, 4, 5])
def test_wide_networks_of_swav_and_vicreg_multiply_all_channels(widen):
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in WideResNet(widen, split_padding=True).state_dict().items()}
        net = build_backbone("resnet50", float(widen), "imagenet", 0)
    assert {name: tensor.shape for name, tensor in net.state_dict().items()} == expected
    assert net.feature_width == 2048 * widen


@pytest.mark.parametrize("side_px", [64, 75])
def test_byol_pads_as_tensorflow_does(tmp_path, side_px):
    trunk = lively(WideResNet(NARROW))
    content, head = published.byol(trunk, 256)
    teacher = teacher_of(tmp_path, "byol", content)
    assert teacher.metadata["options"] == {"padding": "same"}
    assert teacher.metadata["left_out"] == ["fc"]
    as_torch = trunk(images(side_px)).detach()
    assert_same(teacher, published.pad_as_tensorflow(trunk), head, images(side_px))
    assert not torch.allclose(teacher.features(images(side_px)), as_torch, atol=1e-3) or side_px % 2


def test_simclr_was_trained_on_images_between_0_and_1(tmp_path, capsys):
    plain = image_of(64, mean=(0, 0, 0), std=(1, 1, 1))
    trunk = lively(WideResNet(NARROW))
    content, head = published.simclr(trunk, 256)
    assert_same(teacher_of(tmp_path, "simclr", content, plain), trunk, head, images(64))
    trunk = lively(SimclrV2(NARROW))
    content, head = published.simclr_v2(trunk, 256)
    teacher = teacher_of(tmp_path, "simclr", content, plain)
    assert_same(teacher, trunk, head, images(64))
    assert teacher.metadata["left_out"] == ["fc"]
    assert capsys.readouterr().err == ""
    teacher_of(tmp_path, "simclr", content)
    assert "expect [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]; ignore this if teacher.checkpoint was trained differently" in capsys.readouterr().err


def test_networks_with_selective_kernels_are_refused_by_their_names(tmp_path):
    content, _ = published.simclr_v2(lively(SimclrV2(NARROW)), 256)
    for name in ("net.0.6.weight", "net.1.blocks.0.net.2.main_conv.0.weight"):
        content["resnet"][name] = torch.zeros(8, 8, 3, 3)
    line = refusal(tmp_path, "simclr", content)
    assert "does not fit resnet50: not expected net.0.6.weight, layer1.0.conv2.main_conv.0.weight" in line


@pytest.mark.parametrize(
    ("name", "width", "heads", "arch"), [("dino", 192, 3, "vit_tiny_patch16_224"), ("moco_v3", 384, 12, "vit_small_patch16_224")]
)
def test_a_vision_transformer_gives_its_class_token(tmp_path, name, width, heads, arch):
    trunk = lively(Vit(width, heads, 16, 224))
    content, head = published.WITH_A_HEAD[name](trunk, width)
    teacher = teacher_of(tmp_path, name, content, image_of(224), arch=arch, width=1.0)
    assert_same(teacher, trunk, head, images(224, 2))
    assert teacher.features(images(96, 1)).shape == (1, width)
    expected = {"dynamic_img_size": True} | ({"num_heads": 12} if name == "moco_v3" else {})
    assert teacher.metadata["options"] == expected


def test_a_vision_transformer_of_dino_without_a_head(tmp_path):
    trunk = lively(Vit(192, 3, 16, 224))
    teacher = teacher_of(tmp_path, "dino", trunk.state_dict(), image_of(96), arch="vit_tiny_patch16_224", width=1.0)
    assert_same(teacher, trunk, nn.Identity(), images(96))
    params = params_of("dino", tmp_path / "checkpoint.pth", arch="vit_tiny_patch16_224", width=1.0)
    assert "image.crop_px = 100: vit_tiny_patch16_224 does not accept this size" in refusal_of(params, 100)
    line = refusal_of(params.model_copy(update={"arch": "resnet50"}))
    assert line.endswith("these are the weights of a vision transformer; set teacher.arch: vit_tiny_patch16_224")
    larger = Teacher(*make_teacher(params.model_copy(update={"arch": "vit_tiny_patch16_384"}), image_of(96), 0))
    assert_same(larger, trunk, nn.Identity(), images(96))  # the file's grid of 14x14 patches is resampled once, not via 24x24


def test_dinov2_at_another_size_of_images(tmp_path):
    trunk = lively(Vit(384, 6, 14, 518, scaled=True))
    state = trunk.state_dict() | {"mask_token": torch.zeros(1, 384)}
    teacher = teacher_of(tmp_path, "dinov2", state, image_of(56), arch="vit_small_patch14_dinov2", width=1.0)
    assert_same(teacher, trunk, nn.Identity(), images(56))
    assert teacher.metadata["left_out"] == ["mask_token"]
    params = params_of("dinov2", tmp_path / "checkpoint.pth", arch="vit_small_patch14_dinov2", width=1.0)
    assert "image.crop_px = 64: vit_small_patch14_dinov2 does not accept this size" in refusal_of(params)


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def shapes_of(arch: str, **arguments) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in timm.create_model(arch, num_classes=0, **arguments).state_dict().items()}


def loaded(arch: str, state: dict[str, Tensor], **arguments) -> nn.Module:
    net = timm.create_model(arch, num_classes=0, dynamic_img_size=True, **arguments)
    net.load_state_dict(state)
    return net.eval()


def test_registers_of_dinov2_and_its_giant_are_read_as_by_timm():
    for arch in ("vit_small_patch14_reg4_dinov2", "vit_giant_patch14_reg4_dinov2"):
        shapes = {name: shape for name, shape in shapes_of(arch).items() if name.startswith("blocks.0.") or "blocks" not in name}
        names = {"fc1": "w12", "fc2": "w3"} if "giant" in arch else {}
        shapes = {name.replace("fc1", names.get("fc1", "fc1")).replace("fc2", names.get("fc2", "fc2")): s for name, s in shapes.items()}
        shapes["register_tokens"] = shapes.pop("reg_token")
        width = shapes["register_tokens"][2]
        state = random_state(shapes | {"pos_embed": (1, 37 * 37 + 1, width), "mask_token": (1, width)})
        with torch.device("meta"):
            net = timm.create_model(arch)
        expected = timms_dinov2(dict(state), net)
        parts = dinov2.parts(state)
        assert sorted(parts.trunk) == sorted(expected)
        assert all(torch.equal(parts.trunk[name], tensor) for name, tensor in expected.items())


def test_dinov3_is_read_as_by_timm_with_the_class_token(tmp_path, capsys):
    arch, block = "vit_tiny_patch16_dinov3_qkvb", "blocks.{}.attn"
    shapes = shapes_of(arch)
    for name in [name for name in shapes if name.endswith(("q_bias", "v_bias"))]:
        del shapes[name]
    shapes = {
        name.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): s
        for name, s in shapes.items()
    }
    state = random_state(shapes | {f"{block.format(i)}.qkv.bias": (576,) for i in range(12)} | {"mask_token": (1, 192)})
    mask = torch.ones(576).index_fill(0, torch.arange(192, 384), 0)
    state |= {f"{block.format(i)}.qkv.bias_mask": mask for i in range(12)} | {"rope_embed.periods": torch.rand(16)}
    teacher = teacher_of(tmp_path, "dinov3", state, image_of(48), arch=arch, width=1.0)
    expected = loaded(arch, timms_dinov3(dict(state), timm.create_model(arch)), global_pool="token")
    assert_same(teacher, expected, nn.Identity(), images(48))
    assert teacher.metadata["left_out"] == ["mask_token", "rope_embed"]
    line = refusal(tmp_path, "dinov3", state, arch="vit_tiny_patch16_224", width=1.0)
    assert "does not fit vit_tiny_patch16_224: missing pos_embed" in line


@pytest.mark.parametrize("name", format_names())
def test_a_format_is_named_only_by_its_own_file(name):
    """The lists in params.yaml and docs/teachers.md must agree with the files of formats; no code names a format, and each file is
    complete."""
    assert re.search(rf"\b{name}\b", (ROOT / "params.yaml").read_text().partition("# format")[2].partition("source:")[0])
    assert f"`{name}`" in (ROOT / "docs/teachers.md").read_text()
    module = importlib.import_module(f"bingo.teachers.formats.{name}")
    assert module.EXPECTED
    assert (module.KEY_WIDTH is not None) == (name in published.WITH_A_HEAD)
    if name not in method_names():  # a method may have a format with its name
        names_of_timm = ROOT / "bingo/teachers/reading/wrapped.py"  # here dinov2 is a part of timm's names
        code = [path for path in (ROOT / "bingo").rglob("*.py") if path not in (Path(module.__file__), names_of_timm)]
        assert not [path for path in code if re.search(rf"""["']{name}["']""", path.read_text())]


def test_every_format_is_tested():
    assert sorted({*published.WITH_A_HEAD, "byol", "simclr", "dinov2", "dinov3", "efficientnet_pytorch"}) == format_names()


def weights_of(name: str, content: dict) -> dict:
    """The dict inside a checkpoint that contains the teacher's weights."""
    return (
        content
        if name in ("swav", "byol")
        else content["teacher" if name == "dino" else "model" if name in ("barlow", "vicreg") else "state_dict"]
    )


def changed(name: str, change) -> dict:
    """A copy of the small checkpoint with `change` applied to the weights."""
    content = {key: dict(value) if isinstance(value, dict) else value for key, value in small(name).items()}
    change(weights_of(name, content))
    return content


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_missing_weight_is_named(tmp_path, name):
    own = next(key for key in weights_of(name, small(name)) if key.endswith("layer2.0.conv1.weight"))
    line = refusal(tmp_path, name, changed(name, lambda state: state.pop(own)), arch="resnet18")
    assert "its backbone does not fit resnet18: missing layer2.0.conv1.weight; " in line
    assert "give a complete file in teacher.checkpoint" in line


@pytest.mark.parametrize("name", published.WITH_A_HEAD)
def test_a_missing_weight_of_the_head_is_named(tmp_path, name):
    heads = (".fc.", "projector.", "projection_head.", "head.mlp.")
    in_head = [
        key for key in weights_of(name, small(name)) if any(part in key for part in heads) and key.endswith((".0.weight", "1.running_var"))
    ]
    own = [key for key in in_head if not any(part in key for part in ("encoder_k", "momentum", "predictor", "teacher_", "module.teacher"))][
        -1
    ]
    line = refusal(tmp_path, name, changed(name, lambda state: state.pop(own)), arch="resnet18")
    assert f"its projection head is not that of format {name}: missing {'.'.join(own.split('.')[-2:])}" in line


@pytest.mark.parametrize("name", published.WITH_A_HEAD)
def test_an_unexpected_weight_is_named(tmp_path, name):
    line = refusal(tmp_path, name, changed(name, lambda state: state.update({"decoder.weight": torch.zeros(1)})), arch="resnet18")
    assert f"holds what no checkpoint of format {name} has: decoder.weight" in line
    assert line.endswith("set teacher.checkpoint to a file without it, or teacher.format to the code that wrote it")


@pytest.mark.parametrize("name", published.WITH_A_HEAD)
def test_the_right_format_is_suggested(tmp_path, name):
    other = "moco_v3" if name == "moco" else "moco"
    line = refusal(tmp_path, other, small(name), arch="resnet18")
    assert f"is not a checkpoint of format {other}: expected a state_dict with module." in line
    assert line.endswith(f"; set teacher.format: {name}")
    assert ", found a dict of " in line


def test_a_backbone_alone_is_distinguished_from_a_checkpoint_with_a_head(tmp_path):
    line = refusal(tmp_path, "moco", small("byol"))
    assert line.endswith("set teacher.source: timm, teacher.arch: resnet18, or teacher.format: byol or simclr, teacher.arch: resnet18")
    for changes in ({"source": "timm"}, {"format": "byol"}, {"format": "simclr"}):
        make_teacher(params_of("moco", tmp_path / "checkpoint.pth", arch="resnet18", **changes), image_of(64), 0)
    line = refusal(tmp_path, "swav", {"optimizer": {"lr": 1.0}})
    assert line.endswith(f"; set teacher.checkpoint to a file of one of the formats {', '.join(format_names())}")
    assert "found a dict of 1: optimizer;" in line


def test_deepminds_own_file_is_never_unpickled(tmp_path):
    import pickle

    path = tmp_path / "pretrain_res50x1.pkl"
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps({"experiment_state": images(4), "step": 1}, protocol=protocol))
        line = refusal_of(params_of("byol", path))
        assert "is not a checkpoint of torch.save but a plain pickle, which is never run" in line
        assert "convert.py of ajtejankar/byol-convert" in line


@pytest.mark.parametrize("name", ["swav", "dino", "barlow"])
def test_a_truncated_file_and_pickled_code_are_one_line(tmp_path, name):
    torch.save(small(name) | {"extra": Path("x")}, tmp_path / "code.pth")
    assert "holds pickled code (pathlib" in refusal_of(params_of(name, tmp_path / "code.pth"))
    torch.save(small(name), tmp_path / "whole.pth")
    (tmp_path / "part.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-5000])
    assert "is not a checkpoint of torch.save" in refusal_of(params_of(name, tmp_path / "part.pth"))


def test_a_head_is_rebuilt_from_its_description():
    layers = [nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.GELU(), nn.BatchNorm1d(4, affine=False)]
    head = lively(nn.Sequential(*layers))
    description = describe_head(head)
    assert description == {
        "layers": ["linear_no_bias", "batchnorm", "relu", "linear", "gelu", "batchnorm_no_affine"],
        "widths": [6, 5, 4],
    }
    again = described_head(description)
    again.load_state_dict(head.state_dict())
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.eval()(x), head(x))
    assert describe_head(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))) == [6, 5, 4]
    assert describe_head(described_head([6, 4])) == [6, 4]


def test_rebuilding_a_head_does_not_use_the_global_generator():
    before = torch.get_rng_state()
    described_head({"layers": ["linear", "batchnorm"], "widths": [6, 5]})
    assert torch.equal(torch.get_rng_state(), before)
