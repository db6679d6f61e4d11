"""Recipes: every row of the papers' tables exists, resolves and validates; includes; the commands list, show, use and check."""

import math
import shutil
import subprocess
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from command import bingo
from PIL import Image
from ruamel.yaml import YAML
from torch import nn

from bingo.cli.recipe import GROUPS
from bingo.images.augment import center_view, random_views
from bingo.images.draws import draw_views
from bingo.nets.backbones import build_backbone
from bingo.nets.heads import mlp_head
from bingo.params import AugmentParams, load_params, read_yaml, validate
from bingo.planning import recipes
from bingo.planning.dry_run import dry_student, dry_teacher
from bingo.planning.estimates import flops_per_anchor
from bingo.planning.limits import rule_mistakes
from bingo.planning.recipes import Recipe, explained, flattened, lay_over, read_recipe, recipe_names, replaced, speaks_of
from bingo.runtime.errors import UserError
from docs.tools.recipes import markdown

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes"
SHIPPED = read_yaml(ROOT / "params.yaml")
NAMES = recipe_names(FOLDER, parts=True)

# BINGO's ImageNet table: method, teacher, then top-1 and top-5 of ResNet-18 and of ResNet-34.
TABLE = [
    ("moco", None, (52.5, 77.0), (57.4, 81.6)),
    ("seed", "r50-200ep", (57.6, 81.8), (58.5, 82.6)),
    ("disco", "r50-200ep", (60.6, 83.7), (62.5, 85.4)),
    ("bingo", "r50-200ep", (61.4, 84.3), (63.5, 85.7)),
    ("bingo", "r50-800ep", (64.0, 85.7), (66.1, 87.2)),
    ("seed", "r152", (59.5, 83.3), (62.7, 85.8)),
    ("disco", "r152", (65.5, 86.7), (68.1, 88.6)),
    ("bingo", "r152", (65.9, 87.1), (69.1, 88.9)),
    ("seed", "r50w2", (63.0, 84.9), (65.7, 86.8)),
    ("disco", "r50w2", (65.2, 86.8), (67.6, 88.6)),
    ("bingo", "r50w2", (65.5, 87.0), (68.9, 89.0)),
]
# Other students from SwAV's R50x2, top-1: MoCo-v2, SEED, DisCo, BINGO.
SMALL = {"effb0": (42.2, 67.6, 69.1, 69.3), "mobv3": (36.3, 68.2, 58.9, 67.1)}
STUDENTS = {"r18": "resnet18", "r34": "resnet34", "effb0": "tf_efficientnet_b0", "mobv3": "mobilenetv3_large_100"}
TEACHERS = {
    "r50-200ep": ("resnet50", 1.0, "moco", "moco_v2_200ep_pretrain.pth.tar", 67.4),
    "r50-800ep": ("resnet50", 1.0, "moco", "moco_v2_800ep_pretrain.pth.tar", 71.1),
    "r152": ("resnet152", 1.0, "moco", "800-resnet152-moco-v2-checkpoint_0799.pth.tar", 74.1),
    "swav-r50": ("resnet50", 1.0, "swav", "swav_800ep_pretrain.pth.tar", 75.3),
    "swav-r50-400": ("resnet50", 1.0, "swav", "swav_400ep_bs256_pretrain.pth.tar", 74.3),  # SimReg's README links this one
    "byol-r50": ("resnet50", 1.0, "byol", "pretrain_res50x1.pth.tar", 74.3),
    "r50w2": ("resnet50", 2.0, "swav", "swav_RN50w2_400ep_pretrain.pth.tar", 77.3),  # all widths doubled: no wide_resnet50_2
}
# Figures of other tables: linear top-1, then k-NN by its k.
OTHERS = {
    "imagenet-r18-ablation-keys-momentum-relation-none": (52.2, {}),
    "imagenet-r18-ablation-keys-momentum-relation-student": (57.2, {}),
    "imagenet-r18-ablation-keys-momentum-relation-teacher": (62.2, {}),
    "imagenet-r18-ablation-keys-live-relation-none": (62.0, {}),
    "imagenet-r18-ablation-keys-live-relation-student": (62.5, {}),
    "imagenet-r18-ablation-keys-live-relation-teacher": (64.0, {}),
    "imagenet-r18-ablation-clusters-5000": (62.7, {}),
    "imagenet-r18-ablation-clusters-10000": (63.5, {}),
    "imagenet-r18-ablation-clusters-20000": (63.8, {}),
    "imagenet-r18-ablation-clusters-50000": (63.6, {}),
    "imagenet-r18-compress-2q-r50-800ep": (61.7, {1: 53.4}),
    "imagenet-r18-compress-1q-r50-800ep": (62.6, {1: 53.5}),
    "imagenet-r18-compress-2q-swav-r50": (62.4, {1: 53.7}),
    "imagenet-r18-compress-1q-swav-r50": (65.6, {1: 56.0}),
    "imagenet-r18-simreg-r50-800ep": (65.1, {1: 54.8}),
    "imagenet-r18-simreg-byol-r50": (66.8, {1: 56.7}),
    "imagenet-r18-simreg-swav-r50": (65.8, {1: 54.0}),
    "imagenet-r18-isd": (53.8, {1: 41.5, 20: 46.6}),
    "imagenet-r18-coss-r50-200ep": (62.35, {10: 53.78}),
    "imagenet-r34-coss-r50-200ep": (64.01, {10: 54.80}),
    "imagenet-effb0-coss-r50-200ep": (67.36, {10: 58.33}),
    "imagenet-effb0-bingo-r50-200ep": (63.74, {10: 54.75}),
    "imagenet-r18-seed-r50-200ep-head2048": (60.31, {}),
    "imagenet-r18-bingo-r50-200ep": (61.4, {10: 54.16}),
    "imagenet-r18-moco": (52.5, {10: 36.7}),
    "imagenet-r18-seed-r50-200ep": (57.6, {10: 50.12}),
    "imagenet-r18-disco-r50-200ep": (60.6, {10: 52.03}),
}


@cache
def recipe(name: str) -> Recipe:
    return read_recipe(FOLDER, name)


@cache
def resolved(name: str):
    document = deepcopy(SHIPPED)
    lay_over(document, recipe(name).overlay)
    return validate(document, name)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_and_part_resolves_validates_and_is_described(name):
    resolved(name)
    assert len(recipe(name).description) > 15
    assert recipe(name).about.source or not recipe(name).about.expected


