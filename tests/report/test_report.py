"""The report: figures in the right rows, all text escaped, no external files, the same bytes twice, and explained gaps."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from math import nan
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from bingo.bags.index import Bags, read_bags, write_bags
from bingo.images.images import FileImages, MemoryImages, write_images
from bingo.images.listing import Listing, write_listing
from bingo.params import method_names, read_yaml, validate
from bingo.paths import LIMITS
from bingo.report.bags import closest_pairs, gallery_rows, statistics
from bingo.report.downstream import figures
from bingo.report.inputs import Artefacts, NetworkFacts, read_curves, read_network_facts, read_outcomes
from bingo.report.page import build_page, run_script
from bingo.report.pictures import THUMBNAIL_PX, thumbnail
from bingo.report.plots import accuracy_bars, lines
from bingo.report.results import caveats, columns, warnings
from bingo.runtime.artefacts import write_arrays, write_bytes, write_json
from bingo.runtime.checksums import seal_safetensors
from bingo.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
ATTACK = "<img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br"}
TRAIN, TEST = 12, 6
KNN = {
    "student": {"knn_1": 80.5, "knn_10": 81.25, "knn_20_weighted": 82.75},
    "moco": {"knn_1": 60.0, "knn_10": 61.5, "knn_20_weighted": 62.5},
    "untrained": {"knn_1": 31.0, "knn_10": 32.0, "knn_20_weighted": 33.0},
    "teacher": {"knn_1": 90.0, "knn_10": 91.0, "knn_20_weighted": 92.0},
}
LINEAR = {
    "cached": {
        net: {"top1_last": top1, "top5_last": 99.0, "top1_best": top1 + 1, "top5_best": 99.5, "best_epoch": 41}
        for net, top1 in (("student", 84.0), ("moco", 70.0), ("untrained", 40.0), ("teacher", 95.0), ("pixels", 55.5))
    },
    "crops": {"student": {"top1_last": 83.0, "top5_last": 98.0, "top1_best": 83.5, "top5_best": 98.0, "best_epoch": 7}},
}

FAILURES = {  # labels are rows modulo 3
    "k": 2,
    "queries": 6,
    "images": [
        {"row": 17, "common": 0, "teacher": [[2, 0.9], [5, 0.8]], "network": [[0, 0.25], [8, 0.125]]},
        {"row": 13, "common": 1, "teacher": [[1, 0.75], [3, 0.5]], "network": [[3, 0.5], [4, 0.0625]]},
    ],
}


class Page(HTMLParser):
    """Collects elements for the tests, and refuses elements that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.rows: dict[str, list[str]] = {}
        self.text: list[str] = []
        self._row: list[str] | None = None
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self._row = []
        elif tag in ("td", "th") and self._row is not None:
            self._row.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"
        if tag == "tr":
            self.rows.setdefault(self._row[0], self._row[1:])
            self._row = None

    def handle_data(self, data):
        self.text.append(data)
        if self._row:
            self._row[-1] += data.strip()

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def params(**changes):
    """The shipped parameters with some dotted keys changed, written as section__key."""
    raw = read_yaml(ROOT / "params.yaml")
    raw["distill"]["method"] = "bingo"
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = raw
        for name in sections:
            section = section[name]
        section[last] = value
    return validate(raw, "params.yaml")


def make_listing(labelled=True, skipped=()):
    rows = TRAIN + TEST
    labels = np.arange(rows) % 3 if labelled else np.full(rows, -1)
    classes = [ATTACK, "two", "three"] if labelled else []
    return Listing("made-up", [f"{ATTACK}/{row}.png" for row in range(rows)], labels, TRAIN, classes, list(skipped), "0" * 32)


