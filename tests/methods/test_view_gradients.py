"""Gradients computed term by term equal those of the plain sum, but keep the activations of only one view at a time."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from bingo.methods.contract import Batch, Context, Progress, build_method
from bingo.methods.view_gradients import sum_of_terms
from bingo.nets.backbones import build_backbone
from bingo.nets.precision import autocast, casts_kept
from bingo.params import method_section
from bingo.planning.costs import saved_bytes
from tests.training.test_train import PARAMS

CPU = torch.device("cpu")


def network(seed: int = 0) -> nn.Sequential:
    """Weights, of which one is frozen and one is not used by any term, and BatchNorm."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5), nn.Linear(5, 5))
    net[5].weight.requires_grad_(False)
    net.unused = nn.Parameter(torch.ones(2))
    net.forward = lambda x: net[5](net[4](net[3](net[2](net[1](net[0](x))))))
    return net


def losses(net: nn.Module, views: list[torch.Tensor], precision: str) -> dict:
    def loss(view: torch.Tensor, power: int) -> torch.Tensor:
        with autocast(precision, CPU):
            output = net(view)
        return output.float().abs().pow(power).mean()

    return {str(power): lambda view=view, power=power: loss(view, power) for power, view in enumerate(views, 1)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_value_gradient_and_statistics_are_those_of_the_plain_sum(precision):
    views = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    ours, plain = network(), network()
    with casts_kept(ours, precision, CPU):
        total, values = sum_of_terms(losses(ours, views, precision), ours)
    wanted = {name: term() for name, term in losses(plain, views, precision).items()}
    for name, value in wanted.items():
        assert torch.equal(values[name], value)
        assert not values[name].requires_grad
    summed = torch.stack(list(wanted.values())).sum()
    assert torch.equal(total, summed)
    (total / 3).backward(), (summed / 3).backward()
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if name != "unused" and mine.requires_grad:
            rounding = 1e-5 if precision == "fp32" else 2e-2
            assert (mine.grad - theirs.grad).abs().max() <= rounding * theirs.grad.abs().max(), name
        else:
            assert mine.grad is None is theirs.grad
    for mine, theirs in zip(ours.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_weights_are_copied_to_bf16_only_once():
    """Products outside `autocast` stay in float32."""
    net, view, seen, casts = network(), torch.randn(4, 3, 8, 8), [], Counter()
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    weights = [net[0].weight, net[4].weight, net[4].bias, net[5].weight, net[5].bias]  # one of them frozen

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._foreach_copy_.default:
                casts[args[0][0].dtype] += 1
                assert len(args[0]) == (5 if args[0][0].dtype == torch.bfloat16 else 4)
            if function is torch.ops.aten._to_copy.default:
                assert not any(args[0] is weight for weight in weights)
            return function(*args, **(kwargs or {}))

    with Casts(), casts_kept(net, "bf16", CPU):
        sum_of_terms(losses(net, [view] * 3, "bf16"), net)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert seen == [torch.bfloat16] * 3
    assert casts == {torch.bfloat16: 1, torch.float32: 3}  # copies of weights, and of the gradients of each term
    assert net[0].weight.dtype == torch.float32


@pytest.mark.parametrize("term", [lambda net: ((net.a + net.b) * 3).sum(), lambda net: net.a.sum() + net.b.sum(), lambda net: net.b.sum()])
@pytest.mark.parametrize("before", [None, 5.0])
def test_gradients_that_share_memory_are_separated(term, before):
    """Autograd returns the same tensor for two summands, and a broadcast number for a sum. Existing gradients change only in backward."""
    ours, plain = nn.Module(), nn.Module()
    for net in (ours, plain):
        net.a, net.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        net.a.grad = None if before is None else torch.full((4,), before)
    total, _ = sum_of_terms({"first": lambda: term(ours), "second": lambda: term(ours)}, ours)
    assert ours.b.grad is None
    assert ours.a.grad is None if before is None else torch.equal(ours.a.grad, torch.full((4,), before))
    (total / 2).backward(), ((term(plain) + term(plain)) / 2).backward()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert mine.grad is theirs.grad is None or torch.equal(mine.grad, theirs.grad)


def test_a_term_that_fails_leaves_the_gradients_as_they_were():
    net = nn.Linear(3, 2)
    net.weight.grad = before = torch.ones(2, 3)

    def fails() -> torch.Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        sum_of_terms({"first": lambda: net(torch.ones(1, 3)).sum(), "second": fails}, net)
    assert net.weight.grad is before
    assert torch.equal(before, torch.ones(2, 3))
    assert net.bias.grad is None


def test_without_gradients_the_terms_are_only_computed():
    net, views = network().eval(), [torch.randn(4, 3, 8, 8) for _ in range(2)]
    wanted = torch.stack([term() for term in losses(net, views, "fp32").values()]).sum()
    with torch.no_grad():
        total, values = sum_of_terms(losses(net, views, "fp32"), net)
    assert torch.equal(total, wanted)
    assert not total.requires_grad
    total, _ = sum_of_terms(losses(net.requires_grad_(False), views, "fp32"), net)
    assert torch.equal(total, wanted)
    assert list(values) == ["1", "2"]


def test_activations_of_one_view_at_a_time_are_kept_for_backward():
    """BINGO with three views of 32 px keeps as much as with one view, except for a mixed image and its keys."""

    def kept(**switches) -> int:
        keys_TVP = torch.nn.functional.normalize(torch.randn(64, 1, 16), dim=2).half()
        context = Context(build_backbone("resnet18", 0.25, "small", 0), 128, 0, "stored", "fp32", CPU, None, keys_TVP)
        shipped = PARAMS.methods.bingo.model_dump()
        section = method_section("bingo").model_validate(shipped | {"negatives": "bank", "mask_bag": False} | switches)
        views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
        keys = torch.randn(2, 8, 16)
        rows = torch.arange(8)
        batch = Batch(rows, views[:1], rows + 8, views[1:], [keys[0]], keys[1], host_rows_B=np.arange(8))
        return saved_bytes(build_method("bingo", section, context).train(), batch, Progress(20, 0))

    one, three = kept(relation="none"), kept(terms="symmetric_mix")
    assert one > 20e6 / 4
    assert three < 1.05 * one


def test_gradients_have_the_memory_layout_of_their_parameters():
    """With other layouts DistributedDataParallel warns, and the optimizer handles parameters one by one."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(20, 2)).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    given = {}  # of the terms separately, then of their sum
    for name, parameter in network.named_parameters():
        parameter.register_hook(lambda gradient, name=name: given.update({name: gradient.stride()}))
    sum_of_terms({name: lambda: network(images).square().mean() for name in "ab"}, network)[0].backward()
    assert given == {name: parameter.stride() for name, parameter in network.named_parameters()}
