"""Fuzzed networks: checkpoints of every published format, BINGO's own files with forged checksums, and unfinished trainings."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from bingo.export.stored import read_student, read_teacher
from bingo.nets.backbones import build_backbone
from bingo.nets.students import load_backbone
from bingo.params import ImageParams, TeacherParams, format_names
from bingo.report.inputs import read_network_facts
from bingo.runtime.artefacts import canonical_json, fingerprint, write_json
from bingo.runtime.checkpoints import Checkpoints
from bingo.runtime.checksums import seal, seal_safetensors
from bingo.runtime.errors import UserError
from bingo.teachers.reading.sources import make_teacher
from bingo.teachers.teacher import load_teacher, teacher_metadata
from tests import published
from tests.published import WideResNet, lively
from tests.stress.fuzz.damage import Damage, damaged, damages
from tests.stress.fuzz.harness import Surface
from tests.stress.fuzz.parameters import shipped
from tests.stress.fuzz.values import Edit, edited, edits, values

CPU = torch.device("cpu")
WIDTH, FEATURES = 0.125, 64
CONTAINERS = ("zip", "zip", "zip", "legacy", "safetensors", "deflated", "pickle", "code", "legacy code")
TENSOR_KINDS = (
    "dtype", "shape", "huge", "nan", "drop", "rename", "add", "object", "sparse", "meta", "parameter", "strided",
)  # fmt: skip
HUGE = ([2**31, 2**31], [2**20, 64], [2**16, 2**10, 64], [2**40], [1] * 60)
DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)
MADE = {**published.WITH_A_HEAD, "simclr": published.simclr, "byol": published.byol}
WRAPPERS = ("state_dict", "model", "teacher", "")


@dataclass(frozen=True)
class TensorEdit:
    """A change of one tensor of a state dict, selected by `place`; `value` determines the change."""

    kind: str
    place: int
    value: Any


def tensor_edits() -> st.SearchStrategy:
    one = st.builds(TensorEdit, st.sampled_from(TENSOR_KINDS), st.integers(0, 2**16), st.one_of(st.integers(0, 2**16), values()))
    return st.lists(one, max_size=2)


def changed(state: dict[str, Any], changes: list[TensorEdit]) -> dict[str, Any]:
    """A copy of a state dict with some of its tensors changed."""
    state = dict(state)
    for change in changes:
        if names := [name for name, value in state.items() if isinstance(value, Tensor) and value.numel() < 2**20]:
            _change(state, names[change.place % len(names)], change)
    return state


def _change(state: dict[str, Any], name: str, change: TensorEdit) -> None:
    tensor, number = state[name], change.value if isinstance(change.value, int) else change.place
    makers: dict[str, Callable[[], Any]] = {
        "dtype": lambda: tensor.to(DTYPES[number % len(DTYPES)]),
        "shape": lambda: [
            tensor.flatten(),
            tensor[None],
            tensor.flatten()[:0],
            torch.zeros(()),
            tensor.transpose(0, -1) if tensor.ndim else tensor,
        ][number % 5],
        "huge": lambda: torch.zeros(()).expand(*HUGE[number % len(HUGE)]),
        "nan": lambda: torch.full(tensor.shape, [float("nan"), float("inf"), -1e30, 1e-45][number % 4]),
        "object": lambda: change.value,
        "sparse": lambda: torch.zeros(4, 4).to_sparse(),
        "meta": lambda: torch.empty(tensor.shape, device="meta"),
        "parameter": lambda: nn.Parameter(tensor.float()),
        "strided": lambda: torch.zeros(tensor.numel() * 2)[::2].reshape(tensor.shape),
    }
    if change.kind in ("drop", "rename"):
        state.pop(name)
    if change.kind == "rename":
        state[f"{name}.{change.value}"] = tensor
    elif change.kind == "add":
        state[change.value if isinstance(change.value, str | int | float) else "more"] = tensor
    elif change.kind != "drop":
        state[name] = makers[change.kind]()


# Files of other programs.


@cache
def _published(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    trunk = lively(WideResNet(WIDTH, blocks=(2, 2, 2, 2)))
    return trunk.state_dict() if name == "timm" else MADE[name](trunk, FEATURES)[0]


@dataclass(frozen=True)
class Foreign:
    """A checkpoint of format `made`, edited and damaged, that is read as format `read`."""

    made: str
    read: str | None
    container: str
    tensors: list[TensorEdit]
    tree: list[Edit]
    damage: list[Damage]


def foreign() -> st.SearchStrategy:
    return st.builds(
        Foreign,
        st.sampled_from((*MADE, "timm")),
        st.one_of(st.none(), st.none(), st.none(), st.sampled_from((*format_names(), "timm"))),
        st.sampled_from(CONTAINERS),
        tensor_edits(),
        st.one_of(st.just([]), st.just([]), edits(most=1)),
        st.one_of(st.just([]), damages()),
    )


class Code:
    """Code in a hostile checkpoint: unpickling would write a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def _content(case: Foreign) -> Any:
    content = dict(_published(case.made))
    key = next(key for key in WRAPPERS if not key or isinstance(content.get(key), dict))
    state = changed(content[key] if key else content, case.tensors)
    content = {**content, key: state} if key else state
    return edited(content, case.tree) if case.tree else content


