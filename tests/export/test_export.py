"""`bingo export`: every format is read by its library, or compared with a network rebuilt from the library's description."""

import hashlib
import io
import json
import pickle
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from command import bingo
from ruamel.yaml import YAML
from torch import nn

from bingo.bags.builders import build_knn
from bingo.bags.index import read_bags, write_bags
from bingo.datasets.sources import memory_listing
from bingo.embeddings.store import create_embeddings
from bingo.export.contract import find_target, target_names
from bingo.export.run import export_network, largest_difference
from bingo.export.stored import StoredNetwork, read_student
from bingo.export.twins import twin
from bingo.images.listing import write_listing
from bingo.nets.backbones import Backbone, build_backbone
from bingo.nets.checkpoint import save_network
from bingo.nets.heads import mlp_head
from bingo.params import ImageParams, NetworkParams
from bingo.runtime.artefacts import file_fingerprint, write_json
from bingo.runtime.errors import UserError
from bingo.teachers.teacher import save_teacher, teacher_metadata

IMAGE = {"crop_px": 32, "resize_px": 36, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.2, 0.2]}
TINY = ("resnet10t", 0.125, "small")


@cache
def backbone_of(arch: str, width: float, stem: str) -> Backbone:
    """Built once; its BatchNorm has statistics of its own, like a trained network's."""
    backbone = build_backbone(arch, width, stem, seed_value=1).eval()
    generator = torch.Generator().manual_seed(2)
    for name, tensor in backbone.state_dict().items():
        if name.endswith("running_mean"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return backbone


def network(arch: str, width: float, stem: str, **metadata) -> StoredNetwork:
    backbone = backbone_of(arch, width, stem)
    shape = {"kind": "student", "arch": arch, "width": width, "stem": stem}
    return StoredNetwork(backbone, {**shape, **IMAGE, "method": "bingo", **metadata}, ImageParams(**IMAGE))


def images(count: int = 2, px: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, px, px, generator=torch.Generator().manual_seed(3))


def written(net: StoredNetwork, target: str, folder: Path) -> Path:
    path = folder / "".join(["net", *find_target(target).SUFFIXES[:1]])
    export_network(net, find_target(target), path)
    assert [file.name for file in folder.iterdir()] == [path.name], "no other file is left"
    return path


def close(outputs, expected) -> bool:
    return (outputs - expected).abs().max().item() <= 1e-5 * max(1.0, expected.abs().max().item())


# ---- reading the files as users do


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "shape"),
    [
        ("timm", TINY),
        ("timm", ("resnet18", 0.125, "imagenet")),
        ("timm", ("resnet26d", 0.125, "imagenet")),
        ("timm", ("efficientnet_b0", 1.0, "small")),
        ("timm", ("vit_tiny_patch16_224", 1.0, "imagenet")),  # with images of another side than its name says
        ("torchvision", ("resnet18", 1.0, "small")),
        ("torchvision", ("efficientnet_b0", 1.0, "small")),
        ("torchvision", ("torchvision/mobilenet_v3_small", 1.0, "small")),
        ("safetensors", ("resnet50", 0.125, "small")),
        ("safetensors", ("torchvision/mobilenet_v3_small", 1.0, "small")),
    ],
)
def test_the_code_in_the_card_loads_the_network_without_bingo(target, shape, tmp_path, monkeypatch):
    net = network(*shape)
    written(net, target, tmp_path)
    monkeypatch.chdir(tmp_path)
    loading = find_target(target).loading(net, next(tmp_path.iterdir()).name)
    assert "bingo" not in loading.text
    names: dict = {}
    exec(loading.text, names)  # as pasted by a user
    with torch.no_grad():
        assert close(names["net"](images()), net.backbone(images()))
    assert bool(loading.remark) == (shape[1:] != (1.0, "imagenet"))


def test_timm_reads_the_file_by_name_and_for_fine_tuning(tmp_path):
    net = network("resnet18", 1.0, "imagenet")
    path = str(written(net, "timm", tmp_path))
    read = timm.create_model("resnet18", num_classes=0, checkpoint_path=path).eval()
    tuned = timm.create_model("resnet18", num_classes=10, pretrained=True, pretrained_cfg_overlay={"file": path, "num_classes": 0}).eval()
    with torch.no_grad():
        assert torch.equal(read(images()), net.backbone(images()))
        assert tuned(images()).shape == (2, 10)
        assert torch.equal(tuned.forward_head(tuned.forward_features(images()), pre_logits=True), net.backbone(images()))


