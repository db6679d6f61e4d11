"""What a target of the export is: a module bingo/export/to_NAME.py with the names of `Target`; nothing else lists it."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from torch import Tensor

from bingo.export.stored import StoredNetwork
from bingo.runtime.errors import UserError, near_matches


class NotReadBack(Exception):
    """The library that reads a format is not here; the message says so in a few words."""


class ReadBack(NamedTuple):
    """What read a file (library and version), and the network in it: normalised images (B, 3, H, W) to pooled features (B, D)."""

    library: str
    features: Callable[[Tensor], Tensor]


class Loading(NamedTuple):
    """How a user loads the file: text, the language that it is in (`python` or `yaml`), and a remark to be printed, if any."""

    language: str
    text: str
    remark: str = ""


class Target(Protocol):
    """A target's module. `SUFFIXES` are the endings that its files may have, the usual one first."""

    SUFFIXES: tuple[str, ...]

    def write(self, network: StoredNetwork, path: Path) -> None:
        """Write the file, equal bytes for equal networks. Raises UserError where this format or library has no such network."""

    def read_back(self, network: StoredNetwork, path: Path) -> ReadBack:
        """Load a file of `write` with the library itself. Raises NotReadBack where it cannot be imported."""

    def loading(self, network: StoredNetwork, file_name: str) -> Loading:
        """For the model card: how to load the file."""


def quoted(text: str) -> str:
    """A string as Python and YAML read it."""
    return json.dumps(text, ensure_ascii=False)


def target_names() -> list[str]:
    """Every target that has a file here."""
    return sorted(path.stem.removeprefix("to_") for path in Path(__file__).parent.glob("to_*.py"))


def find_target(name: str) -> Target:
    """The target of a name. Raises UserError where there is none."""
    if name not in (names := target_names()):
        raise UserError(f"--to = {name}: allowed are {', '.join(names)}{near_matches(name, names)}")
    return cast(Target, importlib.import_module(f"bingo.export.to_{name}"))