def assert_row(name: str, student: str, method: str, teacher: str | None) -> None:
    params, about = resolved(name), recipe(name).about
    own = "efficientnet_b0" if (student, method) == ("effb0", "disco") else STUDENTS[student]
    assert (params.student.arch, params.student.width, params.student.stem) == (own, 1.0, "imagenet")
    assert (params.image.crop_px, params.image.resize_px, params.dataset.source) == (224, 256, "folder")
    assert params.distill.method == method
    assert (about.images.train, about.images.test) == (1281167, 50000)
    if teacher is None:
        assert (params.teacher.source, params.distill.keys) == ("random", "momentum")
        return
    arch, width, written_by, file, top1 = TEACHERS[teacher]
    assert (params.teacher.arch, params.teacher.width, params.teacher.stem) == (arch, width, "imagenet")
    assert (params.teacher.source, params.teacher.format, Path(params.teacher.checkpoint).name) == ("checkpoint", written_by, file)
    assert about.teacher.linear_top1 == top1


@pytest.mark.parametrize(("method", "teacher", "r18", "r34"), TABLE)
def test_every_row_of_the_imagenet_table_exists(method, teacher, r18, r34):
    for student, (top1, top5) in (("r18", r18), ("r34", r34)):
        name = "-".join(["imagenet", student, method, *([teacher] if teacher else [])])
        assert_row(name, student, method, teacher)
        expected = recipe(name).about.expected
        assert (expected["linear_top1"], expected["linear_top5"]) == (top1, top5)
        params = resolved(name)
        small_patches = {"r18": 400, "r34": 800}[student]  # from the released file's name, and from the caption of SEED's table
        assert params.distill.epochs == (small_patches if (method, teacher) == ("seed", "r50w2") else 200)
        assert (params.distill.lr, params.distill.batch_anchors, params.distill.weight_decay) == (0.03, 256, 1e-4)


@pytest.mark.parametrize("student", SMALL)
def test_every_row_of_the_small_students_exists(student):
    for method, top1 in zip(("moco", "seed", "disco", "bingo"), SMALL[student], strict=True):
        teacher = None if method == "moco" else "r50w2"
        name = "-".join(["imagenet", student, method, *([teacher] if teacher else [])])
        assert_row(name, student, method, teacher)
        assert recipe(name).about.expected == {"linear_top1": top1}


@pytest.mark.parametrize("name", OTHERS)
def test_every_row_of_the_other_tables_exists(name):
    top1, knn = OTHERS[name]
    expected = recipe(name).about.expected
    assert expected["linear_top1"] == top1
    found = {measure: x for measure, x in expected.items() if measure.startswith("knn")}
    weighted = {k: "_weighted" if k == 10 else "" for k in knn}  # only CoSS's table has weighted votes
    assert found == {f"knn_{k}{weighted[k]}": x for k, x in knn.items()}
    view = resolved(name).knn_eval.view(resolved(name).image)
    assert (view.resize_px, view.interpolation, view.crop_px) == ((235, "bicubic", 224) if 10 in knn else (256, "bilinear", 224))
    _, student, method, *rest = name.split("-")
    if method in ("coss", "simreg", "compress"):
        teacher = "-".join(rest).removeprefix("2q-").removeprefix("1q-")
        teacher += "-400" if (method, teacher) == ("simreg", "swav-r50") else ""
        assert_row(name, student, method, teacher)


def test_published_numbers_of_the_methods():
    bingo = resolved("imagenet-r18-bingo-r50w2").methods.bingo
    assert (bingo.terms, bingo.temperature, bingo.head_hidden, bingo.inter_warmup_epochs) == ("symmetric_mix", 0.2, 2048, 11)
    small = resolved("imagenet-effb0-bingo-r50w2")
    assert (small.methods.bingo.temperature, small.distill.weight_decay) == (0.12, 4e-5)
    for method in ("bingo-r50w2", "seed-r50w2", "moco", "coss-r50-200ep"):
        params = resolved(f"imagenet-effb0-{method}")
        assert params.student.options == {"drop_path_rate": 0.2, "drop_rate": 0.2, "batchnorm_momentum": 0.01}
        assert params.distill.weight_decay == (4e-5 if method.startswith("bingo") else 1e-4)
    disco = resolved("imagenet-effb0-disco-r50w2")
    assert (disco.student.options, disco.distill.weight_decay, disco.linear_eval.crops.lr) == ({}, 1e-4, 3.0)
    for student in ("r34", "effb0", "mobv3"):
        seed = resolved(f"imagenet-{student}-seed-r50w2")
        assert seed.distill.augment.crop_scale == seed.extract.augment.crop_scale == [0.14, 1.0]
        assert (seed.distill.epochs, seed.distill.augment.jitter, seed.linear_eval.crops.lr) == (800, [0.4, 0.4, 0.4, 0.1], 30.0)
    mobile = resolved("imagenet-mobv3-moco")
    assert (mobile.methods.moco.head_hidden, mobile.linear_eval.crops.lr) == (512, 3.0)
    assert recipe("imagenet-effb0-coss-r50-200ep").about.expected["linear_top5"] == 87.75
    assert resolved("imagenet-r34-moco").methods.moco.head_hidden == 512
    assert resolved("imagenet-mobv3-seed-r50w2").methods.seed.head_hidden == 1280  # the width of the student's features
    assert resolved("imagenet-r18-disco-r152").methods.disco.head_hidden == 2048
    assert resolved("imagenet-r18-compress-1q-r50-800ep").methods.compress.queues == 1
    assert (simreg := resolved("imagenet-r18-simreg-r50-800ep")).distill.epochs == 130
    assert (simreg.distill.keys, resolved("imagenet-r18-simreg-swav-r50").distill.keys) == ("live", "stored")
    coss = resolved("imagenet-r18-coss-r50-200ep")
    assert (coss.distill.batch_anchors, coss.bagging.k, coss.methods.coss.companions) == (64, 31, 15)
    images_of_a_gpu = {
        name: resolved(name).distill.batch_anchors // resolved(name).distill.batchnorm_groups
        for name in (*OTHERS, "imagenet-r34-bingo-r152")
    }
    others = {"coss": 16, "simreg": 64}  # their scripts use 4 GPUs
    assert images_of_a_gpu == {name: others.get(name.split("-")[2], 32) for name in images_of_a_gpu}
    student = resolved("imagenet-r18-ablation-keys-live-relation-student")
    assert (student.bagging.relation, student.baselines, student.methods.moco.queue_rows) == ("baselines/moco", ["moco"], 65536)


