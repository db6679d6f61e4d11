"""The training loop: resumed equals uninterrupted, two processes equal one, bf16 is really on, a loss that is not finite stops."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bingo.bag_builders import build_knn
from bingo.batches import Batches, Stored
from bingo.checkpoints import Checkpoints
from bingo.data.images import MemoryImages
from bingo.data.loader import ViewLoader
from bingo.errors import Interrupted, UserError
from bingo.methods.contract import Context, build_method
from bingo.nets.backbones import build_backbone
from bingo.params import load_params, method_section
from bingo.train import Trainer

CPU = torch.device("cpu")
PARAMS = load_params(Path(__file__).parent.parent / "params.yaml")
IMAGE = PARAMS.image.model_copy(update={"crop_px": 12, "resize_px": 12})
ROWS, SIDE_PX, FEATURES = 64, 12, 8


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


def trainer(folder: Path, method_name="bingo", epochs=3, every_seconds=1e9, network="plain", precision="fp32", lr=0.1) -> Trainer:
    torch.manual_seed(0)
    student = NoBatchNorm() if network == "plain" else build_backbone("resnet18", 0.125, "small", 0)
    rng = np.random.default_rng(1)
    keys = rng.standard_normal((ROWS, 3, 16)).astype(np.float32)
    keys = torch.from_numpy((keys / np.linalg.norm(keys, axis=2, keepdims=True)).astype(np.float16))
    bags = build_knn(rng.standard_normal((ROWS, 6)).astype(np.float32), 3)
    shipped = getattr(PARAMS.methods, method_name).model_dump()
    shrink = (
        {"head_hidden": 8, "key_width": 16, "queue_rows": 24} if method_name == "moco" else {"head_hidden": 8, "inter_warmup_epochs": 1}
    )
    section = method_section(method_name).model_validate(shipped | shrink)
    context = Context(student, student.feature_width, 0, "stored", precision, CPU, None, keys, None, bags)
    method = build_method(method_name, section, context)
    schedule = PARAMS.distill.model_copy(update={"epochs": epochs, "batch_anchors": 16, "lr": lr, "precision": precision})
    loader = ViewLoader(rng_images(), IMAGE, PARAMS.distill.augment, 0, CPU)
    batches = Batches(method.needs, loader, 0, ROWS, schedule.batch_anchors, bags, Stored(keys, PARAMS.extract.augment))
    return Trainer(method, batches, schedule, CPU, Checkpoints(folder, every_seconds))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(x == y and torch.equal(v, w) for (x, v), (y, w) in pairs)


@pytest.mark.parametrize("method_name", ["bingo", "moco"])
@pytest.mark.parametrize("stop_step", [1, 4, 6])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, method_name, stop_step, monkeypatch):
    whole = trainer(tmp_path / "whole", method_name, network="batchnorm")
    whole_result = whole.run()

    first = trainer(tmp_path / "parts", method_name, network="batchnorm")
    step = first._train_step

    def stop_at(batch, progress):
        step(batch, progress)
        first.stopping = first.step + 1 == stop_step

    monkeypatch.setattr(first, "_train_step", stop_at)
    with pytest.raises(Interrupted, match=f"step {stop_step}"):
        first.run()
    second = trainer(tmp_path / "parts", method_name, network="batchnorm")
    second_result = second.run()
    assert second_result.history == whole_result.history
    assert same_state(second.method, whole.method)


def test_only_the_last_complete_checkpoint_stays(tmp_path):
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


def test_a_batch_larger_than_the_dataset_is_refused(tmp_path):
    run = trainer(tmp_path)
    with pytest.raises(UserError, match="there are only 8 train images"):
        Batches(run.method.needs, run.batches.loader, 0, 8, run.schedule.batch_anchors, run.batches.bags, run.batches.stored)


def test_bf16_is_on_inside_the_network_on_the_cpu_and_the_loss_is_float32(tmp_path):
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


def _two_processes(rank: int, port: int, folder: Path, method_name: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    from bingo import distributed

    with distributed.group(CPU):
        run = trainer(folder / "two", method_name)
        result = run.run()
        torch.save({"state": run.method.state_dict(), "history": result.history}, folder / f"two-{rank}.pt")


@pytest.mark.parametrize("method_name", ["bingo", "moco"])
def test_two_processes_train_what_one_trains_on_the_joined_batch(tmp_path, method_name):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_two_processes, (port, tmp_path, method_name), nprocs=2)
    one = trainer(tmp_path / "one", method_name)
    history = one.run().history
    for rank in (0, 1):
        two = torch.load(tmp_path / f"two-{rank}.pt", weights_only=True)
        for epoch, other in zip(history, two["history"], strict=True):
            assert other["loss"] == pytest.approx(epoch["loss"], abs=2e-5)
        for name, value in one.method.state_dict().items():
            assert torch.allclose(two["state"][name].double(), value.double(), atol=2e-5), name
