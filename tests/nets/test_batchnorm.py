"""BatchNorm by groups: each group as in a separate process, keys shuffled among the groups, layers and names unchanged."""

import itertools
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from bingo.methods.contract import Progress
from bingo.methods.parts.momentum import shuffled
from bingo.nets.backbones import build_backbone
from bingo.nets.batchnorm import groups as batchnorm
from bingo.nets.batchnorm.groups import counted_together, counting_layers, grouped_batchnorm, groups, own_groups
from bingo.nets.heads import batchnorm_mlp, layered_head
from bingo.params import read_yaml, validate
from bingo.runtime import distributed
from bingo.runtime.errors import UserError
from tests.training.test_train import trainer

GROUPS = 4


def images(count: int, side: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    images_BCHW = torch.randn(count, 3, side, side, generator=generator) * torch.rand(count, 3, 1, 1, generator=generator) * 3
    return images_BCHW.contiguous(memory_format=torch.channels_last)


def pooled(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(3), nn.Flatten(), *layers)


NETWORKS = {  # torchvision and timm (plain, BatchNorm with its activation, standardised weights), and heads
    "torchvision": lambda: torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=8),
    "timm": lambda: build_backbone("resnet10t", 0.125, "small", 0),
    "BatchNormAct2d": lambda: timm.create_model("test_efficientnet", num_classes=0),
    "standardised": lambda: nn.Sequential(timm.layers.StdConv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),
    "BatchNorm1d": lambda: pooled(batchnorm_mlp(48, 16, 8, 0)),
    "no affine": lambda: pooled(layered_head(["linear_no_bias", "batchnorm_no_affine"], [48, 8])),
    "cumulative": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.Flatten()),
    "no running statistics": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()),
}


@pytest.fixture(params=["_one_by_one", "_side_by_side"])
def way(request, monkeypatch) -> str:
    """Computes the groups as on a CPU, and as on a GPU."""
    monkeypatch.setattr(batchnorm, "_one_by_one", getattr(batchnorm, request.param))
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("companions", [0, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_each_group_is_treated_as_in_a_separate_process(name, companions, way):
    """Outputs, gradients and running statistics are compared with copies of the network, one per group, each of which sees only its
    images."""
    together = NETWORKS[name]().double().to(memory_format=torch.channels_last).train()
    apart = [deepcopy(together) for _ in range(GROUPS)]
    anchors, blocks = 16, 1 + companions
    x = images(anchors * blocks).double()
    for _ in range(2):
        with grouped_batchnorm(GROUPS, anchors):
            output = together(x)
        of_block = torch.arange(anchors).reshape(GROUPS, -1)
        weight = torch.linspace(-1, 1, output.numel()).double().reshape(output.shape)
        (output * weight).sum().backward()
        for group, net in enumerate(apart):
            rows = torch.cat([of_block[group] + anchors * block for block in range(blocks)])
            alone = net(x[rows])
            torch.testing.assert_close(output[rows], alone, rtol=1e-9, atol=1e-9)
            (alone * weight[rows]).sum().backward()
    for parameter, *parts in zip(together.parameters(), *(net.parameters() for net in apart), strict=True):
        torch.testing.assert_close(parameter.grad, sum(part.grad for part in parts), rtol=1e-7, atol=1e-7)
    for buffer, *parts in zip(together.buffers(), *(net.buffers() for net in apart), strict=True):
        torch.testing.assert_close(buffer.double(), torch.stack(parts).double().mean(dim=0), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_a_gpus_kernels_in_the_interpreter_on_the_cpu():
    """Their numbers; in a separate process, because Triton chooses its interpreter when it is imported."""
    pytest.importorskip("triton")
    file = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-c", os.devnull, "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_gpus_kernels_compile_without_one(tmp_path, monkeypatch):
    """To PTX, because the interpreter allows more than the compiler."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from bingo.nets.batchnorm import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile, numbers = {"P": 16, "R": 32, "W": 64}, {"M", "C", "G", "chunk", "count"}
    types = dict.fromkeys(numbers, "i32") | dict.fromkeys(("x", "dy", "out"), "*bf16") | {"momentum": "fp32", "eps": "fp32"}
    steps = ("sums", "statistics", "gradients", "linear")
    absent, ones = dict.fromkeys(("weight", "dweight", "running_mean", "dy")), dict.fromkeys(("G", "count"), 1)  # Triton makes 1 a constant
    for kernel, given in itertools.product([getattr(kernels, f"_{step}") for step in steps], [{}, absent, ones]):
        constants = {name: value for name, value in (tile | given).items() if name in kernel.arg_names}
        signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
        made = compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", 90, 32), {"enable_fp_fusion": True})
        assert f".entry {kernel.__name__}" in made.asm["ptx"]


def test_channels_last_layers_and_names_are_kept(way):
    net = build_backbone("resnet10t", 0.125, "small", 0).to(memory_format=torch.channels_last).train()
    names, kinds, formats = list(net.state_dict()), [type(module) for module in net.modules()], set()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(
                lambda module, inputs, output: formats.add(output.is_contiguous(memory_format=torch.channels_last))
            )
    with grouped_batchnorm(GROUPS, 16):
        assert groups() == GROUPS
        net(images(16))
    assert groups() == 1
    assert formats == {True}
    assert (list(net.state_dict()), [type(module) for module in net.modules()]) == (names, kinds)


def test_stored_statistics_are_used_and_not_changed():
    net = nn.BatchNorm2d(3)
    net.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
    x, before = images(12), deepcopy(net.state_dict())
    expected = net.eval()(x)
    with grouped_batchnorm(3, 12):
        assert torch.equal(net(x), expected)
        net.train().momentum = 0.0  # as in a live teacher with batch statistics
        assert not torch.equal(net(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items() if name != "num_batches_tracked")


def _mates(method, x_BCHW, groups: int) -> tuple[list[set], list[set]]:
    """The images with which each image is normalised, in the student's pass and in that of its moving average. Image i is filled with i."""
    seen = {}
    handles = [
        net.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0][:, 0, 0, 0].tolist()}))
        for name, net in (("query", method.student), ("key", method.key_encoder))
    ]
    with grouped_batchnorm(groups, len(x_BCHW)):
        method.student(x_BCHW)
        keys = shuffled(method.key_encoder, x_BCHW, 0, 5)
    for handle in handles:
        handle.remove()
    found, run = [], len(x_BCHW) // groups
    for name in ("query", "key"):
        together = [set(seen[name][start : start + run]) for start in range(0, len(x_BCHW), run)]
        found.append([next(group for group in together if i in group) for i in range(len(x_BCHW))])
    assert len(keys) == len(x_BCHW)
    return found[0], found[1]