PAPERS = [name for name in NAMES if name.startswith("imagenet-")]
# Known for every row: without one of these, `published` is incomplete.
KNOWN = {
    "student.arch", "image.crop_px", "image.resize_px", "image.mean", "image.std",
    *(f"distill.{key}" for key in ("keys", "epochs", "batch_anchors", "lr", "drop_epochs", "hold_epochs", "sgd_momentum", "weight_decay")),
    *(f"distill.augment.{key}" for key in ("crop_scale", "jitter", "jitter_p", "gray_p", "blur_p", "flip_p")), "distill.precision",
    *(f"linear_eval.crops.{key}" for key in ("epochs", "batch_images", "lr", "drop_epochs", "weight_decay", "crop_scale", "flip_p")),
    "linear_eval.crops.init_std",
}  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
def test_every_setting_is_as_published_or_its_deviation_is_explained(name):
    """And no line explains a setting that is as published."""
    about, ours = recipe(name).about, dict(flattened(resolved(name).model_dump()))
    assert set(about.published) >= KNOWN
    assert set(about.published) <= set(ours)
    others = {key for key, value in about.published.items() if ours[key] != value}
    assert not [key for key in others if not any(speaks_of(line, key) for line in about.deviates)]
    named = [key for line in about.deviates for key in explained(line)]
    assert not [key for key in named if not any(f"{other}.".startswith(f"{key}.") for other in ours)]  # each is a key or a section
    assert not [line for line in about.deviates if explained(line) and not any(speaks_of(line, key) for key in others)]


def test_every_row_has_the_published_precision():
    """BINGO, MoCo-v2, DisCo, CompRess, SimReg and ISD are trained in float32; SEED and CoSS in float16 with autocast."""
    for name in PAPERS:
        params, published = resolved(name), recipe(name).about.published
        assert published["distill.precision"] == ("fp16" if params.distill.method in ("seed", "coss") else "fp32")
        assert any(line.startswith("distill.precision: bf16 on a GPU") for line in recipe(name).about.deviates) == (
            params.distill.precision != published["distill.precision"]
        )


MOCO_LAYER = (30.0, 100, [60, 80], 0.1)
BINGO_LAYER = (30.0, 120, None, 0.1)
UMBC_LAYER = (0.01, 40, [15, 30], 0.1)
DISCO_LAYER = (3.0, 100, [5, 10, 15, 20, 25, 30, 35, 40, 45, 60, 80], 0.5)


@pytest.mark.parametrize(
    ("name", "training", "layer"),
    [
        ("r18-bingo-r50-200ep", (0.03, 200, None, 0), BINGO_LAYER),
        ("r34-bingo-r152", (0.03, 200, None, 0), BINGO_LAYER),
        ("effb0-bingo-r50w2", (0.03, 200, None, 0), (3.0, 120, None, 0.1)),
        ("r18-ablation-keys-live-relation-student", (0.03, 200, None, 0), BINGO_LAYER),
        ("r18-moco", (0.03, 200, None, 0), MOCO_LAYER),
        ("r34-seed-r50-200ep", (0.03, 200, None, 5), MOCO_LAYER),
        ("r18-seed-r50w2", (0.03, 400, None, 5), MOCO_LAYER),
        ("r18-disco-r50-200ep", (0.03, 200, None, 0), DISCO_LAYER),
        ("r18-disco-r50w2", (0.03, 200, None, 0), (30.0, *DISCO_LAYER[1:])),
        ("effb0-disco-r50w2", (0.03, 200, None, 0), DISCO_LAYER),
        ("r18-coss-r50-200ep", (0.03, 25, None, 5), MOCO_LAYER),
        ("r18-compress-1q-swav-r50", (0.01, 130, [90, 120], 0), UMBC_LAYER),
        ("r18-compress-2q-r50-800ep", (0.01, 130, [90, 120], 0), UMBC_LAYER),
        ("r18-simreg-byol-r50", (0.05, 130, None, 0), UMBC_LAYER),
        ("r18-isd", (0.01, 200, [140, 180], 0), UMBC_LAYER),
    ],
)
def test_every_learning_rate_is_that_of_its_paper(name, training, layer):
    params = resolved(f"imagenet-{name}")
    distill, crops = params.distill, params.linear_eval.crops
    assert (distill.lr, distill.epochs, distill.drop_epochs, distill.hold_epochs) == training
    assert distill.drop_factor == (0.2 if distill.drop_epochs else 0.1)
    assert (distill.lr_warmup_epochs, crops.hold_epochs) == (0, 0)
    assert (crops.lr, crops.epochs, crops.drop_epochs, crops.drop_factor) == layer
    assert (crops.standardise, crops.weight_decay, crops.init_std) == ((True, 1e-4, None) if layer == UMBC_LAYER else (False, 0.0, 0.01))
    assert not [line for line in recipe(f"imagenet-{name}").about.deviates if line.startswith("lr: ")]


@pytest.mark.parametrize("student", ["r18", "r34", "effb0", "mobv3"])
def test_seed_has_small_crops_only_with_swavs_teacher_and_live_keys(student):
    params = resolved(f"imagenet-{student}-seed-r50w2")
    seed = params.methods.seed
    assert (seed.small_crops, seed.small_crop_px, seed.small_crop_scale) == (6, 96, [0.05, 0.14])
    for other in ("imagenet-r18-seed-r50-200ep", "keys-stored", "method-seed"):  # after the recipe with small crops
        document = params.model_dump()
        lay_over(document, recipe(other).overlay)
        assert validate(document, other).methods.seed.small_crops == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "live", "stored"),
    [
        ("bingo-r50-200ep", 48.4, 32.06),
        ("bingo-r50w2", 96.6, 32.06),
        ("seed-r50-200ep", 18.8, 10.7),
        ("seed-r50w2", 90.7, 10.7),
        ("disco-r50-200ep", 41.3, 25.0),
    ],
)
def test_keys_are_live_as_published_and_one_recipe_stores_them(name, live, stored):
    """GFLOP per anchor: for BINGO 3 (3.63 + 7.02) for the student and, if live, 2 forward passes of the teacher; and so on."""
    params = resolved(f"imagenet-r18-{name}")
    document = params.model_dump()
    lay_over(document, recipe("keys-stored").overlay)
    cached = validate(document, name)
    assert (params.distill.keys, params.extract.views) == ("live", 0)
    assert (cached.distill.keys, cached.extract.views) == ("stored", 8)
    for each, gflop in ((params, live), (cached, stored)):
        training = dry_student(each, dry_teacher(each, checkpoint=False), bank=False)
        assert flops_per_anchor(training) / 1e9 == pytest.approx(gflop, rel=0.01)
    section = {"bingo": cached.methods.bingo, "disco": cached.methods.disco}.get(cached.distill.method)
    assert section is None or section.teacher_batchnorm == "eval"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "known", "key_width"),
    [
        ("moco-r50-800", "moco-v2-r50-800", 128),
        ("swav-r50", "swav-r50-800", 128),
        ("byol-r50", "byol-r50", 128),
        ("moco-v3-r50", "moco-v3-r50-1000", 128),
        ("dinov2-s", "dinov2-s", 128),
        ("dinov2-b", "dinov2-b", 128),
    ],
)
def test_lean_rows_train_on_one_view_of_an_image(teacher, known, key_width):
    """The FLOPs of a step are those of one view: 3.63 GFLOP forward, the same for each of two gradients (without the 0.24 for the input of
    the first convolution), and the negatives. BINGO uses three views."""
    for student, arch in (("r18", "resnet18"), ("r34", "resnet34"), ("effb0", "tf_efficientnet_b0")):
        params = resolved(f"lean-{student}-{teacher}")
        assert (params.student.arch, params.teacher.name, params.teacher.key_width or key_width) == (arch, known, key_width)
        assert not recipe(f"lean-{student}-{teacher}").about.expected
    if teacher == "swav-r50":
        params = resolved(f"lean-r18-{teacher}")
        training = dry_student(params, dry_teacher(params, checkpoint=False), bank=False)
        assert flops_per_anchor(training) / 1e9 == pytest.approx(3 * 3.63 - 0.24 + 4 * 65536 * 128 / 1e9, rel=0.01)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("parts/")])