def make_bags() -> Bags:
    members = (np.arange(TRAIN)[:, None] + np.array([3, 1, 6])) % TRAIN
    similarity = np.tile(np.float16([0.9375, 0.75, 0.5]), (TRAIN, 1))
    members[5], similarity[5] = [8, -1, -1], [0.25, -np.inf, -np.inf]
    settings = {"method": "knn", "k": 3, "metric": "cosine", "search": "exact"}
    return Bags(settings, members.astype(np.int32), similarity)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (TRAIN + TEST, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, pixels):
    """A workspace as after a complete run, with small synthetic artefacts."""
    from bingo.bags.metrics import bag_metrics

    folder = tmp_path_factory.mktemp("workspace")
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    listing, bags = make_listing(), make_bags()
    write_listing(folder / "data/listing.parquet", listing)
    write_images(folder / "data/images.zarr", listing, pixels)
    write_bags(folder / "data/bags.zarr", bags, listing.fingerprint, "1" * 32)
    reports = folder / "reports"
    write_json(reports / "bags.json", bag_metrics(bags, listing.labels_N[:TRAIN]))
    for net, scores in KNN.items():
        write_json(reports / f"knn/{net}.json", scores)
    for net in LINEAR["cached"]:
        write_json(reports / f"linear/{net}.json", {protocol: scores[net] for protocol, scores in LINEAR.items() if net in scores})
    write_json(reports / "failures/student.json", FAILURES)
    write_json(reports / "knn/isd.json", {"knn_10": 1.0})  # from a baseline that has since been removed
    write_json(reports / "linear/isd.json", {"cached": {"top1_last": 1.0}})
    write_json(reports / "distill.json", {"last_loss": 3.125, "last_mix": 2.5, "last_knn_10": 80.0})
    write_json(reports / "baselines/moco.json", {"last_loss": 5.5})
    write_json(reports / "teacher.json", {"pretrained": True})
    write_bytes(reports / "plots/teacher.csv", b"\n")
    curve = b"epoch,lr,loss,mix,knn_10\n1,0.1,5.0,4.0,\n2,0.05,4.0,3.0,70.0\n3,0.0,3.125,2.5,80.0\n"
    write_bytes(reports / "plots/distill.csv", curve)
    write_bytes(reports / "plots/baseline-moco.csv", curve.replace(b",mix", b"").replace(b",4.0,\n", b",\n"))
    weights = {
        "conv.weight": np.zeros((7, 3), np.float32),
        "bn.running_mean": np.zeros(7, np.float32),
        "n": np.zeros((), np.int64),
    }
    write_bytes(folder / "models/student.safetensors", seal_safetensors(save(weights, {"bingo": json.dumps({"arch": "resnet18"})})))
    teacher = {"backbone.w": np.zeros((21, 10), np.float16), "head.w": np.zeros(99, np.float32)}
    write_bytes(folder / "models/teacher.safetensors", seal_safetensors(save(teacher, {"bingo": json.dumps({"pretrained": True})})))
    run = {"stage": "distill", "seconds": 12.5, "anchors_per_second": 900.0, "versions": {"torch": "9"}, "params": {"seed": 0}}
    write_json(folder / ".bingo/runs/distill.json", run)
    return folder


def run_stage(folder: Path, *python_arguments: str) -> bytes:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *python_arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "reports/index.html").read_bytes()


@pytest.fixture(scope="module")
def built(workspace):
    return run_stage(workspace, "-m", "stages.report")


@pytest.fixture(scope="module")
def page(built):
    return Page(built.decode())


def artefacts(**changes) -> Artefacts:
    base = Artefacts(params=params(), params_text="seed: 0\n", listing=make_listing(), knn=KNN, linear=LINEAR)
    return dataclasses.replace(base, **changes)


@pytest.mark.slow
def test_every_figure_is_in_its_row(page):
    by_label = {"teacher": "Teacherceiling", "student": "Student by BINGO", "moco": "Student by MoCo-v2, no teacher"}
    by_label |= {"untrained": "Student, untrainedfloor", "pixels": "Raw pixelsno network"}
    for net, label in by_label.items():
        cells = page.rows[label]
        for position, key in enumerate(["knn_10", "knn_20_weighted"]):
            assert cells[position].startswith(f"{KNN[net][key]:.1f}" if net in KNN else "–"), (net, key)
        for position, key in enumerate(["top1_last", "top1_best"]):  # no top-5 for three classes
            assert cells[2 + position].startswith(f"{LINEAR['cached'][net][key]:.1f}"), (net, key)
            measured = LINEAR["crops"].get(net)
            assert cells[4 + position].startswith(f"{measured[key]:.1f}" if measured else "–"), (net, key)
        assert cells[3].endswith("epoch 41")
    assert not [label for label in page.rows if "ISD" in label]
    assert page.rows["Chanceequal classes"] == ["33.3"] * 6
    assert list(page.rows).index("Teacherceiling") < list(page.rows).index("Student by BINGO")
    assert "best epoch, chosen on the test split" in page.words