def test_only_with_groups_are_a_query_and_its_key_normalised_with_different_images(tmp_path):
    method = trainer(tmp_path, "moco", network="batchnorm").method.train()
    x = torch.arange(16.0)[:, None, None, None].expand(-1, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    query, key = _mates(method, x, 1)
    assert query == key
    query, key = _mates(method, x, GROUPS)
    assert [len(mates) for mates in key] == [4] * 16
    assert all(own != other for own, other in zip(query, key, strict=True))


def test_shuffled_keys_return_to_their_images(tmp_path):
    encode = nn.Flatten()
    with grouped_batchnorm(GROUPS, 16):
        assert torch.equal(shuffled(encode, images(16), 0, 5), encode(images(16)))


def test_training_differs_with_groups_and_the_student_is_a_plain_network(tmp_path):
    whole, grouped = (trainer(tmp_path / str(count), "moco", network="batchnorm", epochs=1, groups=count) for count in (1, GROUPS))
    first, second = whole.run().history, grouped.run().history
    assert first[0]["loss"] != second[0]["loss"]
    plain = build_backbone("resnet18", 0.125, "small", 0)
    plain.load_state_dict(grouped.method.student.state_dict())
    x = images(4)
    assert torch.equal(plain.eval()(x), grouped.method.student.eval()(x))


def test_a_moco_step_equals_groups_computed_one_by_one(tmp_path):
    run = trainer(tmp_path, "moco", network="batchnorm", groups=GROUPS)
    method = run.method.train()
    batch = next(run.batches.epoch(0, 0))
    student, encoder = deepcopy(nn.Sequential(method.student, method.head)), deepcopy(method.key_encoder)
    with grouped_batchnorm(GROUPS, 16):
        loss = method(batch, Progress(0, 3))["loss"]
    query = torch.cat([nn.functional.normalize(deepcopy(student)(part)) for part in batch.anchor_views[0].split(4)])
    from bingo import seeds

    order = torch.from_numpy(seeds.permutation(0, "shuffle batchnorm", 3, 16))
    dealt = torch.cat([nn.functional.normalize(deepcopy(encoder)(part)) for part in batch.anchor_views[1][order].split(4)])
    keys = torch.empty_like(dealt)
    keys[order] = dealt
    logits = torch.cat([(query * keys).sum(dim=1, keepdim=True), query @ method.queue.keys_QP.T], dim=1) / method.params.temperature
    expected = nn.functional.cross_entropy(logits, torch.zeros(16, dtype=torch.int64))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("world", "asked", "own"), [(1, 8, 8), (2, 8, 4), (8, 8, 1), (16, 8, 1), (4, 1, 1), (3, 9, 3)])
