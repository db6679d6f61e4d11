"""BINGO's network files: equal bytes for equal content; damaged files are refused."""

import pytest
import safetensors.torch
import torch
from torch import nn

from bingo.nets.checkpoint import building, first_names, load_network, load_strictly, on_host, save_network
from bingo.runtime.checkpoints import Checkpoints
from bingo.runtime.errors import UserError
from bingo.teachers.reading.foreign import read_checkpoint

STATE = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(7), "c": torch.ones(2, dtype=torch.float16)}
METADATA = {"kind": "test", "mean": [0.5, 0.25], "width": 0.125, "head": None, "name": "é"}


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        load_network(path)
    (line,) = caught.value.lines
    assert str(path) in line
    assert "\n" not in line
    return line


def test_tensors_and_metadata_are_read_as_written(tmp_path):
    save_network(tmp_path / "net.safetensors", STATE, METADATA)
    state, metadata = load_network(tmp_path / "net.safetensors")
    assert metadata == METADATA
    assert set(state) == set(STATE)
    for name, tensor in STATE.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)


def test_host_copies_of_any_dtype_and_layout_share_no_memory():
    turned = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = {"d": torch.arange(3), "a": turned, "c": torch.tensor(7), "b": torch.rand(4).half(), "none": torch.empty(0, 2), "again": turned}
    copies = on_host(state)
    assert list(copies) == list(state)
    for name, tensor in state.items():
        assert copies[name].dtype == tensor.dtype
        assert torch.equal(copies[name], tensor)
        assert copies[name].is_contiguous()
    assert len({copy.untyped_storage().data_ptr() for copy in copies.values() if copy.numel()}) == 5
    assert on_host({}) == {}


def test_equal_content_has_equal_bytes_in_any_order_and_layout(tmp_path):
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    shared = torch.arange(6.0)
    save_network(tmp_path / "one", {"x": images, "y": shared[:3].clone(), "z": shared}, METADATA)
    turned = {"z": shared, "y": shared[:3], "x": images.to(memory_format=torch.channels_last).requires_grad_()}
    save_network(tmp_path / "two", turned, dict(reversed(METADATA.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_other_files_are_refused_by_name(tmp_path):
    path = tmp_path / "net.safetensors"
    assert "cannot be read (" in refusal(path)
    save_network(path, STATE, METADATA)
    whole = path.read_bytes()
    for content in (whole[:-3], whole[:40], b"", b"PK\x03\x04 not a network at all", (5).to_bytes(8, "little") + b"[1,2]", whole + b"x"):
        path.write_bytes(content)
        assert "is damaged, or BINGO did not write it (it" in refusal(path)
    for metadata in (None, {"bingo": "{"}):
        path.write_bytes(safetensors.torch.save(STATE, metadata=metadata))
        assert "is damaged, or BINGO did not write it (its metadata hold no checksum)" in refusal(path)
    assert "cannot be read" in refusal(tmp_path)


def test_lack_of_memory_is_not_reported_as_damage(tmp_path, monkeypatch):
    """A checkpoint that does not fit on a full GPU is not reported as damaged."""
    checkpoints = Checkpoints(tmp_path / "training", 0)
    checkpoints.save({"step": 1}, 1)
    torch.save(STATE, tmp_path / "net.pth")

    def no_room(*_, **__) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def build() -> None:
        with building(tmp_path / "net.safetensors"):
            no_room()

    monkeypatch.setattr(torch, "load", no_room)
    for act in (lambda: checkpoints.load(torch.device("cpu")), lambda: read_checkpoint(tmp_path / "net.pth"), build):
        with pytest.raises(UserError, match=r"out of memory \(CUDA out of memory") as caught:
            act()
        assert str(tmp_path) in str(caught.value)
        assert not any(word in str(caught.value) for word in ("delete", "damaged", "truncated"))


def test_strict_loading_names_every_difference():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = {**net.state_dict(), "0.weight": torch.zeros(4, 2), "2.extra": torch.zeros(1)}
    del state["0.bias"]
    with pytest.raises(UserError) as caught:
        load_strictly(net, state, "file.pt")
    (line,) = caught.value.lines
    assert line.startswith("file.pt: missing 0.bias; not expected 2.extra; of another shape 0.weight (4, 2) for (3, 2); ")


def test_strict_loading_accepts_old_files_without_batch_counters():
    net = nn.BatchNorm1d(3)
    state = {name: tensor + 2 for name, tensor in net.state_dict().items() if name != "num_batches_tracked"}
    load_strictly(net, state, "file.pt")
    assert net.num_batches_tracked == 0
    assert torch.equal(net.running_mean, torch.full((3,), 2.0))


def test_first_names():
    assert first_names(["a", "b"]) == "a, b"
    assert first_names("abcdef") == "a, b, c, d and 2 more"