def test_torchvision_loads_its_own_names(tmp_path):
    net = network("resnet18", 1.0, "imagenet")
    state = torch.load(written(net, "torchvision", tmp_path), weights_only=True)
    theirs = torchvision.models.resnet18()
    assert set(theirs.state_dict()) - set(state) == {"fc.weight", "fc.bias"}
    theirs.fc = nn.Identity()
    theirs.load_state_dict(state)
    with torch.no_grad():
        assert close(theirs.eval()(images()), net.backbone(images()))


def test_safetensors_can_be_read_as_a_student(tmp_path):
    net = network(*TINY, epochs=3)
    again = read_student(written(net, "safetensors", tmp_path))
    assert again.metadata == net.metadata
    assert again.image == net.image
    assert all(torch.equal(tensor, net.backbone.state_dict()[name]) for name, tensor in again.backbone.state_dict().items())


def test_a_torchvision_network_exported_to_timm_is_a_student_of_timm(tmp_path):
    net = network("torchvision/resnet18", 1.0, "small")
    again = read_student(written(net, "timm", tmp_path))
    assert again.arch == "resnet18"
    with torch.no_grad():
        assert close(again.backbone(images()), net.backbone(images()))


# ---- detectron2, rebuilt from its own description: modeling/backbone/resnet.py (BasicStem, BasicBlock, BottleneckBlock, ResNet)


