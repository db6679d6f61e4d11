"""Flipped bytes in every artefact: found and named, or without effect on the content read (tests/stress/corruption.py makes many more)."""

import pytest
import torch
from fabricated import make_workspace
from torch import nn

from bingo.nets.backbones import build_backbone
from bingo.nets.checkpoint import load_network, save_network
from bingo.nets.students import save_student
from bingo.params import ImageParams, NetworkParams
from bingo.runtime.checkpoints import Checkpoints
from bingo.runtime.checksums import Damaged, check_safetensors, seal, unseal
from bingo.runtime.errors import UserError
from bingo.teachers.teacher import save_teacher, teacher_metadata
from tests.stress.corruption import artefacts, digest, flip_bytes

FLIPS = 30
NAMES = [
    "listing", "listing, row by row", "images", "embeddings", "embeddings, in blocks", "bags", "teacher", "student", "student, header",
    "checkpoint",
]  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """One small artefact of every kind."""
    root = tmp_path_factory.mktemp("corruption")
    make_workspace(root)
    network = NetworkParams(arch="resnet10t", width=0.125, stem="small")
    image = ImageParams(crop_px=12, resize_px=12, mean=[0.5] * 3, std=[0.25] * 3)
    backbone = build_backbone(network.arch, network.width, network.stem, 0)
    metadata = teacher_metadata(network, image, backbone, None, {"source": "random", "pretrained": False})
    save_teacher(root / "models/teacher.safetensors", backbone, None, metadata)
    save_student(root / "models/student.safetensors", root / "models/head.safetensors", backbone, nn.Linear(2, 2), network, image, {})
    Checkpoints(root / "checkpoints", 0).save({"method": backbone.state_dict(), "step": 3, "history": [{"loss": 0.5}]}, 3)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_byte_is_found_and_named_or_changes_nothing(workspace, name):
    (artefact,) = [artefact for artefact in artefacts(workspace) if artefact.name == name]
    counts, lines = flip_bytes(artefact, FLIPS, seed=1)
    assert not lines
    assert counts["refused"] > FLIPS / 4
    assert counts["refused"] + counts["harmless"] == FLIPS


def test_the_digest_distinguishes_values():
    assert digest([1, "a"]) == digest([1, "a"])
    x = torch.zeros(3)
    values = [[1, "a"], [1, "b"], (1, "a"), {"x": x}, {"x": x + 1e-45}, {"y": x}, {"x": x.numpy()}, {"x": -x}]
    assert len({digest(value) for value in values}) == len(values)


@pytest.mark.parametrize("file", ["latest.json", "step-3.rank-0.pt"])
def test_a_checkpoint_without_its_checksum_is_refused(workspace, tmp_path, file):
    checkpoints = Checkpoints(tmp_path, 0)
    checkpoints.save({"step": 3}, 3)
    assert checkpoints.load(torch.device("cpu")) == {"step": 3}
    path = tmp_path / file
    path.write_bytes(b'{"processes": 1, "step": 3}' if path.suffix == ".json" else path.read_bytes()[32:])
    with pytest.raises(UserError, match=r"the checkpoint is damaged .* delete this folder"):
        checkpoints.load(torch.device("cpu"))


def test_sealed_bytes():
    for content in (b"", b"abc"):
        assert unseal(seal(content)) == content
    for damaged in (b"", b"x", seal(b"abc")[:-1], b"x" + seal(b"abc")):
        with pytest.raises(Damaged):
            unseal(damaged)


def test_another_networks_tensors_behind_a_header_are_found(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_network(tmp_path / name, {"x": torch.full((4,), value)}, {"kind": "test"})
        check_safetensors(tmp_path / name)
    (tmp_path / "c").write_bytes((tmp_path / "a").read_bytes()[:-16] + (tmp_path / "b").read_bytes()[-16:])
    with pytest.raises(UserError, match="its bytes do not fit their checksum"):
        load_network(tmp_path / "c")
