"""A GPU is reported exactly if torch or FAISS cannot use it, for several drivers, device files and environments."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from bingo.pipeline.run import make_deterministic, pick_device
from bingo.runtime import gpus
from bingo.runtime.errors import UserError
from tests.pretended_gpu.fake_faiss import fake_faiss_gpus

TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx (Triggered internally at CUDAFunctions.cpp:119.)"
)
UNKNOWN = "CUDA initialization: CUDA unknown error - this may be due to an incorrectly set up environment. Setting the devices to be zero."
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine without device files and with an empty environment."""
    monkeypatch.setattr(gpus, "_DEVICE_FILES", tmp_path)
    for name in ("BINGO_DEVICE", "CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def torch_says(monkeypatch, *messages):
    """torch finds no GPU and warns."""

    def is_available():
        for message in messages:
            warnings.warn(message, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize(("message", "reason"), [(TOO_OLD, "is too old (found version 11040))"), (UNKNOWN, "CUDA unknown error")])
def test_a_driver_that_torch_rejects_ends_the_run_with_a_line(monkeypatch, wanted, message, reason):
    torch_says(monkeypatch, message)
    monkeypatch.setenv("BINGO_DEVICE", wanted)
    with pytest.raises(UserError) as refused:
        pick_device()
    (line,) = refused.value.lines
    assert line.startswith(f"BINGO_DEVICE = {wanted}: torch cannot use this machine's GPU (CUDA initialization: ")
    assert reason in line
    assert "http" not in line
    assert line.endswith("or set BINGO_DEVICE=cpu to work without it")


@pytest.mark.parametrize(("variable", "value"), [("BINGO_DEVICE", "cpu"), ("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1")])
def test_a_gpu_that_is_not_requested_may_have_any_driver(monkeypatch, tmp_path, variable, value):
    torch_says(monkeypatch, TOO_OLD)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv(variable, value)
    assert pick_device() == CPU


def test_other_warnings_are_ignored(monkeypatch):
    torch_says(monkeypatch, "numpy is old")
    assert pick_device() == CPU


@pytest.mark.parametrize(
    ("visible", "file", "reported"),
    [
        (None, "nvidia0", True),
        ("0,1", "nvidia3", True),
        ("GPU-5ebe9f43", "nvidia0", True),
        ("MIG-5ebe9f43", "nvidia0", True),
        ("", "nvidia0", False),
        ("-1", "nvidia0", False),
        ("NoDevFiles", "nvidia0", False),
        (None, "nvidiactl", False),
        (None, "nvidia-uvm", False),
        (None, None, False),
    ],
)
def test_a_device_file_that_this_process_may_open_is_a_gpu(monkeypatch, tmp_path, visible, file, reported):
    torch_says(monkeypatch)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if file:
        (tmp_path / file).touch()
    with fake_faiss_gpus(0):
        line = gpus.gpu_unused_by_faiss()
    assert (line is not None) == reported
    if not reported:
        assert pick_device() == CPU
        return
    assert line is not None
    assert f"FAISS cannot use this machine's GPU ({tmp_path / file} is here" in line
    with pytest.raises(UserError, match="torch cannot use this machine's GPU"):
        pick_device()
    (tmp_path / file).unlink()
    (tmp_path / file).symlink_to(tmp_path / "gone")  # cannot be opened, as in a job to which the GPU is not assigned
    assert pick_device() == CPU
    with fake_faiss_gpus(0):
        assert gpus.gpu_unused_by_faiss() is None


def test_faiss_is_not_reported_with_a_gpu_or_without_support_or_on_the_cpu(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    with fake_faiss_gpus(1):
        assert gpus.gpu_unused_by_faiss() is None
    with fake_faiss_gpus(0):
        assert gpus.gpu_unused_by_faiss() is not None
        monkeypatch.setenv("BINGO_DEVICE", "cpu")
        assert gpus.gpu_unused_by_faiss() is None
    monkeypatch.delenv("BINGO_DEVICE")
    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(get_num_gpus=lambda: 0))
    assert gpus.gpu_unused_by_faiss() is None


@pytest.mark.parametrize("wanted", ["gpu", "CPU", "cuda:1", ""])
def test_other_devices_are_refused(monkeypatch, wanted):
    monkeypatch.setenv("BINGO_DEVICE", wanted)
    for asking in (pick_device, gpus.faiss_gpus):
        with pytest.raises(UserError, match=r"BINGO_DEVICE = .*: allowed are auto, cpu, cuda"):
            asking()


def test_a_requested_gpu_that_does_not_exist(monkeypatch):
    torch_says(monkeypatch)
    monkeypatch.setenv("BINGO_DEVICE", "cuda")
    with pytest.raises(UserError, match="BINGO_DEVICE = cuda: torch sees no GPU here"):
        pick_device()


@pytest.fixture
def modes(monkeypatch):
    """torch's modes, which are restored after the test."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", torch.utils.deterministic.fill_uninitialized_memory)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    was, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.use_deterministic_algorithms(was, warn_only=warns)


@pytest.mark.parametrize(("wanted", "device", "on"), [(None, "cuda", True), ("1", "cuda", True), ("0", "cuda", False), ("0", "cpu", True)])
def test_only_a_gpu_can_disable_deterministic_algorithms_and_memory_is_not_filled(monkeypatch, modes, wanted, device, on):
    monkeypatch.delenv("BINGO_DETERMINISTIC", raising=False)
    if wanted is not None:
        monkeypatch.setenv("BINGO_DETERMINISTIC", wanted)
    assert make_deterministic(torch.device(device)) is on is torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark is not on
    assert not torch.empty(10_000).isnan().all(), "filled memory would contain only NaN"


def test_another_value_is_refused(monkeypatch, modes):
    monkeypatch.setenv("BINGO_DETERMINISTIC", "no")
    with pytest.raises(UserError, match="BINGO_DETERMINISTIC = no: allowed are 1 and 0"):
        make_deterministic(CPU)