def test_a_recipe_stores_the_views_that_its_training_reads(name):
    params = resolved(name)
    section = params.methods.section(params.distill.method)
    keys = params.distill.keys == "stored" and not section.reads_features
    assert params.extract.views >= keys * (2 if params.distill.method == "disco" else 1)
    assert params.extract.views or getattr(section, "negatives", None) != "bank"


def test_in_no_row_does_the_teacher_compute_views_that_are_not_read():
    assert {resolved(name).extract.views for name in PAPERS} == {0}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("ablation-")])
def test_an_ablation_changes_neither_the_images_nor_the_budget(name):
    allowed = ("distill.method", "distill.keys", "bagging.", "extract.views", "extract.augment", "methods.bingo.", "baselines", "report.")
    assert not [key for key, _ in flattened(recipe(name).overlay) if not key.startswith(allowed)]


def test_six_relations_are_six_settings():
    chosen = set()
    for keys in ("momentum", "stored"):
        for relation in ("none", "student", "teacher"):
            params = resolved(f"ablation-keys-{keys}-relation-{relation}")
            whose = "none" if params.methods.bingo.relation == "none" else params.bagging.relation
            assert whose == {"none": "none", "student": "baselines/moco", "teacher": "teacher"}[relation]
            chosen.add((params.distill.keys, whose))
    assert len(chosen) == 6


