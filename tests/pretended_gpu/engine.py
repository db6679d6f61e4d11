"""Make torch's autograd engine accept backward passes on cuda:0 without a GPU.

torch calls `CUDAHooks::hasPrimaryContext(0)` before it looks up the stream of a device, which raises an error without a driver. This
function is replaced in a copy of the table of virtual functions; its slot is found in torch's headers. `ready` must be called before the
first backward pass of the process, in which the engine starts one thread per device.
"""

import ctypes
import re
from functools import cache
from pathlib import Path

import torch

_HEADERS = Path(torch.__file__).parent / "include/ATen/detail"
_HOOKS = "_ZN2at6detail12getCUDAHooksEv"  # at::detail::getCUDAHooks()
_BEFORE = 2  # words before a table: offset to the top, type information


def virtual_functions(header: str) -> list[str]:
    """The names of the virtual functions declared in a header of torch, in the order of their slots; a destructor has two slots."""
    text = re.sub(r"//.*", "", (_HEADERS / header).read_text())
    declared = re.findall(r"\bvirtual\s+[^;{]*?(~?\w+)\s*\(", text)
    return [name for found in declared for name in ([found, found] if found.startswith("~") else [found])]


@cache
def ready() -> tuple[object, ...]:
    """Prepare this process; `cache` keeps the result alive, as is necessary."""
    torch._C._ensureCUDADeviceGuardSet()  # torch's replacement for the guard of a missing device, made for FakeTensor
    hooks = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))[_HOOKS]
    hooks.restype = ctypes.c_void_p
    hooks_object = ctypes.c_void_p.from_address(hooks())
    names = virtual_functions("AcceleratorHooksInterface.h")
    words = _BEFORE + len(names) + len(virtual_functions("CUDAHooksInterface.h"))
    table = (ctypes.c_void_p * words)()
    word_bytes = ctypes.sizeof(ctypes.c_void_p)
    ctypes.memmove(table, hooks_object.value - _BEFORE * word_bytes, words * word_bytes)
    always = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_byte)(lambda _, device: True)
    table[_BEFORE + names.index("hasPrimaryContext")] = ctypes.cast(always, ctypes.c_void_p).value
    hooks_object.value = ctypes.addressof(table) + _BEFORE * word_bytes
    return table, always
