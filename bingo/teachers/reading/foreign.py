"""Read checkpoints written by other programs without running any code in them."""

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bingo.nets.checkpoint import first_names
from bingo.runtime.errors import UserError, near_matches, out_of_memory, reason_of

_GLOBAL = re.compile(r"GLOBAL (\S+)")  # in the message of torch's weights-only reader, before the name that it refuses
# What public training programs pickle in addition to the weights: DINO's options; NumPy's learning rates in the optimizers of DINO and
# SwAV; a
# function in that of Barlow Twins and VICReg. Only these names are skipped, and nothing is imported or run.
_BESIDE_WEIGHTS = (
    "argparse.Namespace",
    *(f"{module}.{name}" for module in ("numpy.core.multiarray", "numpy._core.multiarray") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{name}" for name in ("dtype", "ndarray")),
    "__main__.exclude_bias_and_norm",
)
_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first bytes of torch.save's files before PyTorch 1.6
_SPARE_BYTES = 64 << 20  # some files contain small tensors in this form
_WAY_OUT = "set {key} to a file of torch.save or safetensors"
# Other kinds of files, by their first bytes, and how to fix the error.
_BEGINNINGS = (
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch that with: git lfs pull"),
    (rb"\s*<", "a web page", "download the file itself, for example by the page's link to the raw file"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "compressed", "unpack it, and set {key} to what was in it"),
    (rb"\x89HDF", "of HDF5, as Keras writes it", "convert its weights to PyTorch, and save their state_dict()"),
    (rb"\x93NUMPY", "a NumPy array", "save a dict of tensors by name with torch.save"),
    (rb"\{", "a text of JSON", "set {key} to the file of weights itself"),
)
# Modules that wrap a network when it is compiled, sharded or checkpointed; no network has a part with such a name.
_WRAPPING = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_MOST_DEEP = 4  # levels of dicts around the weights


def read_checkpoint(path: Path | str, key: str = "teacher.checkpoint") -> tuple[Any, str]:
    """The content of a file of `torch.save` or safetensors, on the CPU, and the sha256 of its bytes (64 hex digits).

    Objects that public training programs are known to save in addition to the weights are replaced by empty `Nothing`s. Raises UserError
    if the file is absent, damaged, of neither kind, or contains any other pickled code, whose name it reports. `key` is the parameter that
    gives the file, for messages.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path}: is {_what_holds(Path(path), key)}")
    try:
        with open(path, "rb") as file:
            sha256, start = hashlib.file_digest(file, "sha256").hexdigest(), _first_bytes(path)
    except FileNotFoundError:
        beside = Path(path).parent
        near = near_matches(Path(path).name, [file.name for file in beside.iterdir()] if beside.is_dir() else [])
        raise UserError(f"{path}: the file does not exist{near}; {_WAY_OUT.format(key=key)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); fix its permissions, or {_WAY_OUT.format(key=key)}") from None
    # Recognised by content, since downloads may have no suffix. A safetensors file begins with the length of the JSON that follows.
    read = _safetensors if start[8:9] == b"{" or Path(path).suffix == ".safetensors" else _torch_file
    return read(path, key), sha256


def states_in(content: Any) -> list[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """All dicts of tensors by name in the result of `read_checkpoint`: the keys that lead to it, and its tensors.

    Empty dicts and those more than four levels deep are ignored.
    """
    return [(keys, value) for keys, value in dicts_in(content) if is_state_dict(value)]


def dicts_in(content: Any) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """`content` and the dicts in it whose keys are strings, outermost first, with the keys that lead to each."""
    found: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    waiting: list[tuple[tuple[str, ...], Any]] = [((), content)]
    for keys, value in waiting:
        if isinstance(value, dict) and len(keys) <= _MOST_DEEP:
            found.append((keys, value))
            waiting += [((*keys, key), item) for key, item in value.items() if isinstance(key, str) and isinstance(item, dict)]
    return found


def without_wrapping(content: Any, levels: int = _MOST_DEEP) -> Any:
    """The content with the names that it has without torch.compile and FSDP, which insert `_orig_mod.` and the like."""
    if not isinstance(content, dict) or levels < 0:
        return content
    names = {key: _WRAPPING.sub("", key) if isinstance(key, str) else key for key in content}
    return {names[key]: without_wrapping(value, levels - 1) for key, value in content.items()}


def shared_prefix(state: Mapping[str, Tensor]) -> str:
    """The modules with which all names begin, such as `module.encoder.`, or the empty string."""
    modules = [name.split(".")[:-1] for name in state]
    first, last = min(modules), max(modules)
    same = next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), min(len(first), len(last)))
    return "".join(f"{part}." for part in first[:same])


def is_state_dict(value: Any) -> TypeGuard[dict[str, Tensor]]:
    """Whether this is a non-empty dict from names to tensors."""
    return isinstance(value, dict) and bool(value) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def summary(content: Any) -> str:
    """A short description of a checkpoint's content, for an error message."""
    return f"a dict of {len(content)}: {first_names(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"


def _first_bytes(path: Path | str) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


def _what_holds(path: Path, key: str) -> str:
    """What a path is if it is not a regular file, and how to fix it; for a folder, by giving a file of weights in it."""
    if not path.is_dir():
        return f"no regular file; {_WAY_OUT.format(key=key)}"
    weights = sorted(str(file) for suffix in ("safetensors", "pth", "pt", "pth.tar", "bin", "ckpt") for file in path.glob(f"*.{suffix}"))
    return f"a folder; set {key} to {' or '.join(weights[:4])}" if weights else f"a folder without weights; {_WAY_OUT.format(key=key)}"


class Nothing:
    """A placeholder for an unwanted object in a checkpoint; it accepts any arguments and ignores them."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _safetensors(path: Path | str, key: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: is not a whole safetensors file ({error}); {_instead(path, key, 'copy or download it again')}") from None


class _TooLarge(Exception):
    pass


def _check_sizes(content: Any, file_bytes: int) -> None:
    """Raise UserError for tensors with more numbers than the file has bytes: a few bytes may declare any shape, with strides of 0."""
    waiting, seen = [("", content)], set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor) and value.numel() * value.element_size() > file_bytes + _SPARE_BYTES:
            raise _TooLarge(f"its tensor {name or 'without a name'} of shape {tuple(value.shape)} is larger than the file")
        if isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.items() if isinstance(value, dict) else (("", item) for item in value)


def _torch_file(path: Path | str, key: str) -> Any:
    with open(path, "rb") as file:
        start = file.read(len(_MAGIC))
    if start[:1] == _MAGIC[:1] and start != _MAGIC:
        line = f"{path}: is not a checkpoint of torch.save but a plain pickle, which is never run"
        way_out = "if you trust it, load it and save its tensors by name with torch.save"
        raise UserError(f"{line}; {way_out} (DeepMind's BYOL: by convert.py of ajtejankar/byol-convert)")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(Nothing, name) for name in _BESIDE_WEIGHTS]):
            warnings.simplefilter("ignore")  # about pickle protocols: files that cannot be read are refused below
            # Files from before PyTorch 1.6, as MoCo's are, are no zip archives and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        _check_sizes(content, Path(path).stat().st_size)
        return content
    except _TooLarge as error:
        raise UserError(f"{path}: {error}; {_WAY_OUT.format(key=key)}, as it was trained") from None
    except pickle.UnpicklingError as error:
        if named := _GLOBAL.search(str(error)):
            line = f"{path}: holds pickled code ({named[1]}), which is never run"
            raise UserError(f"{line}; if you trust it, load it and save its state_dict alone with torch.save") from None
        raise UserError(f"{path}: is not a checkpoint of torch.save; {_instead(path, key, _WAY_OUT)}") from None
    except Exception as error:  # arbitrary bytes can raise almost anything
        if full := out_of_memory(error):
            raise UserError(f"{path}: {full}") from None
        if "TorchScript" in str(error):
            way_out = "save the state_dict() of torch.jit.load with torch.save"
            raise UserError(f"{path}: is a program of TorchScript, which is never run; {way_out}") from None
        way_out = _instead(path, key, "copy or download it again, or unpack it if it is an archive")
        raise UserError(f"{path}: is not a checkpoint of torch.save, or is truncated ({reason_of(error)}); {way_out}") from None


def _instead(path: Path | str, key: str, otherwise: str) -> str:
    """The kind of the file by its first bytes, and how to fix it; `otherwise` if it is unknown."""
    start = _first_bytes(path)
    if not start:
        return "it is empty: copy or download it again"
    found = (f"it is {what}: {way_out}" for begins, what, way_out in _BEGINNINGS if re.match(begins, start, re.DOTALL))
    return next(found, otherwise).format(key=key)
