"""The training loop: resumed equals uninterrupted, two processes equal one, bf16 is really used, a loss that is not finite stops."""

import functools
import itertools
import os
import socket
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from bingo.bags.builders import build_knn
from bingo.images.images import MemoryImages
from bingo.images.loader import ViewLoader
from bingo.methods.contract import Context, Progress, build_method
from bingo.nets.backbones import build_backbone
from bingo.params import load_params, method_names, method_section
from bingo.runtime.checkpoints import Checkpoints
from bingo.runtime.errors import Interrupted, UserError
from bingo.training import compiled
from bingo.training.batches import Batches, Stored
from bingo.training.loop import Trainer
from tests.processes import start_two
from tests.training.test_compiled import traced

CPU = torch.device("cpu")
PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")
IMAGE = PARAMS.image.model_copy(update={"crop_px": 12, "resize_px": 12})
ROWS, SIDE_PX, FEATURES = 64, 12, 8
SHRUNK = {  # in addition to the settings of all methods: a head of width 8, and a queue that wraps
    "bingo": {"inter_warmup_epochs": 1},
    "moco": {"key_width": 16},
    "compress": {"target": "features"},
    "coss": {"companions": 2, "teacher_temperature": 1.0, "student_temperature": 1.0},  # a loss of the same magnitude as the others
    "isd": {"weak_keys": True, "projection_width": 6},
}