def _contained(content: Any, container: str, marker: Path) -> bytes:
    file = io.BytesIO()
    if container == "safetensors":
        state = next((content[key] for key in WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)), content)
        try:
            return safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})
        except Exception:  # anything but a dict of plain tensors has no such file
            return safetensors.torch.save({"x": torch.zeros(3)})
    if container == "pickle":
        return pickle.dumps({"state_dict": {"a": 1}, "code": Code(marker)}, protocol=2)
    if container.endswith("code"):
        content = {"state_dict": content, "code": Code(marker)}
    torch.save(content, file, _use_new_zipfile_serialization=not container.startswith("legacy"))
    return _deflated(file.getvalue()) if container == "deflated" else file.getvalue()


def _deflated(content: bytes) -> bytes:
    """The same archive with compressed members, one of which is larger than its declared length."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, bytes(2**26) if name.endswith("/data/0") else source.read(name))
    return file.getvalue()


def _foreign(case: Foreign, folder: Path) -> None:
    marker = folder / "marker"
    path = folder / ("checkpoint.safetensors" if case.container == "safetensors" else "checkpoint.pth")
    try:
        content = _contained(_content(case), case.container, marker)
    except (RuntimeError, NotImplementedError, pickle.PicklingError, AttributeError, TypeError, ValueError, RecursionError):
        content = _contained(dict(_published(case.made)), case.container, marker)  # cannot be written with these edits
    path.write_bytes(damaged(content, case.damage))
    read = case.read or case.made
    own = {"arch": "resnet18", "width": WIDTH, "stem": "imagenet", "checkpoint": str(path)}
    chosen = {"source": "timm"} if read == "timm" else {"source": "checkpoint", "format": read}
    params = TeacherParams.model_validate(shipped()["teacher"] | own | chosen)
    try:
        make_teacher(params, _image(), 0)
    finally:
        assert not marker.exists(), "code of the checkpoint was run"


def _image() -> ImageParams:
    return ImageParams(crop_px=32, resize_px=32, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


# BINGO's own files.


@dataclass(frozen=True)
class Own:
    """A network's file: edits of metadata, tensors and header with a correct checksum, and damage without one."""

    kind: str
    metadata: list[Edit]
    tensors: list[TensorEdit]
    header: list[Edit]
    damage: list[Damage]


def own() -> st.SearchStrategy:
    none: st.SearchStrategy = st.just([])
    return st.builds(
        Own,
        st.sampled_from(("teacher", "student")),
        st.one_of(none, edits(of_json=True)),
        st.one_of(none, tensor_edits()),
        st.one_of(none, none, none, edits(of_json=True, most=1)),
        st.one_of(none, none, none, damages()),
    )


