"""Checkpoints with any wrappers: read if the network is unambiguous, otherwise refused with advice that helps."""

import gzip
import re
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from published import lively
from torch import Tensor, nn
from torchvision import models as vision

from bingo.nets.backbones import Backbone, build_backbone
from bingo.params import NetworkParams, load_params
from bingo.runtime.errors import UserError
from bingo.teachers.reading.foreign import read_checkpoint, shared_prefix
from bingo.teachers.reading.sources import make_teacher

pytestmark = pytest.mark.slow

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
IMAGENET = {"crop_px": 32, "resize_px": 32, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
IMAGE = PARAMS.image.model_copy(update=IMAGENET)
NARROW = {"arch": "resnet18", "width": 0.125, "stem": "imagenet"}


@cache
def weights(seed: int = 0) -> dict[str, Tensor]:
    """The weights of a ResNet-18 with an eighth of the channels, changed so that two seeds differ in every tensor."""
    torch.manual_seed(seed)
    return dict(lively(build_backbone("resnet18", 0.125, "imagenet", seed)).state_dict())


def under(prefix: str, seed: int = 0) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in weights(seed).items()}


def params_of(path: Path, **changes):
    return PARAMS.teacher.model_copy(update={**NARROW, "source": "timm", "checkpoint": str(path), **changes})


def made(content, tmp_path, **changes) -> tuple[Backbone, dict]:
    torch.save(content, tmp_path / "net.pt")
    backbone, _, metadata = make_teacher(params_of(tmp_path / "net.pt", **changes), IMAGE, 0)
    return backbone, metadata


def has_weights(backbone: nn.Module, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, expected[name]) for name, tensor in backbone.state_dict().items())


