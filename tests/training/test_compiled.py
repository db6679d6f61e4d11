"""Compiled networks: the eager step's numbers for every method, no compiling outside of a step, and one line if it fails."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bingo.nets.backbones import build_backbone
from bingo.nets.batchnorm import groups as batchnorm
from bingo.params import method_names
from bingo.runtime.errors import Interrupted, UserError
from bingo.training import compiled
from bingo.training.compiled import CompiledNetworks
from bingo.training.loop import TrainingResult
from tests.pretended_gpu import steps as small
from tests.pretended_gpu.steps import CPU, Case, Outcome, outcome_of, steps, trainer

COMPILE = torch.compile
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch hides it itself unless warnings are errors
METHODS = [
    Case("bingo", precision="bf16", changes={"terms": "symmetric_mix"}),
    Case("bingo", "live", changes={"teacher_batchnorm": "batch"}, teacher_px=16),
    Case("moco", "momentum", "bf16"),
    Case("isd", "momentum"),
    Case("disco"),
    Case("compress"),
    Case("seed", "live", changes={"negatives": "queue", "small_crops": 2}),
    Case("simreg", "live", "bf16"),
    Case("coss", changes={"companions": 2}),
]


def traced(function, mode, dynamic):
    """torch.compile up to the kernels, which are those of eager mode."""
    return COMPILE(function, backend="aot_eager", dynamic=dynamic)


def outcome(folder: Path, case: Case, mode: str | None, groups: int = 1) -> Outcome:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = trainer(folder, case, CPU, compiled=mode, student_ema=0.3)
    run.groups = groups
    steps(run, 2)
    if mode is not None:
        assert torch._dynamo.utils.counters["frames"]["ok"] >= len(run.compiled.forwards)
        assert not torch._dynamo.utils.counters["graph_break"]
        assert all("forward" not in network.__dict__ for network, _ in run.compiled.forwards)
        assert {id(network) for network, _ in run.compiled.forwards} >= {id(run.method.student), *map(id, run.method.frozen)}
    found = outcome_of(run)
    found.state |= {f"average.{name}": value for name, value in run.average.state_dict().items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
def test_a_compiled_step_equals_the_eager_one(tmp_path, monkeypatch, case):
    """In 4 groups, as compiled networks compute them; counters of batches are equal, too."""
    monkeypatch.setattr(compiled.torch, "compile", traced)
    monkeypatch.setattr(small, "build_backbone", lambda _, *others: build_backbone("resnet10t", *others))
    monkeypatch.setattr(batchnorm, "_one_by_one", batchnorm._side_by_side)
    wanted, found = (outcome(tmp_path / str(mode), case, mode, groups=4) for mode in (None, "default"))
    assert found.sums == pytest.approx(wanted.sums, rel=1e-5)
    for name, value in wanted.state.items():
        torch.testing.assert_close(found.state[name], value, rtol=1e-4, atol=1e-6, msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.slow
def test_a_compiled_training_that_is_interrupted_ends_like_an_uninterrupted_one(tmp_path, monkeypatch):
    """With a moving average and the best epoch by the probe; the probe's network is not compiled."""
    monkeypatch.setattr(compiled.torch, "compile", traced)
    monkeypatch.setattr(small, "build_backbone", lambda _, *others: build_backbone("resnet10t", *others))

    def whole(folder: Path, stop_step: int = -1) -> tuple[TrainingResult, dict[str, torch.Tensor]]:
        torch._dynamo.reset()
        probed = []

        def probe(student: nn.Module) -> dict[str, float]:
            assert "forward" not in student.__dict__
            probed.append(student.eval()(torch.ones(5, 3, 12, 12)).double().sum().item())
            return {"knn": probed[-1]}

        run = trainer(folder, Case("moco", "momentum", "bf16"), CPU, compiled="default", probe=probe, keep_best=True, measure_start=True)
        step = run._train_step

        def and_stop(batch, progress):
            step(batch, progress)
            run.checkpoints.stopping = run.step + 1 == stop_step

        monkeypatch.setattr(run, "_train_step", and_stop)
        return run.run(), run.method.state_dict()

    wanted, weights = whole(tmp_path / "whole")
    with pytest.raises(Interrupted):
        whole(tmp_path / "parts", 6)
    result, state = whole(tmp_path / "parts")
    assert result.history == wanted.history
    assert result.best["epoch"] == wanted.best["epoch"]
    for found, expected in ((state, weights), (result.best["weights"], wanted.best["weights"])):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_cases_are_of_every_method():
    assert {case.method for case in METHODS} == set(method_names())