def test_processes_share_the_groups(monkeypatch, world, asked, own):
    monkeypatch.setattr(distributed, "world", lambda: world)
    assert own_groups(asked) == own


def test_groups_that_cannot_be_shared_by_the_processes_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(UserError, match=r"distill\.batchnorm_groups = 8: 3 processes cannot share"):
        own_groups(8, "distill.batchnorm_groups")


@pytest.mark.parametrize(
    ("batch", "set_groups", "momentum", "processes", "groups"),
    [
        (64, None, True, 1, 2), (128, None, True, 1, 4), (256, None, True, 1, 8), (63, None, True, 1, 1), (100, None, True, 1, 2),
        (96, None, True, 1, 3), (4, None, True, 1, 1), (256, None, False, 1, 1), (256, None, True, 2, 1),
        (256, 1, True, 1, 1), (256, 4, False, 8, 4),
    ],
)  # fmt: skip
def test_by_default_the_groups_of_a_momentum_encoder_have_a_gpus_number_of_images(batch, set_groups, momentum, processes, groups):
    raw = read_yaml(Path(__file__).parents[2] / "params.yaml")
    raw["distill"] |= {"batch_anchors": batch, "batchnorm_groups": set_groups}
    assert validate(raw, "params.yaml").distill.groups_for(momentum, processes) == groups


@pytest.mark.parametrize(
    ("batch", "parts", "set_groups", "momentum", "world", "groups", "of_a_part"),
    [
        (64, 2, None, False, 1, 2, 1), (64, 2, None, True, 1, 2, 1), (256, 2, None, True, 1, 8, 4), (192, 3, None, True, 1, 6, 2),
        (256, 2, 8, True, 1, 8, 4), (256, 2, None, True, 2, 2, 1), (256, 2, 8, False, 2, 8, 2), (256, 4, 4, False, 2, 4, 1),
    ],
)  # fmt: skip
def test_each_part_of_a_step_has_its_share_of_the_groups(batch, parts, set_groups, momentum, world, groups, of_a_part, monkeypatch):
    raw = read_yaml(Path(__file__).parents[2] / "params.yaml")
    raw["distill"] |= {"batch_anchors": batch, "accumulate_steps": parts, "batchnorm_groups": set_groups}
    assert validate(raw, "params.yaml").distill.groups_for(momentum, world) == groups
    monkeypatch.setattr(distributed, "world", lambda: world)
    assert own_groups(groups, parts=parts) == of_a_part


@pytest.mark.parametrize(
    ("batch", "groups", "allowed"),
    [
        (64, 3, "1, 2, 4, 8, 16"),
        (64, 32, "1, 2, 4, 8, 16"),
        (30, 4, "1, 2, 3, 5, 6"),
        (7, 2, "1"),
        (3, 3, "1"),
        (10**9, 3, "1, 2, 4, 5, 8"),
    ],
)
def test_groups_that_do_not_divide_the_batch_or_are_too_small_are_refused(batch, groups, allowed):
    raw = read_yaml(Path(__file__).parents[2] / "params.yaml")
    raw["distill"] |= {"batch_anchors": batch, "batchnorm_groups": groups}
    with pytest.raises(UserError) as caught:
        validate(raw, "params.yaml")
    (line,) = caught.value.lines
    assert line.startswith(f"params.yaml: distill: batchnorm_groups: {groups}, allowed for batch_anchors {batch} are {allowed}")
    for count in [int(word) for word in allowed.split(", ")]:
        raw["distill"] |= {"batchnorm_groups": count}
        validate(raw, "params.yaml")


@pytest.mark.parametrize("name", NETWORKS)
def test_batches_are_counted_together_as_one_by_one(name):
    """Two calls of every layer, after which the body fails. A layer that averages over all batches reads its own count and is excluded."""
    torch.manual_seed(0)
    together = NETWORKS[name]()
    alone = deepcopy(together)

    def called(network: nn.Module) -> None:
        norms = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        for layer in norms * 2:
            torch.manual_seed(0)
            layer.train()(torch.randn(4, layer.num_features, *[2, 2][: 2 * (not isinstance(layer, nn.BatchNorm1d))]))

    def fails() -> None:
        with counted_together(counting_layers(together)):
            called(together)
            raise ZeroDivisionError

    counters = together.state_dict(keep_vars=True)
    with pytest.raises(ZeroDivisionError):
        fails()
    called(alone)
    for (key, value), wanted in zip(together.state_dict(keep_vars=True).items(), alone.state_dict().values(), strict=True):
        assert value is counters[key]
        assert torch.equal(value, wanted)
        assert "num_batches" not in key or value == 2