def test_networks_are_described_from_their_files(page):
    student, teacher = params().student, params().teacher
    assert f"{student.arch} × {student.width:g} wide, 21 parameters" in page.words  # running statistics and counters are not parameters
    assert f"{teacher.arch} × {teacher.width:g} wide, 210 parameters" in page.words  # the head is not part of the backbone
    assert "10 times smaller" in page.words


def test_everything_is_escaped(built, page):
    assert ATTACK.encode() not in built
    assert all("onerror" not in attrs for _, attrs in page.tags)
    assert any(ATTACK in attrs["alt"] for attrs in page.all("img"))  # as text it is there


def test_the_page_uses_no_external_files(built, page):
    assert b"http" not in re.sub(rb"http-equiv", b"", built)
    for _, attrs in page.tags:
        for name in ("src", "href"):
            if name in attrs:
                assert attrs[name].startswith(("data:image/png;base64,", "#")) or attrs[name] in ("run.js", "exports.js")
    assert not page.all("link")
    assert [attrs.get("src") for attrs in page.all("script")] == ["run.js", "exports.js", None]


def test_the_page_is_accessible_and_its_ids_are_distinct(page):
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in page.all("svg") if "aria-hidden" not in attrs)
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))
    assert len(page.all("caption")) == len(page.all("table"))
    targets = {attrs["href"][1:] for attrs in page.all("a")}
    assert targets <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", str(page.tags))) <= set(ids)


@pytest.mark.slow
def test_a_second_build_has_the_same_bytes_and_needs_no_torch(workspace, built):
    """A first build needs none either: the networks of the parameters have not been checked here before."""
    assert not (workspace / LIMITS).exists()
    code = "import sys, stages.report as r; r.main(); assert not {'torch', 'sklearn'} & {*sys.modules}"
    assert run_stage(workspace, "-c", code) == built


def test_timings_are_in_a_file_beside_the_page(workspace, built):
    script = (workspace / "reports/run.js").read_text()
    records = json.loads(script.removeprefix("window.bingoRuns = ").removesuffix(";\n"))
    assert records == [{"stage": "distill", "seconds": 12.5, "anchors_per_second": 900.0, "versions": {"torch": "9"}}]
    assert b"900" not in built.partition(b'id="timings"')[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "label"), [("knn_10", "k-NN accuracy, percent"), ("agreement_10", "Agreement with the teacher, k = 10, percent")]
)
def test_the_curve_of_the_probe_is_named_after_its_measure(measure, label):
    curves = {"distill": {"epoch": [1.0, 2.0], "lr": [0.1, 0.0], "loss": [3.0, 2.0], "mix": [2.0, 1.0], measure: [math.nan, 41.5]}}
    labels = [
        attrs["aria-label"] for attrs in Page(build_page(artefacts(curves=curves))).all("svg") if "by epoch" in attrs.get("aria-label", "")
    ]
    assert len(labels) == 3  # loss, learning rate, probe
    assert "mix from 2 to 1" in labels[0]
    assert measure not in labels[0]
    assert f"{label} by epoch. {measure} from 41.5 to 41.5" in labels[2]


def test_runs_are_in_the_order_of_the_stages():
    names = ["knn_eval", "scan", "export", "baseline-moco", "teacher"]
    script = run_script({"stage": name, "seconds": 1} for name in names)
    assert re.findall(r'"stage": "([^"]+)"', script) == ["scan", "teacher", "baseline-moco", "knn_eval", "export"]


