"""A simulated GPU: tensors on cuda:0 with their numbers in the host's memory.

    with pretended_gpu() as record:  # torch.device("cuda") works in the body, on any machine
        ...
    record.waits, record.pageable, record.launches, ...

A tensor subclass presents itself to torch as a CUDA tensor and wraps a tensor of the host, on which each operation is run. Dispatch,
autocast, autograd and code with `device.type == "cuda"` then behave as on a GPU, results are the CPU's, and errors of CUDA (operands on two
devices, different memory formats in a fused optimizer) are raised. Kernels, their rounding, time, memory, NCCL and FAISS (see
fake_faiss.py) are not simulated. FakeTensor works the same way, without numbers.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from sys import _getframe
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretended_gpu import engine
from tests.pretended_gpu.streams import GPU, STREAMS, Event, Memory, Stream
from tests.pretended_gpu.tables import NO_LAUNCH, NONDETERMINISTIC, SORTED, WAITING

AUTOGRAD = "autograd"  # the place of operations that no function of the product calls
engine.ready()  # for processes without tests/conftest.py


class DeviceError(RuntimeError):
    """An error that CUDA would raise."""


@dataclass
class Record:
    """Observed events: numbers of times by (event, place). `launches` is by the name of the operation; a place is a function of the
    product.

    `waits`: the host waits for the device. `pageable`: uploads from memory that is not page-locked, which also wait. `unordered`: memory is
    used on a stream before another stream has finished with it, or without being recorded for it. `nondeterministic`, `sorted`: operations
    without a deterministic kernel, or with one that sorts, while deterministic ones are requested. `by_tensor`: `_foreach` operations with
    a launch for each tensor, because the tensors of a group differ in dtype or layout.
    """

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    pageable: Counter[tuple[str, str]] = field(default_factory=Counter)
    unordered: Counter[tuple[str, str]] = field(default_factory=Counter)
    nondeterministic: Counter[tuple[str, str]] = field(default_factory=Counter)
    sorted: Counter[tuple[str, str]] = field(default_factory=Counter)
    by_tensor: Counter[tuple[str, str]] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        """Reset all counts."""
        for one in fields(self):
            getattr(self, one.name).clear()

    def copy(self) -> "Record":
        """A copy that no longer changes."""
        return Record(*(Counter(getattr(self, one.name)) for one in fields(self)))

    def wait(self, what: str) -> None:
        """Make the host wait for the device."""
        self.waits[what, place()] += 1

    @property
    def faults(self) -> dict[str, dict[tuple[str, str], int]]:
        """All kinds of faults that occurred; launches are not faults."""
        return {one.name: dict(found) for one in fields(self) if one.name != "launches" and (found := getattr(self, one.name))}


def place() -> str:
    """The innermost running function of the product, "bingo/FILE.py:Class.function", or AUTOGRAD."""
    frame = _getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("bingo.", "stages.")) and frame.f_code.co_name != "__torch_function__":  # all calls pass through it
            return f"{module.replace('.', '/')}.py:{frame.f_code.co_qualname.partition('.<locals>')[0]}"
        frame = frame.f_back
    return AUTOGRAD


_RECORD = Record()


class DeviceTensor(Tensor):
    """A tensor on cuda:0 with the numbers of `host`."""

    host: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, host: Tensor, memory: Memory | None = None):
        with torch.inference_mode(host.is_inference()):
            x = Tensor._make_wrapper_subclass(
                cls,
                host.size(),
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                layout=host.layout,
                device=GPU,
            )
        x.host, x.memory = host, memory or Memory(_storage(host))
        return x

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Call(func, args, kwargs or {}).run()

    def __repr__(self) -> str:
        return f"DeviceTensor({self.host})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with torch.no_grad():
                memo[id(self)] = copied = DeviceTensor(self.host.clone()).requires_grad_(self.requires_grad)
            if hasattr(self, "_is_param"):
                copied._is_param = True
        return memo[id(self)]

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    __array__ = numpy

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else str(self), spec)

    def tolist(self):
        _RECORD.wait("tolist")
        return self.host.tolist()

    def untyped_storage(self):
        return self.host.untyped_storage()

    def data_ptr(self):
        return self.host.data_ptr()

    def pin_memory(self, *_):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def record_stream(self, stream: Stream) -> None:
        self.memory.recorded.add(stream)


def _storage(host: Tensor) -> int:
    return host.untyped_storage()._cdata


def _is_device(x: object) -> bool:
    return isinstance(x, DeviceTensor)


def _on_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _leaves(value: Any) -> Iterator[Any]:
    """The leaves of nested lists, tuples and dicts; torch's pytree, which supports more types, took half of a step's time."""
    if isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def _mapped(kind: type, change: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `change` applied to all its leaves of this type."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return type(value)((name, _mapped(kind, change, part)) for name, part in value.items())
    return type(value)([_mapped(kind, change, part) for part in value]) if type(value) in (list, tuple) else value


@cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Number and name of the arguments that an operation writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((number, a.name) for number, a in arguments if a.alias_info is not None and a.alias_info.is_write)


class Call:
    """One operation of torch, run on the host's tensors for the simulated GPU."""

    def __init__(self, func: Any, args: tuple, kwargs: dict[str, Any]):
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = func._schema.name.partition("::")[2]
        self.leaves = [*_leaves((args, kwargs))]
        self.device = [x for x in self.leaves if isinstance(x, DeviceTensor)]
        self.host = [x for x in self.leaves if isinstance(x, Tensor) and not isinstance(x, DeviceTensor)]
        wanted = kwargs.get("device")
        self.to_gpu = _on_gpu(wanted) if wanted is not None else bool(self.device)

    def run(self) -> Any:
        """The result, on the device on which CUDA would have it."""
        if torch.is_inference_mode_enabled() and self._is_composite():
            with _Dispatch():  # otherwise torch would split such an operation before it arrives here
                return self.func.decompose(*self.args, **self.kwargs)
        if self.device or self.to_gpu:
            self._check_devices()
            self._check_lists()
            self._note()
        result = self._on_host()
        return _mapped(Tensor, self._wrapped, result) if self.to_gpu else result

    def _is_composite(self) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(self.func.name(), "CompositeImplicitAutograd")

    def _on_host(self) -> Any:
        args, kwargs = _mapped(DeviceTensor, lambda x: x.host, (self.args, self.kwargs)) if self.device else (self.args, {**self.kwargs})
        if self.to_gpu and "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if self.to_gpu:
            kwargs.pop("pin_memory", None)
        return _ON_HOST.get(self.name, self.func)(*args, **kwargs)

    def _wrapped(self, host: Tensor) -> Tensor:
        """The GPU tensor of a result: a changed argument, a view of one, or a new tensor."""
        for x in self.device:
            if x.host is host:
                if x.shape != host.shape or x.stride() != host.stride():
                    with torch._C._DisableTorchDispatch():  # torch's own information about the GPU tensor changes too
                        self.func(*self.args, **self.kwargs)
                return x
        memory = next((x.memory for x in self.device if x.memory.storage == _storage(host)), None)
        made = DeviceTensor(host, memory)
        if memory is None:
            made.memory.use(writes=True)
        return made

    # Errors of CUDA.

    def _check_devices(self) -> None:
        """All operands of an operation must be on one device; numbers (0-dimensional) and indices may be on the host."""
        if not (self.device and self.host) or self.name in ("_to_copy", "copy_", "copy", "set_"):
            return
        away = self.host
        if self.name in ("index", "index_put", "index_put_", "_index_put_impl_") and isinstance(self.args[0], DeviceTensor):
            _RECORD.wait(f"{self.name}: indices on the host")
            away = [x for x in _leaves(self.args[2:]) if isinstance(x, Tensor) and not isinstance(x, DeviceTensor)]
        if any(x.dim() > 0 for x in away):
            message = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
            raise DeviceError(f"{self.func}: {message} ({place()})")

    def _check_lists(self) -> None:
        """Lists of tensors in one operation must be on one device, and have one layout; if unfused, other layouts cost more launches."""
        fused = self.name.startswith("_fused")
        if not fused and not self.name.startswith("_foreach"):
            return
        lists = [x for x in self.args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
        if not all(_is_device(x) for tensors in lists for x in tensors):
            raise DeviceError(f"{self.name}: a list holds tensors of the host ({place()})")
        if fused:  # the step counters of Adam are numbers
            lists = [tensors for tensors in lists if any(x.dim() for x in tensors)]
        casts = self.name == "_foreach_copy_" and all(len({x.dtype for x in tensors}) == 1 for tensors in lists)  # one kernel, too
        if not all(_one_layout(tensors, any_dtype=casts) for tensors in zip(*lists, strict=False)):
            if fused:
                raise DeviceError(f"{self.name}: parameter, gradient and state differ in dtype or layout ({place()})")
            _RECORD.by_tensor[self.name, place()] += 1

    # Recorded events.

    def _note(self) -> None:
        self._note_copy()
        self._note_waits()
        if torch.are_deterministic_algorithms_enabled():
            self._note_deterministic()
        if self.name not in NO_LAUNCH:
            _RECORD.launches[self.name] += 1
        elif self.name.startswith(("empty", "new_empty")) and self._fills():
            _RECORD.launches["fill of new memory"] += 1
        self._note_uses()

    def _fills(self) -> bool:
        return torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory

    def _note_copy(self) -> None:
        if self.name not in ("_to_copy", "copy_", "copy"):
            return
        source = self.args[0] if self.name == "_to_copy" else self.args[1]
        arrives = self.to_gpu if self.name == "_to_copy" else _is_device(self.args[0])
        if _is_device(source) and not arrives:
            _RECORD.wait("copy to the host")
        elif arrives and not _is_device(source) and source.dim() + (self.name == "_to_copy") > 0:  # copy_ of a number fills
            non_blocking = self.kwargs.get("non_blocking", self.args[2] if len(self.args) > 2 else False)
            if not (non_blocking and _is_pinned(source)):
                _RECORD.wait("upload")
            if not _is_pinned(source):
                _RECORD.pageable["upload", place()] += 1

    def _note_waits(self) -> None:
        if not self.device:
            return
        counted = self.name == "repeat_interleave" and self.kwargs.get("output_size") is None
        if self.name in WAITING or counted:
            _RECORD.wait(self.name)
        elif "index" in self.name and any(x.dtype in (torch.bool, torch.uint8) for x in self._indices()):
            _RECORD.wait(f"{self.name} by a mask")

    def _indices(self) -> list[Tensor]:
        indices = self.args[1] if len(self.args) > 1 and isinstance(self.args[1], list | tuple) else []
        return [x for x in indices if isinstance(x, Tensor)]

    def _note_deterministic(self) -> None:
        if self.name in NONDETERMINISTIC:
            _RECORD.nondeterministic[self.name, place()] += 1
        from_tensor = self.name in ("scatter", "scatter_") and len(self.args) > 3 and isinstance(self.args[3], Tensor)
        if self.name in SORTED or from_tensor:
            _RECORD.sorted[self.name, place()] += 1

    def _note_uses(self) -> None:
        if self.name in NO_LAUNCH:
            return
        STREAMS.current().tick()
        written = [self.args[n] if n < len(self.args) else self.kwargs.get(name) for n, name in _written_arguments(self.func)]
        changed = {id(x) for x in _leaves(written)}
        for x in self.device:
            if problem := x.memory.use(writes=id(x) in changed):
                _RECORD.unordered[f"{self.name} {problem}", place()] += 1


def _one_layout(tensors: tuple[Tensor, ...], any_dtype: bool) -> bool:
    """Whether fused kernels can process these together: the same dtype (unless it is free), shape and memory order, without gaps."""
    orders = [[(stride, n) for n, stride in zip(x.shape, x.stride(), strict=True) if n != 1] for x in tensors]
    return len({(any_dtype or x.dtype, x.shape, tuple(order)) for x, order in zip(tensors, orders, strict=True)}) == 1 and _dense(orders[0])


def _dense(order: list[tuple[int, int]]) -> bool:
    expected = 1
    for stride, n in sorted(order):
        if stride != expected:
            return False
        expected *= n
    return True


def _cudnn_batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    out = torch.ops.aten.native_batch_norm.default(x, weight, bias, mean, var, training, momentum, eps)
    return *out, x.new_empty(0, dtype=torch.uint8)


def _cudnn_batch_norm_backward(x, grad, weight, mean, var, saved_mean, saved_var, eps, reserve):
    arguments = grad, x, weight, mean, var, saved_mean, saved_var, True, eps, [True, True, True]
    return torch.ops.aten.native_batch_norm_backward.default(*arguments)


# Operations that only exist for CUDA.
_ON_HOST = {"cudnn_batch_norm": _cudnn_batch_norm, "cudnn_batch_norm_backward": _cudnn_batch_norm_backward}


class _Dispatch(TorchDispatchMode):
    """Also routes operations without arguments on the GPU to `Call`, such as torch.zeros(3, device="cuda")."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return Call(func, args, kwargs or {}).run()


# torch.cuda and the rest of torch.


class _Properties:
    name, major, minor, total_memory, multi_processor_count = "simulated GPU", 9, 0, 80 << 30, 132
    L2_cache_size = 50 << 20


def _is_pinned(x: Tensor, *_: object) -> bool:
    return hasattr(x, "_pretended_pinned") or (x._base is not None and hasattr(x._base, "_pretended_pinned"))


def _pinned(x: Tensor, *_: object) -> Tensor:
    x = x.clone()
    x._pretended_pinned = True
    return x


def _saving(save: Any) -> Any:
    def on_host(state: Any, *arguments: Any, **options: Any) -> Any:
        _RECORD.wait("torch.save")
        return save(_mapped(DeviceTensor, lambda x: x.host.detach(), state), *arguments, **options)

    return on_host


def _loading(load: Any) -> Any:
    def on_device(*arguments: Any, map_location: Any = None, **options: Any) -> Any:
        state = load(*arguments, map_location="cpu", **options)
        return _mapped(Tensor, DeviceTensor, state) if _on_gpu(map_location) else state

    return on_device


def _gives(result: Any = None) -> Any:
    """Returns a new function for each name, because tables of torch.compile contain each function once."""
    return lambda *_, **__: result


def _cuda(gpus: int) -> dict[str, Any]:
    """The functions of torch.cuda for a driver with `gpus` GPUs. Random draws are the CPU's, so seeds are those of the CPU."""
    generator = torch.default_generator
    results = {
        "is_available": True, "is_initialized": True, "is_bf16_supported": True, "_is_in_bad_fork": False, "device_count": gpus,
        "current_device": 0, "set_device": None, "init": None, "_lazy_init": None, "_lazy_call": None, "get_device_name": _Properties.name,
        "get_device_capability": (9, 0), "get_device_properties": _Properties, "empty_cache": None, "memory_allocated": 0,
        "max_memory_allocated": 0, "reset_peak_memory_stats": None, "mem_get_info": (70 << 30, 80 << 30),
    }  # fmt: skip
    return {name: _gives(result) for name, result in results.items()} | {
        "Stream": Stream, "Event": Event, "stream": STREAMS.chosen, "current_stream": STREAMS.current, "default_stream": STREAMS.default,
        "synchronize": lambda *_: _RECORD.wait("synchronize"), "manual_seed": lambda seed: generator.manual_seed(seed),
        "manual_seed_all": lambda seed: generator.manual_seed(seed), "get_rng_state": lambda *_: generator.get_state(),
        "set_rng_state": lambda state, *_: generator.set_state(state),
    }  # fmt: skip


def _accelerator() -> dict[str, Any]:
    results = {
        "is_available": True,
        "current_accelerator": torch.device("cuda"),
        "device_count": 1,
        "current_device_index": 0,
        "set_device_index": None,
    }
    return {name: _gives(result) for name, result in results.items()}


@contextmanager
def pretended_gpu(gpus: int = 1) -> Iterator[Record]:
    """In the body torch has a GPU, cuda:0, and a new record; `gpus` only sets torch.cuda.device_count()."""
    _RECORD.clear()
    STREAMS.default().wait_for_all()
    STREAMS.host_waits = _RECORD.wait
    with ExitStack() as stack:
        patched = (
            (torch.cuda, _cuda(gpus)),
            (torch.accelerator, _accelerator()),
            (Tensor, {"pin_memory": _pinned, "is_pinned": _is_pinned}),
            (torch, {"save": _saving(torch.save), "load": _loading(torch.load)}),
        )
        for owner, functions in patched:
            stack.enter_context(mock.patch.multiple(owner, **functions))
        stack.enter_context(_host_first())
        stack.enter_context(_Dispatch())
        yield _RECORD


@contextmanager
def _host_first() -> Iterator[None]:
    """Settings for such subclasses: numbers from Python first become tensors of the host, and `Module.to` swaps parameters."""
    swaps, lifts = torch.__future__.get_swap_module_params_on_conversion(), torch._C._only_lift_cpu_tensors()
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        torch.__future__.set_swap_module_params_on_conversion(swaps)
