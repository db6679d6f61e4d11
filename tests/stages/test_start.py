"""A student that starts from given weights, and a comparison with supervised weights: from the files to the report."""

import json
import sys

import numpy as np
import pytest
import torch
from workspace import Workspace

from bingo.nets.backbones import build_backbone
from bingo.nets.checkpoint import load_network
from bingo.nets.students import load_backbone
from bingo.params import load_params
from bingo.report.inputs import read_curves
from bingo.runtime.artefacts import file_fingerprint

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="starts stages by tests/stage_server.py"),
    pytest.mark.slow,
]
MODELS = ("start", "supervised")


def write_weights(workspace: Workspace, name: str, seed: int) -> dict[str, torch.Tensor]:
    network = load_params(workspace.root / "params.yaml").student
    state = build_backbone(network.arch, network.width, network.stem, seed).state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, workspace.root / name)
    return state


@pytest.fixture
def started(workspace) -> Workspace:
    """The finished short pipeline, and parameters that name the weights of two networks."""
    for seed, name in enumerate(MODELS):
        write_weights(workspace, f"{name}.pth", seed + 5)
    workspace.edit(
        {
            "student.weights": "start.pth",
            "supervised": "supervised.pth",
            "distill.epochs": 1,
            "distill.lr_warmup_epochs": 0,
            "distill.probe_every_epochs": 1,
        }
    )
    assert workspace.run("weights").status == 0
    return workspace


def scores(workspace: Workspace, evaluation: str, net: str) -> dict:
    return json.loads((workspace.root / f"reports/{evaluation}/{net}.json").read_text())


def test_student_and_baseline_start_from_the_weights_and_all_networks_are_evaluated(started):
    for stage in ("distill", "baseline moco", "linear_eval", "knn_eval", "report"):
        started.done(stage)
    of_start = scores(started, "knn", "start")["knn_10"]
    assert of_start != scores(started, "knn", "untrained")["knn_10"]
    for name in ("distill", "baseline-moco"):  # all 400 train and 100 test images are used by the probe
        curves = read_curves(started.root / f"reports/plots/{name}.csv")
        assert curves["epoch"] == [0, 1]
        assert curves["knn_10"][0] == pytest.approx(of_start, abs=1e-5)
        assert np.isnan(curves["loss"][0])
    for file in ("models/student.safetensors", "models/baselines/moco.safetensors"):
        assert load_backbone(started.root / file)[1]["start"]["weights"] == "start.pth"
    results = json.loads((started.root / "reports/results.json").read_text())
    assert {"student", "moco", "start", "supervised", "untrained", "teacher"} <= set(results["linear"])
    page = (started.root / "reports/index.html").read_text()
    assert "start.pth" in page
    assert "supervised.pth" in page
    for net in ("student", "start"):  # the first sentence compares them, and contains the figures
        hits = np.load(started.root / f"reports/linear/{net}.npz")["cached"]
        assert 100 * hits.mean() == pytest.approx(scores(started, "linear", net)["cached"]["top1_last"], abs=1e-5)
        file = started.root / f"models/{net}.safetensors"
        layer, made_from = load_network(started.root / f"models/linear/{net}.safetensors")
        assert made_from["backbone"] == file_fingerprint(file)
        assert layer["weight"].shape == (len(made_from["classes"]), load_backbone(file)[0].feature_width)
        counts = np.load(started.root / f"reports/knn/{net}.npz")["agreement_10"]
        assert 10 * counts.mean() == pytest.approx(scores(started, "knn", net)["agreement_10"], abs=1e-5)


def test_a_changed_file_of_weights_changes_a_dependency_of_training(started):
    before = started.files("models/start.safetensors", "models/supervised.safetensors")
    state = write_weights(started, "start.pth", 9)
    assert started.run("weights").status == 0
    after = started.files("models/start.safetensors", "models/supervised.safetensors")
    assert [after[name] == before[name] for name in before] == [False, True]
    found = load_backbone(started.root / "models/start.safetensors")[0].state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in state.items())
    started.edit({"student.weights": None, "supervised": None})
    started.done("weights")
    assert set(started.files("models/start.safetensors", "models/supervised.safetensors").values()) == {b"none\n"}
    for stage in ("linear_eval start", "knn_eval supervised"):
        assert started.run(stage).status == 0
    assert scores(started, "linear", "start") == scores(started, "knn", "supervised") == {}
    assert (started.root / "models/linear/start.safetensors").read_bytes() == b"none\n"


def test_scan_refuses_weights_that_do_not_fit(started):
    started.edit({"student.width": 0.25})
    before = started.existing_files()
    done = started.run("scan")
    assert done.status == 2
    assert [line.partition(": ")[2].partition(":")[0] for line in done.err.splitlines() if line.startswith("error")] == [
        "student.weights",
        "supervised",
    ]
    assert started.existing_files() == before