@pytest.mark.slow
@pytest.mark.parametrize(("percents", "epoch"), [([nan, 70.0, 80.0], 3), ([80.0, nan, 80.0], 1), ([nan, nan, nan], None), ([], None)])
@pytest.mark.parametrize("kept", [False, True])
def test_the_best_epoch_by_the_probe_and_its_file_are_named(percents, epoch, kept):
    curve = {"epoch": [1.0, 2.0, 3.0], "loss": [3.0, 2.0, 1.0]} | ({"knn_10": percents} if percents else {})
    text = build_page(artefacts(params=params(distill__keep_best=kept), curves={"distill": curve}))
    assert re.findall(r"Best by the probe: epoch (\d+) with ([\d.]+) %", text) == ([(str(epoch), "80.0")] if epoch else [])
    assert ("models/best/student.safetensors" in text) == (kept and epoch is not None)


def section(built: bytes, name: str) -> str:
    """The HTML of one section of the page."""
    return re.search(rf'<section id="{name}".*?</section>', built.decode(), re.DOTALL)[0]


def test_the_gallery_shows_members_with_cosine_and_sign(built):
    page = Page(section(built, "bags"))
    items = [attrs["class"].split()[-1] for attrs in page.all("li") if attrs.get("class", "").startswith("item")]
    # the three classes alternate: members 3 and 6 rows later are of the anchor's class, 1 row later is not; row 5 has one member
    assert items.count("same") == 11 * 2 + 1
    assert items.count("other") == 11
    counts = {cosine: page.text.count(cosine) for cosine in ("0.938", "0.750", "0.500", "0.250")}
    assert counts == {"0.938": 11, "0.750": 11, "0.500": 11, "0.250": 1}
    assert page.words.count(", same class") == items.count("same")
    assert page.words.count(", other class") == items.count("other")


def test_the_failures_show_both_kinds_of_neighbours(built):
    html = section(built, "failures")
    alts = [re.match(r"Image (\d+)", alt)[1] for alt in re.findall(r'alt="([^"]+)"', html)]
    assert alts == ["17", "2", "5", "0", "8", "13", "1", "3", "3", "4"]
    assert re.findall(r"<span>(\d of \d)</span>", html) == ["0 of 2", "1 of 2"]
    assert re.findall(r"<b>([\d.]+)</b>", html) == ["0.500", "0.500"], "found by teacher and student"
    assert "".join(re.findall("([✓✗]) (?=[&a-z])", html)) == "✓✓✗✓✓✗✗✓"


def test_without_failures_there_is_no_such_section():
    assert 'id="failures"' not in build_page(artefacts(images=MemoryImages(np.zeros((TRAIN + TEST, 8, 8, 3), np.uint8))))


@pytest.mark.parametrize(("limit", "near"), [(0.9, [True, False]), (0.95, [False, False]), (None, [False, False])])
def test_pairs_above_the_cosine_of_near_duplicates_are_marked(pixels, limit, near):
    pairs = [{"rows": [3, 7], "cosine": 0.95}, {"rows": [1, 2], "cosine": 0.5}]
    metrics = {"closest_pairs": pairs} | ({"near_duplicate_cosine": limit, "near_duplicates": 2} if limit else {})
    found = closest_pairs(artefacts(images=MemoryImages(pixels), bag_metrics=metrics))
    assert [[thumbnail.row for thumbnail in thumbnails] for thumbnails, _, _ in found] == [[3, 7], [1, 2]]
    assert [is_near for _, _, is_near in found] == near


def test_bag_statistics_are_explained(page):
    assert page.rows["Purity"][0] == f"{100 * (11 * 2 / 3 + 1) / 12:.1f} %"
    assert page.rows["Short bags"][0] == "1"
    assert all(len(cells) == 2 and cells[1].endswith(".") for name, cells in page.rows.items() if name in ("Purity", "Short bags"))


def test_the_page_says_that_artefacts_are_empty():
    text = build_page(artefacts(knn={}, linear={}))
    words = Page(text).words
    for sentence in ("Nothing was measured", "no training curves", "No bags are shown", "no bag statistics"):
        assert sentence in words
    assert "Limitations" not in words


