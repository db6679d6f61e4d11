"""Limits between sections: all mistakes are reported at once before any work, and the advice in each message is accepted."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from workspace import ROOT, SHORT, new_workspace

from bingo.datasets.subset import Counts
from bingo.methods.contract import Progress
from bingo.nets.backbones import build_backbone, check_images, is_transformer, say_once
from bingo.params import read_yaml, validate
from bingo.planning import limits, network_limits
from bingo.planning.dry_run import dry_student, dry_teacher
from bingo.planning.limits import check_limits, image_mistakes, list_mistakes
from bingo.runtime.errors import UserError

SMALL = {
    "teacher.width": 0.125,
    "teacher.pretrain.moco.queue_rows": 512,
    "student.width": 0.125,
    "distill.method": "moco",
    "baselines": [],
    "image.crop_px": 16,
    "image.resize_px": 16,
}
VIT = {"student.arch": "vit_tiny_patch16_224", "student.width": 1.0, "student.stem": "imagenet"}
TRANSFER = {"source": "cifar10", "root": "cifar", "store_px": 32, "train_images": None, "test_images": None}
KINDS: dict[type, str] = {int: r"\d+", float: r"\d+\.\d+"}
ANY_SIDE = {"image.resize_px": 512}


def raw(changes: dict[str, Any]) -> dict[str, Any]:
    document = read_yaml(ROOT / "params.yaml")
    for key, value in (SMALL | changes).items():
        *sections, last = key.split(".")
        section = document
        for name in sections:
            section = section[name]
        section[last] = value
    return document


def answer(changes: dict[str, Any], processes: int = 1, memory: Path | None = None) -> list[str]:
    """The lines with which the parameters are refused; empty if they are accepted."""
    try:
        check_limits(validate(raw(changes), "params.yaml"), processes, memory)
    except UserError as error:
        return error.lines
    return []


def advised(line: str) -> dict[str, Any]:
    """The settings at the end of a line, KEY: VALUE or KEY to VALUE; the first of several alternatives."""
    sections = "dataset|image|teacher|student|distill|methods|bagging|transfer|extract"
    way_out = line.rpartition("; ")[2].partition(", or ")[0]
    found = dict(re.findall(rf"((?:{sections})\.[\w.]+?)(?:: | to | = )([\w./-]+)", way_out))
    return {key: next((kind(value) for kind, form in KINDS.items() if re.fullmatch(form, value)), value) for key, value in found.items()}


PUBLISHED = {"teacher.width": 1.0, "teacher.stem": "imagenet"}
SMALL_CROPS = {"distill.method": "seed", "distill.keys": "live", "methods.seed.small_crops": 2}
REFUSED: list[dict[str, Any]] = [
    VIT | ANY_SIDE | {"image.crop_px": 40},
    {"student.arch": "inception_v3", "student.width": 1.0, "student.stem": "imagenet", **ANY_SIDE, "image.crop_px": 31},
    VIT | {"image.crop_px": 32, "image.resize_px": 32, "transfer.datasets": {"own": TRANSFER}, "transfer.resized_px": 100},
    {"student.arch": "resnet18", "student.stem": "small", "transfer_coco.runs": ["fpn-1x"], "transfer_coco.root": "coco"},
    {"student.arch": "efficientnet_b0", "student.width": 1.0, "transfer_coco.runs": ["fpn-1x"], "transfer_coco.root": "coco"},
    {"distill.method": "simreg", "distill.batch_anchors": 2},
    {"distill.method": "isd", "distill.batch_anchors": 2},
    {"distill.method": "coss", "methods.coss.companions": 9},
    {"distill.method": "compress", "methods.compress.queue_rows": 32},
    {"distill.method": "seed", "methods.seed.negatives": "queue", "methods.seed.negative_rows": 20},
    {"distill.method": "seed", "methods.seed.small_crops": 2},
    {"distill.method": "seed", "methods.seed.small_crops": 2, "distill.keys": "momentum"},
    SMALL_CROPS | {"methods.seed.negative_rows": 20},
    SMALL_CROPS | VIT | ANY_SIDE | {"image.crop_px": 32, "methods.seed.small_crop_px": 40},
    SMALL_CROPS | {"teacher.source": "random", "teacher.arch": "inception_v3", **PUBLISHED, "teacher.image.crop_px": 96},
    {"teacher.pretrain.moco.queue_rows": 100},
    {"distill.batchnorm_groups": 3, "distill.batch_anchors": 66},
    {"distill.method": "coss", "distill.accumulate_steps": 2},
    {"distill.method": "simreg", "distill.batch_anchors": 4, "distill.accumulate_steps": 2},
    {"distill.accumulate_steps": 3, "distill.batch_anchors": 63},
    {"distill.accumulate_steps": 2, "distill.batch_anchors": 72, "distill.batchnorm_groups": 6},
    {"teacher.pretrain.accumulate_steps": 3, "teacher.pretrain.batch_anchors": 129},
    {"distill.batch_anchors": 51, "teacher.pretrain.batch_anchors": 127},
    {"distill.method": "bingo", "methods.bingo.inter_warmup_epochs": 5},
    {"distill.method": "bingo", "distill.keys": "momentum"},
    {"distill.method": "disco", "distill.keys": "momentum"},
    {"distill.method": "disco", "extract.views": 1},
    {"distill.method": "bingo", "extract.views": 0},
    {"distill.method": "bingo", "extract.views": 0, "distill.keys": "live"},
    {"distill.method": "simreg", "extract.views": 0},
    {"distill.method": "bingo", "methods.bingo.terms": "expected", "distill.keys": "momentum"},
    {"teacher.key_width": 128},
    {"teacher.source": "random", "teacher.key_width": 500},
    {"student.arch": "resnet18.a1_in1k"},
    {"teacher.source": "random", "teacher.arch": "resnet18.a1_in1k"},
    {"teacher.source": "timm", "teacher.arch": "resnet18", "teacher.width": 0.25},
    {"teacher.source": "torchvision", "teacher.arch": "resnet10t", **PUBLISHED},
    {"teacher.source": "torchvision", "teacher.arch": "resnet18", **PUBLISHED},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", REFUSED, ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()))
def test_the_advice_in_each_refusal_is_accepted(changes):
    lines = answer(changes, processes=2)
    assert lines
    assert not any("\n" in line for line in lines)
    settings = {key: value for line in lines for key, value in advised(line).items()}
    assert settings, lines
    assert answer(changes | settings, processes=2) == [], settings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"student.arch": "efficientnet_b0", "student.width": 0.5}, "width"),
        ({"student.arch": "resnet14t", "student.width": 0.0625, "student.stem": "imagenet"}, "width"),
        ({"student.arch": "regnetx_002", "student.width": 1.0}, "stem"),
    ],
)
def test_impossible_settings_of_a_network_name_their_section(changes, key):
    (line,) = answer(changes)
    value = re.search(rf"set {key}: ([\w.]+)", line)
    assert line.startswith(f"student.{key} = ")
    assert value
    assert answer(changes | {f"student.{key}": float(value[1]) if key == "width" else value[1]}) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bingo", "moco", "seed", "compress", "disco", "simreg", "isd", "coss"])
@pytest.mark.parametrize("companions", [0, 1])
@pytest.mark.parametrize("keys", ["stored", "live"])
def test_a_batch_of_one_is_refused_exactly_if_a_step_would_fail(method, companions, keys):
    """Compared with a real step on one image: no working method is refused, and no method is accepted that would end in a traceback."""
    changes = {"distill.method": method, "distill.batch_anchors": 1, "methods.coss.companions": companions, "distill.keys": keys}
    changes |= {"methods.bingo.teacher_batchnorm": "batch"} if keys == "live" else {}
    params = validate(raw(changes), "params.yaml")
    training = dry_student(params, dry_teacher(params, checkpoint=False), bank=False)
    works = True
    try:
        training.method.train()(training.batch(1), Progress(0, 0))
    except ValueError:
        works = False
    meaningless = method == "coss" and not companions  # the cosine of single numbers is always 1 or -1
    assert bool(answer(changes)) == (not works or meaningless)


def test_all_mistakes_are_reported_at_once():
    changes = VIT | {
        "image.crop_px": 15,
        "teacher.width": 0.3,
        "distill.batch_anchors": 33,
        "methods.moco.queue_rows": 8,
    }
    lines = answer(changes, processes=2)
    for what in ("crop_px = 15", "teacher.width = 0.3", "batch_anchors = 33", "methods.moco.queue_rows = 8"):
        assert any(what in line for line in lines), what


def test_all_networks_that_are_not_trained_are_named():
    changes = {"semi_eval.nets": ["moco", "studnt"], "transfer.nets": ["isd"], "bagging.relation": "baselines/moco"}
    with pytest.raises(UserError) as caught:
        validate(raw(changes), "params.yaml")
    for what in ("'moco' is not a network", "'studnt'", "'isd'", "bagging.relation"):
        assert any(what in line for line in caught.value.lines), what


def test_batches_are_compared_with_the_number_of_images():
    params = validate(raw({"distill.batch_anchors": 300, "teacher.pretrain.batch_anchors": 301, "methods.moco.queue_rows": 300}), "p")
    assert len(image_mistakes(params, Counts(299, 0))) == 2
    assert not image_mistakes(params, Counts(301, 0))


def test_missing_labels_and_lists_are_reported_before_the_teachers_pass(tmp_path):
    split = {"percent": 1.0, "list_file": str(tmp_path / "list.txt"), "trunk_lr": 0.1, "head_lr": 0.1, "linear_lr": 0.1}
    params = validate(raw({"bagging.method": "label", "semi_eval.splits": {"one": split}}), "p")
    lines = image_mistakes(params, Counts(9999, 1, labelled=False)) + list_mistakes(params)
    assert [line.split(" = ")[0] for line in lines] == ["bagging.method", "semi_eval.splits.one.list_file"]
    (tmp_path / "list.txt").write_text("a.jpg\n")
    assert not image_mistakes(params, Counts(9999, 1)) + list_mistakes(params)


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"bagging.k": 300}, 301),
        ({"teacher.key_width": 300}, 301),
        ({"bagging.method": "kmeans", "bagging.clusters": 300}, 300),
        ({"bagging.search": "ivf", "bagging.lists": 300}, 300),
    ],
)
def test_bag_sizes_are_compared_with_the_number_of_images(changes, most):
    params = validate(raw({"distill.batch_anchors": 8, "teacher.pretrain.batch_anchors": 8} | changes), "p")
    (line,) = image_mistakes(params, Counts(most - 1, 0))
    assert line.startswith(f"{list(changes)[-1]} = 300: ")
    assert not image_mistakes(params, Counts(most, 0))


@pytest.mark.parametrize(
    ("rows", "way_out"), [(2, {"methods.bingo.mask_bag": False}), (9, {"bagging.k": 7}), (9, {"bagging.mutual": True})]
)
def test_a_bag_of_all_images_leaves_no_negatives(rows, way_out):
    small = {"distill.method": "bingo", "distill.batch_anchors": 2, "teacher.pretrain.batch_anchors": 2, "bagging.k": rows - 1}
    (line,) = image_mistakes(validate(raw(small), "p"), Counts(rows, 0))
    assert line.startswith("methods.bingo.mask_bag = true: ")
    assert not image_mistakes(validate(raw(small | way_out), "p"), Counts(rows, 0))


def test_one_train_image_is_too_few():
    (line,) = image_mistakes(validate(raw({"distill.batch_anchors": 1, "teacher.pretrain.batch_anchors": 1}), "p"), Counts(1, 0))
    assert "add images" in line


def test_accepted_networks_are_not_tried_again_and_a_damaged_memory_does_not_matter(tmp_path, monkeypatch):
    memory, tried = tmp_path / "limits.json", []
    real = network_limits.network_mistakes
    monkeypatch.setattr(network_limits, "network_mistakes", lambda *given: tried.append(given) or real(*given))
    assert answer({}, memory=memory) == answer({}, memory=memory) == []
    assert len(tried) == 1
    assert answer({"student.width": 0.3}, memory=memory) == answer({"student.width": 0.3}, memory=memory) != []
    assert len(tried) == 3  # failures are tried again
    assert answer({"bagging.k": 7, "bagging.method": "kmeans"}, memory=memory) == []
    assert len(tried) == 3
    assert answer({"methods.coss.companions": 8, "distill.method": "coss", "bagging.k": 7}, memory=memory) != []  # not the network
    memory.write_text("[1, {")
    assert answer({}, memory=memory) == []
    assert len(json.loads(memory.read_text())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [{}, {"distill.batch_anchors": 1}, {"student.width": 0.3}])
def test_whether_a_network_works_does_not_depend_on_the_bags(wrong):
    """So accepted networks need not be tried again with other bags."""
    found = [
        network_limits.network_mistakes(validate(raw({"distill.method": "simreg"} | wrong | bags), "p"), 1)
        for bags in ({}, {"bagging.k": 900, "bagging.draw_temperature": 0.5}, {"bagging.method": "label", "bagging.k": 1})
    ]
    assert found == [found[0]] * 3
    assert bool(found[0]) == bool(wrong)


def test_limits_without_networks_need_no_torch():
    code = (
        "import sys; from bingo.planning import limits; from bingo.params import load_params; params = load_params();"
        "print([line for rule in limits._RULES for line in rule(params, 1)], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"


# Vision transformers accept any whole number of patches, in every role.


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_tiny_patch16_dinov3_qkvb"])
@pytest.mark.parametrize("side_px", [32, 48])
def test_a_vision_transformer_accepts_other_sizes_as_student_and_random_teacher(capsys, arch, side_px):
    student = {"student.arch": arch, "student.width": 1.0, "student.stem": "imagenet"}
    teacher = {"teacher.source": "random", "teacher.arch": arch, "teacher.width": 1.0, "teacher.stem": "imagenet"}
    say_once.cache_clear()
    assert answer(student | teacher | {"image.crop_px": side_px, "image.resize_px": side_px}) == []
    resampled = "dinov3" not in arch  # its rotary embedding is computed for any grid
    assert capsys.readouterr().err.count(f"resampled to {side_px // 16}x{side_px // 16}") == resampled


def test_a_resampled_embedding_equals_the_interpolated_one():
    net: Any = build_backbone("vit_tiny_patch16_224", 1.0, "imagenet", 0).eval()
    grid = net.pos_embed[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(grid, (2, 2), mode="bicubic", antialias=True, align_corners=False)
    expected = torch.cat([net.pos_embed[:, :1], small.permute(0, 2, 3, 1).reshape(1, 4, -1)], dim=1)
    other: Any = build_backbone("vit_tiny_patch16_224", 1.0, "imagenet", 0, {"img_size": 32}).eval()
    state = net.state_dict() | {"pos_embed": expected}
    other.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(x), other(x), rtol=1e-4, atol=1e-4)


def test_at_its_own_size_a_transformer_equals_the_librarys_network():
    import timm

    assert is_transformer("vit_tiny_patch16_224")
    net = build_backbone("vit_tiny_patch16_224", 1.0, "imagenet", 0).eval()
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    plain.load_state_dict(net.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(net(x), plain(x))


@pytest.mark.parametrize("arch", ["resnet10t", "resnet14t", "resnet26d", "resnet18", "resnet50d"])
@pytest.mark.parametrize("width", [1 / 32, 1 / 16, 1 / 8])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_narrow_networks_have_a_channel_everywhere_or_are_refused_without_a_warning(arch, width, stem):
    """Warnings are errors here, including torch's about tensors without elements."""
    try:
        net = build_backbone(arch, width, stem, 0)
    except UserError as error:
        wider = re.search(r"set width: ([\d.]+)", str(error))
        assert wider
        net = build_backbone(arch, float(wider[1]), stem, 0)
    assert all(tensor.numel() for tensor in net.state_dict().values())
    check_images(net, arch, 16)


