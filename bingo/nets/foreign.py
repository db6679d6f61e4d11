"""Reading checkpoints that other programs wrote, without running any code that they hold."""

import hashlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, Self, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bingo.errors import UserError, out_of_memory
from bingo.nets.checkpoint import first_names

_GLOBAL = re.compile(r"GLOBAL (\S+)")  # how torch's weights-only reader names what it refuses
# What public training programs pickle beside the weights: DINO's options; NumPy's learning rates in the optimizers of DINO and SwAV; a
# function in that of Barlow Twins and VICReg. Only these names are passed over, and nothing of theirs is imported or run.
_BESIDE_WEIGHTS = (
    "argparse.Namespace",
    *(f"{module}.{name}" for module in ("numpy.core.multiarray", "numpy._core.multiarray") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{name}" for name in ("dtype", "ndarray")),
    "__main__.exclude_bias_and_norm",
)
_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch.save began before PyTorch 1.6
_SPARE_BYTES = 64 << 20  # some files hold small tensors in this form
_WAY_OUT = "set teacher.checkpoint to a file of torch.save or safetensors"


def read_checkpoint(path: Path | str) -> tuple[Any, str]:
    """What a file of `torch.save` or safetensors holds, on the CPU, and the sha256 of its bytes (64 hex digits).

    Objects that public training programs are known to leave beside the weights come as empty `Nothing`s. Raises UserError where the
    file is absent, damaged, neither of the two, or holds any other pickled code, whose name it tells.
    """
    if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        raise UserError(f"{path}: is no regular file; {_WAY_OUT}")
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_WAY_OUT}") from None
    return (_safetensors(path) if Path(path).suffix == ".safetensors" else _torch_file(path)), sha256


def state_dict_in(content: Any, path: Path | str) -> dict[str, Tensor]:
    """The tensors by name in what `read_checkpoint` gave: itself, or its entry `state_dict` or `model`; without DDP's `module.`.

    Raises UserError that tells what was found instead.
    """
    if isinstance(content, dict):
        for state in (content, content.get("state_dict"), content.get("model")):
            if is_state_dict(state):
                ddp = all(name.startswith("module.") for name in state)
                return {name.removeprefix("module.") if ddp else name: tensor for name, tensor in state.items()}
    raise UserError(f"{path}: holds no weights by name, but {summary(content)}; save the network's state_dict() with torch.save")


def is_state_dict(value: Any) -> TypeGuard[dict[str, Tensor]]:
    """Whether this is a non-empty dict from names to tensors."""
    return isinstance(value, dict) and bool(value) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def summary(content: Any) -> str:
    """What a checkpoint holds, in a few words, for an error line."""
    return f"a dict of {len(content)}: {first_names(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"


class Nothing:
    """Stands where a checkpoint has an object that is not wanted: it is made from anything and keeps none of it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _safetensors(path: Path | str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: is not a whole safetensors file ({error}); {_WAY_OUT}") from None


class _TooLarge(Exception):
    pass


def _check_sizes(content: Any, file_bytes: int) -> None:
    """Refuse tensors that stand for more numbers than the file has bytes for: a few bytes may claim any shape, with strides of 0."""
    waiting, seen = [("", content)], set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor) and value.numel() * value.element_size() > file_bytes + _SPARE_BYTES:
            raise _TooLarge(f"its tensor {name or 'without a name'} of shape {tuple(value.shape)} is larger than the file")
        if isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.items() if isinstance(value, dict) else (("", item) for item in value)


def _torch_file(path: Path | str) -> Any:
    with open(path, "rb") as file:
        start = file.read(len(_MAGIC))
    if start[:1] == _MAGIC[:1] and start != _MAGIC:
        line = f"{path}: is no checkpoint of torch.save but a plain pickle, which is never run"
        raise UserError(f"{line}; DeepMind's BYOL becomes a checkpoint by convert.py of ajtejankar/byol-convert")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(Nothing, name) for name in _BESIDE_WEIGHTS]):
            warnings.simplefilter("ignore")  # about pickle protocols: what cannot be read is refused below
            # Files from before PyTorch 1.6, as MoCo's are, are no zip archives and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        _check_sizes(content, Path(path).stat().st_size)
        return content
    except _TooLarge as error:
        raise UserError(f"{path}: {error}; {_WAY_OUT}") from None
    except pickle.UnpicklingError as error:
        if named := _GLOBAL.search(str(error)):
            line = f"{path}: holds pickled code ({named[1]}), which is never run; save its state_dict alone with torch.save"
            raise UserError(line) from None
        raise UserError(f"{path}: is no checkpoint of torch.save; {_WAY_OUT}") from None
    except Exception as error:  # arbitrary bytes make the reader raise almost anything
        if full := out_of_memory(error):
            raise UserError(f"{path}: {full}") from None
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise UserError(f"{path}: is no checkpoint of torch.save, or is truncated ({reason}); {_WAY_OUT}") from None