def test_without_labels_the_page_says_so(tmp_path, pixels):
    listing = make_listing(labelled=False)
    write_bags(tmp_path / "bags.zarr", make_bags(), listing.fingerprint, "")
    bags = read_bags(tmp_path / "bags.zarr", listing)
    page = Page(build_page(artefacts(listing=listing, knn={}, linear={}, images=MemoryImages(pixels), bags=bags)))
    assert "The images have no labels" in page.words
    assert not [attrs for attrs in page.all("li") if attrs.get("class", "").endswith(("same", "other"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"params": params(teacher__source="random")},
        {"teacher": NetworkFacts({"pretrained": False}, 5)},
        {"terms": {"teacher": {"pretrained": False}}},
    ],
)
def test_a_random_teacher_is_reported_in_a_red_notice(changes):
    assert "The teacher has random weights" in Page(build_page(artefacts(**changes))).words
    assert "random weights" not in Page(build_page(artefacts())).words


@pytest.mark.parametrize(
    ("method", "teacher", "untrained", "said"),
    [("bingo", 30.0, 30.0, True), ("bingo", 30.1, 30.0, False), ("bingo", 100.0, 100.0, False), ("moco", 21.0, 30.0, False)],
)
def test_a_teacher_that_is_not_better_than_the_untrained_student_is_reported(method, teacher, untrained, said):
    cached = LINEAR["cached"]
    figures = {net: cached[net] | {"top1_last": top1} for net, top1 in (("teacher", teacher), ("untrained", untrained))}
    a = artefacts(linear=LINEAR | {"cached": cached | figures}, params=params(distill__method=method, baselines=[]))
    assert any("is not better than the untrained student" in warning for warning in warnings(a)) == said


def test_skipped_images_are_counted_and_the_first_named():
    skipped = [f"bad<{number}>.jpg" for number in range(13)]
    words = Page(build_page(artefacts(listing=make_listing(skipped=skipped)))).words
    assert "left out: 13 (bad<0>.jpg" in words
    assert "bad<9>.jpg and 3 more)" in words
    assert "bad<10>" not in words


@pytest.mark.parametrize(("classes", "shown"), [(5, False), (6, True)])
def test_top_5_is_shown_for_more_than_five_classes(classes, shown):
    listing = dataclasses.replace(make_listing(), classes=[f"class {number}" for number in range(classes)])
    assert ("top5_last" in [column.key for column in columns(artefacts(listing=listing))]) == shown


@pytest.mark.parametrize(
    ("held_out", "left_out", "near", "counts"),
    [
        (TEST + 5, (13, 15), 2, ["11", "5", "2"]),  # 5 were copies
        (TEST, (), 0, ["6"]),
        (None, (), 3, ["3"]),  # in a test split of the dataset itself they are counted
        (None, (), 0, None),
    ],
)
def test_held_out_images_are_counted_with_those_left_out(held_out, left_out, near, counts):
    listing = dataclasses.replace(make_listing(), held_out=held_out, left_out_rows=left_out)
    found = artefacts(listing=listing, bag_metrics={"test_near_duplicates": near})
    said = [line for line in caveats(found) if "near-duplicate" in line or "held out" in line]
    assert (re.findall(r"(?<!seed )\b\d+\b", said[0]) if said else None) == counts
    assert f"Percent of the {TEST - len(left_out)} test images" in Page(build_page(found)).words


def scores(top1: float) -> dict[str, float]:
    return {"top1_last": top1, "top5_last": 99.0, "top1_best": top1 + 1, "top5_best": 99.0, "best_epoch": 3}


SEMI = {
    "tenth": {
        "percent": 10.0,
        "labels": 1234,
        "origin": "listed",
        "nets": {net: {"linear": scores(top1), "finetune": scores(top1 + 5)} for net, top1 in (("untrained", 30.0), ("student", 60.0))},
    },
    "one": {"percent": 1.0, "labels": 123, "origin": "drawn", "nets": {"student": {"linear": scores(41.0), "finetune": scores(38.0)}}},
}
TRANSFER = {
    "cifar10": {
        "dataset": "cifar10",
        "images": [50000, 10000],
        "protocols": {"finetune": {"crop_px": 32}, "linear_resized": {"crop_px": 224}},
        "nets": {"student": {"finetune": scores(90.5), "linear_resized": scores(85.0)}},
    }
}


