"""TF32 by precision, for each product of a forward and a backward pass on the simulated GPU."""

import sys

import pytest
import torch
from torch import nn

from bingo.nets.precision import autocast

pytestmark = pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="pretends a GPU")


@pytest.fixture(autouse=True)
def settings():
    """torch's settings, which are restored after the test."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("auto", True), ("bf16", True)])
@pytest.mark.parametrize("before", [False, True])
def test_a_gpu_multiplies_float32_as_tf32_unless_the_precision_is_fp32(monkeypatch, precision, allowed, before):
    from tests.pretended_gpu import device

    seen, run = {}, device.Call.run

    def watched(call):
        seen[call.name] = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        return run(call)

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = before
    monkeypatch.setattr(device.Call, "run", watched)
    with device.pretended_gpu():
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)).to("cuda")
        with autocast(precision, torch.device("cuda")):
            y_BK = network(torch.ones(5, 3, 3, 3, device="cuda"))
        loss = (y_BK.float() @ torch.ones(2, 1, device="cuda")).sum()
        loss.backward()
    products = {name: flags for name, flags in seen.items() if "conv" in name or name in ("mm", "addmm")}
    assert {"convolution_backward", "mm", "addmm"} <= set(products)
    assert set(products.values()) == {(allowed, allowed)}


def test_work_on_a_cpu_does_not_change_the_settings_of_gpus():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for precision in ("fp32", "auto", "bf16"):
        with autocast(precision, torch.device("cpu")):
            pass
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