class NormedConv(nn.Conv2d):
    """detectron2's Conv2d; its normalisation is a child called norm."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int):
        super().__init__(inside, outside, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outside)

    def forward(self, x):
        return self.norm(super().forward(x))


class Block(nn.Module):
    """A basic block if `bottleneck` is None, otherwise a bottleneck with its stride in the 3x3 convolution (STRIDE_IN_1X1 False)."""

    def __init__(self, inside: int, outside: int, bottleneck: int | None, stride: int):
        super().__init__()
        self.shortcut = NormedConv(inside, outside, 1, stride) if inside != outside else None
        if bottleneck is None:
            layers = [(inside, outside, 3, stride), (outside, outside, 3, 1)]
        else:
            layers = [(inside, bottleneck, 1, 1), (bottleneck, bottleneck, 3, stride), (bottleneck, outside, 1, 1)]
        for number, layer in enumerate(layers, 1):
            setattr(self, f"conv{number}", NormedConv(*layer))
        self.convolutions = len(layers)

    def forward(self, x):
        out = x
        for number in range(1, self.convolutions + 1):
            out = getattr(self, f"conv{number}")(out)
            out = out.relu() if number < self.convolutions else out
        return (out + (x if self.shortcut is None else self.shortcut(x))).relu()


class Detectron2ResNet(nn.Module):
    """build_resnet_backbone, from MODEL.RESNETS of a configuration."""

    def __init__(self, cfg: dict):
        super().__init__()
        depth, inside, outside, bottleneck = (cfg[k] for k in ("DEPTH", "STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP"))
        assert cfg["STRIDE_IN_1X1"] is False
        blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
        assert depth > 34 or outside == 64
        self.stem = nn.Module()
        self.stem.conv1 = NormedConv(3, inside, 7, 2)
        for stage, count in enumerate(blocks):
            layers = []
            for i in range(count):
                layers.append(Block(inside, outside, None if depth <= 34 else bottleneck, 2 if stage and not i else 1))
                inside = outside
            self.add_module(f"res{stage + 2}", nn.Sequential(*layers))
            outside, bottleneck = outside * 2, bottleneck * 2

    def forward(self, x):
        x = F.max_pool2d(self.stem.conv1(x).relu(), 3, 2, 1)
        for stage in (2, 3, 4, 5):
            x = getattr(self, f"res{stage}")(x)
        return x


@pytest.mark.parametrize("shape", [("torchvision/resnet18", 1.0, "imagenet"), ("resnet50", 0.125, "imagenet")])
def test_detectron2_gives_the_same_features(shape, tmp_path):
    net = network(*shape)
    path = written(net, "detectron2", tmp_path)
    content = pickle.loads(path.read_bytes(), encoding="latin1")  # as in detectron2's checkpointer
    assert set(content) == {"model", "__author__", "matching_heuristics"}
    assert content["matching_heuristics"] is True
    assert all(type(array) is np.ndarray and array.flags.writeable for array in content["model"].values())
    cfg = YAML(typ="safe").load(find_target("detectron2").loading(net, path.name).text)
    theirs = Detectron2ResNet(cfg["MODEL"]["RESNETS"]).eval()
    loaded = theirs.load_state_dict({name: torch.from_numpy(array) for name, array in content["model"].items()}, strict=False)
    assert not loaded.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in loaded.missing_keys), "frozen normalisation does not count batches"
    with torch.no_grad():
        assert close(theirs(images()).mean(dim=(2, 3)), net.backbone(images()))
    # detectron2 subtracts the mean and divides in 0..255
    np.testing.assert_allclose(np.array(cfg["MODEL"]["PIXEL_MEAN"]) / 255, IMAGE["mean"], atol=1e-6)
    np.testing.assert_allclose(np.array(cfg["MODEL"]["PIXEL_STD"]) / 255, IMAGE["std"], atol=1e-6)
    assert cfg["INPUT"]["FORMAT"] == "RGB"
    assert cfg["MODEL"]["WEIGHTS"] == path.name


def test_detectron2s_own_resnet_gives_the_same_features(tmp_path):
    pytest.importorskip("detectron2.modeling", reason="detectron2 is not installed, or was compiled for another torch", exc_type=Exception)
    check = export_network(network("resnet50", 0.125, "imagenet"), find_target("detectron2"), tmp_path / "net.pkl")
    assert check.startswith("read back with detectron2")


def test_arrays_for_detectron2_can_be_read_by_all_numpy_versions(tmp_path):
    content = written(network("resnet18", 1.0, "imagenet"), "detectron2", tmp_path).read_bytes()
    assert b"_reconstruct" not in content
    assert b"numpy._core" not in content
    assert b"numpy.core" not in content


# ---- onnx


def test_without_the_packages_of_onnx_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("bingo.export.to_onnx.find_spec", lambda name: None)
    with pytest.raises(UserError, match="onnx and onnxscript not installed; run: pip install onnx onnxscript onnxruntime"):
        export_network(network(*TINY), find_target("onnx"), tmp_path / "net.onnx")


# ---- properties of every target


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(set(target_names()) - {"onnx"}))
def test_equal_networks_have_equal_bytes(target, tmp_path):
    files = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        shapes = {"torchvision": ("efficientnet_b0", 1.0, "small"), "hub": ("resnet26d", 0.125, "imagenet"), "torch": TINY}
        shape = shapes.get(target, ("resnet50", 0.125, "imagenet"))
        made = written(network(*shape), target, tmp_path / name)
        files.append([file.read_bytes() for file in (sorted(made.iterdir()) if made.is_dir() else [made])])
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("target", "shape", "says"),
    [
        ("torchvision", TINY, "torchvision .* has no network resnet10t; export --to timm, onnx or safetensors"),
        ("torchvision", ("resnet18", 0.125, "imagenet"), "the network has width 0.125, torchvision's have 1.0"),
        (
            "torchvision",
            ("convnext_tiny", 1.0, "imagenet"),
            "torchvision/convnext_tiny has other layers than convnext_tiny, the network's arch",
        ),
        ("timm", ("torchvision/mobilenet_v3_small", 1.0, "imagenet"), "timm .* has no network mobilenet_v3_small; export --to torchvision"),
        ("detectron2", TINY, "the network is resnet10t, detectron2 builds resnet18, "),
        ("detectron2", ("resnet18", 1.0, "small"), r"stem small, detectron2's ResNets begin with a 7x7 .*\(stem imagenet\)"),
        ("detectron2", ("resnet18", 0.125, "imagenet"), "width 0.125, detectron2 builds ResNet-18 only at 1.0"),
    ],
)
def test_networks_that_a_library_cannot_build_are_refused_in_one_line(target, shape, says, tmp_path):
    with pytest.raises(UserError, match=says) as caught:
        written(network(*shape), target, tmp_path)
    (line,) = caught.value.lines
    assert "\n" not in line
    assert "; export --to " in line
    assert not list(tmp_path.iterdir())


def test_networks_with_other_layers_do_not_match():
    with pytest.raises(UserError, match="resnet26d has other layers than resnet10t, the network's arch; export --to timm"):
        twin(network(*TINY), "resnet26d")


def test_a_file_that_gives_other_outputs_is_not_kept(tmp_path):
    net = network("efficientnet_b0", 1.0, "small")
    net = replace(net, backbone=deepcopy(net.backbone))
    for module in net.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-2  # networks of different libraries may differ like this, which no tensor shows
    (tmp_path / "net.pth").write_bytes(b"before")
    with pytest.raises(UserError, match=r"net.pth: torchvision .* gives outputs that differ by .*, allowed is 1e-05; nothing was written"):
        export_network(net, find_target("torchvision"), tmp_path / "net.pth")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"before"]


def test_the_difference_is_relative_to_the_largest_output():
    net = network(*TINY)
    assert largest_difference(net, net.backbone) == 0
    assert largest_difference(net, lambda x: 1.5 * net.backbone(x)) == pytest.approx(0.5)
    assert largest_difference(net, lambda x: net.backbone(x) if len(x) > 1 else 2 * net.backbone(x)) == pytest.approx(1)
    assert not largest_difference(net, lambda x: net.backbone(x) * torch.nan) <= 1


# ---- the command and its card


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Listing, teacher, embeddings, bags, a student and a baseline that refer to one another by fingerprints, and reports."""
    monkeypatch.chdir(tmp_path)
    labels = np.arange(12) % 2
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 3)).astype(np.uint8)
    listing = memory_listing("toys", [f"{row}" for row in range(12)], labels, 8, ["a", "b"], pixels)
    write_listing("data/listing.parquet", listing)
    shape, image = NetworkParams(arch="resnet10t", width=0.125, stem="small"), ImageParams(**IMAGE)
    teacher, head = build_backbone(*TINY, 5), mlp_head([64, 4], 0)
    save_teacher(
        "models/teacher.safetensors", teacher, head,
        teacher_metadata(shape, image, teacher, head, {"source": "checkpoint", "pretrained": True, "source_sha256": "ab" * 32}),
    )  # fmt: skip
    attrs = {"listing": listing.fingerprint, "teacher": file_fingerprint("models/teacher.safetensors"), "recipe": {"seed": 0}}
    embeddings = create_embeddings(Path("data/embeddings.zarr"), 12, 8, 3, 1, 4, 12, attrs)
    features = np.random.default_rng(1).random((12, 3))
    embeddings.write_chunk(0, features, np.ones((8, 1, 4)))
    fingerprint = read_embeddings_fingerprint()
    write_bags("data/bags.zarr", build_knn(features[:8].astype(np.float32), 3), listing.fingerprint, fingerprint)
    made_from = {
        "listing": listing.fingerprint, "embeddings": fingerprint, "bags": read_bags("data/bags.zarr", listing).fingerprint, "epochs": 3,
        "params": {"distill": {"lr": 0.06, "keys": "stored", "augment": {"crop_scale": [0.2, 1.0]}}, "bingo": {"temperature": 0.1}},
    }  # fmt: skip
    net = network(*TINY, **made_from)
    save_network("models/student.safetensors", net.backbone.state_dict(), net.metadata)
    baseline = network(*TINY, method="moco", listing=listing.fingerprint, epochs=3)
    save_network("models/baselines/moco.safetensors", build_backbone(*TINY, 9).state_dict(), baseline.metadata)
    scores = {
        "student": {"knn_10": 91.25, "knn_200": 80.0, "knn_10_weighted": 92.5},
        "moco": {"knn_10": 70.0},
        "untrained": {"knn_10": 50.5},
    }
    for net, figures in scores.items():
        write_json(f"reports/knn/{net}.json", figures)
    write_json("reports/linear/student.json", {"cached": {"top1_last": 95.0, "top5_last": 100.0}})
    return tmp_path