JUNK = {"projector.0.weight": torch.zeros(3, 3), "prototypes.weight": torch.zeros(2)}
WRAPPED = {
    "compiled": under("_orig_mod."),
    "compiled within DDP": under("module._orig_mod."),
    "sharded, part by part": {f"_fsdp_wrapped_module.{name.replace('.conv1', '.conv1._orig_mod')}": t for name, t in weights().items()},
    "vissl": {"classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.")}}}},
    "lightning": {"state_dict": under("model.net."), "hyper_parameters": {"lr": 0.1}, "epoch": 3},
    "nested five times": {"model_state_dict": under("module.student.encoder.backbone.body.")},
    "beside a head": {"state_dict": under("backbone.") | JUNK, "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}}},
    "an entry of any name": {"my_net": weights(), "loss": 0.3},
    "in another's shadow": {"model": under("module."), "ema": under("module.", 1)},
    "a teacher and its student": {"student": under("backbone.", 1), "teacher": under("backbone.")},
    "an online network and its average": {"state_dict": under("online_encoder.") | under("target_encoder.", 1)},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_and_prefixes_are_removed(tmp_path, capsys, name):
    backbone, metadata = made(WRAPPED[name], tmp_path)
    assert has_weights(backbone, weights())
    if name == "beside a head":
        assert metadata["left_out"] == ["projector", "prototypes"]
    said = capsys.readouterr().err
    assert len(said.splitlines()) == (0 if name in ("compiled", "sharded, part by part") else 1)
    if name == "in another's shadow":
        assert "ema" in said


def test_two_unknown_networks_are_refused_and_a_single_one_is_read(tmp_path):
    content = {"a": weights(), "b": weights(1)}
    with pytest.raises(UserError) as caught:
        made(content, tmp_path)
    assert re.findall(r"its entry (\w+)", str(caught.value)) == ["a", "b"]
    assert has_weights(made(content["b"], tmp_path)[0], weights(1))


def moco(rename) -> dict[str, Tensor]:
    net = build_backbone("resnet18", 0.125, "imagenet", 0)
    net.load_state_dict(weights())
    net.fc = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    state = {f"module.encoder_{which}.{name}": tensor for which in "qk" for name, tensor in net.state_dict().items()}
    return {rename(name): tensor for name, tensor in (state | {"module.queue": torch.zeros(16, 8)}).items()}


@pytest.mark.parametrize(
    ("rename", "wrap"),
    [
        (lambda name: name.replace("module.", "module._orig_mod."), lambda state: {"state_dict": state}),
        (lambda name: name.removeprefix("module."), lambda state: {"state_dict": state}),
        (lambda name: name, lambda state: state),
        (lambda name: name, lambda state: {"model_state_dict": state}),
        (lambda name: f"model.{name}", lambda state: {"checkpoint": {"network": state}}),
    ],
)
def test_a_published_format_is_read_in_other_wrappers_too(tmp_path, rename, wrap):
    torch.save(wrap(moco(rename)), tmp_path / "net.pt")
    params = params_of(tmp_path / "net.pt", source="checkpoint", format="moco")
    backbone, head, _ = make_teacher(params, IMAGE, 0)
    assert has_weights(backbone, weights())
    assert head is not None


def test_a_backbone_beside_heads_as_in_dinov2(tmp_path, capsys):
    """As written to teacher_checkpoint.pth by facebookresearch/dinov2."""
    arch = "vit_small_patch14_dinov2"
    net = timm.create_model(arch, num_classes=0)
    state = {f"backbone.{name}": tensor for name, tensor in net.state_dict().items()}
    heads = {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.mlp.0.weight": torch.zeros(2, 2)}
    torch.save({"teacher": state | {"backbone.mask_token": torch.zeros(1, 384)} | heads}, tmp_path / "net.pt")
    params = params_of(tmp_path / "net.pt", source="checkpoint", format="dinov2", arch=arch, width=1.0)
    backbone, _, metadata = make_teacher(params, IMAGE.model_copy(update={"crop_px": 28}), 0)
    assert has_weights(backbone, net.state_dict())
    assert metadata["left_out"] == ["dino_head", "ibot_head", "mask_token"]
    assert "backbone" in capsys.readouterr().err


def wide(arch: str, width: float, stem: str) -> dict[str, Tensor]:
    return build_backbone(arch, width, stem, 0).state_dict()


MISFITS = {
    "deeper, wider, other stem": lambda: wide("resnet34", 0.25, "small"),
    "bottlenecks in a wrapper": lambda: {"state_dict": {f"module.{name}": t for name, t in wide("resnet50", 0.0625, "imagenet").items()}},
    "a deep stem": lambda: wide("resnet10t", 0.125, "imagenet"),
    "an efficientnet": lambda: {"model": timm.create_model("efficientnet_b0").state_dict()},
    "a transformer": lambda: timm.create_model("vit_tiny_patch16_224").state_dict(),
    "torchvision's": lambda: vision.mobilenet_v3_small().state_dict(),
    "a published format": lambda: {"state_dict": moco(str)},
}


@pytest.mark.parametrize("name", MISFITS)
def test_following_the_advice_for_a_misfit_loads_the_file(tmp_path, name):
    torch.save(MISFITS[name](), tmp_path / "net.pt")
    params = params_of(tmp_path / "net.pt", arch="regnetx_002", width=1.0)
    with pytest.raises(UserError) as caught:
        make_teacher(params, IMAGE, 0)
    settings = ways_out(str(caught.value))[0]
    make_teacher(params.model_copy(update=settings), IMAGE, 0)


def ways_out(line: str) -> list[dict[str, object]]:
    """The alternatives of settings in a message: `set teacher.KEY: VALUE, teacher.KEY: VALUE, or teacher.KEY: ...`."""
    alternatives = line.rpartition("; set ")[2].split(", or ")
    found = [dict(re.findall(r"teacher\.(\w+): ([\w./-]+)", alternative)) for alternative in alternatives]
    return [{key: float(value) if key == "width" else value for key, value in settings.items()} for settings in found if settings]


@cache
def vit() -> dict[str, Tensor]:
    return dict(lively(timm.create_model("vit_tiny_patch16_224", num_classes=0)).state_dict())


def vit_under(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in vit().items()}


MASK, DECODER = (
    {"mask_token": torch.zeros(1, 1, 192)},
    {"decoder.0.weight": torch.ones(2), "decoder_embed.weight": torch.zeros(8, 192), "decoder_pos_embed": torch.zeros(1)},
)
FILES = {
    "MAE with its decoder": lambda: {"model": vit() | MASK | DECODER},
    "MAE's encoder": lambda: {"model": vit()},
    "SimMIM": lambda: {"state_dict": vit_under("encoder.") | {f"encoder.{name}": t for name, t in MASK.items()} | DECODER},
    "iBOT": lambda: {"teacher": vit_under("backbone.") | {"backbone.masked_embed": torch.zeros(1, 192)}, "student": {"x": torch.ones(1)}},
    "DINO": lambda: vit_under(""),
    "MoCo": lambda: {"state_dict": moco(str)},
    "torchvision": lambda: vision.mobilenet_v3_small().state_dict(),
}  # fmt: skip
ASKED = {
    "timm, its transformer": {"source": "timm", "arch": "vit_tiny_patch16_224", "width": 1.0},
    "timm, another network": {"source": "timm", "arch": "resnet14t"},
    "dinov2": {"source": "checkpoint", "format": "dinov2", "arch": "vit_tiny_patch16_224", "width": 1.0},
    "dino": {"source": "checkpoint", "format": "dino", "arch": "resnet50", "width": 0.25},
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("file", FILES)
def test_a_file_is_read_at_once_or_with_any_setting_that_the_message_advises(tmp_path, file, asked):
    """One message is sufficient: each of its alternatives is tried."""
    torch.save(FILES[file](), tmp_path / "net.pt")
    params = params_of(tmp_path / "net.pt", **ASKED[asked])
    found: list[dict[str, object]] = [{}]
    try:
        make_teacher(params, IMAGE, 0)
    except UserError as error:
        found = ways_out(str(error))
    assert found
    backbones = [make_teacher(params.model_copy(update=settings), IMAGE, 0)[0] for settings in found]
    assert file in ("MoCo", "torchvision") or all(has_weights(backbone, vit()) for backbone in backbones)


def test_weights_used_only_for_masking_are_left_out_and_named(tmp_path, capsys):
    _, metadata = made(FILES["MAE with its decoder"](), tmp_path, arch="vit_tiny_patch16_224", width=1.0)
    assert metadata["left_out"] == ["decoder.0.weight", "decoder_embed.weight", "decoder_pos_embed", "mask_token"]
    assert "left out: decoder, decoder_embed, decoder_pos_embed, mask_token" in capsys.readouterr().err


def test_weights_that_do_not_belong_to_the_network_must_be_removed(tmp_path):
    extra = {"fc.fc1.weight": torch.zeros(4, 4)}
    with pytest.raises(UserError, match=r"not expected fc\.fc1\.weight; .* save its state_dict\(\) without them") as caught:
        made(vit() | extra, tmp_path, arch="vit_tiny_patch16_224", width=1.0)
    assert not ways_out(str(caught.value))
    assert has_weights(made(vit(), tmp_path, arch="vit_tiny_patch16_224", width=1.0)[0], vit())


@pytest.mark.parametrize("asked", ["swav", "dinov2", "simsiam", "seed"])
def test_following_the_advice_for_another_format_loads_the_file(tmp_path, asked):
    torch.save({"model_state_dict": moco(str)} if asked != "seed" else weights(), tmp_path / "net.pt")
    params = params_of(tmp_path / "net.pt", source="checkpoint", format=asked)
    with pytest.raises(UserError) as caught:
        make_teacher(params, IMAGE, 0)
    for settings in ways_out(str(caught.value)):
        make_teacher(params.model_copy(update=settings), IMAGE, 0)


def test_safetensors_and_checkpoints_are_distinguished_by_their_content(tmp_path):
    safetensors.torch.save_file(weights(), tmp_path / "model.pth")
    torch.save(weights(), tmp_path / "pytorch_model.bin")
    for path in (tmp_path / "model.pth", tmp_path / "pytorch_model.bin"):
        assert has_weights(make_teacher(params_of(path), IMAGE, 0)[0], weights())


def test_for_a_folder_and_a_misspelt_name_the_file_is_suggested(tmp_path):
    torch.save(weights(), tmp_path / "checkpoint_0200.pth")
    for wrong in (tmp_path, tmp_path / "checkpoint_200.pth"):
        with pytest.raises(UserError) as caught:
            read_checkpoint(wrong)
        assert "checkpoint_0200.pth" in str(caught.value)
    read_checkpoint(tmp_path / "checkpoint_0200.pth")


@pytest.mark.parametrize(
    ("content", "helps"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"\n <!DOCTYPE html><html>Sign in", "the file itself"),
        (gzip.compress(b"weights", mtime=0), "unpack it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "convert its weights"),
        (b'{"weight_map": {}}', "the file of weights itself"),
        (b"", "download it again"),
    ],
)
def test_other_kinds_of_files_are_named_in_the_error(tmp_path, content, helps):
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_checkpoint(tmp_path / "net.pt")
    assert helps in str(caught.value)
    assert len(caught.value.lines) == 1


def test_the_error_for_torchscript_says_how_to_get_the_weights(tmp_path):
    net = build_backbone("resnet18", 0.125, "imagenet", 0).eval()
    with pytest.warns((FutureWarning, DeprecationWarning), match="deprecated"):
        torch.jit.trace(net, torch.zeros(1, 3, 32, 32)).save(str(tmp_path / "net.pt"))
    with pytest.raises(UserError, match=r"torch\.jit\.load"):
        read_checkpoint(tmp_path / "net.pt")
    with pytest.warns((FutureWarning, DeprecationWarning), match="deprecated"):
        torch.save(torch.jit.load(str(tmp_path / "net.pt")).state_dict(), tmp_path / "state.pt")  # as advised by the message
    make_teacher(params_of(tmp_path / "state.pt"), IMAGE, 0)


def test_the_prefix_that_all_names_share():
    assert shared_prefix({"a.b.x": torch.zeros(1), "a.b.c.y": torch.zeros(1)}) == "a.b."
    assert shared_prefix({"a.x": torch.zeros(1), "b.x": torch.zeros(1)}) == ""
    assert shared_prefix({"x": torch.zeros(1)}) == ""


# Tags of timm.


def arch_error(arch: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        NetworkParams(arch=arch, width=1.0, stem="imagenet")
    return str(caught.value)


def test_every_tag_of_timm_is_accepted():
    for name in timm.list_pretrained():
        NetworkParams(arch=name, width=1.0, stem="imagenet")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("timm/vit_small_patch16_224.dino", "vit_small_patch16_224.dino"),
        ("hf-hub:timm/resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("torchvision/resnet50.IMAGENET1K_V2", "torchvision/resnet50"),
    ],
)
def test_for_names_of_other_tools_ours_are_suggested(wrong, right):
    message = arch_error(wrong)
    assert f"set arch: {right}" in message
    NetworkParams(arch=right, width=1.0, stem="imagenet")


def test_for_an_unknown_tag_those_of_the_same_network_are_suggested():
    message = arch_error("vit_small_patch16_224.mocov3")
    listed = re.findall(r"\w+", message.partition("it has ")[2])
    assert {f"vit_small_patch16_224.{tag}" for tag in listed} >= set(timm.list_pretrained("vit_small_patch16_224.*"))
    arch_error("resnet50.")


def test_the_tag_selects_the_weights(monkeypatch):
    asked = []
    create = timm.create_model

    def recorded(name, *args, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        return create(name, *args, **kwargs)

    monkeypatch.setattr(timm, "create_model", recorded)
    params = params_of(Path("x"), arch="vit_small_patch16_224.dino", width=1.0, checkpoint=None)
    _, _, metadata = make_teacher(params, IMAGE, 0)
    assert ("vit_small_patch16_224.dino", True) in asked
    assert metadata["weights"] == "vit_small_patch16_224.dino"
