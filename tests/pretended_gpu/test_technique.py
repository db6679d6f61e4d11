"""Parts of torch that the simulated GPU relies on, one test for each, so that after an upgrade the failing test names the part."""

import copy
import io
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  # its operations
from torch import nn

from tests.pretended_gpu import tables
from tests.pretended_gpu.device import DeviceError, DeviceTensor, pretended_gpu
from tests.pretended_gpu.engine import virtual_functions
from tests.pretended_gpu.streams import GPU

CPU = torch.device("cpu")


@pytest.fixture
def record():
    with pretended_gpu() as record:
        yield record


# Names in torch.


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch._C, "_ensureCUDADeviceGuardSet"),
        (torch._C, "_only_lift_cpu_tensors"),
        (torch._C, "_set_only_lift_cpu_tensors"),
        (torch._C, "_dispatch_has_kernel_for_dispatch_key"),
        (torch._C, "_disabled_torch_function_impl"),
        (torch.Tensor, "_make_wrapper_subclass"),
        (torch.UntypedStorage, "_cdata"),
        (torch.__future__, "set_swap_module_params_on_conversion"),
        (torch.ops.aten.add.Tensor, "_schema"),
        (torch.ops.aten.add.Tensor, "decompose"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_torch_has(owner, name):
    assert hasattr(owner, name)


def test_the_slot_of_has_primary_context_is_known():
    names = virtual_functions("AcceleratorHooksInterface.h")
    assert names.count("hasPrimaryContext") == 1
    assert names.index("hasPrimaryContext") < names.index("init"), "the destructor takes two slots and comes first"
    assert not {"hasPrimaryContext", "~AcceleratorHooksInterface"} & set(virtual_functions("CUDAHooksInterface.h")), "one slot only"


def test_every_operation_of_the_tables_exists():
    known = {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert known >= tables.NO_LAUNCH | tables.WAITING | tables.SORTED | tables.NONDETERMINISTIC


def test_the_tables_cover_torchs_documentation_of_deterministic_operations():
    """Every operation that raises an error on CUDA is in a table, and no other operation of torch."""
    text = torch.use_deterministic_algorithms.__doc__
    raising = text.partition("operations will throw a")[2].partition("In addition")[0]
    bullets = [" ".join(bullet.split()) for bullet in raising.split("* ")[1:]]
    named = {
        name for bullet in bullets if "MPS tensor" not in bullet or "CUDA" in bullet for name in re.findall(r"`(torch\.[\w.]+)`", bullet)
    }
    listed = {name for name in tables.NONDETERMINISTIC_BY_NAME if name.startswith("torch.")}
    assert named <= listed
    assert listed - named <= {"torch.cumsum", "torch.kthvalue", "torch.nn.MaxPool3d"}, "named by older versions"


# torch's handling of such tensors.


def test_outside_the_body_torch_has_no_gpu_and_computes_as_before():
    own = torch.cuda.is_available, torch.cuda.Stream, torch.save, torch.Tensor.pin_memory, torch.cuda.manual_seed
    with pretended_gpu():
        assert torch.cuda.is_available()
    assert (torch.cuda.is_available, torch.cuda.Stream, torch.save, torch.Tensor.pin_memory, torch.cuda.manual_seed) == own
    assert not torch.cuda.is_available()
    x = torch.ones(3, requires_grad=True)
    (2 * x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
    assert type(nn.Linear(2, 2).double().weight) is nn.Parameter


@pytest.mark.parametrize(
    "make",
    [
        lambda device: torch.zeros(2, device=device),
        lambda device: torch.tensor([1.0, 2.0], device=device),
        lambda device: torch.as_tensor(np.ones(2), device=device),
        lambda device: torch.asarray([1, 2], device=device),
        lambda device: torch.arange(3, device=device),
        lambda device: torch.full((), 5, device=device),
        lambda device: torch.ones(2).to(device),
        lambda device: torch.empty(2, device=device).fill_(3),
        lambda device: torch.cat([torch.ones(2, device=device)] * 2),
        lambda device: torch.ones(2, 3, device=device).new_zeros(4),
    ],
)
def test_a_new_tensor_is_on_the_device_with_the_cpus_numbers(record, make):
    made = make(GPU)
    assert (made.device, made.is_cuda, made.type().startswith("torch.cuda")) == (GPU, True, True)
    wanted = make(CPU)
    assert made.cpu().dtype == wanted.dtype
    assert torch.equal(made.cpu(), wanted)


def test_a_view_shares_the_memory_of_its_base(record):
    base = torch.zeros(3, 4, device=GPU)
    view = base.T[1:]
    view += 1
    assert view.memory is base.memory
    assert base.clone().memory is not base.memory
    assert base.cpu().sum() == 9


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
    return nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 2))


def trained(device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    """A network after two steps, and its last output."""
    network = small_network().to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=True)
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    for step in range(2):
        (torch.cuda.manual_seed if device.type == "cuda" else torch.default_generator.manual_seed)(step)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = network(images)
        optimizer.zero_grad()
        F.cross_entropy(out.float(), torch.tensor([0, 1, 0, 1], device=device)).backward()
        optimizer.step()
    return network, out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_trains_as_on_the_cpu(record, dtype):
    """With convolution, BatchNorm, dropout, autocast, autograd and a fused optimizer."""
    wanted, wanted_out = trained(CPU, dtype)
    network, out = trained(GPU, dtype)
    assert out.dtype == wanted_out.dtype == dtype
    assert all(type(x) is DeviceTensor and isinstance(x, nn.Parameter) for x in network.parameters())
    assert torch.equal(out.cpu(), wanted_out)
    for (name, got), expected in zip(network.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert got.stride() == expected.stride(), name
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0 if dtype == torch.float32 else 2e-3)  # autocast rounds elsewhere
    assert {"convolution", "convolution_backward", "_fused_sgd_"} <= set(record.launches)


def test_a_copied_network_is_independent_and_has_the_same_weights(record):
    network = small_network().to(GPU)
    copied = copy.deepcopy(network)
    with torch.no_grad():
        network[0].weight.zero_()
    assert isinstance(copied[0].weight, nn.Parameter)
    assert copied[0].weight.requires_grad
    assert torch.equal(copied[0].weight.cpu(), small_network()[0].weight)


def test_inference_mode_splits_composite_operations(record):
    network = small_network().to(GPU).eval()
    with torch.inference_mode():
        out = network(torch.ones(1, 3, 8, 8, device=GPU))
    assert torch.equal(out.cpu(), small_network().eval()(torch.ones(1, 3, 8, 8)).detach())
    assert "linear" not in record.launches


@pytest.mark.parametrize("map_location", ["cpu", "cuda"])
def test_a_saved_state_is_loaded_on_either_device(record, map_location):
    network, file = small_network().to(GPU), io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, map_location=map_location)
    assert {x.device.type for x in loaded.values()} == {map_location}
    network.load_state_dict(loaded)
    assert torch.equal(loaded["0.weight"].cpu(), small_network()[0].weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.unsqueeze_(0),
        lambda x: x.T.squeeze_(0),
        lambda x: x.t_(),
        lambda x: x.as_strided_((2, 2), (1, 3)),
        lambda x: x.resize_(3, 2),
    ],
)
def test_an_operation_that_reshapes_its_argument_changes_the_shape_in_torch(record, change):
    made, wanted = change(torch.arange(6, device=GPU).view(2, 3)), change(torch.arange(6).view(2, 3))
    assert (made.shape, made.stride(), made.cpu().tolist()) == (wanted.shape, wanted.stride(), wanted.tolist())