def read_embeddings_fingerprint() -> str:
    return json.loads(Path("data/embeddings.zarr/zarr.json").read_text())["attributes"]["fingerprint"]


def bingo_export(*arguments):
    """(exit code, stdout, stderr)."""
    return bingo("export", *arguments)


def test_the_command_writes_the_file_and_its_card(workspace):
    code, out, err = bingo_export("--to", "timm", "--out", "out/net.safetensors")
    assert (code, err) == (0, "")
    first, size, second, third = out.splitlines()
    assert size == f"bytes: {Path('out/net.safetensors').stat().st_size:,}"
    assert first == f"written out/net.safetensors; read back with timm {timm.__version__}: outputs differ by at most 0.0e+00 of the largest"
    assert second == "note: resnet10t has width 0.125 and stem small, which timm cannot build by name: see the model card for the code"
    assert third == "model card: out/net.safetensors.md"
    card = Path("out/net.safetensors.md").read_text()
    sha256 = hashlib.sha256(Path("models/teacher.safetensors").read_bytes()).hexdigest()
    parameters = sum(parameter.numel() for parameter in build_backbone(*TINY, 0).parameters())
    for expected in (
        "| architecture | resnet10t |",
        f"| parameters | {parameters:,} |",
        "short side resized to 36 pixels (bilinear, antialiased), then a centre crop of 32 x 32",
        "with mean [0.5, 0.4, 0.3] and standard deviation [0.25, 0.2, 0.2]",
        "| method | BINGO |",
        "| parameters: distill | augment.crop_scale [0.2, 1], keys stored, lr 0.06 |",
        "| data | toys, 8 training images |",
        f"resnet10t, width 0.125, stem small, from checkpoint; sha256 {sha256}; sha256 of the checkpoint it came from: {'ab' * 32} |",
        "| k-NN, k = 10 | 91.25 | 50.50 |\n| k-NN, k = 200 | 80.00 |  |\n| k-NN, k = 10, weighted votes | 92.50 |  |",
        "| linear layer on stored features, top-1 | 95.00 |  |",
        "from the images (toys) and the teacher's weights (checkpoint: resnet10t)",
        "Apache-2.0",
    ):
        assert expected in card, expected
    assert "| bags | " in card
    assert " k 3" in card
    assert str(workspace) not in card
    again = bingo_export("--to", "timm", "--out", "out/net.safetensors", "--force")
    assert again == (code, out, err)
    assert Path("out/net.safetensors.md").read_text() == card