class NoBatchNorm(nn.Module):
    """A network whose output for an image does not depend on the other images of the batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, FEATURES, 3, stride=2)
        self.feature_width = FEATURES

    def forward(self, images):
        return torch.relu(self.conv(images)).mean(dim=(2, 3))


def rng_images() -> MemoryImages:
    return MemoryImages(np.random.default_rng(0).integers(0, 256, (ROWS, SIDE_PX, SIDE_PX, 3), dtype=np.uint8))


DRAWING = {"drop_rate": 0.3, "drop_path_rate": 0.3}


def trainer(
    folder: Path,
    method_name="bingo",
    epochs=3,
    every_seconds=1e9,
    network="plain",
    precision="fp32",
    lr=0.1,
    groups=1,
    schedule=None,
    section=None,
    **more,
) -> Trainer:
    torch.manual_seed(0)
    options = DRAWING if network == "drawing" else {}
    student = NoBatchNorm() if network == "plain" else build_backbone("resnet18", 0.125, "small", 0, options)
    rng = np.random.default_rng(1)
    keys = rng.standard_normal((ROWS, 3, 16)).astype(np.float32)
    keys = torch.from_numpy((keys / np.linalg.norm(keys, axis=2, keepdims=True)).astype(np.float16))
    features = torch.from_numpy(rng.standard_normal((ROWS, 6)).astype(np.float16))
    bags = build_knn(features.numpy(), 3)
    shipped = getattr(PARAMS.methods, method_name).model_dump()
    shrink = {name: width for name, width in (("head_hidden", 8), ("queue_rows", 24)) if name in shipped}
    section = method_section(method_name).model_validate(shipped | shrink | SHRUNK.get(method_name, {}) | (section or {}))
    context = Context(student, student.feature_width, 0, "stored", precision, CPU, None, keys, features, bags)
    method = build_method(method_name, section, context)
    changes = {"epochs": epochs, "batch_anchors": 16, "batchnorm_groups": groups, "lr": lr, "precision": precision, "probe_every_epochs": 1}
    schedule = PARAMS.distill.model_copy(update=changes | (schedule or {}))
    loader = ViewLoader(rng_images(), IMAGE, PARAMS.distill.augment, 0, CPU)
    batches = Batches(
        method.needs,
        loader,
        0,
        ROWS,
        schedule.batch_anchors,
        bags,
        Stored(keys, PARAMS.extract.augment, features),
        schedule.accumulate_steps,
    )
    return Trainer(method, batches, schedule, CPU, Checkpoints(folder, every_seconds), **more)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(x == y and torch.equal(v, w) for (x, v), (y, w) in pairs)


def stop_at(running: Trainer, stop_step: int, monkeypatch) -> None:
    """Ask the trainer to stop during the step with this number, starting from 1."""
    step = running._train_step

    def and_stop(batch, progress):
        step(batch, progress)
        running.checkpoints.stopping = running.step + 1 == stop_step

    monkeypatch.setattr(running, "_train_step", and_stop)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A trainer that has run from start to end, and its result; computed once for all steps at which another one is stopped."""

    @functools.cache
    def run(method_name: str, network: str, groups: int):
        whole = trainer(tmp_path_factory.mktemp("whole"), method_name, network=network, groups=groups)
        return whole, whole.run()

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method_name", "stop_step"),
    [*itertools.product(["bingo", "moco"], [1, 4, 6]), *((name, 6) for name in method_names() if name not in ("bingo", "moco"))],
)
@pytest.mark.parametrize(("network", "groups"), [("batchnorm", 1), pytest.param("drawing", 4, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, method_name, stop_step, network, groups, monkeypatch, uninterrupted):
    whole, whole_result = uninterrupted(method_name, network, groups)
    first = trainer(tmp_path / "parts", method_name, network=network, groups=groups)
    stop_at(first, stop_step, monkeypatch)
    with pytest.raises(Interrupted, match=f"step {stop_step}"):
        first.run()
    torch.rand(5)  # earlier draws must not matter
    second = trainer(tmp_path / "parts", method_name, network=network, groups=groups)
    torch.rand(3)
    second_result = second.run()
    assert second_result.history == whole_result.history
    assert same_state(second.method, whole.method)


ADAMW = {"optimizer": "adamw", "decay_norms_and_biases": False, "clip_grad_norm": 0.1}


@pytest.mark.slow
def test_optimizer_parts_and_average_resume_with_their_state(tmp_path, monkeypatch):
    schedule = ADAMW | {"accumulate_steps": 2, "optimizer": "adamw"}
    settings = {"method_name": "moco", "network": "batchnorm", "groups": 4, "lr": 0.01, "schedule": schedule, "student_ema": 0.9}
    whole, first = (trainer(tmp_path / name, **settings) for name in ("whole", "parts"))
    expected = whole.run()
    stop_at(first, 6, monkeypatch)
    with pytest.raises(Interrupted, match="step 6"):
        first.run()
    second = trainer(tmp_path / "parts", **settings)
    found = second.run()
    assert same_state(second.method, whole.method)
    assert found.history == expected.history
    assert all(torch.equal(value, found.average[name]) for name, value in expected.average.items())


def test_the_average_is_over_the_weights_and_statistics_after_each_step(tmp_path, monkeypatch):
    """a = d a + (1 - d) w with d = min(student_ema, 1 - t^(-2/3)) in step t, starting from 1, where a is a copy of w. Counters are
    copied."""
    run = trainer(tmp_path, "simreg", network="batchnorm", epochs=2, student_ema=0.7)
    expected, step = {}, run._train_step

    def watched(batch, progress):
        step(batch, progress)
        share = min(0.7, 1 - (progress.step + 1) ** (-2 / 3))
        for name, value in run.method.student.state_dict().items():
            before = expected.get(name, value).double()
            expected[name] = share * before + (1 - share) * value.double() if value.is_floating_point() else value.clone()

    monkeypatch.setattr(run, "_train_step", watched)
    timms, after = ModelEmaV3(run.method.student, 0.7, use_warmup=True), run.method.after_step
    monkeypatch.setattr(run.method, "after_step", lambda: (after(), timms.update(run.method.student, run.step + 1)))
    found = run.run().average
    assert all(torch.equal(found[name], value) for name, value in timms.module.state_dict().items())
    assert found.keys() == expected.keys() == run.method.student.state_dict().keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["conv1.weight"], run.method.student.state_dict()["conv1.weight"])
    assert trainer(tmp_path / "none", "simreg", epochs=1).run().average == {}


def in_float64(value):
    if isinstance(value, list):
        return [in_float64(each) for each in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def two_steps(folder: Path, parts: int, monkeypatch, **settings) -> tuple[dict, dict]:
    """Gradients of the second step, and queues after it, in float64."""
    run = trainer(folder, epochs=1, schedule={"accumulate_steps": parts}, **settings)
    run.method.double().train()
    batches = list(itertools.islice(run.batches.epoch(0, 0), 2 * parts))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for name in ("bingo", "moco", "disco"):
            patch.setattr(f"bingo.methods.{name}.dtype_of_similarities", lambda *_: torch.float64)
        if settings["method_name"] == "bingo":
            run.method.similarities = torch.float64
        for number, batch in enumerate(batches):
            vars(batch).update({name: in_float64(value) for name, value in vars(batch).items()})
            run._train_step(batch, Progress(0, number // parts))
            run.step = (number + 1) // parts
    queues = {name: value for name, value in run.method.state_dict().items() if name.endswith(("keys_QP", "rows_Q"))}
    return {name: weight.grad for name, weight in run.method.named_parameters() if weight.grad is not None}, queues


WITHOUT_A_MOVING_AVERAGE = ["bingo", "seed", "simreg", "coss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        *({"method_name": name} for name in method_names() if name != "isd"),
        {"method_name": "isd", "section": {"projection_width": None}},  # BatchNorm of a projector would be shuffled
        *({"method_name": name, "groups": 2, "network": "batchnorm"} for name in WITHOUT_A_MOVING_AVERAGE),
        {"method_name": "bingo", "groups": 4, "network": "batchnorm", "section": {"terms": "symmetric_mix", "negatives": "queue"}},
        {"method_name": "bingo", "section": {"negatives": "queue", "queue_push": "anchor_and_member", "negative_rows": 48}},
        {"method_name": "seed", "section": {"negatives": "queue", "negative_rows": 48}},
    ],
    ids=str,
)
def test_two_parts_have_the_gradients_and_queues_of_the_whole_batch(tmp_path, settings, monkeypatch):
    """For all methods with settings in which parts do not divide BatchNorm's groups, and keys are not shuffled into other parts."""
    whole, parts = (two_steps(tmp_path / str(n), n, monkeypatch, **{"groups": 4} | settings) for n in (1, 2))
    for one, other in zip(whole, parts, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    assert max(float(gradient.abs().max()) for gradient in whole[0].values()) > 1e-4


class ScriptedProbe:
    """Returns the next of some percentages, and keeps the weights that it was given."""

    def __init__(self, percents: list[float]):
        self.percents, self.seen = percents, []

    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        self.seen.append({name: tensor.clone() for name, tensor in backbone.state_dict().items()})
        return {"knn_10": self.percents[len(self.seen) - 1]}


@pytest.mark.slow
@pytest.mark.parametrize(("percents", "best"), [([10, 30, 30, 20], 2), ([0, 0, 0, 0], 1), ([1, 2, 3, 4], 4)])
def test_the_best_epoch_by_the_probe_is_kept_through_an_interruption(tmp_path, percents, best, monkeypatch):
    """Epochs have 4 steps and are all probed; the run stopped in epoch 3 resumes with the percentages of epochs 3 and 4."""
    probe = ScriptedProbe(percents)
    whole = trainer(tmp_path / "whole", epochs=4, network="batchnorm", probe=probe, keep_best=True).run()
    first = trainer(tmp_path / "parts", epochs=4, network="batchnorm", probe=ScriptedProbe(percents), keep_best=True)
    stop_at(first, 10, monkeypatch)
    with pytest.raises(Interrupted):
        first.run()
    second = trainer(tmp_path / "parts", epochs=4, network="batchnorm", probe=ScriptedProbe(percents[2:]), keep_best=True).run()
    for result in (whole, second):
        assert (result.best["epoch"], result.best["probe"]) == (best, {"knn_10": percents[best - 1]})
        assert result.best["weights"].keys() == probe.seen[best - 1].keys()
        assert all(torch.equal(tensor, probe.seen[best - 1][name]) for name, tensor in result.best["weights"].items())


def test_no_epoch_is_kept_by_default(tmp_path):
    assert trainer(tmp_path, probe=ScriptedProbe([5, 6, 7])).run().best == {}


def test_draws_of_a_network_depend_on_seed_step_and_process(tmp_path, monkeypatch):
    """Dropout of 64 ones in three steps for two seeds and two processes: 12 different masks, which are the same again when repeated."""

    def masks() -> list[tuple]:
        seen = []
        for seed, rank in itertools.product((0, 1), (0, 1)):
            run = trainer(tmp_path)
            run.batches.seed = seed
            with monkeypatch.context() as patch:
                patch.setattr("bingo.runtime.distributed.rank", lambda rank=rank: rank)
                for run.step in (0, 1, 7):
                    run._seed_draws()
                    seen.append(tuple(torch.nn.functional.dropout(torch.ones(64), 0.5).tolist()))
        return seen

    first = masks()
    assert len(set(first)) == len(first) == 12
    assert masks() == first


def test_a_network_that_draws_trains_other_weights_than_one_that_does_not(tmp_path):
    plain, drawing = (trainer(tmp_path / network, network=network) for network in ("batchnorm", "drawing"))
    assert same_state(plain.method, drawing.method)
    plain.run(), drawing.run()
    assert not same_state(plain.method, drawing.method)


def test_only_the_last_complete_checkpoint_is_kept(tmp_path):
    trainer(tmp_path, every_seconds=0, epochs=2).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "step-8.rank-0.pt"]


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    run = trainer(tmp_path)
    with torch.no_grad():
        run.method.head[0].weight[0, 0] = float("nan")
    before = {name: value.clone() for name, value in run.method.state_dict().items()}
    with pytest.raises(UserError, match="loss is nan at step 0; no step was taken yet"):
        run.run()
    assert all(torch.equal(value, before[name]) or value.isnan().any() for name, value in run.method.state_dict().items())


def test_a_single_nan_pixel_stops_the_training(tmp_path):
    run = trainer(tmp_path)
    views = run.batches.loader.items_with_views

    def with_nan(items):
        for item, views_of_item in views(items):
            views_of_item[0][3, 0, 5, 5] = float("nan")
            yield item, views_of_item

    run.batches.loader.items_with_views = with_nan
    with pytest.raises(UserError, match="loss is nan at step 0; no step was taken yet"):
        run.run()
    assert all(value.isfinite().all() for value in run.method.state_dict().values())


@pytest.mark.parametrize("method_name", ["bingo", "simreg", "coss", "moco"])
def test_a_learning_rate_that_diverges_is_reported(tmp_path, method_name):
    with pytest.raises(UserError, match=r"(loss is|weights are) (nan|inf|nan or inf) (at step|after) .*lower lr"):
        trainer(tmp_path, method_name, lr=1e38).run()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_the_last_step_broke_are_not_returned(tmp_path, number):
    run = trainer(tmp_path, epochs=1)
    update = run.optimizer.step

    def explode():
        update()
        if run.step == run.steps_per_epoch - 1:
            with torch.no_grad():
                run.method.student.conv.bias[0] = number

    run.optimizer.step = explode
    with pytest.raises(UserError, match=r"weights are nan or inf after 4 steps; lower lr \(now 0\.1\)"):
        run.run()


def test_a_batch_larger_than_the_dataset_is_refused(tmp_path):
    run = trainer(tmp_path)
    with pytest.raises(UserError, match="there are only 8 train images"):
        Batches(run.method.needs, run.batches.loader, 0, 8, run.schedule.batch_anchors, run.batches.bags, run.batches.stored)


def test_bf16_is_used_inside_the_network_on_the_cpu_and_the_loss_is_float32(tmp_path):
    run = trainer(tmp_path, network="batchnorm", precision="bf16", epochs=1)
    seen = set()
    run.method.student.layer1[0].conv1.register_forward_hook(
        lambda module, inputs, output: seen.add((output.dtype, output.is_contiguous(memory_format=torch.channels_last)))
    )
    losses = []
    run.method.register_forward_hook(lambda module, inputs, output: losses.append(output["loss"].dtype))
    run.run()
    assert seen == {(torch.bfloat16, True)}
    assert set(losses) == {torch.float32}


GROUPED = {"network": "batchnorm", "groups": 4, "epochs": 1, "lr": 1e-4}  # with small steps, differences by rounding do not grow

# Heads of SimReg and ISD have BatchNorm with statistics of each process's images by design, so two processes train other weights.
# So do they for CoSS, which compares outputs over a process's images.
BATCHNORM_HEADS = ["isd", "simreg"]
EACH_ROW_ALONE = ["bingo", "moco", "seed", "compress", "disco"]


IN_PARTS = {"epochs": 1, "schedule": {"accumulate_steps": 2, "batchnorm_groups": None}, "groups": None}


def _two_processes(rank: int, port: int, folder: Path, methods: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    from bingo.runtime import distributed

    with distributed.group(CPU):
        for name in methods:
            for case, settings in (("", {}), ("-grouped", GROUPED), ("-parts", IN_PARTS))[: 2 + (name in EACH_ROW_ALONE)]:
                run = trainer(folder / "two" / f"{name}{case}", name, **settings)
                result = run.run()
                torch.save({"state": run.method.state_dict(), "history": result.history}, folder / f"{name}{case}-{rank}.pt")
        with mock.patch.object(compiled.torch, "compile", traced):
            run = trainer(folder / "two" / "compiled", "moco", schedule={"compile": "default"}, **GROUPED)
            result = run.run()
        torch.save({"state": run.method.state_dict(), "history": result.history}, folder / f"moco-compiled-{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """Every method trained by two processes, one after the other, because starting the processes takes longer than training."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_two(_two_processes, port, folder, method_names())
    return folder


def saved(folder: Path, method_name: str) -> list[dict]:
    return [torch.load(folder / f"{method_name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("method_name", EACH_ROW_ALONE)
def test_two_processes_train_the_weights_of_one_with_the_whole_batch(tmp_path, two_processes, method_name):
    one = trainer(tmp_path, method_name)
    history = one.run().history
    for two in saved(two_processes, method_name):
        for epoch, other in zip(history, two["history"], strict=True):
            assert other["loss"] == pytest.approx(epoch["loss"], abs=2e-5)
        for name, value in one.method.state_dict().items():
            assert torch.allclose(two["state"][name].double(), value.double(), atol=2e-5), name


@pytest.mark.parametrize("method_name", EACH_ROW_ALONE)
def test_two_processes_in_parts_train_the_weights_of_one_with_the_whole_batch(tmp_path, two_processes, method_name):
    one = trainer(tmp_path, method_name, epochs=1)
    one.run()
    for two in saved(two_processes, f"{method_name}-parts"):
        for name, value in one.method.state_dict().items():
            assert torch.allclose(two["state"][name].double(), value.double(), atol=2e-5), name


@pytest.mark.parametrize("method_name", BATCHNORM_HEADS)
def test_two_processes_with_batchnorm_heads_keep_equal_weights(tmp_path, two_processes, method_name):
    """They differ only in BatchNorm's running statistics, and a queue contains the same images as with one process."""
    one = trainer(tmp_path, method_name)
    one.run()
    first, second = saved(two_processes, method_name)
    assert first["history"] == second["history"]
    assert all(np.isfinite(epoch["loss"]) for epoch in first["history"])
    different = {name for name, value in first["state"].items() if not torch.equal(value, second["state"][name])}
    assert different
    assert all(name.endswith(("running_mean", "running_var")) for name in different)
    for name, value in one.method.state_dict().items():
        if name.endswith(("rows_Q", "pointer", "num_batches_tracked")):
            assert torch.equal(first["state"][name], value), name


def test_two_processes_train_the_same_weights_with_compiled_networks(two_processes):
    for run, eager in zip(saved(two_processes, "moco-compiled"), saved(two_processes, "moco-grouped"), strict=True):
        assert run["history"][0]["loss"] == pytest.approx(eager["history"][0]["loss"], rel=1e-5)
        for name, value in eager["state"].items():
            torch.testing.assert_close(run["state"][name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("method_name", method_names())
def test_two_processes_share_the_groups_of_one_process(tmp_path, two_processes, method_name):
    """With BatchNorm in the student and in some heads: losses and weights equal those of one process, and so does the mean of running
    statistics."""
    one = trainer(tmp_path / "one", method_name, **GROUPED)
    history = one.run().history
    whole = trainer(tmp_path / "whole", method_name, **GROUPED | {"groups": 1}).run().history
    assert whole[0]["loss"] != pytest.approx(history[0]["loss"], rel=2e-4)
    first, second = saved(two_processes, f"{method_name}-grouped")
    assert first["history"][0]["loss"] == pytest.approx(history[0]["loss"], rel=5e-5)
    for name, value in one.method.state_dict().items():
        mean = (first["state"][name].double() + second["state"][name].double()) / 2
        assert torch.allclose(mean, value.double(), rtol=1e-3, atol=1e-4), name