def test_few_labels_and_transfer_are_beside_the_published_figures():
    page = Page(build_page(artefacts(knn={}, linear={}, semi=SEMI, transfer={})))
    # for each percentage, fine-tuned before linear; below a figure is that of the best epoch
    assert page.rows["Student by BINGO"] == ["38.0best 39.0", "41.0best 42.0", "65.0best 66.0", "60.0best 61.0"]
    assert page.rows["Student, untrainedfloor"] == ["–not measured", "–not measured", "35.0best 36.0", "30.0best 31.0"]
    assert page.rows["Network"] == ["fine-tuned", "linear only", "fine-tuned", "linear only"]
    assert page.rows[""] == ["1\xa0%: 123 labels, drawn", "10\xa0%: 1,234 labels, listed"]
    assert page.rows["SEEDR50 67.4, linear only"] == ["39.1", "50.2"]
    assert page.rows["BINGOR50 67.4, fine-tuned"] == ["42.8", "57.5"]
    assert page.rows["BINGOR152, fine-tuned"] == ["50.3", "61.2"]
    assert "#few-labels" in {attrs["href"] for attrs in page.all("a")}
    assert "#transfer" not in {attrs["href"] for attrs in page.all("a")}

    page = Page(build_page(artefacts(knn={}, linear={}, transfer=TRANSFER)))
    assert page.rows["Student by BINGO"] == ["85.0best 86.0", "90.5best 91.5"]
    assert page.rows["Network"] == ["linear, enlarged, 224\xa0px", "fine-tuned, 32\xa0px"]
    assert page.rows["BINGOR50 67.4"] == ["86.8", "66.5"]
    assert page.rows["MoCo-v2no teacher"] == ["77.9", "48.1"]
    assert len(page.all("caption")) == len(page.all("table"))


def test_evaluations_that_were_not_requested_have_no_section(page):
    assert not {"few-labels", "transfer"} & {attrs.get("id") for _, attrs in page.tags}


def test_experiments_compare_few_labels_and_transfer_too():
    a = artefacts(semi=SEMI, transfer=TRANSFER)
    assert figures(a) == {
        "semi_tenth": {"untrained_linear": 30.0, "untrained_finetune": 35.0, "student_linear": 60.0, "student_finetune": 65.0},
        "semi_one": {"student_linear": 41.0, "student_finetune": 38.0},
        "transfer_cifar10": {"student_finetune": 90.5, "student_linear_resized": 85.0},
    }


def test_published_figures_have_their_own_table():
    page = Page(build_page(artefacts(params=params(report__published={"BINGO, <ImageNet>": "64.0"}))))
    assert page.rows["BINGO, <ImageNet>"] == ["64.0"]


def test_unusual_values_of_k_are_shown_too():
    page = Page(build_page(artefacts(knn={"student": {"knn_5": 50.0, "knn_5_weighted": 51.0}}, linear={})))
    assert page.rows["Student by BINGO"] == ["50.0", "51.0"]


def test_gallery_rows_cover_the_classes_evenly():
    listing = make_listing()
    assert gallery_rows(listing, 3) == [6, 7, 8]  # the middle one of each class
    assert sorted(gallery_rows(listing, 100)) == list(range(TRAIN))
    assert gallery_rows(listing, 0) == []


