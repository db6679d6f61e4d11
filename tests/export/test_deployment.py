"""Files for deployment: a folder for the Hub, programs of torch and ONNX, INT8, and networks with a classifier."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from command import bingo
from fabricated import make_workspace
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn
from workspace import ROOT

from bingo import paths
from bingo.evals.features import backbone_features
from bingo.export import to_hub
from bingo.export.contract import find_target
from bingo.export.measured import agreement, cost
from bingo.export.model_card import Provenance, hub_header
from bingo.export.run import export_network
from bingo.export.stored import StoredNetwork, read_student, with_classifier
from bingo.images.images import open_images
from bingo.images.listing import read_listing
from bingo.images.loader import center_views
from bingo.nets.checkpoint import save_network
from bingo.params import BicubicImageParams, ImageParams
from bingo.runtime.artefacts import file_fingerprint
from bingo.runtime.errors import UserError
from tests.export.test_export import IMAGE, TINY, backbone_of, close, images, network, written

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
HOSTILE = ("a\nb", "</script><b>|", "Ünïcode 猫 \u202e", "", 'quote"\\')
# The networks named in the documentation, with small widths and images.
FAMILIES = [
    ("resnet26d", 0.125, "imagenet"),
    ("efficientnet_b0", 1.0, "imagenet"),
    ("mobilenetv3_small_050", 1.0, "imagenet"),
    ("vit_tiny_patch16_224", 1.0, "imagenet"),
]


def classifying(shape: tuple[str, float, str], classes: tuple[str, ...] = HOSTILE) -> StoredNetwork:
    net = network(*shape)
    torch.manual_seed(0)
    layer = nn.Linear(net.backbone.feature_width, len(classes)).requires_grad_(False)
    return StoredNetwork(net.backbone, net.metadata, net.image, layer, classes)


def logits(net: StoredNetwork, x: torch.Tensor) -> torch.Tensor:
    assert net.classifier is not None
    return net.backbone(x) @ net.classifier.weight.T + net.classifier.bias


# ---- the Hub's folder


@pytest.mark.parametrize("shape", [*FAMILIES, ("torchvision/resnet18", 1.0, "imagenet")])
def test_timm_reads_the_folder_by_its_path(shape, tmp_path):
    net, classifier = network(*shape), classifying(shape)
    folder = written(net, "hub", tmp_path)
    export_network(classifier, find_target("hub"), tmp_path / "classifier")
    read = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    names = timm.create_model(f"local-dir:{tmp_path / 'classifier'}", pretrained=True).eval()
    tuned = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7).eval()
    with torch.no_grad():
        assert close(read(images()), net.backbone(images()))
        assert close(names(images()), logits(classifier, images()))
        assert close(tuned.forward_head(tuned.forward_features(images()), pre_logits=True), net.backbone(images()))
    assert tuple(names.pretrained_cfg["label_names"]) == HOSTILE
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == (shape[0].removeprefix("torchvision/"), 0)


@pytest.mark.parametrize("image", [ImageParams(**IMAGE), BicubicImageParams(**(IMAGE | {"crop_px": 29, "resize_px": 31}))])
def test_timms_transform_is_the_students_centre_view(image, tmp_path):
    net = StoredNetwork(backbone_of("resnet18", 1.0, "imagenet"), network("resnet18", 1.0, "imagenet").metadata, image)
    read = timm.create_model(f"local-dir:{written(net, 'hub', tmp_path)}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(read))
    resize, crop, *_ = transform.transforms
    assert (resize.size, tuple(crop.size), resize.interpolation.value) == (image.resize_px, (image.crop_px,) * 2, image.interpolation)
    assert transform(Image.new("RGB", (90, 60), (255, 0, 51))).numpy()[:, 0, 0] == pytest.approx(
        [(value - mean) / std for value, mean, std in zip((1, 0, 0.2), image.mean, image.std, strict=True)], abs=1e-5
    )


@pytest.mark.parametrize("resize_px", [29, 36, 64, 255, 256, 511])
def test_timm_rounds_the_crop_ratio_to_the_same_size(resize_px):
    for crop_px in range(20, resize_px + 1):
        share = to_hub._crop_pct(ImageParams(**(IMAGE | {"crop_px": crop_px, "resize_px": resize_px})))
        assert int(np.floor(crop_px / share)) == resize_px


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (TINY, "stem small"),
        (("resnet18", 0.125, "imagenet"), "width 0.125, for which timm has no argument in resnet18"),
        (("efficientnet_b0", 1.0, "small"), "stem small"),
        (("torchvision/resnet18", 1.0, "small"), "stem small"),
    ],
)
def test_networks_that_timm_cannot_build_are_refused_before_writing(shape, says, tmp_path):
    with pytest.raises(UserError, match=f"--to = hub: the network has {says}.*; export --to onnx or safetensors"):
        export_network(network(*shape), find_target("hub"), tmp_path / "hub")
    assert not list(tmp_path.iterdir())


def test_the_header_can_be_read_by_the_hub(tmp_path):
    net = network("resnet18", 1.0, "imagenet", start={"weights": "resnet18.a1_in1k", "source_sha256": None})
    teacher = {"source": "timm", "weights": "vit_small_patch14_dinov2.lvd142m", "arch": "vit_small_patch14_dinov2"}
    rows = [("k-NN, k = 10", {"student": 91.25, "teacher": 95.0}), ("agreement with the teacher, k = 10", {"student": 40.0})]
    text = hub_header(net, Provenance(net="student", dataset="cifar10", teacher=teacher, scores=rows), "apache-2.0")
    data = ModelCard(f"{text}# body\n").data
    assert (data.license, data.library_name, data.metrics, data.datasets) == ("apache-2.0", "timm", ["accuracy"], ["uoft-cs/cifar10"])
    assert data.base_model == ["timm/resnet18.a1_in1k", "timm/vit_small_patch14_dinov2.lvd142m"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.metric_name) == ("accuracy", 91.25, "k-NN, k = 10")
    unknown = ModelCard(hub_header(net, Provenance(dataset="mine: - [x]\n---\n"), "unknown") + "# body\n")
    assert unknown.data.datasets is unknown.data.eval_results is None
    assert unknown.text.strip() == "# body"


# ---- programs


@pytest.mark.parametrize("shape", [TINY, *(pytest.param(shape, marks=pytest.mark.slow) for shape in FAMILIES)])
@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_programs_classify_any_number_of_images(shape, target, tmp_path, monkeypatch):
    if target == "onnx":
        pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    net = classifying(shape)
    path = written(net, target, tmp_path)
    assert b"site-packages" not in path.read_bytes(), "the file contains no path of this machine"
    monkeypatch.chdir(tmp_path)
    names: dict = {"images": images().numpy()}
    exec(find_target(target).loading(net, path.name).text, names)
    for count in (1, 2, 5):
        with torch.no_grad():
            if target == "torch":
                outputs = names["net"](images(count))
            else:
                outputs = torch.from_numpy(names["session"].run(None, {"images": images(count).numpy()})[0])
            assert close(outputs, logits(net, images(count)))
    if target == "torch":
        assert tuple(json.loads(names["extra"]["bingo.json"])["classes"]) == HOSTILE
    else:
        import onnx

        onnx.checker.check_model(onnx.load(path))
        assert tuple(json.loads(onnx.load(path).metadata_props[0].value)["classes"]) == HOSTILE


@pytest.mark.parametrize("shape", [TINY, ("vit_tiny_patch16_224", 1.0, "imagenet")])
def test_timms_file_classifies_with_the_code_in_its_card(shape, tmp_path, monkeypatch):
    net = classifying(shape)
    path = written(net, "timm", tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(find_target("timm").loading(net, path.name).text, names)
    with torch.no_grad():
        assert close(names["net"](images()), logits(net, images()))
    with pytest.raises(UserError, match="holds a classifier, not a student"):
        read_student(path)


# ---- the command in a workspace with images


@pytest.fixture(scope="module")
def with_images(tmp_path_factory) -> Path:
    """Listing, images, parameters, a student, and a layer as saved by linear_eval, here with class means so that it is often right."""
    root = tmp_path_factory.mktemp("made")
    listing = make_workspace(root, train_rows=60, test_rows=24)
    shutil.copy(ROOT / "params.yaml", root / "params.yaml")
    student = root / paths.STUDENT
    net = network(*TINY, listing=listing.fingerprint)
    save_network(student, net.backbone.state_dict(), net.metadata)
    pixels = open_images(listing, root / paths.IMAGES, None)
    features = torch.from_numpy(backbone_features(net.backbone, pixels, range(60), net.image, CPU, "fp32", 32))
    weight = torch.stack([features[torch.from_numpy(listing.labels_N[:60] == label)].mean(0) for label in range(3)])
    layer = {"weight": weight, "bias": -(weight**2).sum(1) / 2}
    made_from = {"kind": "linear layer", "classes": listing.classes, "listing": listing.fingerprint, "backbone": file_fingerprint(student)}
    save_network(root / paths.LINEAR / "student.safetensors", layer, made_from)
    return root


@pytest.fixture
def workspace(with_images, tmp_path, monkeypatch) -> Path:
    shutil.copytree(with_images, tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")
    return tmp_path / "made"


def test_int8_is_calibrated_compared_and_described(workspace):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    import onnx

    done = bingo("export", "--to", "onnx", "--int8", "--calibration-images", 1000, "--out", "out/net.onnx")
    assert (done.exit_code, done.stderr) == (0, "note: --calibration-images = 1000: there are only 60 train images, which are all used\n")
    assert sorted(path.name for path in Path("out").iterdir()) == ["net.onnx", "net.onnx.md"]
    graph = onnx.load("out/net.onnx").graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    scales = [weights[node.input[1]] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights]
    assert any(len(scale.dims) == 1 and scale.dims[0] > 1 for scale in scales), "a scale for each channel"
    net, listing = read_student(paths.STUDENT), read_listing(paths.LISTING)
    (views,) = center_views(open_images(listing, paths.IMAGES, None), range(60, 84), net.image, CPU, 24)
    session = onnxruntime.InferenceSession("out/net.onnx", providers=["CPUExecutionProvider"])
    layer = with_classifier(net, paths.STUDENT)[0].classifier
    with torch.no_grad():
        before, after = net.backbone(views), torch.from_numpy(session.run(None, {"images": views.numpy()})[0])
        percents = [100 * np.mean(layer(features).argmax(1).numpy() == listing.labels_N[60:]) for features in (before, after)]
    cosine = np.mean([np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(before.numpy(), after.numpy(), strict=True)])
    assert 0.95 < cosine < 0.99999
    card = Path("out/net.onnx.md").read_text()
    for row in (
        f"| accuracy of the linear layer, percent of 24 test images | {percents[0]:.2f} | {percents[1]:.2f} |",
        f"| cosine to the float32 features, mean of 24 test images | 1 | {cosine:.4f} |",
        "| latency at batch 32, ms | 8 | 8 |",
        "| peak memory at batch 1, MB | 77 | 77 |",
        f" | {Path('out/net.onnx').stat().st_size:,} |",
    ):
        assert row in card, row
    assert percents[0] > 40
    again = bingo("export", "--to", "onnx", "--int8", "--calibration-images", 60, "--out", "again.onnx")
    assert again.stderr == ""
    assert Path("again.onnx").read_bytes() == Path("out/net.onnx").read_bytes()
    bingo("export", "--to", "onnx", "--int8", "--calibration-images", 2, "--out", "again.onnx", "--force")
    assert Path("again.onnx").read_bytes() != Path("out/net.onnx").read_bytes(), "other images change the ranges"


def test_a_classifier_has_the_accuracy_of_its_layer_and_the_report_links_to_it(workspace):
    done = bingo("export", "--to", "torch", "--head", "linear", "--out", "out/nét &.pt2")
    assert (done.exit_code, done.stderr) == (0, "")
    read, listing = torch.export.load("out/nét &.pt2").module(), read_listing(paths.LISTING)
    (views,) = center_views(open_images(listing, paths.IMAGES, None), range(60, 84), read_student(paths.STUDENT).image, CPU, 24)
    percent = 100 * np.mean(read(views).argmax(1).numpy() == listing.labels_N[60:])
    assert f"percent of 24 test images | {percent:.2f} | {percent:.2f} |" in Path("out/nét &.pt2.md").read_text()
    assert "logits of 3 classes" in Path("out/nét &.pt2.md").read_text()
    bingo("export", "--to", "safetensors", "--out", "other.safetensors")
    text = Path("reports/exports.js").read_text()
    links = json.loads(text.removeprefix("window.bingoExports = ").removesuffix(";\n"))
    assert [link["file"] for link in links] == ["../out/n%C3%A9t%20%26.pt2", "../other.safetensors"]
    assert links[0]["network"] == file_fingerprint(paths.STUDENT)
    Path("out/nét &.pt2").unlink()
    bingo("export", "--to", "safetensors", "--out", "other.safetensors", "--force")
    assert Path("reports/exports.js").read_text().count('"file"') == 1


def test_without_labels_the_features_are_compared(workspace):
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    (paths.LINEAR / "student.safetensors").write_bytes(paths.NO_WEIGHTS)
    done = bingo("export", "--to", "onnx", "--int8", "--test-images", 9, "--out", "net.onnx")
    assert done.exit_code == 0
    assert "accuracy" not in done.stdout
    assert "8 nearest of 9 test images in common, percent: 100 -> " in done.stdout
    done = bingo("export", "--to", "onnx", "--head", "linear", "--out", "classifier.onnx")
    assert done.exit_code == 2
    assert "holds no layer of models/student.safetensors; linear_eval had no labelled train and test images" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--to", "torch", "--head", "linear", "--student", "other.safetensors"],
            "holds no layer of other.safetensors; run: dvc repro linear_eval",
        ),
        (["--to", "safetensors", "--head", "linear"], "--to safetensors writes no classifier; export --to timm, hub, onnx or torch"),
        (["--to", "torch", "--head", "linaer"], "--head = linaer"),
        (["--to", "torch", "--int8"], "--int8 = True: has no effect without --to onnx"),
        (["--to", "timm", "--license", "mit"], "--license = mit: has no effect without --to hub"),
        (["--to", "onnx", "--calibration-images", "9"], "--calibration-images = 9: has no effect without --int8"),
        (["--to", "torch", "--test-images", "9"], "--test-images = 9: has no effect without --int8 or --head linear"),
        (["--to", "onnx", "--int8", "--calibration-images", "0"], "--calibration-images = 0: allowed is "),
        (["--to", "torch", "--push", "me/net"], "--push = me/net: has no effect without --to hub"),
        (["--to", "hub", "--push", "net"], "--push = net: allowed is OWNER/NAME"),
        (["--to", "hub", "--push", "me/a net"], "--push = me/a net: allowed is OWNER/NAME"),
        (["--to", "hub", "--push", "me/net"], "no token of the Hugging Face Hub was found; run: hf auth login, or set HF_TOKEN"),
        (["--to", "hub", "--out", "models"], "--out = models: exists already"),
        (["--to", "hub", "--out", "models", "--force"], "--out = models: is not a folder of this kind, so --force does not replace it"),
        (["--to", "hub", "--out", "link", "--force"], "--out = link: is not a folder of this kind"),
        (["--to", "hub", "--out", "params.yaml/hub"], "params.yaml is a file, not a folder"),
        (["--to", "onnx", "--student", "cut.safetensors"], "cut.safetensors: is damaged"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(workspace, monkeypatch, arguments, says):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    net = network(*TINY, epochs=9)
    save_network("other.safetensors", net.backbone.state_dict(), net.metadata)
    Path("cut.safetensors").write_bytes(Path("other.safetensors").read_bytes()[:-100])
    Path("link").symlink_to("nowhere")
    suffix = "" if "hub" in arguments else {"torch": ".pt2"}.get(arguments[1], f".{arguments[1]}")
    before = sorted(workspace.rglob("*"))
    done = bingo("export", *(arguments if "--out" in arguments else [*arguments, "--out", f"net{suffix}"]))
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert sorted(workspace.rglob("*")) == before


def test_a_damaged_layer_is_not_used(workspace):
    layer = paths.LINEAR / "student.safetensors"
    content = bytearray(layer.read_bytes())
    content[-5] ^= 1
    layer.write_bytes(content)
    done = bingo("export", "--to", "torch", "--head", "linear", "--out", "net.pt2")
    assert done.exit_code == 2
    assert "models/linear/student.safetensors: is damaged" in done.stderr


# ---- the upload


class Hub:
    """Replaces huggingface_hub.HfApi."""

    calls: list[tuple] = []
    error: Exception | None = None

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))
        return f"address of {repo_id}"

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        if self.error:
            raise self.error
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir()), sorted(allow_patterns)))


@pytest.fixture
def hub(workspace, monkeypatch):
    """A student that timm can build, and a fake Hub."""
    net = network("resnet18", 1.0, "imagenet")
    save_network(paths.STUDENT, net.backbone.state_dict(), net.metadata)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def test_the_folder_is_uploaded_only_on_request(hub, monkeypatch):
    files = ["README.md", "config.json", "model.safetensors"]
    assert bingo("export", "--to", "hub", "--out", "hub", "--license", "mit").exit_code == 0
    assert sorted(path.name for path in Path("hub").iterdir()) == files
    assert hub.calls == []
    done = bingo("export", "--to", "hub", "--out", "hub", "--push", "me/net", "--force")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "uploaded to address of me/net")
    assert hub.calls == [("create", "me/net", True, True), ("upload", "me/net", files, files)]
    assert "secret" not in "".join(path.read_text(errors="replace") for path in Path("hub").iterdir())
    assert ModelCard.load("hub/README.md").data.license == "unknown"
    monkeypatch.setattr(hub, "error", ConnectionError("no\nnetwork"))
    done = bingo("export", "--to", "hub", "--out", "hub", "--push", "me/net", "--force")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "the upload failed (no network); hub is complete, upload it with: hf upload me/net hub" in done.stderr


# ---- figures


def test_agreement_follows_its_definition():
    generator = np.random.default_rng(0)
    first = generator.standard_normal((30, 6)).astype(np.float32)
    second = first + 0.3 * generator.standard_normal((30, 6)).astype(np.float32)
    cosines, shares = [], []
    for row in range(30):
        near = []
        for features in (first, second):
            unit = features / np.linalg.norm(features, axis=1, keepdims=True)
            others = [other for other in np.argsort(-(unit @ unit[row])) if other != row]
            near.append(set(others[:10]))
        cosines.append(first[row] @ second[row] / np.linalg.norm(first[row]) / np.linalg.norm(second[row]))
        shares.append(10 * len(near[0] & near[1]))
    found = agreement(torch.from_numpy(first), torch.from_numpy(second))
    assert found == pytest.approx((np.mean(cosines), np.mean(shares)), abs=1e-5)
    assert agreement(torch.ones(1, 4), torch.ones(1, 4)) == pytest.approx((1, 100))


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_costs_are_measured_in_a_separate_process(target, tmp_path):
    if target == "onnx":
        pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    net = network(*TINY)
    net = replace(net, backbone=deepcopy(net.backbone).to(memory_format=torch.channels_last))  # as after a pass over images
    path = written(net, target, tmp_path)
    found = cost(path, 2, 32)
    assert 0 < found["latency"] < 60_000
    assert 10 < found["peak memory"] < 4000
    with pytest.raises(UserError, match="its latency cannot be measured"):
        cost(path, 2, 1 if target == "torch" else -1)
