"""`bingo init`: its view of a folder; estimated times compared with sums by hand; chosen parameters within every limit."""

from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bingo.nets.backbones import build_backbone
from bingo.params import read_yaml, validate
from bingo.planning.first_params import (
    ChosenTeacher,
    Network,
    Pace,
    Plan,
    batch_anchors,
    crops_for,
    fit,
    network_flops,
    overlay,
    split_counts,
    timed,
)
from bingo.planning.limits import batch_mistakes, rule_mistakes
from bingo.planning.look import Look, look_at
from bingo.planning.recipes import flattened, lay_over, read_recipe, recipe_names
from bingo.runtime.errors import UserError

PHOTOS = Look(900, 100, (), 200, (300, 500, 4000), 3, (), 0.01, (), "folder")
SLOW = Pace(teacher_flops=8e10, inference_flops=1e11, training_flops=5e10, images=200.0, search_flops=4e10, layer_seconds=(5e-5, 2e-6))
OWN, DINO = (
    ChosenTeacher(None),
    ChosenTeacher("dinov2-s", Network("vit_small_patch14_dinov2", 1.0, "imagenet"), None, 224, 12.25, key_width=384),
)


@cache
def shipped() -> dict:
    return read_yaml(Path("params.yaml"))


def test_the_content_of_a_folder_is_found(tmp_path):
    random = np.random.default_rng(0)
    for i, (height, width) in enumerate([(40, 60), (80, 50), (30, 30), (200, 90)]):
        folder = tmp_path / ("train" if i else "val") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels[..., 0] if i == 3 else pixels).save(folder / f"{i}.png")
    for name in ("train/a/0.png", "train/b/9.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    look = look_at(str(tmp_path), follow_links=False)
    assert (look.train, look.test, look.classes, look.sampled) == (3, 1, ("a", "b"), 6)
    assert look.short_px == (30, 45, 90)
    assert look.gray == 1
    assert {*look.unreadable} == {"train/a/0.png", "train/b/9.jpg"}
    for spoilt in ("val/a/0.png", "train/b/1.png", "train/b/3.png"):  # no test image is left; then one train image; then none at all
        (tmp_path / spoilt).write_bytes(b"")
        with pytest.raises(UserError, match="FOLDER = "):
            look_at(str(tmp_path), follow_links=False)
        if spoilt.startswith("val"):
            Image.fromarray(pixels).save(tmp_path / spoilt)


def test_the_number_of_unreadable_files_in_a_large_folder_is_estimated(tmp_path):
    readable_N = np.random.default_rng(0).random(800) < 0.75
    for i in range(800):
        path = tmp_path / f"{i:03}.png"
        if readable_N[i]:
            Image.new("RGB", (9, 9)).save(path)
        else:
            path.write_bytes(b"no image")
    look = look_at(str(tmp_path), follow_links=False)
    assert look.sampled == 200
    assert look.train == pytest.approx(readable_N.sum(), abs=60)


@pytest.mark.parametrize(("train", "test", "expected"), [(9, 0, (9, 0)), (38, 0, (31, 7)), (10_000, 0, (9000, 1000)), (80, 5, (80, 5))])
def test_a_part_is_held_out_if_there_is_no_test_split(train, test, expected):
    assert split_counts(replace(PHOTOS, train=train, test=test)) == expected


def test_the_time_is_the_sum_of_its_terms():
    student = Network("resnet18", 1.0, "imagenet")
    plan = timed(Plan(student, 128, 224, 2, 900, 100, 20), PHOTOS, DINO, SLOW)
    flops = network_flops(student, 128)
    assert flops == pytest.approx(2 * 1.814e9 * (128 / 224) ** 2, rel=0.01)  # of ResNet-18's published multiply-adds
    passes = 900 * 3 + 100  # once as stored centre views, twice as views
    passes += 900  # to find the principal components
    passes += 900 + 100  # the untrained teacher
    assert plan.seconds["scan"] == 1000 / 200
    assert plan.seconds["teacher"] == pytest.approx(passes * (12.25e9 / 8e10 + 1 / 200))
    probes = 5 * 1000 * (flops / 1e11 + 1 / 200)
    assert plan.seconds["student"] == pytest.approx(20 * 900 * (3.3 * flops / 5e10 + 1 / 200) + probes)
    searched = 900 + 100 + 900 + 2 * 900  # all rows, test rows, and samples: for near-duplicates, and by each of two views
    assert plan.seconds["bags"] == pytest.approx(2 * 900 * 384 * searched / 4e10)
    half = timed(replace(plan, teacher_px=112), PHOTOS, DINO, SLOW)
    assert half.seconds["teacher"] == pytest.approx(passes * (12.25e9 / 4 / 8e10 + 1 / 200))


@pytest.mark.parametrize("classes", [(), ("a", "b")], ids=["no labels", "labels"])
@pytest.mark.parametrize(("short_px", "pixels"), [((32,) * 3, 3 * 32**2), ((300, 500, 4000), 3 * 16**2)], ids=["small", "photographs"])
def test_the_time_of_evaluations_is_the_sum_over_the_networks(short_px, pixels, classes):
    """By a loop over student, untrained network, pixels and teacher, whose features have widths of 512, 512, `pixels` and 384."""
    look, student = replace(PHOTOS, short_px=short_px, classes=classes), Network("resnet18", 1.0, "imagenet")
    plan, flops = timed(Plan(student, 32, 224, 1, 900, 3000, 20), look, DINO, SLOW), network_flops(student, 32)
    decoding = 0 if short_px[1] == 32 else 1 / 200
    seconds = 0.0
    for width, passes, is_teacher in ((512, 1, False), (512, 1, False), (pixels, 0, False), (384, 0, True)):
        forward = 3900 * (passes * flops / 1e11 + (not is_teacher) * decoding)
        seconds += forward * (2 if classes else 1)
        if classes:
            seconds += 3900 * (5e-5 + 2e-6 * width)
        seconds += 2 * 3000 * 900 * width / 4e10
        if not is_teacher:  # its neighbours beside those of the teacher, then those of 2,000 images once more
            seconds += 2 * 900 * (3000 * 384 + 2000 * (width + 384)) / 4e10
    assert plan.seconds["evaluations"] == pytest.approx(seconds)
    assert timed(replace(plan, test_images=0), look, DINO, SLOW).seconds["evaluations"] == 0


def test_bags_of_many_images_are_searched_by_lists():
    plan = Plan(Network("resnet18", 1.0, "imagenet"), 128, 224, 1, 1_000_000, 0, 20)
    lists, rows = 4000, 1_000_000
    cosines = (10 * 64 * lists + 2 * rows) * lists  # K-means on 64 rows of each list, then assignments of all rows and queries
    cosines += rows * 64 * (rows / lists) + 1000 * rows  # 64 lists of each row; the recall of 1,000 rows
    found = timed(plan, PHOTOS, DINO, SLOW).seconds["bags"]
    assert found == pytest.approx(2 * 384 * (cosines + 1000 * rows) / 4e10)


@pytest.mark.parametrize("teacher", [OWN, DINO], ids=["pretrained", "named"])
@pytest.mark.parametrize(
    "look",
    [
        pytest.param(PHOTOS, id="photographs", marks=pytest.mark.slow),
        pytest.param(replace(PHOTOS, train=60_000, short_px=(32,) * 3), id="small"),
    ],
)
def test_more_time_never_reduces_a_run_and_plans_fit_the_time(look, teacher):
    plans = [fit(look, teacher, None, SLOW, minutes) for minutes in (3, 10, 30, 100, 1000, float("inf"))]
    for minutes, plan in zip((10, 30, 100, 1000, float("inf")), plans[1:], strict=True):
        assert plan.minutes <= minutes or plan == plans[0]
    assert [plan.train_images for plan in plans] == sorted(plan.train_images for plan in plans)
    assert [plan.student.width for plan in plans] == sorted(plan.student.width for plan in plans)
    assert (plans[-1].train_images, plans[-1].views, plans[-1].epochs) == (split_counts(look)[0], 4, 200)


@pytest.mark.parametrize(("teacher_m", "width"), [(22.0, 1.0), (11.2, 1.0), (11.1, 0.5), (3.4, 0.5), (2.7, 0.25), (0.1, 0.25)])
def test_the_student_is_smaller_than_its_teacher(teacher_m, width):
    """torchvision's ResNet-18 has 11.18 million parameters without its last layer; widths of 1/2 and 1/4 have 2.80 and 0.70 million."""
    plan = fit(PHOTOS, replace(DINO, parameters_m=teacher_m), None, SLOW, float("inf"))
    assert plan.student == Network("resnet18", width, "imagenet")


@pytest.mark.parametrize(("train", "test", "median_px"), [*product([3, 10, 38, 500, 20_000, 1_281_167], [0, 50], [8, 64, 90, 3000])])
def test_chosen_parameters_are_within_all_limits(train, test, median_px):
    look = replace(PHOTOS, train=train, test=test, short_px=(median_px, median_px, median_px))
    for teacher, minutes in product((OWN, DINO), (2, 60)):
        plan = fit(look, teacher, None, SLOW, minutes)
        document = deepcopy(shipped())
        part = "small-photographs" if median_px <= 64 else "photographs"
        lay_over(document, read_recipe(Path("recipes"), f"parts/{part}").overlay)
        lay_over(document, overlay(look, plan, teacher, "photos", on_gpu=False))
        params = validate(document, "params.yaml")
        assert rule_mistakes(params, 1) + batch_mistakes(params, plan.train_images) == []
        assert params.image.crop_px <= max(median_px, 8)
        tests = params.dataset.test_images if params.dataset.test_images is not None else test
        assert tests == (
            min(split_counts(look)[1], max(1000, plan.train_images // 5)) if params.dataset.train_images else split_counts(look)[1]
        )


@pytest.mark.parametrize(("median_px", "views"), [(32, "small_photographs"), (500, "photographs")])
def test_the_training_is_that_of_the_lean_recipes(median_px, views):
    """Compared with the row of ImageNet with the same teacher, which sets these values itself."""
    look = replace(PHOTOS, train=20_000, short_px=(median_px,) * 3)
    document, lean = deepcopy(shipped()), deepcopy(shipped())
    lay_over(lean, read_recipe(Path("recipes"), "lean-r18-dinov2-s").overlay)
    part = "small-photographs" if median_px <= 64 else "photographs"
    lay_over(document, read_recipe(Path("recipes"), f"parts/{part}").overlay)
    lay_over(document, overlay(look, fit(look, DINO, None, SLOW, 60), DINO, "photos", on_gpu=False))
    for key in ("terms", "view_coupling", "anchor_views", "relation", "pair_weights"):
        assert document["methods"]["bingo"][key] == lean["methods"]["bingo"][key], key
    assert document["teacher"]["key_width"] == lean["teacher"]["key_width"] == 128
    for stage in ("extract", "distill"):
        assert document[stage]["augment"] == lean[stage]["augment"] | {"name": views}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("train", "batch"), [(500, 64), (20_000, 256), (31, 8)])
@pytest.mark.parametrize(("median_px", "started", "of_64"), [(32, False, 0.2), (32, True, 0.06), (500, False, 0.06)])
def test_learning_rates_are_proportional_to_the_batch(median_px, started, of_64, train, batch, processes):
    look = replace(PHOTOS, train=train, test=50, short_px=(median_px,) * 3)
    found = overlay(look, fit(look, OWN, None, SLOW, float("inf")), OWN, "photos", False, processes, started)
    assert found["distill"]["lr"] == pytest.approx(of_64 * batch / 64, abs=1e-4)
    assert found["teacher"]["pretrain"]["lr"] == pytest.approx(0.06 * batch / 64, abs=1e-4)


@pytest.mark.parametrize(("train", "of_teacher", "expected"), [(20_000, 384, 128), (20_000, 128, None), (129, 384, None), (130, 384, 128)])
def test_keys_are_narrowed_if_there_are_as_many_components(train, of_teacher, expected):
    look, teacher = replace(PHOTOS, train=train), replace(DINO, key_width=of_teacher)
    assert overlay(look, fit(look, teacher, None, SLOW, 60), teacher, "photos", on_gpu=False)["teacher"]["key_width"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "torchvision/resnet18", pytest.param("inception_v3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("median_px", [1, 90])
def test_the_student_accepts_the_crops(arch, median_px):
    look, student = replace(PHOTOS, short_px=(1, median_px, 4000)), Network(arch, 1.0, "imagenet")
    net = build_backbone(arch, 1.0, "imagenet", 0).eval()
    crops_px = crops_for(look, student)
    assert crops_px
    for crop_px in crops_px:
        assert net(torch.zeros(1, 3, crop_px, crop_px)).shape == (1, net.feature_width)
    assert {fit(look, OWN, student, SLOW, minutes).crop_px for minutes in (2, float("inf"))} <= {*crops_px}


def test_a_student_that_cannot_be_built_is_reported():
    with pytest.raises(UserError, match="resnet8"):
        crops_for(PHOTOS, Network("resnet8", 1.0, "imagenet"))


@pytest.mark.parametrize("processes", [1, 3, 8])
@pytest.mark.parametrize("train", [3, 40, 20_000])
def test_processes_can_share_a_batch(train, processes):
    batch = batch_anchors(train, processes)
    assert batch % processes == 0
    assert batch // processes >= 1
    assert batch <= max(batch_anchors(train), processes)


@pytest.mark.parametrize(("train", "expected"), [(3, 2), (31, 8), (500, 64), (19_999, 64), (20_000, 256)])
def test_a_batch_leaves_three_steps(train, expected):
    assert batch_anchors(train) == expected


# Not used by a run of init: other methods, evaluations that are off, moving-average keys, other kinds of bags.
UNREAD = (
    "methods.",
    "linear_eval.crops.",
    "semi_eval.",
    "transfer.",
    "transfer_coco.",
    "dataset.placement",
    "bagging.clusters",
    "report.gallery",
)
UNREAD_OF_BINGO = ("methods.bingo.key_momentum", "methods.bingo.teacher_batchnorm", "methods.bingo.key_width", "methods.bingo.queue_push")


@pytest.mark.slow
def test_settings_of_an_earlier_recipe_do_not_change_what_init_chooses():
    look = replace(PHOTOS, short_px=(32, 32, 32))

    def chosen(document: dict, teacher: ChosenTeacher) -> dict:
        document = deepcopy(document)
        lay_over(document, read_recipe(Path("recipes"), "parts/small-photographs").overlay)
        lay_over(document, overlay(look, fit(look, teacher, None, SLOW, 60), teacher, "photos", on_gpu=False))
        kept = dict(flattened(document))
        read = {key for key in kept if not key.startswith(UNREAD) or (key.startswith("methods.bingo.") and key not in UNREAD_OF_BINGO)}
        if teacher.name:  # the name sets these, and nothing is pretrained
            read -= {key for key in read if key.startswith(("teacher.pretrain.", "teacher.")) and not key.startswith("teacher.image")}
        return {key: kept[key] for key in sorted(read - {"extract.chunk_rows"})}

    for teacher in (OWN, DINO):
        expected = chosen(shipped(), teacher)
        for name in recipe_names(Path("recipes")):
            document = deepcopy(shipped())
            lay_over(document, read_recipe(Path("recipes"), name).overlay)
            assert chosen(document, teacher) == expected, name
