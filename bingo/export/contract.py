"""An export target is a module bingo/export/to_NAME.py with the attributes of `Target`. It is found by its name and needs no
registration."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from torch import Tensor

from bingo.export.stored import StoredNetwork
from bingo.runtime.errors import UserError, near_matches


class NotReadBack(Exception):
    """The library that reads a format is not installed; the message says so briefly."""


class ReadBack(NamedTuple):
    """The library that read a file (name and version), and the network in it, which maps normalised images (B, 3, H, W) to pooled features
    (B, D), or with a classifier to logits (B, C)."""

    library: str
    outputs: Callable[[Tensor], Tensor]


class Loading(NamedTuple):
    """How a user loads the file: language (`python` or `yaml`), text, and a note to be printed, if any."""

    language: str
    text: str
    remark: str = ""


class Target(Protocol):
    """The module of a target. `SUFFIXES` are the file name extensions that it accepts, the default first; empty if it writes a folder.
    `CLASSIFIES`: whether it can also write networks with a classifier."""

    SUFFIXES: tuple[str, ...]
    CLASSIFIES: bool

    def write(self, network: StoredNetwork, path: Path) -> None:
        """Write the file or folder; equal networks give equal bytes. Raises UserError for networks that the format or library does not
        support."""

    def read_back(self, network: StoredNetwork, path: Path) -> ReadBack:
        """Load a file that `write` wrote with the library itself. Raises NotReadBack if the library cannot be imported."""

    def loading(self, network: StoredNetwork, file_name: str) -> Loading:
        """How to load the file, for the model card."""


def quoted(text: str) -> str:
    """A string literal for Python and YAML."""
    return json.dumps(text, ensure_ascii=False)


def target_names() -> list[str]:
    """Names of all targets."""
    return sorted(path.stem.removeprefix("to_") for path in Path(__file__).parent.glob("to_*.py"))


def find_target(name: str) -> Target:
    """The target called `name`. Raises UserError if it does not exist."""
    if name not in (names := target_names()):
        raise UserError(f"--to = {name}: allowed are {', '.join(names)}{near_matches(name, names)}")
    return cast(Target, importlib.import_module(f"bingo.export.to_{name}"))