def test_the_code_in_the_card_runs(workspace, monkeypatch):
    bingo_export("--to", "timm", "--out", "out/net.safetensors")
    code = Path("out/net.safetensors.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir("out")
    names: dict = {}
    with redirect_stdout(io.StringIO()):
        exec(code, names)
    with torch.no_grad():
        assert torch.equal(names["net"](images()), read_student(workspace / "models/student.safetensors").backbone(images()))


def test_a_baselines_card_has_its_own_figures_and_no_teacher(workspace):
    assert bingo_export("--to", "safetensors", "--student", "models/baselines/moco.safetensors", "--out", "b.safetensors")[0] == 0
    card = Path("b.safetensors.md").read_text()
    assert "| teacher | none: MoCo-v2 needs none |" in card
    assert "teacher's weights (" not in card
    assert "| k-NN, k = 10 | 70.00 | 50.50 |" in card
    assert "91.25" not in card


def test_the_card_claims_nothing_about_inputs_missing_from_the_workspace(workspace):
    student = read_student(Path("models/student.safetensors"))
    save_network("other.safetensors", student.backbone.state_dict(), {**student.metadata, "listing": "x", "embeddings": "y", "bags": "z"})
    assert bingo_export("--to", "safetensors", "--student", "other.safetensors", "--out", "o.safetensors")[0] == 0
    card = Path("o.safetensors.md").read_text()
    assert card.count("not known: it is no longer in this workspace") == 3
    assert "Not measured in this workspace." in card
    assert "toys" not in card


def test_figures_of_another_student_are_left_out(workspace):
    dep = {"path": "models/student.safetensors", "hash": "md5", "md5": "0" * 32}
    with open("dvc.lock", "w") as file:
        YAML(typ="safe", pure=True).dump({"stages": {"knn_eval@student": {"deps": [dep]}}}, file)
    code, _, err = bingo_export("--to", "safetensors", "--out", "o.safetensors")
    assert code == 0
    assert err == "note: reports/knn/student.json was measured on another student and is left out of the model card; run: dvc repro\n"
    card = Path("o.safetensors.md").read_text()
    assert "91.25" not in card
    assert "95.00" in card


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--to", "tim", "--out", "a.safetensors"],
            "--to = tim: allowed are detectron2, hub, onnx, safetensors, timm, torch, torchvision; did you mean timm",
        ),
        (["--to", "timm", "--out", "a.pth"], "--out = a.pth: allowed are names that end in .safetensors"),
        (["--to", "safetensors", "--out", "carded.safetensors"], "exists already; give another name, or --force"),
        (["--to", "onnx", "--out", "params.yaml/a.onnx"], "params.yaml is a file, not a folder; give another name"),
        (["--to", "timm", "--out", "carded.safetensors"], "--out: model card = carded.safetensors.md: exists already"),
        (["--to", "timm", "--out", "a.safetensors", "--student", "none.safetensors"], "none.safetensors: cannot be read"),
        (["--to", "timm", "--out", "a.safetensors", "--student", "models/teacher.safetensors"], "holds a teacher, not a student"),
        (
            ["--to", "timm", "--out", "a.safetensors", "--student", "damaged.safetensors"],
            "damaged.safetensors: missing conv1.0.weight, ",
        ),
        (["--to", "torchvision", "--out", "a.pth"], "--to = torchvision: torchvision"),
    ],
)
def test_mistakes_are_one_line(workspace, arguments, says):
    state = build_backbone("resnet18", 0.125, "small", 0).state_dict()
    save_network("damaged.safetensors", state, {"kind": "student", "arch": "resnet10t", "width": 0.125, "stem": "imagenet", **IMAGE})
    for name in ("params.yaml", "carded.safetensors.md"):
        (workspace / name).write_text("before")
    before = sorted(path.name for path in workspace.iterdir())
    code, out, err = bingo_export(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert sorted(path.name for path in workspace.iterdir()) == before
