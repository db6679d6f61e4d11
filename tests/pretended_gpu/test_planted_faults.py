"""Faults of all kinds that the other tests look for are planted into a step or a loader: exactly these must be found."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bingo.images import uploads
from bingo.methods.parts.momentum import Queue
from bingo.runtime.finite import LossWatch
from tests.pretended_gpu.device import DeviceError, DeviceTensor, pretended_gpu
from tests.pretended_gpu.steps import BATCH, Case, on_cpu, on_gpu
from tests.pretended_gpu.streams import GPU, Stream
from tests.pretended_gpu.works import random_views

MOCO, BINGO = Case("moco", "momentum", "bf16"), Case("bingo", precision="bf16")
pytestmark = pytest.mark.slow


def faults(tmp_path, case, change=lambda run: None) -> set[str]:
    """The kinds of faults of a step."""
    return set(on_gpu(tmp_path, case, change)[1].faults)


def around_forward(run, work) -> None:
    """Let `work(terms)` change what the method's forward returns."""
    forward = run.method.forward
    run.method.forward = lambda batch, progress: work(forward(batch, progress))


def replace_everywhere(monkeypatch, function, other) -> None:
    """Replace a function in all modules that have imported it."""
    for module in [module for name, module in sys.modules.items() if name.startswith("bingo.")]:
        for name, value in list(vars(module).items()):
            if value is function:
                monkeypatch.setattr(module, name, other)


def test_without_a_planted_fault_none_is_found(tmp_path):
    assert faults(tmp_path / "moco", MOCO) == faults(tmp_path / "bingo", BINGO) == set()
    with pretended_gpu() as record:
        random_views(GPU, tmp_path)
    assert set(record.faults) == {"waits"}, "only the sums that this test reads"


def read(terms):
    assert terms["loss"].item() > 0
    return terms


def refuse_nan(terms):
    if not torch.isfinite(terms["loss"]):
        raise ValueError
    return terms


@pytest.mark.parametrize("reading", [read, refuse_nan, lambda terms: terms | {"n": terms["loss"][torch.isfinite(terms["loss"])].sum()}])
def test_a_step_that_reads_its_loss_waits(tmp_path, reading):
    assert faults(tmp_path, MOCO, lambda run: around_forward(run, reading)) == {"waits"}


def test_a_loss_that_is_checked_at_every_step_waits(tmp_path):
    def often(run):
        run.watch = LossWatch(torch.device("cuda"))
        run.watch.every_steps = 1

    assert faults(tmp_path, MOCO, often) == {"waits"}


def test_a_queue_that_is_indexed_from_the_host_waits(tmp_path, monkeypatch):
    def push(self, keys_BP, rows_B):
        self.keys_QP[torch.arange(BATCH) % len(self.rows_Q)] = keys_BP.float()

    monkeypatch.setattr(Queue, "push", push)
    assert faults(tmp_path, MOCO) == {"waits", "sorted"}


def test_a_mask_as_an_index_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(Queue, "empty", lambda self: (self.rows_Q[self.rows_Q < 0].sum() < 0).expand(1, len(self.rows_Q)))
    assert faults(tmp_path, MOCO) == {"waits"}


@pytest.mark.parametrize("copy", [lambda x: x, lambda x: x[:].clone()])
def test_an_upload_from_memory_that_is_not_page_locked_is_found(tmp_path, monkeypatch, copy):
    def upload(values, device):
        return copy(torch.from_numpy(np.ascontiguousarray(values))).to(device, non_blocking=True)

    replace_everywhere(monkeypatch, uploads.upload, upload)
    assert faults(tmp_path, BINGO) == {"waits", "pageable"}


def test_an_upload_that_waits_is_found(tmp_path, monkeypatch):
    replace_everywhere(monkeypatch, uploads.upload, lambda values, device: torch.from_numpy(np.array(values)).pin_memory().to(device))
    assert faults(tmp_path, BINGO) == {"waits"}


def test_numbers_that_are_uploaded_at_every_step_are_found(tmp_path, monkeypatch):
    replace_everywhere(monkeypatch, uploads.channels, lambda values, device: torch.tensor(values, device=device)[:, None, None])
    assert faults(tmp_path, MOCO) == {"waits", "pageable"}


def test_stored_keys_on_the_host_are_refused(tmp_path):
    def on_host(run):
        run.batches.stored = replace(run.batches.stored, keys_TVP=run.batches.stored.keys_TVP.cpu())

    with pytest.raises(DeviceError, match="cpu"):
        faults(tmp_path, BINGO, on_host)


def test_a_loss_with_a_term_on_the_host_is_refused(tmp_path):
    weights = torch.ones(1)
    with pytest.raises(DeviceError, match="two devices"):
        faults(tmp_path, MOCO, lambda run: around_forward(run, lambda terms: {"loss": (terms["loss"] * weights).sum()}))


def test_momentum_in_another_memory_format_is_refused(tmp_path):
    def contiguous(run):
        for parameter in run.optimizer.param_groups[0]["params"]:
            run.optimizer.state[parameter]["momentum_buffer"] = torch.zeros(parameter.shape, device="cuda")

    with pytest.raises(DeviceError, match="layout"):
        faults(tmp_path, MOCO, contiguous)


@pytest.mark.parametrize("owner", [Stream, DeviceTensor])
def test_a_copying_stream_that_is_out_of_order_is_found(tmp_path, monkeypatch, owner):
    """The training does not wait for the copy, or the memory of the copy is reused while the training needs it."""
    monkeypatch.setattr(owner, {Stream: "wait_stream", DeviceTensor: "record_stream"}[owner], lambda self, other: None)
    with pretended_gpu() as record:
        random_views(GPU, tmp_path)
    assert set(record.faults) == {"waits", "unordered"}


def around_student(run, work) -> None:
    """Let `work(features)` change what the student's forward returns."""
    forward = run.method.student.forward
    run.method.student.forward = lambda images: work(forward(images))


def resampled(x_BD: torch.Tensor) -> torch.Tensor:
    return x_BD + F.interpolate(x_BD[:, None], x_BD.shape[1], mode="linear")[:, 0]


def test_an_operation_without_a_deterministic_kernel_is_found(tmp_path):
    assert faults(tmp_path, MOCO, lambda run: around_student(run, resampled)) == {"nondeterministic"}


def test_an_index_whose_gradient_sorts_is_found(tmp_path):
    def sorting(change) -> int:
        return on_gpu(tmp_path / "step", MOCO, change)[1].sorted.total()

    before = sorting(lambda run: None)
    assert sorting(lambda run: around_student(run, lambda x: x[:, torch.arange(x.shape[1], device=x.device)])) == before + 1


def test_a_branch_for_gpus_with_other_results_is_found(tmp_path):
    wanted = on_cpu(tmp_path / "cpu", MOCO).sums
    assert on_gpu(tmp_path / "same", MOCO)[0].sums == wanted
    outcome, _ = on_gpu(tmp_path / "other", MOCO, lambda run: around_student(run, lambda x: 1.01 * x + 0.01))
    assert outcome.sums != wanted


def test_an_operation_for_each_row_increases_the_launches(tmp_path):
    def launches(change) -> int:
        return on_gpu(tmp_path / "step", MOCO, change)[1].launches.total()

    before = launches(lambda run: None)
    assert launches(lambda run: around_student(run, lambda x: torch.stack([row * 1 for row in x]))) >= before + 2 * BATCH
