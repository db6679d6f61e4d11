"""The training step: exact in spite of savings, without waiting for the device, and a loss that is not finite is still found."""

import copy
import dataclasses
import itertools
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bench_host, bench_step
from bingo import seeds
from bingo.methods.bingo import cutmix
from bingo.methods.contract import Batch, Context, Progress, build_method
from bingo.methods.negatives import hidden_negatives, hidden_places
from bingo.methods.parts import losses
from bingo.nets.backbones import build_backbone
from bingo.nets.heads import mlp_head, unit
from bingo.params import method_names, method_section
from bingo.runtime.errors import UserError
from bingo.runtime.finite import LossWatch
from bingo.teachers.teacher import Teacher
from tests.training.test_train import PARAMS, trainer

CPU = torch.device("cpu")
aten = torch.ops.aten
WAITING = [aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default]


def unit_rows(rows: int, width: int = 16) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, width), dim=1)


@pytest.mark.parametrize("hidden_rows", [0, 1, 7])
@pytest.mark.parametrize("at_once", [1, 16 * 64, 10**9])
@pytest.mark.parametrize("bank_type", [torch.float16, torch.float32])
def test_blocks_of_the_bank_give_the_value_and_gradient_of_the_whole_bank(monkeypatch, at_once, hidden_rows, bank_type):
    """Compared with torch's logsumexp over all logits at once, in float64; the first rows are hidden, and one logit is much larger than the
    others."""
    torch.manual_seed(0)
    monkeypatch.setattr(losses, "BANK_AT_ONCE", at_once)
    query_BP, bank_JP, weight_B = unit_rows(7), unit_rows(200).to(bank_type), torch.rand(7)
    bank_JP[150] *= 40
    hidden_BJ = torch.rand(hidden_rows, 200) < 0.3 if hidden_rows else None
    if hidden_BJ is not None:
        hidden_BJ[:, :70] = True
    got_B, mean_BP = losses.negative_logsumexp(query_BP, bank_JP, 0.1, hidden_BJ)
    gradient_BP = weight_B[:, None] * mean_BP / 0.1
    plain_BP = query_BP.double().requires_grad_(True)
    logits_BJ = plain_BP @ bank_JP.double().T / 0.1
    if hidden_BJ is not None:
        logits_BJ = logits_BJ.masked_fill(hidden_BJ, float("-inf"))
    want_B = logits_BJ.logsumexp(1)
    (wanted_BP,) = torch.autograd.grad((weight_B.double() * want_B).sum(), plain_BP)
    assert got_B.dtype == torch.float32
    torch.testing.assert_close(got_B.double(), want_B, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(gradient_BP.double(), wanted_BP, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("at_once", [16 * 3000, 10**9])
@pytest.mark.parametrize("closeness", [0.0, 0.9, 1.0], ids=["random", "near", "the same"])
def test_errors_of_products_in_float16_are_bounded(monkeypatch, closeness, at_once, temperature):
    """Compared with float64. The closer the rows, the larger the logits; if all rows are the same, the sum of weights exceeds float16's
    range."""
    torch.manual_seed(0)
    monkeypatch.setattr(losses, "BANK_AT_ONCE", at_once)
    query_BP = unit_rows(7)
    bank_JP = torch.nn.functional.normalize(torch.lerp(unit_rows(70000), query_BP[:1], closeness), dim=1)
    got_B, mean_BP = losses.negative_logsumexp(query_BP, bank_JP, temperature, None, torch.float16)
    plain_BP = query_BP.double().requires_grad_(True)
    want_B = (plain_BP @ bank_JP.double().T / temperature).logsumexp(1)
    (wanted_BP,) = torch.autograd.grad(want_B.sum(), plain_BP)
    assert 0 < (got_B - want_B).abs().max() <= 2**-9 / temperature
    assert (mean_BP - wanted_BP * temperature).abs().max() <= 2**-8 / temperature + 2**-8


@pytest.mark.parametrize(("device", "queries", "rows"), [("cpu", 8, 8192), ("cpu", 1024, 1024), ("meta", 256, 65536), ("meta", 2**25, 1)])
def test_rows_of_a_block(device, queries, rows):
    """For 128 numbers per row; devices other than CPUs are treated like a GPU, which computes an ordinary batch at once."""
    assert losses._rows_at_once(torch.empty(queries, 128, device=device)) == rows


def test_a_query_without_negatives_has_the_loss_zero_and_no_gradient():
    query_BP = unit_rows(2).requires_grad_(True)
    hidden_BJ = torch.tensor([[True] * 5, [False] * 5])
    first, bank_JP = torch.tensor([1.0, 0.0]), unit_rows(5)
    loss, of_first = (losses.info_nce(query_BP, [(weight, unit_rows(2))], bank_JP, 0.2, hidden_BJ) for weight in (1.0, first))
    (gradient_BP,) = torch.autograd.grad(loss, query_BP)
    assert of_first == 0 < loss
    assert not gradient_BP[0].any()
    assert gradient_BP[1].any()


def test_unit_rows_have_the_gradient_of_normalize():
    """Including a row of zeros, short and long rows, and a gradient along the row."""
    torch.manual_seed(0)
    rows_BP, gradient_BP = torch.randn(6, 5), torch.randn(6, 5)
    rows_BP[0], rows_BP[1], rows_BP[2] = 0, 1e-8, 1e6
    gradient_BP[3] = rows_BP[3]
    found, wanted = rows_BP.clone().requires_grad_(), rows_BP.clone().requires_grad_()
    ours, plain = unit(found), torch.nn.functional.normalize(wanted, eps=1e-12)
    assert torch.equal(ours, plain)
    ours.backward(gradient_BP), plain.backward(gradient_BP)
    torch.testing.assert_close(found.grad, wanted.grad)


def test_nothing_as_large_as_the_logits_is_kept_for_backward():
    kept = []
    query_BP, bank_JP = unit_rows(6).requires_grad_(True), unit_rows(1000)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        losses.info_nce(query_BP, [(1.0, unit_rows(6))], bank_JP, 0.2)
    assert kept == [6 * 16]


def test_rows_are_looked_up_as_one_by_one():
    torch.manual_seed(0)
    for rows in (5, 60, 300):
        bank_J = torch.randperm(300)[:rows].sort().values
        excluded_BM = torch.randint(-1, 300, (9, 6))
        assert torch.equal(hidden_places(bank_J, excluded_BM), hidden_negatives(bank_J, excluded_BM))


def test_a_step_of_three_terms_equals_a_plain_version_of_the_released_one():
    """Loss and gradient of every weight, with live keys from batch statistics, a queue, and BatchNorm in the student."""
    torch.manual_seed(0)
    student, backbone = build_backbone("resnet18", 0.125, "small", 0), build_backbone("resnet18", 0.125, "small", 1)
    teacher = Teacher(backbone, mlp_head([64, 16, 8], 1), {"feature_width": 64, "key_width": 8})
    context = Context(student, 64, 0, "live", "fp32", CPU, teacher, unit_rows(3 * 40, 8).half().view(40, 3, 8))
    released = {"terms": "symmetric_mix", "pair_weights": [0.5, 0.5], "negatives": "queue", "negative_rows": 32, "mask_bag": False}
    shipped = PARAMS.methods.bingo.model_dump()
    section = method_section("bingo").model_validate(shipped | released | {"teacher_batchnorm": "batch", "head_hidden": 16})
    method = build_method("bingo", section, context).train()
    views = [torch.randn(4, 3, 12, 12) for _ in range(4)]
    batch = Batch(torch.arange(4), views[:2], torch.arange(4, 8), views[2:])
    plain = copy.deepcopy(nn.Sequential(method.student, method.head))
    terms = method(batch, Progress(20, 0))

    uniform_B3 = seeds.uniforms(0, "cutmix", 0, [0], draws=3).repeat(4, axis=0)  # one box for all
    mixed, share_B = cutmix(views[0], views[2], uniform_B3, section.cutmix_alpha)
    queries = [unit(plain(view)) for view in (views[0], views[2], mixed)]
    frozen = copy.deepcopy(nn.Sequential(backbone, teacher.head)).train()
    with torch.no_grad():
        own, other = unit(frozen(views[1])), unit(frozen(views[3]))
    loss = bench_step.released_loss(queries, own, other, method.negatives.queue.keys_QP.T, (0.5, 0.5), share_B, section.temperature)
    torch.testing.assert_close(terms["loss"], loss, rtol=1e-5, atol=0)
    terms["loss"].backward(), loss.backward()
    for ours, theirs in zip([*method.student.parameters(), *method.head.parameters()], plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


class Waits(TorchDispatchMode):
    """Counts operations that make the host wait for a result."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in WAITING:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method_name", method_names())
def test_a_step_does_not_wait_for_the_device(tmp_path, method_name):
    run = trainer(tmp_path, method_name, network="batchnorm")
    run.method.train()
    run.watch.every_steps = 1000
    run.step = 1
    batches = run.batches.epoch(0, 1)
    run._train_step(next(batches), Progress(0, 1))
    with Waits() as waits:
        run._train_step(next(batches), Progress(0, 2))
    assert waits.found == []


@pytest.mark.slow
@pytest.mark.parametrize("method_name", method_names())
def test_a_step_from_images_in_memory_reads_nothing_back_to_the_host(tmp_path, monkeypatch, method_name):
    """On the device `meta`, with tensors that contain no numbers: reading one, or a shape that depends on one, is an error.

    Data sent by the host also goes there, so that the rest of the path (views, keys, loss, gradient, queues) is the same as on a GPU.
    """
    from_numpy, meta = torch.from_numpy, torch.device("meta")
    run = trainer(tmp_path, method_name, network="batchnorm")
    monkeypatch.setattr(torch, "from_numpy", lambda array: from_numpy(array).to(meta))
    loader, stored = run.batches.loader, run.batches.stored
    family = loader.augment.model_copy(update={"jitter": [0.4, 0.4, 0.4, 0.1], "gray_p": 0.2, "blur_p": 0.5, "flip_p": 0.5})
    loader._device, loader.augment, run.watch = meta, family, LossWatch(meta)
    method = run.method.to(meta).train()
    for module in method.modules():
        if isinstance(context := getattr(module, "context", None), Context):
            module.context = dataclasses.replace(context, keys_TVP=stored.keys_TVP.to(meta))  # autocast uses its device
        for name in ("cluster_T", "members_TK", "features_TD"):
            if isinstance(getattr(module, name, None), torch.Tensor):
                setattr(module, name, getattr(module, name).to(meta))
    features_TD = stored.features_TD.to(meta)
    run.batches.stored = dataclasses.replace(stored, keys_TVP=stored.keys_TVP.to(meta), features_TD=features_TD)
    if run.batches.bag_means_TP is not None:
        run.batches.bag_means_TP = run.batches.bag_means_TP.to(meta)
    for step, batch in enumerate(itertools.islice(run.batches.epoch(1, 0), 2)):
        terms = method(batch, Progress(1, step))
        run.watch.note(terms["loss"], step)
        terms["loss"].backward()
        method.after_step()
    with pytest.raises(RuntimeError, match="meta tensors"):  # reading would be noticed
        float(terms["loss"])


@pytest.mark.slow
def test_the_benchmark_counts_the_calls_of_a_step(tmp_path):
    _, student = bench_host.trainings("cifar10", 300, tmp_path)
    line = bench_host.as_text(student, 8, bench_host.calls_in_a_step(student), repeats=1)
    wanted = r"student \(bingo, resnet18\), batch 8, 300 rows: [\d.]+ us per anchor \(views.*\) of 30; a step: (\d+) calls in 0\.2 ms"
    found = re.fullmatch(wanted, line)
    assert found, line
    assert 500 < int(found[1]) < 900, "each call costs the host some microseconds of every step"


def test_a_loss_read_late_names_its_own_step_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    """NaN at step 6 is read at step 10, when the weights are already spoilt, so none of them is kept."""
    run = trainer(tmp_path, epochs=4, every_seconds=1e9)
    run.watch.every_steps = 10
    monkeypatch.setattr(run, "_end_epoch", lambda *_: None)
    forward, steps = run.method.forward, []

    def spoilt(batch, progress):
        steps.append(progress.step)
        terms = forward(batch, progress)
        return {name: value * float("nan") if progress.step in (6, 7) else value for name, value in terms.items()}

    monkeypatch.setattr(run.method, "forward", spoilt)
    with pytest.raises(UserError, match=r"the loss is nan at step 6; lower lr \(now 0\.1\)"):
        run.run()
    assert steps[-1] == 10
    assert not list(tmp_path.iterdir())


def test_a_loss_is_checked_before_a_checkpoint_and_before_an_epochs_record(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    run.watch.every_steps = 10
    run.watch.note(torch.tensor(float("inf")), 3)
    run.checkpoints.stopping = True
    with pytest.raises(UserError, match="the loss is inf at step 3"):
        run._checkpoint_if_due()
    with pytest.raises(UserError, match="the loss is inf at step 3"):
        run._end_epoch(0, None)
    assert not list(tmp_path.iterdir())


def test_the_first_loss_that_is_not_finite_is_reported():
    watch = LossWatch(CPU)
    assert watch.every_steps == 1
    for step, loss in enumerate([1.0, float("-inf"), 2.0, float("nan")]):
        assert (watch.first(step) is None) == (step < 2)
        watch.note(torch.tensor(loss), step)
    assert watch.first(4) == (1, float("-inf"))