def test_thumbnails_of_files_are_small_and_a_missing_file_is_reported(tmp_path):
    from PIL import Image

    listing = dataclasses.replace(make_listing(), paths=["a.jpg", "gone.jpg", "broken.jpg"], labels_N=np.zeros(3, np.int64), train_rows=3)
    Image.new("RGB", (640, 320), "red").save(tmp_path / "a.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    images = FileImages(str(tmp_path), listing.paths)
    small = thumbnail(images, listing, 0)
    assert (small.width_px, small.height_px) == (THUMBNAIL_PX, THUMBNAIL_PX // 2)
    assert [thumbnail(images, listing, row).uri for row in (1, 2)] == [None, None]


def test_curves_are_read_with_gaps(tmp_path):
    path = tmp_path / "curve.csv"
    assert read_curves(path) == {}
    path.write_text("\n")
    assert read_curves(path) == {}
    path.write_text("epoch,knn_10\n1,\n2,50.5\n")
    curves = read_curves(path)
    assert curves["epoch"] == [1, 2]
    np.testing.assert_array_equal(curves["knn_10"], [np.nan, 50.5])
    path.write_text("epoch,loss\n1,low\n")
    with pytest.raises(UserError, match=r"curve\.csv: is damaged .*'low'"):
        read_curves(path)


@pytest.mark.parametrize(
    "arrays",
    [{"cached": np.array(["a"])}, {"agreement_x": np.zeros(3, int)}, {"agreement_0": np.zeros(3, int)}, {"knn_1": np.ones((3, 2), bool)}],
)
def test_outcomes_of_something_else_are_one_line(tmp_path, arrays):
    write_arrays(tmp_path / "student.npz", arrays)
    with pytest.raises(UserError, match=f"student.npz: is damaged .{next(iter(arrays))} is of"):
        read_outcomes(tmp_path / "student.npz")


@pytest.mark.parametrize("wrong", [{"row": 99}, {"teacher": [[99, 0.5]]}, {"network": 3}, {"network": [[1]]}])
def test_failures_of_another_listing_are_one_line(wrong):
    found = {"row": 17, "common": 0, "teacher": [[2, 0.5]], "network": [[0, 0.2]]} | wrong
    pictures = MemoryImages(np.zeros((TRAIN + TEST, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"failures/student\.json: is damaged, or of another listing"):
        build_page(artefacts(images=pictures, failures={"k": 2, "queries": 8, "images": [found]}))


def test_without_test_images_the_page_does_not_ask_to_rerun_the_evaluations():
    html = build_page(artefacts(listing=dataclasses.replace(make_listing(), train_rows=TRAIN + TEST), knn={}, linear={}))
    assert "there are no test images" in html
    assert "No student has been evaluated yet" not in html


def test_a_damaged_network_is_one_line(tmp_path):
    path = tmp_path / "student.safetensors"
    assert read_network_facts(path) is None
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a BINGO network"):
        read_network_facts(path)
    path.write_bytes(save({"w": np.zeros(2, np.float32)}))
    with pytest.raises(UserError, match="is not a BINGO network"):
        read_network_facts(path)


def test_statistics_of_clusters_and_of_nothing():
    sizes = {"min": 1, "median": 4.0, "mean": 5.0, "max": 20, "max_over_mean": 4.0, "singletons": 2, "unused": 0}
    (_, (_, value, _)) = statistics({"cluster_size": sizes})
    assert value == "median 4, from 1 to 20 (4.0 times the mean); 2 with one image, 0 unused"
    ((name, value, _), _) = statistics({"recall": 0.9696, "lists": 1265, "probes": 64})
    assert (name, value) == ("Recall of the search", "97.0 %")
    assert statistics({}) == []


def test_the_overlap_of_two_views_or_what_it_needs_is_listed():
    ((name, value, _), _) = statistics({"view_overlap": 0.125, "chance_share": 0.01})
    assert (name, value) == ("Overlap of two views", "12.5 %")
    ((name, value, meaning), _) = statistics({"chance_share": 0.01})
    assert (name, value, "extract.views" in meaning) == ("Overlap of two views", "not measured", True)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: accuracy_bars("a", [("x <&$ y", [50.0, None], 0)], ["one", "two"], 10.0),
        lambda: lines("b", "Loss", {"l$<": ([1.0], [2.0]), "m": ([1.0], [float("nan")])}, [0, 2], 'a "summary"'),
    ],
)
def test_charts_are_well_formed_and_repeatable(draw):
    svg = draw()
    assert svg == draw()
    page = Page(svg)
    name, attrs = page.tags[0]
    assert (name, attrs["role"]) == ("svg", "img")
    assert attrs["aria-label"]
    assert not re.search(r"#0[0-9a]0[0-9]0[0-9]", svg), "a placeholder colour is left"
    assert "style" not in {tag for tag, _ in page.tags}


@pytest.mark.parametrize(
    ("dataset", "rows", "train_rows", "title"),
    [
        ({"source": "digits"}, 18, 12, "Handwritten digits: 12 train and 6 test images"),
        ({"source": "cifar100", "root": "data/c"}, 18, 12, "CIFAR-100: 12 train and 6 test images"),
        ({"source": "folder", "root": "/data/pets/"}, 18, 18, "pets: 18 train images"),
        ({"source": "folder", "root": "../a b <i>"}, 1, 1, "a b &lt;i&gt;: 1 train image"),
        ({"source": "folder", "root": "."}, 12_345, 11_000, f"{Path.cwd().name}: 11,000 train and 1,345 test images"),
        ({"source": "folder", "root": ".."}, 2, 2, f"{Path.cwd().parent.name}: 2 train images"),
    ],
)
def test_a_title_comes_from_the_dataset_unless_it_is_set(dataset, rows, train_rows, title):
    listing = Listing("made-up", [str(row) for row in range(rows)], np.full(rows, -1), train_rows, [], [], "0" * 32)
    for given in (None, "Mine & <b>"):
        changed = params(report__title=given, **{f"dataset__{key}": value for key, value in dataset.items()})
        text = build_page(artefacts(params=changed, listing=listing, knn={}, linear={}))
        assert f"<h1>{title if given is None else 'Mine &amp; &lt;b&gt;'}</h1>" in text
        assert text.count(f"<title>{title if given is None else 'Mine &amp; &lt;b&gt;'} · BINGO</title>") == 1


PAPERS = {
    "bingo": "BINGO", "compress": "CompRess", "coss": "CoSS", "disco": "DisCo", "isd": "ISD", "moco": "MoCo-v2", "seed": "SEED",
    "simreg": "SimReg",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", method_names())
def test_every_method_is_named_as_in_its_paper(method):
    scores = {net: {"knn_10": 50.0} for net in ("student", "moco", "isd")}
    curves = {"distill": {"epoch": [1.0], "loss": [2.0], "knn_10": [3.0]}, "baseline-isd": {"epoch": [1.0], "loss": [2.0], "knn_10": [3.0]}}
    coco = {"fpn-1x": {kind: dict.fromkeys(("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"), 1.0) for kind in ("box", "mask")}}
    page = Page(build_page(artefacts(params=params(distill__method=method), knn=scores, linear={}, curves=curves, coco=coco)))
    shown, labels = page.words, " ".join(attrs.get("aria-label", "") for attrs in page.all("svg"))
    assert f"Student by {PAPERS[method]}" in shown
    assert f"{params().student.arch} by {PAPERS[method]}" in shown
    assert f"{PAPERS[method]} 50.0" in labels
    assert f"MoCo-v2{' baseline' if method == 'moco' else ''} 50.0" in labels
    assert "by ISD, no teacher from 3 to 3" in labels
    assert not re.search(r"\b(COSS|MOCO|DISCO|COMPRESS|SIMREG)\b", shown + labels)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, {"teacher", "distill"}),  # the baseline is MoCo-v2
        ({"distill__batchnorm_groups": 8, "teacher__pretrain__batchnorm_groups": 4}, set()),
        ({"distill__batchnorm_groups": None, "teacher__pretrain__batchnorm_groups": None}, set()),
        ({"distill__batchnorm_groups": None, "distill__batch_anchors": 48, "teacher__source": "random"}, {"distill"}),
        ({"teacher__source": "random", "distill__batchnorm_groups": 1}, {"distill"}),
        ({"baselines": [], "distill__method": "coss"}, {"teacher"}),
        ({"baselines": [], "distill__method": "bingo", "teacher__source": "random"}, set()),
        ({"baselines": [], "distill__method": "bingo", "distill__keys": "momentum", "teacher__source": "random"}, {"distill"}),
        ({"baselines": [], "distill__method": "disco", "teacher__source": "random"}, {"distill"}),
        ({"baselines": [], "distill__method": "compress", "teacher__source": "random"}, set()),  # no query is compared with its own key
    ],
)
def test_a_moving_average_trained_with_whole_batchnorm_is_a_caveat(changes, named):
    whole = {"teacher__pretrain__batchnorm_groups": 1, "distill__batchnorm_groups": 1}
    found = " ".join(caveats(artefacts(params=params(**whole | changes), knn=KNN)))
    assert {name for name in ("teacher", "distill") if re.search(rf"\b{name}\S*\.?batchnorm_groups", found)} == named
