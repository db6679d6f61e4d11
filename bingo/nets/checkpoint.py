"""BINGO's network files: safetensors with one JSON entry and a checksum. Equal content has equal bytes, and nothing is unpickled."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bingo.paths import NO_WEIGHTS
from bingo.runtime.artefacts import canonical_json, write_bytes
from bingo.runtime.checksums import Damaged, check_safetensors, seal_safetensors
from bingo.runtime.errors import UserError, out_of_memory, reason_of

_ENTRY = "bingo"  # only one entry is used, because safetensors writes several in an order that changes from run to run


def save_network(path: Path | str, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors (on any device, with any layout) and JSON-serialisable `metadata` atomically."""
    # Copies: safetensors refuses tensors that share memory or are channels_last.
    tensors = on_host(dict(sorted(state.items())))
    write_bytes(path, seal_safetensors(safetensors.torch.save(tensors, metadata={_ENTRY: canonical_json(dict(metadata))})))


def on_host(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, by one read for each dtype and device, because on a GPU each read waits for all previous work."""
    copies = dict.fromkeys(state, torch.empty(0))
    for kind in {(tensor.dtype, tensor.device) for tensor in state.values()}:
        tensors = {name: tensor.detach() for name, tensor in state.items() if (tensor.dtype, tensor.device) == kind}
        read = torch.cat([tensor.flatten() for tensor in tensors.values()]).cpu().split([tensor.numel() for tensor in tensors.values()])
        copies |= {name: part.view(tensor.shape).clone() for (name, tensor), part in zip(tensors.items(), read, strict=True)}
    return copies


def load_network(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the metadata of a file that `save_network` wrote.

    Raises UserError if the file is absent or damaged, or if BINGO did not write it.
    """
    try:
        check_safetensors(path)
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[_ENTRY])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
        if not isinstance(metadata, dict):
            raise Damaged("its metadata are not a dict")
    except OSError as error:
        reason = "the file does not exist" if isinstance(error, FileNotFoundError) else error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}); run the stage that writes it: dvc repro") from None
    except (Damaged, SafetensorError, KeyError, ValueError, RecursionError) as error:
        if Path(path).stat().st_size == len(NO_WEIGHTS) and Path(path).read_bytes() == NO_WEIGHTS:
            raise UserError(f"{path}: contains no weights, because the parameters do not ask for any there; give another file") from None
        line = f"{path}: is damaged, or BINGO did not write it ({' '.join(str(error).split())})"
        raise UserError(f"{line}; give another, or delete it and run: dvc repro") from None
    return state, metadata


def own_metadata(path: Path | str) -> dict[str, Any] | None:
    """The metadata of a file that `save_network` wrote; None for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})[_ENTRY])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return metadata if isinstance(metadata, dict) else None


@contextmanager
def building(path: Path | str) -> Iterator[None]:
    """Context manager for building a network from the metadata of its file: any error becomes a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # invalid metadata can raise almost anything
        if line := out_of_memory(error):
            raise UserError(f"{path}: {line}") from None
        line = f"{path}: its tensors and metadata do not describe a network ({reason_of(error)})"
        raise UserError(f"{line}; give a file that BINGO wrote") from None


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """64 hex digits that identify tensors by name, dtype, shape and bytes, regardless of their order and file."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


OWN_FILE = "give a file that BINGO wrote with this version of timm and torchvision, or delete it and run: dvc repro"


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], origin: str, way_out: Callable[[], str] = lambda: OWN_FILE) -> None:
    """Load tensors with exactly the module's names and shapes. Otherwise raises UserError, which begins with `origin`, lists the
    differences and ends with `way_out`.

    A missing `num_batches_tracked` counts as 0, as in PyTorch: old files lack it and no result depends on it.
    """
    expected = module.state_dict()
    state = check_fits(expected, state, origin, way_out)
    _check_numbers(state, expected, origin)
    module.load_state_dict(state)


def check_fits(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], origin: str, way_out: Callable[[], str] = lambda: OWN_FILE
) -> dict[str, Tensor]:
    """The tensors to load: `state` with missing counters added. Raises UserError if names or shapes are not those expected."""
    counters = {name: tensor for name, tensor in expected.items() if name.endswith("num_batches_tracked")}
    state = {**{name: counter.new_zeros(()) for name, counter in counters.items()}, **state}
    shapes = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    differences = {
        "missing": [name for name in expected if name not in state],
        "not expected": [name for name in state if name not in expected],
        "of another shape": [f"{name} {tuple(state[name].shape)} for {tuple(expected[name].shape)}" for name in shapes],
    }
    if any(differences.values()):
        parts = [f"{what} {first_names(names)}" for what, names in differences.items() if names]
        raise UserError(f"{origin}: {'; '.join(parts)}; {way_out()}")
    return state


def _check_numbers(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> None:
    """Raise UserError for tensors that torch would convert silently, and for nan or inf."""
    kinds = [name for name, tensor in expected.items() if tensor.is_floating_point() != state[name].is_floating_point()]
    kinds += [name for name, tensor in state.items() if tensor.layout != torch.strided or tensor.is_meta]
    if kinds:
        raise UserError(f"{origin}: {first_names(kinds)} are not plain floating-point numbers; give the original file")
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{origin}: {first_names(broken)} contain nan or inf; the training diverged, give another file")


def first_names(names: Iterable[object], most: int = 4) -> str:
    """The first few of many names, and the number of further names."""
    named = [str(name) for name in names]
    return ", ".join(named[:most]) + (f" and {len(named) - most} more" if len(named) > most else "")
