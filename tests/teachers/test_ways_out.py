"""For each kind of error about a teacher's or student's file, the advice in its message is followed, and the file can be read."""

import gzip
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from bingo.nets.backbones import build_backbone
from bingo.nets.checkpoint import save_network
from bingo.nets.students import load_backbone, save_student
from bingo.runtime.errors import UserError
from bingo.teachers.reading.sources import make_teacher
from tests.teachers.test_wrapped import IMAGE, NARROW, PARAMS, moco, params_of, weights

pytestmark = pytest.mark.slow


class Net(nn.Module):
    """A module of the user, pickled as a whole."""

    def __init__(self):
        super().__init__()
        self.net = build_backbone("resnet18", 0.125, "imagenet", 0)


def tar(path: Path) -> None:
    torch.save(weights(), path.with_name("inner.pt"))
    with tarfile.open(path, "w:gz") as archive:
        archive.add(path.with_name("inner.pt"), "inner.pt")


def untar(path: Path) -> None:
    with tarfile.open(path) as archive:
        archive.extract("inner.pt", path.parent / "out", filter="data")
    (path.parent / "out/inner.pt").rename(path)


def cut(path: Path) -> None:
    torch.save(weights(), path)
    path.write_bytes(path.read_bytes()[:2000])


def cut_safetensors(path: Path) -> None:
    safetensors.torch.save_file(weights(), path)
    path.write_bytes(path.read_bytes()[:-9])


def as_arrays(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), **{name: tensor.numpy() for name, tensor in weights().items()})
    path.with_suffix(".npz").rename(path)


def from_arrays(path: Path) -> None:
    with np.load(path) as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays}
    torch.save(state, path)


def state_alone(path: Path) -> None:
    torch.save(torch.load(path, weights_only=False).state_dict(), path)


def saved(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content() if callable(content) else content, path)


whole = saved(weights)
spread = torch.zeros(1).expand(1 << 28)  # a few bytes that claim a gigabyte
# The content of the file, a word of the message, and the advice of the message.
FILES: dict[str, tuple[Callable[[Path], Any], str, Callable[[Path], Any]]] = {
    "no file": (lambda path: None, "the file does not exist", whole),
    "an empty file": (Path.touch, "download it again", whole),
    "compressed": (lambda path: path.write_bytes(gzip.compress(b"x" * 99)), "unpack it", whole),
    "an archive": (tar, "unpack it", untar),
    "a truncated file": (cut, "download it again", whole),
    "a truncated file of safetensors": (cut_safetensors, "download it again", whole),
    "arrays of NumPy": (as_arrays, "torch.save", from_arrays),
    "a plain pickle": (
        lambda path: path.write_bytes(pickle.dumps(weights())),
        "save its tensors by name with torch.save",
        lambda path: torch.save(pickle.loads(path.read_bytes()), path),
    ),
    "a whole module": (saved(Net), "save its state_dict alone", state_alone),
    "tensors larger than the file": (saved({"conv1.weight": spread}), "a file of torch.save", whole),
    "no weights by name": (saved({"weights": [1], "epoch": 3}), "save the network's state_dict() with torch.save", whole),
    "a weight that is missing": (saved(lambda: {k: t for k, t in weights().items() if k != "bn1.weight"}), "give a complete file", whole),
    "numbers that are none": (saved(lambda: weights() | {"bn1.weight": torch.full((8,), float("nan"))}), "give another file", whole),
    "whole numbers": (saved(lambda: weights() | {"bn1.weight": torch.ones(8, dtype=torch.int32)}), "give the original file", whole),
    "of a library that a pickle names": (saved(lambda: {"net": weights(), "made": Path("x")}), "save its state_dict alone", whole),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_can_be_read_after_following_its_message(tmp_path, kind):
    wrong, says, mend = FILES[kind]
    path = tmp_path / ("net.safetensors" if "safetensors" in kind else "net.pt")
    wrong(path)
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        make_teacher(params_of(path), IMAGE, 0)
    assert len(caught.value.lines) == 1
    mend(path) if "safetensors" not in kind else safetensors.torch.save_file(weights(), path)
    backbone, _, _ = make_teacher(params_of(path), IMAGE, 0)
    assert backbone.feature_width == 64


def test_a_head_of_another_format_and_a_normalisation_of_other_weights(tmp_path, monkeypatch):
    torch.save({"state_dict": {name: tensor for name, tensor in moco(str).items() if ".fc.0." not in name}}, tmp_path / "net.pt")
    params = params_of(tmp_path / "net.pt", source="checkpoint", format="moco")
    with pytest.raises(UserError, match=r"teacher\.checkpoint to a complete file"):
        make_teacher(params, IMAGE, 0)
    torch.save({"state_dict": moco(str)}, tmp_path / "net.pt")
    make_teacher(params, IMAGE, 0)
    published = params_of(tmp_path, arch="test_vit", width=1.0, checkpoint=None)
    with pytest.raises(UserError, match=r"set teacher\.image\.mean and teacher\.image\.std to these") as caught:
        make_teacher(published, IMAGE, 0)
    expected = str(caught.value).rpartition(" expect ")[2]
    mean, std = ([float(x) for x in values.split(", ")] for values in re.findall(r"\[([^\]]+)\]", expected))
    image = IMAGE.model_copy(update={"mean": mean, "std": std})
    create = timm.create_model

    def unreachable(*args, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no network")
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError, match=r"set teacher\.checkpoint to a local file of them"):
        make_teacher(published, image, 0)  # a mistake of another kind: missing weights
    torch.save(create("test_vit").state_dict(), tmp_path / "vit.pt")
    make_teacher(published.model_copy(update={"checkpoint": str(tmp_path / "vit.pt")}), image, 0)


def test_a_students_file_can_be_read_after_the_stage_has_written_it(tmp_path):
    params = PARAMS.student.model_copy(update=NARROW)
    path, backbone = tmp_path / "student.safetensors", build_backbone(*NARROW.values(), 0)

    def stage() -> None:
        save_student(path, tmp_path / "head.safetensors", backbone, nn.Identity(), params, IMAGE, {})

    other = PARAMS.student.model_copy(update={"arch": "resnet34", "width": 0.125, "stem": "imagenet"})
    for wrong, says in [
        (lambda: None, r"the file does not exist.*run the stage that writes it: dvc repro"),
        (lambda: path.write_bytes(b"x"), r"is damaged.*run: dvc repro"),
        (
            lambda: save_network(path, {"x": torch.zeros(1)}, {"kind": "teacher"}),
            r"a teacher, not a student; give another, or run: dvc repro distill",
        ),
        (
            lambda: save_student(path, tmp_path / "h", build_backbone("resnet34", 0.125, "imagenet", 0), nn.Identity(), other, IMAGE, {}),
            r"student.arch = resnet18, this network has resnet34; run the stage that writes it: dvc repro",
        ),
    ]:
        path.unlink(missing_ok=True)
        wrong()
        with pytest.raises(UserError, match=says):
            load_backbone(path, params)
        stage()
        assert load_backbone(path, params)[0].feature_width == 64
