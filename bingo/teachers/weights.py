"""Weights for the student's network from elsewhere: those that it starts from, and supervised ones to compare it with.

They are read as a teacher's are (bingo/teachers/reading), from a library or from a file of any program, but only the backbone is kept.
"""

import io
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from bingo.nets.backbones import Backbone, build_backbone
from bingo.nets.checkpoint import load_strictly, own_metadata
from bingo.nets.students import evaluated, load_student
from bingo.params import ImageParams, StudentParams, TeacherParams
from bingo.params.fields import LIBRARIES
from bingo.runtime.errors import UserError
from bingo.teachers.reading.foreign import read_checkpoint
from bingo.teachers.reading.sources import from_checkpoint, from_library, from_names, readings

_NETWORK = ("arch", "width", "stem")
_OF_TEACHER = re.compile(
    r"teacher\.(?:source|format): [^,;]+(?:, )?|(?:, or )?teacher\.format to the code that wrote it(?:, or )?"
)  # ways out that only a teacher has


def student_weights(key: str, value: str, student: StudentParams, image: ImageParams) -> tuple[Backbone, dict[str, Any]]:
    """The student's network with the weights that `key` of params.yaml (`student.weights` or `supervised`) asks for, and their origin:
    `weights`, timm's or torchvision's name of them or the file's name, and `source_sha256` of a file.

    Raises UserError, which names `key`, if they cannot be had, if any weight of the network is missing or of another shape, and for
    published weights that were trained with another mean and std than `image` has (of a file, that is a line on stderr).
    """
    library = "torchvision" if student.arch.startswith("torchvision/") else "timm"
    network = {name: getattr(student, name) for name in _NETWORK}
    own = {"name": "own", "factory": None, "pooling": None, "format": "moco", "source": library, "checkpoint": None, **network}
    asked = TeacherParams.model_construct(**own)  # a teacher's source, which reads no other key
    with _said_of(key, value):
        read, facts = _published(asked, image) if value in LIBRARIES else _from_file(asked, value, image)
    backbone = build_backbone(**network, seed_value=0, options=evaluated(student.options))
    load_strictly(backbone, read.state_dict(), f"{key} = {value}", lambda: "give weights of the same image size")
    return backbone, facts


def _published(asked: TeacherParams, image: ImageParams) -> tuple[Backbone, dict[str, Any]]:
    backbone, _, facts = from_library(asked, image)
    return backbone, {"weights": facts["weights"], "source_sha256": None}


def _from_file(asked: TeacherParams, path: str, image: ImageParams) -> tuple[Backbone, dict[str, Any]]:
    """The backbone in a file, by the published format that it is of, or else by the names of timm or torchvision, wherever these are."""
    content, sha256 = read_checkpoint(path)
    facts = {"weights": Path(path).name, "source_sha256": sha256}
    asked = asked.model_copy(update={"checkpoint": path})
    if (written := own_metadata(path)) is not None:
        _compare(asked, image, written)
        if written.get("kind") == "student":
            return load_student(Path(path))[0], facts
    way = next((way for way in readings(asked, content) if all(way[name] == getattr(asked, name) for name in _NETWORK)), {})
    if way.get("source") == "checkpoint":
        asked = asked.model_copy(update={"source": "checkpoint", "format": way["format"].partition(" or ")[0]})
        return from_checkpoint(asked, image)[0], facts
    return (from_names if written or asked.arch.partition(":")[0].endswith(".py") else from_library)(asked, image)[0], facts


def _compare(asked: TeacherParams, image: ImageParams, written: Mapping[str, Any]) -> None:
    """Raises UserError if a file of this project is of another network than is asked for, which shapes alone may not show; another mean
    and std are a line on stderr."""
    other = [name for name in _NETWORK if name in written and written[name] != getattr(asked, name)]
    if other:
        found = ", ".join(f"teacher.{name} = {getattr(asked, name)}, this network has {written[name]}" for name in other)
        raise UserError(f"{asked.checkpoint}: {found}; set {', '.join(f'teacher.{name}: {written[name]}' for name in other)}")
    if any(name in written and written[name] != getattr(image, name) for name in ("mean", "std")):
        expected = f"was trained with {written.get('mean')}, {written.get('std')}"
        print(f"teacher.image.mean = {image.mean}, teacher.image.std = {image.std}: {asked.checkpoint} {expected}", file=sys.stderr)


@contextmanager
def _said_of(key: str, value: str) -> Iterator[None]:
    """What is said of a teacher in the body, on stderr and in errors, said of the parameter `key`, `value`, and of the student."""
    of_student = {"teacher.checkpoint": key, "teacher.image": "image"} | {f"teacher.{name}": f"student.{name}" for name in _NETWORK}
    kept = {value, Path(value).name} - of_student.keys()  # a file may be called teacher.arch.pth
    words = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, [*kept, *of_student]))})(?!\w)")

    def translated(line: str) -> str:
        line = words.sub(lambda found: found[0] if found[0] in kept else of_student[found[0]], _OF_TEACHER.sub("", line))
        return re.sub(r"(student\..+), or \1", r"\1", line)

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except UserError as error:
        raise UserError([line if line.startswith(f"{key} = ") else f"{key}: {line}" for line in map(translated, error.lines)]) from None
    finally:
        sys.stderr.write(translated(said.getvalue()))