# Faults that must be found.


@pytest.mark.parametrize(
    ("what", "work"),
    [
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("_local_scalar_dense", lambda x: float(x.sum())),
        ("_local_scalar_dense", lambda x: bool((x > 0).any())),
        ("_local_scalar_dense", lambda x: f"{x.sum():.3f}"),
        ("_local_scalar_dense", lambda x: torch.split(x, int(x.sum()) + 4)),
        ("tolist", lambda x: x.tolist()),
        ("copy to the host", lambda x: x.cpu()),
        ("copy to the host", lambda x: torch.zeros(4).copy_(x)),
        ("copy to the host", lambda x: x.to("cpu", non_blocking=True)),
        ("upload", lambda x: x + torch.ones(4).to(GPU)),
        ("upload", lambda x: torch.ones(4).to(GPU, non_blocking=True)),
        ("upload", lambda x: torch.ones(4).pin_memory().to(GPU)),
        ("upload", lambda x: torch.tensor([1.0], device=GPU)),
        ("upload", lambda x: x.copy_(torch.ones(4))),
        ("index: indices on the host", lambda x: x[torch.tensor([0])]),
        ("index by a mask", lambda x: x[x > 0]),
        ("index_put_ by a mask", lambda x: x.__setitem__(x > 0, torch.ones(1, device=GPU).expand(4)[x > 0])),
        ("nonzero", lambda x: torch.where(x > 0)),
        ("_unique2", lambda x: x.unique()),
        ("equal", lambda x: torch.equal(x, x)),
        ("repeat_interleave", lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=GPU))),
        ("synchronize", lambda x: torch.cuda.synchronize()),
        ("Stream.synchronize", lambda x: torch.cuda.current_stream().synchronize()),
        ("Event.synchronize", lambda x: torch.cuda.Event().synchronize()),
        ("torch.save", lambda x: torch.save(x, io.BytesIO())),
    ],
)
def test_a_wait_is_found(record, what, work):
    x = torch.zeros(4, device=GPU)
    assert not record.waits
    work(x)
    assert what in {kind for kind, _ in record.waits}


@pytest.mark.parametrize(
    "work",
    [
        lambda x: torch.ones(4).pin_memory().to(GPU, non_blocking=True),
        lambda x: x + torch.tensor(1.0) + 2,
        lambda x: torch.where(x > 0, 1, x),
        lambda x: torch.full((4,), 3, device=GPU),
        lambda x: x.masked_fill(x > 0, 2.0),
        lambda x: x.__setitem__(0, 5.0),
        lambda x: x.repeat_interleave(2),
        lambda x: x[None, :].expand(3, 4).flatten()[torch.arange(2, device=GPU)],
    ],
)
def test_operations_that_do_not_wait_are_not_faults(record, work):
    work(torch.zeros(4, device=GPU))
    assert record.faults == {}


