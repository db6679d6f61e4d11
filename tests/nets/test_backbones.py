"""Backbones and heads: names, widths, stems and seeds, compared with the libraries' own networks."""

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.layers.conv2d_same import Conv2dSame
from torch import nn
from torchvision import models as vision

from bingo.nets.backbones import build_backbone, check_images, without_numbers
from bingo.nets.checkpoint import save_network
from bingo.nets.heads import head_widths, mlp_head, unit
from bingo.nets.students import load_backbone, save_student
from bingo.params import ImageParams, StudentParams
from bingo.runtime.errors import UserError


def stage_widths(net) -> list[int]:
    return [net.conv1.out_channels, *(getattr(net, f"layer{i}")[-1].bn2.num_features for i in (1, 2, 3, 4))]


def shapes(net) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize(("width", "expected"), [(0.125, [8, 8, 16, 32, 64]), (0.5, [32, 32, 64, 128, 256])])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_width_scales_every_channel_of_a_resnet(width, expected, stem):
    net = build_backbone("resnet18", width, stem, 0)
    assert stage_widths(net) == expected
    assert net.feature_width == expected[-1]
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, expected[-1])


def test_resnet50_of_width_2_is_twice_as_wide_everywhere_with_the_same_names():
    with torch.device("meta"):
        one = shapes(build_backbone("resnet50", 1.0, "imagenet", 0))
        two = build_backbone("resnet50", 2.0, "imagenet", 0)
    assert two.feature_width == 4096
    doubled = {name: tuple(2 * n if i < 2 else n for i, n in enumerate(shape)) for name, shape in one.items()}
    doubled["conv1.weight"] = (128, 3, 7, 7)  # the image still has three channels
    assert shapes(two) == doubled


def test_a_deep_stem_is_scaled_too():
    net = build_backbone("resnet26d", 0.25, "imagenet", 0)
    assert [net.conv1[0].out_channels, net.conv1[-1].out_channels, net.feature_width] == [8, 16, 512]
    assert list(net.state_dict()) == list(timm.create_model("resnet26d", num_classes=0).state_dict())


@pytest.mark.parametrize("arch", ["resnet18", "resnet26d", "torchvision/resnet18"])
def test_the_small_stem_of_a_resnet_keeps_the_resolution(arch):
    net, sizes = build_backbone(arch, 1.0, "small", 0), []
    net.layer1.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape)))
    net(torch.zeros(1, 3, 20, 20))
    assert [size[2:] for size in sizes] == [(20, 20)]
    assert (net.conv1.kernel_size, net.conv1.stride) == ((3, 3), (1, 1))


@pytest.mark.parametrize(
    ("arch", "conv"),
    [
        ("efficientnet_b0", "conv_stem"),
        ("tf_mobilenetv3_small_minimal_100", "conv_stem"),
        ("torchvision/mobilenet_v3_small", "features.0.0"),
    ],
)
def test_other_small_stems_do_not_stride(arch, conv):
    net = build_backbone(arch, 1.0, "small", 0)
    published = build_backbone(arch, 1.0, "imagenet", 0)
    assert net.get_submodule(conv).stride == (1, 1)
    assert published.get_submodule(conv).stride == (2, 2)
    assert shapes(net) == shapes(published)
    check_images(net, arch, 16)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_timm_and_torchvision_agree_on_the_names_and_the_function(arch):
    net = build_backbone(arch, 1.0, "imagenet", 3).eval()
    theirs = getattr(vision, arch)()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(x), theirs.eval()(x))


def test_networks_that_cannot_be_built_on_meta_are_built_with_numbers():
    def reading() -> nn.Module:
        return nn.Linear(int(torch.full((3,), 2).sum()), 1)

    assert all(tensor.is_meta for tensor in without_numbers(lambda: build_backbone("resnet18", 1.0, "small", 0)).parameters())
    assert without_numbers(reading).weight.shape == (1, 6)
    with pytest.raises(UserError):
        without_numbers(lambda: build_backbone("resnet8", 1.0, "small", 0))


def test_timm_reads_a_student_strictly(tmp_path):
    net = build_backbone("resnet18", 1.0, "imagenet", 5).eval()
    save_network(tmp_path / "student.safetensors", net.state_dict(), {"kind": "student"})
    read = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(tmp_path / "student.safetensors")).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read(x), net(x))