@pytest.mark.slow
def test_kernels_of_inductor_equal_eager_ones_up_to_rounding(tmp_path):
    case = Case("moco", "momentum")
    wanted, found = (outcome(tmp_path / str(mode), case, mode) for mode in (None, "default"))
    assert found.sums == pytest.approx(wanted.sums, rel=1e-4)
    for name, value in wanted.state.items():
        torch.testing.assert_close(found.state[name], value, rtol=1e-3, atol=1e-4, msg=lambda message, name=name: f"{name}: {message}")


def test_batches_of_several_shapes_are_each_compiled_once(monkeypatch):
    """As for small crops, and for larger images of a teacher."""
    seen = []

    def counted(graph, inputs):
        seen.append(inputs)
        return graph.forward

    monkeypatch.setattr(compiled.torch, "compile", lambda function, mode, dynamic: COMPILE(function, backend=counted, dynamic=dynamic))
    torch._dynamo.reset()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    networks, batches = CompiledNetworks([network], "default", CPU), [torch.randn(b, 3, p, p) for b, p in ((2, 8), (6, 5), (3, 9))]
    wanted, own = [network(x) for x in batches], len(seen)
    for _ in range(3):
        with networks.used():
            for x, y in zip(batches, wanted, strict=True):
                torch.testing.assert_close(network(x), y)
    assert len(seen) == own + len(batches)


def test_one_line_is_printed_if_nothing_can_be_compiled(monkeypatch):
    def fails(function, mode, dynamic):
        def call(x):
            raise RuntimeError("No working C++ compiler found\nin this image")

        return call

    monkeypatch.setattr(compiled.torch, "compile", fails)
    with pytest.raises(UserError) as caught:
        CompiledNetworks([nn.Linear(2, 2)], "default", CPU)
    (line,) = caught.value.lines
    assert line.startswith("compile = default: ")
    assert "No working C++ compiler found in this image" in line
    assert not CompiledNetworks([nn.Linear(2, 2)], None, CPU)


def test_a_network_that_cannot_be_compiled_is_one_line(monkeypatch):
    def backend(graph, inputs):
        if len([*graph.parameters(), *inputs]) > 1:  # not the first check
            raise ValueError("no kernel for\nsuch a layer")
        return graph.forward

    monkeypatch.setattr(compiled.torch, "compile", lambda function, mode, dynamic: COMPILE(function, backend=backend, dynamic=dynamic))
    network = nn.Linear(2, 2)
    networks = CompiledNetworks([network], "max-autotune", CPU)
    with pytest.raises(UserError) as caught, networks.used():
        network(torch.zeros(1, 2))
    (line,) = caught.value.lines
    assert line.startswith("compile = max-autotune: ")
    assert "no kernel for such a layer" in line
    assert "forward" not in network.__dict__


def test_a_network_is_restored_after_a_step_that_fails(monkeypatch):
    monkeypatch.setattr(compiled.torch, "compile", traced)
    network = nn.Linear(2, 2)
    networks = CompiledNetworks([network, nn.Sequential()], "default", CPU)
    assert len(networks.forwards) == 1  # nothing to compile in the other network
    with networks.used():
        assert "forward" in network.__dict__
    with pytest.raises(MemoryError), networks.used():
        raise MemoryError
    assert "forward" not in network.__dict__