@cache
def _network(kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    network = TeacherParams.model_validate(shipped()["teacher"] | {"width": 0.125})
    backbone = build_backbone(network.arch, network.width, network.stem, 0)
    head = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    if kind == "student":
        shape = {name: getattr(network, name) for name in ("arch", "width", "stem")}
        return backbone.state_dict(), {"kind": kind, **shape, **_image().model_dump(), "listing": "l", "embeddings": "e", "bags": "b"}
    state = {
        f"{name}.{key}": tensor for name, part in (("backbone", backbone), ("head", head)) for key, tensor in part.state_dict().items()
    }
    return state, teacher_metadata(network, _image(), backbone, head, {"source": "random", "pretrained": False})


def _own(case: Own, folder: Path) -> None:
    state, metadata = _network(case.kind)
    state = {
        name: tensor
        for name, tensor in changed(state, case.tensors).items()
        if isinstance(name, str) and isinstance(tensor, Tensor) and tensor.numel() < 2**22
    }
    text = json.dumps(edited(metadata, case.metadata), sort_keys=True, skipkeys=True)
    try:
        content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()}, metadata={"bingo": text})
    except (RuntimeError, ValueError, KeyError, UnicodeEncodeError, NotImplementedError, AttributeError):
        content = safetensors.torch.save(_network(case.kind)[0], metadata={"bingo": canonical_json(metadata)})
    path = folder / "network.safetensors"
    path.write_bytes(damaged(_sealed(content, case.header), case.damage))
    lines = []
    for reader in (
        read_network_facts,
        *((load_teacher, read_teacher) if case.kind == "teacher" else (load_backbone, read_student)),
    ):
        try:
            reader(path)
        except UserError as error:
            lines += error.lines
    if lines:
        raise UserError(lines)


def _sealed(content: bytes, changes: list[Edit]) -> bytes:
    """With an edited header, and the matching checksum if it has one."""
    length = struct.unpack("<Q", content[:8])[0]
    header = edited(json.loads(content[8 : 8 + length]), changes) if changes else json.loads(content[8 : 8 + length])
    text = json.dumps(header).encode()
    try:
        return seal_safetensors(struct.pack("<Q", len(text)) + text + content[8 + length :])
    except (AttributeError, TypeError, ValueError):  # no header at all
        return struct.pack("<Q", len(text)) + text + content[8 + length :]


# Unfinished trainings.


@dataclass(frozen=True)
class Training:
    """A checkpoint of a training: edits of latest.json and of the state with correct checksums, and damage to either file."""

    latest: list[Edit]
    state: list[Edit]
    tensors: list[TensorEdit]
    damage: list[Damage]
    damaged_file: int


STATE = {
    "method": {"w": torch.zeros(3, 4), "b": torch.zeros(4)},
    "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    "step": 3,
    "history": [{"loss": 1.0}],
}


def _training(case: Training, folder: Path) -> None:
    checkpoints = Checkpoints(folder / "checkpoints", 0)
    latest = edited({"step": 3, "processes": 1}, case.latest)
    write_json(checkpoints.folder / "latest.json", {"step": 3, "processes": 1, "checksum": fingerprint({"step": 3, "processes": 1})})
    if isinstance(latest, dict):
        text = json.dumps(latest, skipkeys=True, default=str)
        try:
            (checkpoints.folder / "latest.json").write_text(json.dumps(json.loads(text) | {"checksum": fingerprint(json.loads(text))}))
        except ValueError:  # nan
            (checkpoints.folder / "latest.json").write_text(text)
    file = io.BytesIO()
    try:
        torch.save(edited({**STATE, "method": changed(STATE["method"], case.tensors)}, case.state), file)
    except Exception:  # cannot be written with these edits
        torch.save(deepcopy(STATE), file := io.BytesIO())
    (checkpoints.folder / "step-3.rank-0.pt").write_bytes(seal(file.getvalue()))
    path = sorted(path for path in checkpoints.folder.iterdir() if path.is_file())[case.damaged_file % 2]
    path.write_bytes(damaged(path.read_bytes(), case.damage))
    checkpoints.load(CPU)


FOREIGN = Surface("checkpoints, published", 12, foreign(), _foreign)
OWN = Surface("networks, BINGO's own", 12, own(), _own)
TRAININGS = Surface(
    "checkpoints of trainings",
    8,
    st.builds(
        Training,
        st.one_of(st.just([]), edits(of_json=True, most=2)),
        st.one_of(st.just([]), edits(most=2)),
        tensor_edits(),
        damages(),
        st.integers(0, 1),
    ),
    _training,
)