def test_the_centre_recipe_gives_the_centre_view():
    pixels = torch.randint(0, 256, (3, 20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = load_params(ROOT / "params.yaml").image
    augment: AugmentParams = resolved("ablation-views-centre").extract.augment
    views = random_views(pixels, np.arange(3), *draw_views(augment, 5, "extract", 0, [1, 2, 3], 0), augment, image)
    torch.testing.assert_close(views, center_view(pixels, image))


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_a_deviation_is_listed_only_if_one_of_its_parameters_differs(tmp_path):
    lines = '["bagging.k, methods.seed.head_hidden: ours (published: others)", "methods.seed: more of it", "no parameter: but true"]'
    write(
        tmp_path,
        parts__a="# a\nbagging: {k: 5}\nmethods: {seed: {head_hidden: 8}}\n"
        f"about: {{published: {{bagging.k: 7, methods.seed.head_hidden: 9}}, deviates: {lines}}}\n",
        as_ours="# as ours\nincludes: [parts/a]\n",
        half="# one of two as published\nincludes: [parts/a]\nmethods: {seed: {head_hidden: 9}}\n",
        as_published="# as published\nincludes: [parts/a]\nbagging: {k: 7}\nmethods: {seed: {head_hidden: 9}}\n",
        another="# another row, of which other settings were published\nincludes: [half]\nabout: {published: {bagging.k: 5}}\n",
    )
    both, section, other = read_recipe(tmp_path, "as_ours").about.deviates
    assert explained(both) == ["bagging.k", "methods.seed.head_hidden"]
    assert (explained(section), explained(other)) == (["methods.seed"], [])
    assert read_recipe(tmp_path, "half").about.deviates == [both, other]
    assert read_recipe(tmp_path, "as_published").about.deviates == [other]
    assert read_recipe(tmp_path, "another").about.deviates == [other]
    assert read_recipe(tmp_path, "another").about.published == {"bagging.k": 5, "methods.seed.head_hidden": 9}


def test_includes_are_applied_in_order_and_before_the_recipe_itself(tmp_path):
    deviates = "about: {deviates: [%s], expected: {linear_top1: 1.0}, source: x}\n"
    write(
        tmp_path,
        parts__a="# a\nbagging: {k: 1, clusters: 1, method: knn}\n" + deviates % "one",
        parts__b="# b\nincludes: [parts/a]\nbagging: {k: 2, clusters: 2}\n" + deviates % "one, two",
        c="# c\nincludes: [parts/b, parts/a]\nbagging: {k: 3}\n",
    )
    made = read_recipe(tmp_path, "c")
    assert made.overlay.pop("report") == {"title": None, "published": {}}  # these belong to another recipe
    assert made.overlay == {"bagging": {"k": 3, "clusters": 1, "method": "knn"}}
    assert made.about.deviates == ["one", "two"]
    assert not made.about.expected  # a figure belongs to one setting and is not inherited
    assert recipe_names(tmp_path) == ["c"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("includes: [a]", ["a.yaml", "includes (a -> a)"]),
        ("includes: [parts/b]", ["includes (a -> parts/b -> a)"]),
        ("includes: [parts/bb]", ["includes parts/bb", "did you mean parts/b"]),
        ("includes: parts/b", ["includes = 'parts/b'", "list"]),
        ("about: {expected: {linear: 3.0}}", ["about.expected.linear"]),
        ("about: {expected: {linear_top1: many}}", ["about.expected.linear_top1"]),
        ("about: {note: x}", ["about.note"]),
        ("- 3", ["holds list"]),
        ("about: [1]", ["about = [1]: allowed is a section"]),
        ("about: {expected: {linear_top1: 120}}", ["about.expected.linear_top1 = 120: must be at most 100"]),
        ("about: {expected: {linear_top1: 60}}", ["figures without a source"]),
        ("about: {teacher: {note: x, linear_top1: 70, published_by: x}}", ["about.teacher.note is not a known key", "published_by"]),
        ("about: {teacher: {linear_top1: 70, published_by: x}}", ["about.teacher describes a checkpoint", "set teacher.checkpoint"]),
        ("bagging: {k: [}", ["is not YAML: ", "at line 2, column 15"]),
        ("bagging: &it {k: *it}", ["is not YAML: "]),
        ("bagging: {k: 3, k: 4}", ['found duplicate key "k"', "at line 2, column 17"]),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(tmp_path, text, said):
    write(tmp_path, a=f"# a\n{text}\n", parts__b="includes: [a]\n")
    with pytest.raises(UserError) as caught:
        read_recipe(tmp_path, "a")
    (line,) = caught.value.lines
    assert all(words in line for words in said), line
    assert "\n" not in line


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """The files of a clone that the commands need, as the current folder."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "recipes").symlink_to(FOLDER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str):
    return bingo("recipe", *arguments)


def comments_of(path):
    return [line.strip() for line in path.read_text().splitlines() if line.lstrip().startswith("#")]


METHODS = [name for name in NAMES if name.startswith("method-")]


def after(document: dict, name: str, committed: dict | None = None) -> dict:
    """The document after a recipe has replaced another one."""
    document = deepcopy(document)
    overlay = replaced(FOLDER, name, document, committed or document)
    lay_over(overlay, recipe(name).overlay)
    lay_over(document, overlay)
    return document


@pytest.mark.slow
@pytest.mark.parametrize("first", METHODS)
def test_a_method_replaces_another_one(first, monkeypatch):
    """Whatever the other method has set, with the budget of the images; and after a commit, with all settings of the method."""
    monkeypatch.setattr(recipes, "read_recipe", lambda _, name: recipe(name))  # so that each file is read only once
    base = deepcopy(SHIPPED)
    lay_over(base, {"distill": {"lr": 0.123, "epochs": 77, "batch_anchors": 96}, "bagging": {"k": 9}, "image": {"crop_px": 15}})
    left = after(base, first)
    for name in METHODS:
        alone = after(base, name)
        assert after(left, name, base) == alone, name
        committed, wanted = (dict(flattened(document)) for document in (after(left, name), alone))
        differing = {key for key, value in committed.items() if value != wanted[key]}
        assert {key for key in differing if not key.startswith("distill.")} <= {"bagging.k"}, name


def test_settings_of_the_user_are_kept_when_the_method_changes():
    own = {"distill": {"lr": 0.2, "epochs": 2}, "bagging": {"k": 9}}  # the first two are those of method-simreg and method-coss
    left = after(SHIPPED, "method-bingo-paper")
    lay_over(left, own)
    expected = after(SHIPPED, "method-seed")
    lay_over(expected, own)
    assert after(left, "method-seed", SHIPPED) == expected


def test_using_a_method_undoes_the_settings_of_another_one(clone):
    git = partial(subprocess.run, cwd=clone, check=True, capture_output=True)
    for command in ("init -q", "add params.yaml", "-c user.name=a -c user.email=a@b.c commit -qm a"):
        git(["git", *command.split()])
    text = Path("params.yaml").read_text()
    assert call("use", "method-coss").exit_code == 0
    assert call("use", "method-bingo-expected").exit_code == 0
    done = call("use", "method-bingo")
    assert "methods.bingo.terms: expected -> symmetric" in done.stdout
    assert Path("params.yaml").read_text() == text


def test_use_prints_every_change_and_keeps_the_comments(clone):
    before, comments = read_yaml("params.yaml"), comments_of(Path("params.yaml"))
    result = call("use", "imagenet-r18-bingo-r50-800ep", "--root", "/pictures")
    assert result.exit_code == 0
    assert "dataset.root: null -> /pictures" in result.stdout
    assert "image.crop_px: 16 -> 224" in result.stdout
    after = dict(flattened(read_yaml("params.yaml")))
    changed = {key for key, value in flattened(before) if after[key] != value}
    printed = {line.partition(":")[0] for line in result.stdout.splitlines() if " -> " in line}
    assert printed == changed
    assert f"{len(changed)} changes" in result.stdout
    assert len(comments) > 50
    assert comments_of(Path("params.yaml")) == comments
    assert not [line for line in comments if line in result.stdout]
    assert after["report.published"]["linear, top-1"] == "64.0 % (BINGO's ImageNet table)"
    load_params("params.yaml")


BREAKING = {
    "behind a list that a tool has made a block": ("baselines: [moco]\n", "baselines:\n- moco  # remark\n\n# another\n"),
    "behind a list of one line": ("baselines: [moco]\n", "baselines: [moco]   # remark\n\n\n# another\n"),
    "between the members of a list": ("baselines: [moco]\n", "baselines:\n  # remark\n  - moco\n  # another\n"),
    "behind a section": ("report:\n", "report:  # remark\n"),
    "in a list of several lines": ("baselines: [moco]\n", "baselines: [  # remark\n  moco,  # another\n  ]\n"),
    "behind every value": ("\n", "\n"),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", BREAKING)
@pytest.mark.parametrize("recipe", ["imagenet-r18-bingo-r50-200ep", "downstream-digits"])
def test_use_survives_comments_at_any_place(clone, place, recipe):
    """The first recipe empties `baselines`; the second fills sections with the user's own keys."""
    before, after = BREAKING[place]
    text = Path("params.yaml").read_text()
    assert before in text
    text = text.replace(before, after)
    if place == "behind every value":
        text = "\n".join(line if line.endswith(":") or line.lstrip().startswith("#") else f"{line}  # remark" for line in text.split("\n"))
    Path("params.yaml").write_text(text)
    expected = read_yaml("params.yaml")
    lay_over(expected, read_recipe(FOLDER, recipe).overlay)
    result = call("use", recipe)
    assert result.exit_code == 0, result.stderr
    assert read_yaml("params.yaml") == expected
    assert len(result.stderr.splitlines()) <= 1


@pytest.mark.slow
def test_use_keeps_all_comments_of_the_shipped_layout_however_often(clone):
    remarks = [line for line in Path("params.yaml").read_text().splitlines() if line.lstrip().startswith("#")]
    for name in ("imagenet-r18-bingo-r50-200ep", "downstream-digits", "coco-fpn", "method-moco", "imagenet-mobv3-moco"):
        result = call("use", name)
        assert (result.exit_code, result.stderr) == (0, "")
        assert [line for line in Path("params.yaml").read_text().splitlines() if line.lstrip().startswith("#")] == remarks


def test_list_shows_broken_recipes_among_the_others(clone):
    (clone / "recipes").unlink()
    broken = {
        "no_yaml": "# x\nseed: [1\n",
        "unknown_key": "# x\nbagging: {kk: 5}\n",
        "wrong_value": "# x\nbagging: {k: five}\n",
        "no_include": "# x\nincludes: [absent]\n",
        "in_a_circle": "# x\nincludes: [in_a_circle]\n",
        "no_sections": "# x\n- 1\n",
        "wrong_about": "# x\nabout: {expected: {linear_top9: 1}}\n",
        "includes_broken": "# x\nincludes: [no_yaml]\n",
        "twice": "# x\nseed: 1\nseed: 2\n",
    }
    write(clone / "recipes", whole="# a whole one\nbagging: {k: 7}\n", **broken)
    (clone / "recipes/no_text.yaml").write_bytes(b"# \xff\xfe\nseed: 1\n")
    result = call("list")
    assert (result.exit_code, result.stderr) == (2, "")
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith("  ")}
    assert set(lines) == {*broken, "no_text", "whole"}
    assert lines["whole"].endswith("a whole one")
    assert all(" BROKEN " in line for name, line in lines.items() if name != "whole")
    assert "bagging.kk is not a known key" in lines["unknown_key"]
    assert "bagging.k = 'five': must be" in lines["wrong_value"]
    for name in broken:
        shown = call("show", name)
        assert shown.exit_code == 2, name
    for path in (clone / "recipes").glob("*.yaml"):
        if path.stem != "whole":
            path.unlink()
    assert call("list").exit_code == 0


def test_a_second_row_removes_the_figures_of_the_first(clone):
    call("use", "imagenet-r18-bingo-r50-200ep")
    assert load_params("params.yaml").report.published["k-NN, k = 10, weighted votes"].startswith("54.16 %")
    call("use", "imagenet-r18-simreg-r50-800ep")
    assert set(load_params("params.yaml").report.published) == {"linear, top-1", "k-NN, k = 1"}
    call("use", "ablation-k-1")
    assert load_params("params.yaml").bagging.k == 1


def test_an_unknown_recipe_is_one_line_and_changes_nothing(clone):
    before = Path("params.yaml").read_bytes()
    result = call("use", "imagenet-r18-bing-r50-800ep")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "did you mean imagenet-r18-bingo-r50-800ep" in result.stderr
    assert call("use", "../params").exit_code == 2
    assert Path("params.yaml").read_bytes() == before


@pytest.mark.slow
def test_list_groups_recipes_and_shows_their_figures(clone):
    text = call("list").stdout
    assert [name for name in NAMES if name.startswith("parts/") and name in text] == []
    assert all(f"  {name} " in text for name in NAMES if not name.startswith("parts/"))
    (line,) = (line for line in text.splitlines() if "imagenet-r34-bingo-r152 " in line)
    assert "69.1 / 88.9" in line
    headings = [line for line in text.splitlines() if not line.startswith(" ")]
    assert headings[0].startswith("Methods")
    assert headings[-2] == f"{GROUPS['']}:"
    assert text.index("ablation-k-5 ") < text.index("ablation-k-10 ")
    assert "parts/imagenet " in call("list", "--all").stdout


@pytest.mark.slow
def test_show_lists_the_settings_of_a_recipe_and_the_hours_of_the_run(clone, monkeypatch):
    texts = {}
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        texts[gpu] = call("show", "digits-short").stdout
    assert "report.gallery_anchors: 4" in texts[False]
    assert "report.title" not in texts[False]
    assert "report.published" not in texts[False]
    (line,) = set(texts[False].splitlines()) - set(texts[True].splitlines())
    assert "no GPU" in line
    assert "CPU" in line
    assert " 0.0 " not in line  # a short run is given in minutes or seconds


@pytest.mark.slow
def test_show_prints_the_file_its_settings_and_its_cost(clone):
    text = call("show", "imagenet-r18-simreg-swav-r50").stdout
    assert (FOLDER / "imagenet-r18-simreg-swav-r50.yaml").read_text() in text
    assert "  methods.simreg.head_hidden: 1024\n" in text
    assert "  dataset.store_px: null\n" in text
    assert "deviates: distill.precision: " in text
    # three times ResNet-18 except the images' gradient in its first convolution (7 x 7, 112 x 112 places), and a head of four layers
    by_hand = 3 * 3.627122688 - 2 * 64 * 3 * 49 * 112**2 / 1e9 + 6 * (3 * 512 * 1024 + 1024 * 2048) / 1e9
    assert f"FLOPs: {by_hand:.4g} GFLOP per anchor" in text
    assert f"embeddings {1331167 * 2048 * 2 / 1e9:.1f} GB" in text


def test_the_page_of_the_docs_is_up_to_date():
    way_out = "what recipes set has changed: python -m docs.tools.recipes > docs/recipes.md"
    assert (ROOT / "docs/recipes.md").read_text() == markdown(FOLDER, SHIPPED), way_out


def test_the_page_has_every_row_with_published_values_beside_ours():
    lines = markdown(FOLDER, SHIPPED).splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}
    assert {f"imagenet-{name}" for name in rows} - {"imagenet-Recipe", "imagenet----", "imagenet-shared by all"} == set(PAPERS)
    moco = rows["r18-moco"]
    assert "| arch resnet18, drop_path_rate 0.0" in moco
    assert " epochs 200, " in moco
    assert "precision **auto** (fp32)" in moco
    assert "keys momentum" in moco
    assert moco.count("**") == 2  # one value differs
    for line in rows.values():
        assert len(line.split(" | ")) == 10
    numbers = [int(number) for number in moco.removesuffix(" |").rpartition(" | ")[2].split(", ")]
    reasons = [next(line for line in lines if line.startswith(f"{number}. ")) for number in numbers]
    assert [reason.partition(". ")[2] for reason in reasons] == recipe("imagenet-r18-moco").about.deviates
    isd = rows["r18-isd"]
    assert "precision **auto** (fp32)" in isd
    assert "standardise true" in isd
    assert "epochs 40, drop_epochs [15, 30]" in isd
    assert "sgd_momentum 0.9" in rows["shared by all"]
    assert "sgd_momentum" not in isd


@pytest.mark.slow
def test_check_of_the_shipped_parameters_finds_nothing_missing(clone):
    result = call("check")
    assert result.exit_code == 0, result.stdout
    assert "5,752 to train on and 1,436 to test on" in result.stdout
    assert "missing" not in result.stdout
    assert {path.name for path in clone.iterdir()} == {"params.yaml", "recipes"}


def test_the_coco_recipes_have_detectron2s_settings(clone):
    """From mask_rcnn_R_50_FPN_1x and _3x's family: 16 images per step, 90k and 180k steps, short sides 640 to 800."""
    assert (resolved("coco-fpn").transfer_coco.runs, resolved("coco-c4").transfer_coco.runs) == (["fpn-1x", "fpn-2x"], ["c4-2x"])
    for name in ("coco-fpn", "coco-c4"):
        coco = resolved(name).transfer_coco
        assert coco.schedules == {"1x": [60000, 80000, 90000], "2x": [120000, 160000, 180000]}
        assert (coco.batch_images, coco.lr, coco.lr_warmup_steps, coco.sgd_momentum, coco.weight_decay) == (16, 0.02, 1000, 0.9, 1e-4)
        assert (coco.min_side_px, coco.max_side_px, coco.test_min_side_px) == (list(range(640, 801, 32)), 1333, 800)
        assert coco.sync_batchnorm
    for name in ("imagenet-r18-bingo-r50-800ep", "coco-fpn"):
        assert call("use", name).exit_code == 0
    params = load_params("params.yaml")
    assert (params.student.arch, params.student.stem, params.transfer_coco.root) == ("resnet18", "imagenet", "data/coco")


@pytest.mark.slow
def test_check_names_missing_files_of_coco_and_an_unusable_student(clone):
    overlay = "# x\nstudent: {arch: resnet18, width: 0.125, stem: %s}\ntransfer_coco: {runs: [fpn-1x], root: coco}\n"
    (clone / "recipes").unlink()
    write(clone / "recipes", fits=overlay % "imagenet", small=overlay % "small")
    (clone / "coco/val2017").mkdir(parents=True)
    (line,) = [line for line in call("check", "fits").stdout.splitlines() if "coco" in line]
    missing = "no train2017, no annotations/instances_train2017.json, no annotations/instances_val2017.json"
    assert line.startswith(f"missing: transfer_coco.root = coco: there is {missing}; COCO 2017 is published by cocodataset.org")
    result = call("check", "small")
    assert result.exit_code == 2
    assert "student.stem = small: its feature maps are too large" in result.output


@pytest.mark.slow
def test_check_names_missing_files(clone):
    before = Path("params.yaml").read_bytes()
    result = call("check", "imagenet-mobv3-moco")
    assert result.exit_code == 2
    assert [line for line in result.stdout.splitlines() if line.startswith("missing")] == [
        "missing: dataset.root = data/imagenet: the folder does not exist; 1,281,167 train and 50,000 test images are published by "
        "image-net.org (ILSVRC 2012), as train/CLASS/*.JPEG and val/CLASS/*.JPEG"
    ]
    assert "student: mobilenetv3_large_100 x 1 at 224 px, 4.2 M parameters" in result.stdout
    assert Path("params.yaml").read_bytes() == before


@pytest.mark.slow
def test_check_reads_an_existing_checkpoint_and_images(clone):
    """A fabricated checkpoint in MoCo's layout, and a folder with as many images as a batch of the recipe, 256."""
    query = nn.Module()
    query.encoder_q = build_backbone("resnet50", 1.0, "imagenet", 0)
    query.encoder_q.fc = mlp_head([2048, 2048, 128], 0)
    path = clone / "data/teachers/moco_v2_800ep_pretrain.pth.tar"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in query.state_dict().items()}, "epoch": 800}, path)
    for place in (*(f"train/{'ab'[i % 2]}/{i}" for i in range(256)), "val/b/4"):
        file = clone / f"data/imagenet/{place}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(file)
    result = call("check", "imagenet-r18-bingo-r50-800ep")
    assert result.exit_code == 0, result.output
    assert "features 2048, keys 128; read from data/teachers/moco_v2_800ep_pretrain.pth.tar" in result.stdout
    assert "256 to train on and 1 to test on" in result.stdout
    assert "FLOPs: 48.43 GFLOP per anchor in a training step, 8.183 GFLOP per image in the teacher, 3.627" in result.stdout
    assert "step: bingo on 2 anchors of synthetic images: loss " in result.stdout

    path.write_bytes(b"no checkpoint")
    result = call("check", "imagenet-r18-bingo-r50-800ep")
    assert result.exit_code == 2
    assert "moco_v2_800ep_pretrain.pth.tar: is not a checkpoint" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ({"source": "folder"}, {"distill.batch_anchors = 6:", "bagging.k = 5:"}),
        (
            {"source": "folder", "train_images": 6, "test_images": 2},
            {"dataset.train_images = 6:", "distill.batch_anchors = 6:", "bagging.k = 5:"},
        ),
        (
            {"source": "folder", "train_images": 4, "test_images": 3},
            {"dataset.test_images = 3:", "distill.batch_anchors = 6:", "bagging.k = 5:"},
        ),
        ({"train_images": 5753}, {"dataset.train_images = 5753:"}),
        ({"source": "cifar10", "root": "cifar", "test_images": 10_001}, {"dataset.test_images = 10001:"}),
        ({"train_images": 5}, {"distill.batch_anchors = 6:", "bagging.k = 5:"}),
    ],
)
def test_check_names_every_number_that_the_images_are_too_few_for(clone, dataset, expected):
    """Five train and two test images in the folder: everything that `scan` would refuse is refused."""
    for place in (*(f"train/{i}" for i in range(5)), "val/5", "val/6"):
        (clone / "photos" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(clone / f"photos/{place}.jpg")
    raw = read_yaml(Path("params.yaml"))
    raw["dataset"] |= {"root": "photos", **dataset}
    raw["teacher"] |= {"source": "random"}
    raw["distill"]["batch_anchors"] = 6
    with open("params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(raw, file)
    result = call("check")
    assert result.exit_code == 2
    assert {" ".join(line.split()[1:4]) for line in result.stderr.splitlines()} == expected


def test_check_reports_limits_too_few_images_and_missing_files_together(clone):
    raw = read_yaml(Path("params.yaml"))
    raw["dataset"] |= {"train_images": 9000, "test_images": 9000}
    raw["teacher"] |= {"source": "timm", "width": 0.25, "checkpoint": "gone.pt"}
    raw["distill"]["batch_anchors"], raw["student"]["width"] = 8000, 0.3
    with open("params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(raw, file)
    result = call("check")
    assert (result.exit_code, result.stdout) == (2, "")
    keys = [line.removeprefix("error: ").split(" = ")[0] for line in result.stderr.splitlines()]
    assert keys == [
        "methods.moco.queue_rows",
        "student.width",
        "dataset.train_images",
        "dataset.test_images",
        "distill.batch_anchors",
        "teacher.checkpoint",
    ]


def test_few_labels_and_transfer_as_published():
    semi = resolved("downstream-imagenet-semi").semi_eval
    rates = {name: (split.percent, split.trunk_lr, split.head_lr, split.linear_lr) for name, split in semi.splits.items()}
    assert rates == {"percent_1": (1.0, 0.02, 5.0, 3.0), "percent_10": (10.0, 0.01, 0.2, 3.0)}  # SwAV's eval_semisup.py; DisCo's lr 3
    assert (semi.finetune.epochs, semi.finetune.drop_epochs, semi.finetune.drop_factor) == (20, [12, 16], 0.2)
    assert (semi.linear.epochs, semi.linear.drop_epochs, semi.linear.drop_factor) == (100, [60, 80], 0.5)
    transfer = resolved("downstream-imagenet-cifar").transfer
    assert [item.source for item in transfer.datasets.values()] == ["cifar10", "cifar100"]
    assert (transfer.linear.lr, transfer.linear.epochs, transfer.linear.drop_epochs, transfer.resized_px) == (3.0, 200, [], 224)
    assert transfer.linear.batch_images == semi.linear.batch_images == semi.finetune.batch_images == 256
    assert semi.crop_scale == transfer.crop_scale == [0.08, 1.0]
    assert transfer.interpolation == "bicubic"
    assert not recipe("downstream-imagenet-cifar").about.deviates


@pytest.mark.slow
@pytest.mark.parametrize("committed", [b"<<<<<<< HEAD\nseed: 0\n", b"- 1\n", b"seed: !own 1\n", b"seed: \xff\n", b"words\n"])
def test_with_an_unreadable_committed_file_nothing_is_undone(clone, committed):
    good = Path("params.yaml").read_bytes()
    Path("params.yaml").write_bytes(committed)
    for command in ("init --quiet", "add params.yaml", "-c user.name=a -c user.email=a@b commit --quiet -m broken"):
        subprocess.run(["git", *command.split()], check=True)
    Path("params.yaml").write_bytes(good)
    result = call("use", "method-seed")
    assert result.exit_code == 0, result.output
    assert load_params("params.yaml").distill.method == "seed"


def test_sections_with_the_users_own_keys_are_replaced_as_a_whole(clone):
    assert call("use", "downstream-digits").exit_code == 0
    assert set(load_params("params.yaml").transfer.datasets) == {"digits_24px"}
    for name in ("imagenet-r18-bingo-r50-200ep", "downstream-imagenet-semi", "downstream-imagenet-cifar"):
        assert call("use", name).exit_code == 0
    params = load_params("params.yaml")
    assert set(params.transfer.datasets) == {"cifar10", "cifar100"}
    assert params.semi_eval.splits["percent_1"].list_file == "data/simclr/1percent.txt"
    assert (params.student.arch, params.distill.epochs) == ("resnet18", 200)


@pytest.mark.slow
def test_check_names_missing_lists_and_transfer_sets(clone):
    call("use", "downstream-imagenet-semi")
    params = YAML(typ="safe", pure=True).load(Path("params.yaml").read_text())
    photos = {"source": "folder", "root": "photos", "store_px": None, "train_images": None, "test_images": None}
    params["bagging"]["search"] = "cuvs"
    params["transfer"]["datasets"] = {"photos": photos, "cifar10": {**photos, "source": "cifar10", "root": "cifar", "store_px": 32}}
    with open("params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(params, file)
    Path("data/simclr").mkdir(parents=True)
    Path("data/simclr/10percent.txt").write_text("a\n")
    result = call("check")
    assert result.exit_code == 2
    assert [line for line in result.stdout.splitlines() if line.startswith("missing")] == [
        "missing: bagging.search = cuvs: cuVS is not installed; pip install cuvs-cu12 or cuvs-cu13, as the driver's CUDA, or set it to ivf",
        "missing: semi_eval.splits.percent_1.list_file = data/simclr/1percent.txt: the file does not exist; "
        "give the path of the list, or null to draw the labels",
        "missing: transfer.datasets.photos.root = photos: the folder does not exist",
    ]


def test_sections_that_share_an_anchor_are_written_separately(clone):
    """Two sections that share a YAML anchor are written as two."""
    call("use", "imagenet-r18-compress-2q-r50-800ep")
    assert "&" not in "".join(line.partition("#")[0] for line in Path("params.yaml").read_text().splitlines())
    text = Path("params.yaml").read_text()
    params = YAML(typ="safe", pure=True).load(text)
    assert params["distill"]["augment"] == params["extract"]["augment"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("method-", "ablation-"))])
def test_every_method_and_ablation_takes_a_step(name):
    params = resolved(name)
    terms = dry_student(params, dry_teacher(params, checkpoint=False)).step()
    assert all(math.isfinite(value) for value in terms.values())


@pytest.mark.parametrize(("recipe_name", "key_width"), [("imagenet-r18-simreg-byol-r50", 2048), ("imagenet-r18-moco", 512)])
def test_the_feature_of_a_teacher_without_a_head_is_its_key(recipe_name, key_width):
    teacher = dry_teacher(resolved(recipe_name), checkpoint=False)
    assert teacher.metadata["key_width"] == key_width
    assert teacher.keys(torch.zeros(1, 3, 32, 32)).shape == (1, key_width)


@pytest.mark.slow
def test_figures_and_title_are_removed_by_another_row_but_kept_by_evaluations():
    row = read_recipe(FOLDER, "imagenet-r18-bingo-r50-800ep")
    for name in recipe_names(FOLDER):
        laid = {"report": {"title": "Mine", "published": {}, "gallery_anchors": 12}}
        lay_over(laid, row.overlay)
        recipe = read_recipe(FOLDER, name)
        lay_over(laid, recipe.overlay)
        if recipe.about.expected:
            assert laid["report"]["title"] == recipe.description
        elif name.startswith(("downstream-", "coco-")):
            assert laid["report"] == {"gallery_anchors": 12} | row.overlay["report"]
        else:
            assert laid["report"]["title"] is None
            assert laid["report"]["published"] == {}


@pytest.mark.slow
def test_any_recipe_can_be_applied_after_any_other():
    """A recipe that sets epochs sets the whole schedule, because the rest of an earlier one would not fit."""
    shipped, names = read_yaml(ROOT / "params.yaml"), recipe_names(ROOT / "recipes")
    overlays = {name: read_recipe(ROOT / "recipes", name).overlay for name in names}
    refused = []
    for first in names:
        for second in names:
            document = deepcopy(shipped)
            for name in (first, second):
                lay_over(document, deepcopy(overlays[name]))
            try:
                lines = rule_mistakes(validate(document, "params.yaml"), processes=1)
            except UserError as error:
                lines = error.lines
            refused += [(first, second, line) for line in lines]
    assert not refused
