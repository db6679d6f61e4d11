"""External weights for the student's network: its initial weights, and supervised weights to compare it with.

They are read like a teacher's (bingo/teachers/reading), from a library or from a file of any program, but only the backbone is kept.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bingo.nets.backbones import Backbone, build_backbone
from bingo.nets.checkpoint import load_strictly, own_metadata
from bingo.nets.students import evaluated, load_backbone
from bingo.params import ImageParams, StudentParams, TeacherParams
from bingo.params.fields import LIBRARIES
from bingo.runtime.errors import UserError
from bingo.teachers.reading.foreign import read_checkpoint
from bingo.teachers.reading.sources import from_checkpoint, from_library, from_names, readings

_NETWORK = ("arch", "width", "stem")


class _Asked(TeacherParams):
    """The student's network in the form of a teacher's source; `given` is the key of its weights."""

    given: str

    def key(self, name: str) -> str:
        """The key to name in a message; empty for settings that a student does not have."""
        return {"checkpoint": self.given, "format": "", "source": ""}.get(name, name if name.startswith("image.") else f"student.{name}")


def student_weights(key: str, value: str, student: StudentParams, image: ImageParams) -> tuple[Backbone, dict[str, Any]]:
    """The student's network with the weights that `key` of params.yaml (`student.weights` or `supervised`) selects, and their origin:
    `weights`, their name in timm or torchvision or the file's name, and `source_sha256` for a file.

    Raises UserError, which names `key`, if the weights cannot be obtained, if a weight of the network is missing or has a different shape,
    and for published weights that were trained with a mean and std other than those of `image` (for a file, this is a line on stderr).
    """
    library = "torchvision" if student.arch.startswith("torchvision/") else "timm"
    network = {name: getattr(student, name) for name in _NETWORK}
    own = {"name": "own", "factory": None, "pooling": None, "format": "moco", "source": library, "checkpoint": None, **network}
    asked = _Asked.model_construct(given=key, **own)
    try:
        if value in LIBRARIES:
            read, _, published = from_library(asked, image)
            facts = {"weights": published["weights"], "source_sha256": None}
        else:
            read, facts = _from_file(asked, value, image)
    except UserError as error:
        raise UserError([line if line.startswith(f"{key} = ") else f"{key}: {line}" for line in error.lines]) from None
    backbone = build_backbone(**network, seed_value=0, options=evaluated(student.options))
    load_strictly(backbone, read.state_dict(), f"{key} = {value}", lambda: "give weights of the same image size")
    return backbone, facts


def _from_file(asked: _Asked, path: str, image: ImageParams) -> tuple[Backbone, dict[str, Any]]:
    """The backbone in a file, read by its published format, or otherwise by the names of timm or torchvision at any place in the file."""
    content, sha256 = read_checkpoint(path, asked.given)
    facts = {"weights": Path(path).name, "source_sha256": sha256}
    asked = asked.model_copy(update={"checkpoint": path})
    if (written := own_metadata(path)) is not None:
        _compare(asked, image, written)
        if written.get("kind") == "student":
            return load_backbone(Path(path))[0], facts
    way = next((way for way in readings(asked, content) if all(way[name] == getattr(asked, name) for name in _NETWORK)), {})
    if way.get("source") == "checkpoint":
        asked = asked.model_copy(update={"source": "checkpoint", "format": way["format"].partition(" or ")[0]})
        return from_checkpoint(asked, image)[0], facts
    return (from_names if written or asked.arch.partition(":")[0].endswith(".py") else from_library)(asked, image)[0], facts


def _compare(asked: _Asked, image: ImageParams, written: Mapping[str, Any]) -> None:
    """Raise UserError if a file of this project contains a different network, which shapes alone may not show. For a different mean and
    std, print a line on stderr."""
    other = [name for name in _NETWORK if name in written and written[name] != getattr(asked, name)]
    if other:
        found = ", ".join(f"student.{name} = {getattr(asked, name)}, this network has {written[name]}" for name in other)
        raise UserError(f"{asked.checkpoint}: {found}; set {', '.join(f'student.{name}: {written[name]}' for name in other)}")
    if any(name in written and written[name] != getattr(image, name) for name in ("mean", "std")):
        expected = f"was trained with {written.get('mean')}, {written.get('std')}"
        print(f"image.mean = {image.mean}, image.std = {image.std}: {asked.checkpoint} {expected}", file=sys.stderr)