@pytest.mark.parametrize(
    ("name", "left_out", "feature_width"),
    [
        ("resnet18", {"fc.weight", "fc.bias"}, 512),
        ("mobilenet_v3_small", {"classifier.3.weight", "classifier.3.bias"}, 1024),
        ("efficientnet_b0", {"classifier.1.weight", "classifier.1.bias"}, 1280),
        ("squeezenet1_1", {"classifier.1.weight", "classifier.1.bias"}, 512),
    ],
)
def test_torchvision_networks_lose_only_their_classifier(name, left_out, feature_width):
    net = build_backbone(f"torchvision/{name}", 1.0, "imagenet", 0)
    assert set(vision.get_model(name, weights=None).state_dict()) - set(net.state_dict()) == left_out
    assert all(key.startswith(net.classifier_names) for key in left_out)
    assert net.feature_width == feature_width
    check_images(net, name, 64)
    net.train()
    with torch.no_grad():
        x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(net(x), net(x)), "dropout and stochastic depth are off"


@pytest.mark.parametrize("arch", ["resnet18", "torchvision/mobilenet_v3_small"])
def test_initial_weights_follow_the_seed_and_do_not_use_the_global_generator(arch):
    state = torch.random.get_rng_state()
    first, again, other = (build_backbone(arch, 1.0, "small", seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("arch", "width", "stem", "says"),
    [
        ("resnet_18", 1.0, "imagenet", "timm .* has no such network"),
        ("torchvision/resnet_18", 1.0, "imagenet", "torchvision .* has no such network"),
        ("torchvision/googlenet", 1.0, "imagenet", "auxiliary classifiers"),
        ("torchvision/resnet18", 0.5, "imagenet", "cannot be scaled; set width: 1.0"),
        ("efficientnet_b0", 0.5, "imagenet", "is not a timm ResNet"),
        ("resnext50_32x4d", 0.5, "imagenet", "grouped convolutions"),
        ("resnet50_gn", 0.5, "imagenet", "no batch normalisation"),
        ("resnet18", 0.3, "imagenet", "width = 0.3: 64 channels become 19.2"),
        ("resnet18", 0.01, "imagenet", "multiple of 1/32"),
        ("regnetx_002", 1.0, "small", "stem = small: regnetx_002 has no such stem; ResNets"),
        ("torchvision/shufflenet_v2_x0_5", 1.0, "small", "set stem: imagenet"),
    ],
)
def test_impossible_settings_of_a_network_are_refused_in_one_line(arch, width, stem, says):
    with pytest.raises(UserError, match=says) as caught:
        build_backbone(arch, width, stem, 0)
    assert len(caught.value.lines) == 1
    assert "\n" not in caught.value.lines[0]


def draws(net: nn.Module, px: int = 64) -> bool:
    """Whether a pass in train mode draws numbers from torch's generator."""
    before, images = torch.random.get_rng_state(), torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        net.train()(images)
    return not torch.equal(before, torch.random.get_rng_state())


TAKES = {  # the rates that have an effect in a small network of each family
    "tf_efficientnet_b0": {"drop_rate", "drop_path_rate"},
    "mobilenetv3_small_050": {"drop_rate", "drop_path_rate"},
    "resnet18": {"drop_rate", "drop_path_rate"},
    "regnetx_002": {"drop_rate", "drop_path_rate"},
    "ghostnet_050": {"drop_rate"},  # its default is 0.2
    "densenet121": {"drop_rate"},
    "dla46_c": {"drop_rate"},
    "efficientvit_m0": set(),  # its drop_rate is for the classifier
    "torchvision/mobilenet_v3_small": set(),
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", TAKES)
def test_a_network_applies_its_rates_and_refuses_those_it_would_ignore(arch):
    px = 224 if arch.startswith("efficientvit") else 64
    assert not draws(build_backbone(arch, 1.0, "imagenet", 0), px)
    for name in ("drop_rate", "drop_path_rate"):
        if name in TAKES[arch]:
            net = build_backbone(arch, 1.0, "imagenet", 0, {name: 0.3})
            assert draws(net)
            with torch.no_grad():
                x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
                assert torch.equal(net.eval()(x), net(x))
        else:
            with pytest.raises(UserError, match=f"{name} = 0.3: {arch} .*set {name}: 0.0") as caught:
                build_backbone(arch, 1.0, "imagenet", 0, {name: 0.3})
            assert len(caught.value.lines) == 1


def test_a_scaled_resnet_drops_branches_at_the_rate_of_the_unscaled_one():
    rates = [
        [module.drop_prob for module in net.modules() if isinstance(module, DropPath)]
        for net in (build_backbone("resnet18", width, "small", 0, {"drop_path_rate": 0.2}) for width in (0.125, 1.0))
    ]
    assert rates[0] == rates[1]
    assert max(rates[0]) == 0.2


def test_efficientnet_as_in_bingo():
    """lukemelas' EfficientNet: drop-connect 0.2 (0.2 * i / 16 in block i), dropout 0.2, BatchNorm 1e-3 and 0.01, SAME padding."""
    options = {"drop_rate": 0.2, "drop_path_rate": 0.2, "batchnorm_momentum": 0.01}
    net = build_backbone("tf_efficientnet_b0", 1.0, "imagenet", 0, options)
    assert {(m.eps, m.momentum) for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {(1e-3, 0.01)}
    assert {type(m) for m in net.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)} == {Conv2dSame}
    rates = [block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0.0 for stage in net.blocks for block in stage]
    assert rates == pytest.approx([0.2 * i / 16 for i in range(16)])
    assert net.drop_rate == 0.2
    with torch.no_grad():  # with a momentum of 0.01, the running mean after one batch is a hundredth of the batch's mean
        x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        net.train()(x)
        torch.testing.assert_close(net.bn1.running_mean, 0.01 * net.conv_stem(x).mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-7)


SHAPE = {"arch": "resnet10t", "width": 0.125, "stem": "small"}
IMAGE = ImageParams(crop_px=16, resize_px=16, mean=[0.5] * 3, std=[0.25] * 3)


def test_a_students_file_contains_its_options_and_older_files_do_not(tmp_path):
    drawing = StudentParams(factory=None, weights=None, **SHAPE, drop_path_rate=0.1, drop_rate=0.2, batchnorm_momentum=0.01)
    plain = StudentParams(factory=None, weights=None, **SHAPE, drop_path_rate=0.0, drop_rate=0.0, batchnorm_momentum=None)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for name, network in (("drawing", drawing), ("plain", plain)):
        backbone = build_backbone(**SHAPE, seed_value=1, options=network.options)
        save_student(path := tmp_path / name, tmp_path / f"{name}-head", backbone, nn.Identity(), network, IMAGE, {})
        loaded, metadata = load_backbone(path, network)
        assert metadata.get("options", {}) == network.options
        with torch.no_grad():
            assert torch.equal(loaded(x), backbone.eval()(x))
        assert not draws(loaded, 16)  # code that reads a student does not train it with dropout
        assert loaded.bn1.momentum == (network.batchnorm_momentum or 0.1)
    assert "options" not in metadata  # the file of a plain student is the same as before there were options
    says = "drop_path_rate = 0.1, this network has 0.0, .*drop_rate = 0.2.*batchnorm_momentum = 0.01, this network has null; run the stage"
    with pytest.raises(UserError, match=says) as caught:
        load_backbone(tmp_path / "plain", drawing)
    assert len(caught.value.lines) == 1
    with pytest.raises(UserError, match=r"student\.batchnorm_momentum = null, this network has 0\.01"):
        load_backbone(tmp_path / "drawing", plain)


def test_images_that_a_network_cannot_use_are_refused():
    net = build_backbone("test_vit", 1.0, "imagenet", 0).train()
    with pytest.raises(UserError, match=r"image\.crop_px = 20: test_vit does not accept this size"):
        check_images(net, "test_vit", 20)
    assert net.training
    check_images(net, "test_vit", 160)


def test_a_head_is_linear_layers_with_relu_between():
    head = mlp_head([6, 5, 4], seed_value=1)
    assert list(head.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert head_widths(head) == [6, 5, 4]
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    state = head.state_dict()
    hidden = (x @ state["0.weight"].T + state["0.bias"]).clamp(min=0)
    torch.testing.assert_close(head(x), hidden @ state["2.weight"].T + state["2.bias"])
    assert torch.equal(mlp_head([6, 5, 4], 1)(x), head(x))
    assert not torch.equal(mlp_head([6, 5, 4], 2)(x), head(x))


def test_a_head_of_two_widths_is_one_layer():
    head = mlp_head([6, 4], seed_value=1)
    assert list(head.state_dict()) == ["0.weight", "0.bias"]
    assert head_widths(head) == [6, 4]


def test_unit_rows_have_length_one_in_float32():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]], dtype=torch.bfloat16)
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(unit(rows), expected)
    assert unit(rows).dtype == torch.float32