# In the stages.


@pytest.mark.slow
def test_scan_reports_all_limits_before_it_reads_an_image(tmp_path, stages):
    workspace = new_workspace(tmp_path / "bingo", stages, {"distill.method": "simreg", "distill.batch_anchors": 1, "teacher.width": 0.3})
    done = workspace.run("scan")
    assert (done.status, done.out) == (2, "")
    assert len(done.err.splitlines()) == 2
    assert not (workspace.root / "data").exists()


def test_scan_reports_limits_and_too_few_images_together_and_the_advice_helps(tmp_path, stages):
    for place in (*(f"train/{name}/{i}" for name in "ab" for i in range(20)), "val/a/1", "val/b/2"):
        (tmp_path / f"photos/{place}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / f"photos/{place}.png")
    dataset = {"source": "folder", "root": str(tmp_path / "photos"), "train_images": 50, "test_images": 3}
    changes = SHORT | {f"dataset.{key}": value for key, value in dataset.items()} | {"teacher.width": 0.3, "bagging.k": 40}
    workspace = new_workspace(tmp_path / "bingo", stages, changes | {"distill.batch_anchors": 41})
    done = workspace.run("scan")
    keys = ["width", "dataset.train_images", "dataset.test_images", "distill.batch_anchors", "bagging.k"]
    assert (done.status, [re.sub("error: (teacher.)?", "", line.split(" = ")[0]) for line in done.err.splitlines()]) == (2, keys)
    settings = {key: value for line in done.err.splitlines() for key, value in advised(line).items()}
    assert settings == {"dataset.train_images": "null", "dataset.test_images": "null"}
    workspace.edit(dict.fromkeys(settings) | {"teacher.width": 0.125, "distill.batch_anchors": 40, "bagging.k": 38})
    assert "allowed are 1 to 38" in done.err  # a bag with all 39 others would leave no negatives
    workspace.done("scan")
    assert (workspace.root / "data/listing.parquet").exists()


def test_every_stage_compares_the_batch_with_the_processes(tmp_path, stages):
    workspace = new_workspace(tmp_path / "bingo", stages, SHORT)
    for stage in ("teacher", "bag", "report"):
        done = workspace.run(stage, BINGO_PROCESSES="3")
        assert (done.status, len(done.err.splitlines())) == (2, 2), done.err
        assert "distill.batch_anchors = 32: 3 processes" in done.err
    assert not (workspace.root / "models").exists()


def test_an_additional_rule_is_an_additional_function(monkeypatch):
    monkeypatch.setattr(limits, "_RULES", (*limits._RULES, lambda params, processes: iter(["x = 1: no"])))
    assert answer({}) == ["x = 1: no"]