def test_uploads_from_pageable_memory_are_distinguished_from_others(record):
    pinned = torch.ones(4).pin_memory()
    pinned.to(GPU), pinned[1:].to(GPU, non_blocking=True)
    assert not record.pageable
    torch.ones(4).to(GPU)
    assert record.pageable.total() == 1


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x + torch.ones(4),
        lambda x: torch.cat([x, torch.ones(4)]),
        lambda x: torch.ones(4)[x.long()],
        lambda x: F.linear(torch.ones(2, 4, device=GPU), torch.ones(3, 4)),
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: torch._foreach_add_([x], [torch.ones(4)]),
    ],
)
def test_operands_on_two_devices_are_refused(record, work):
    with pytest.raises(DeviceError):
        work(torch.zeros(4, device=GPU))


@pytest.mark.parametrize("read", [lambda x: x.numpy(), np.asarray, lambda x: torch.from_numpy(np.array(x))])
def test_numpy_does_not_read_the_device(record, read):
    with pytest.raises(TypeError, match="cuda:0"):
        read(torch.zeros(4, device=GPU))


def test_a_fused_optimizer_refuses_another_memory_format(record):
    weight = nn.Parameter(torch.zeros(2, 3, 3, 3, device=GPU).to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    weight.grad = torch.zeros(2, 3, 3, 3, device=GPU)
    with pytest.raises(DeviceError, match="layout"):
        optimizer.step()


def test_lists_of_different_layouts_need_a_launch_for_each_tensor(record):
    x = torch.zeros(2, 3, device=GPU)
    torch._foreach_add_([x], [torch.ones(2, 3, device=GPU)])
    assert not record.by_tensor
    torch._foreach_add_([x], [torch.ones(3, 2, device=GPU).T])
    assert record.by_tensor.total() == 1


def side_stream(waits: bool, records: bool, joins: bool) -> None:
    """A tensor of the default stream is changed on another stream, and a new tensor of that stream is used here."""
    x, beside, here = torch.zeros(4, device=GPU), torch.cuda.Stream(), torch.cuda.current_stream()
    if waits:
        beside.wait_stream(here)
    with torch.cuda.stream(beside):
        x.record_stream(beside)
        y = x.add_(1) * 2
    if joins:
        here.wait_event(beside.record_event())
    if records:
        y.record_stream(here)
    y.add_(1)
    assert y.cpu().tolist() == [3] * 4


@pytest.mark.parametrize("missing", [None, "waits", "records", "joins"])
def test_a_stream_that_is_out_of_order_is_found(record, missing):
    side_stream(*(name != missing for name in ("waits", "records", "joins")))
    assert bool(record.unordered) == (missing is not None)


def test_memory_must_not_be_changed_before_other_streams_have_read_it(record):
    x, beside = torch.zeros(4, device=GPU), torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    x.record_stream(beside)
    with torch.cuda.stream(beside):
        x.sum()
    assert not record.unordered
    x.sum()
    assert not record.unordered, "two streams may read it"
    x.zero_()
    assert record.unordered


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        ("sorted", lambda x: x.index_put_((torch.arange(2, device=GPU),), torch.ones(2, device=GPU))),
        ("sorted", lambda x: x.index_copy(0, torch.arange(2, device=GPU), torch.ones(2, device=GPU))),
        ("sorted", lambda x: x.scatter(0, torch.arange(2, device=GPU), torch.ones(2, device=GPU))),
        ("sorted", lambda x: x.requires_grad_()[torch.arange(2, device=GPU)].sum().backward()),
        ("sorted", lambda x: x.requires_grad_().gather(0, torch.arange(2, device=GPU)).sum().backward()),
        ("sorted", lambda x: x.requires_grad_().index_select(0, torch.arange(2, device=GPU)).sum().backward()),
        ("nondeterministic", lambda x: x.histc()),
        ("nondeterministic", lambda x: x.long().bincount(minlength=2)),
        ("nondeterministic", lambda x: F.interpolate(x.requires_grad_()[None, None], scale_factor=2, mode="linear").sum().backward()),
    ],
)
def test_operations_that_deterministic_mode_slows_down_or_refuses_are_found(record, kind, work):
    work(torch.zeros(4, device=GPU))
    assert record.faults == {}, "without that mode it is an ordinary kernel"
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        work(torch.zeros(4, device=GPU))
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(record.faults) == {kind}


def test_new_memory_costs_a_launch_if_it_is_filled(record):
    torch.empty(4, device=GPU)
    assert not record.launches
    torch.use_deterministic_algorithms(True)
    try:
        torch.empty(4, device=GPU)
    finally:
        torch.use_deterministic_algorithms(False)
    assert record.launches == ({"fill of new memory": 1} if torch.utils.deterministic.fill_uninitialized_memory else {})
