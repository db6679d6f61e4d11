"""A study: the next runs of a plan, for given accuracies; and running them with a quick replacement for DVC."""

import json
import math
import re
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
from test_compare import ROOT, Repository
from workspace import new_workspace

from benchmarks import study, study_plan, study_tables
from benchmarks.study_lanes import LaneRun, place_of
from benchmarks.study_plan import StudyPlan, Wanted, Wishes
from bingo.params import validate
from bingo.planning.recipes import lay_over
from bingo.runtime.artefacts import fingerprint
from bingo.runtime.errors import UserError

PLAN = """
base: cifar10-cpu-smoke
reference: method-bingo
tuning: {seed: 9, noise_points: 0.0, first_lr: [0.06, 0.2, 0.6, 2.0], settings: {distill: {epochs: 3}}}
tables:
  seeds: [4, 5]
  settings:
    distill: {epochs: 8}
    semi_eval: {splits: {one: {percent: 1.0, list_file: null, trunk_lr: 0.1, head_lr: 0.2, linear_lr: 3.0}}}
rounds:
  - {method-bingo: [methods.bingo.temperature], method-simreg: []}
  - {method-disco: [methods.disco.key_momentum]}
"""
VARIANTS = """
variants:
  wide: {recipe: method-bingo, settings: {bagging: {k: 20}}}
  narrow: {recipe: method-bingo, like: method-bingo, settings: {bagging: {k: 2}}}
  longer: {recipe: wide, settings: {distill: {epochs: 13}}}
  once: {recipe: longer, settings: {bagging: {k: 3}, distill: {epochs: 3}}}
rounds:
  - {method-bingo: [methods.bingo.temperature]}
  - {wide: [methods.bingo.temperature], narrow: [], longer: []}
"""
COSTS = {"method-simreg": 0.03}


@pytest.fixture
def plan(tmp_path, monkeypatch) -> StudyPlan:
    monkeypatch.chdir(ROOT)
    (tmp_path / "plan.yaml").write_text(PLAN)
    return study_plan.read_plan(tmp_path / "plan.yaml")


def run_all(plan: StudyPlan, accuracy) -> list[dict]:
    """Run all of a plan, and return the lines of its results; `accuracy` returns None for a run that diverges."""
    lines: list[dict] = []
    while wanted := Wishes(plan, lines).next():
        linear = accuracy(wanted)
        line = {"part": wanted.part, "recipe": wanted.recipe, "seed": wanted.seed, "settings": dict(wanted.settings)}
        nets = {"student": linear, "teacher": 70.0, "untrained": 30.0}
        figures = {"gflop_per_anchor": COSTS.get(wanted.recipe, 0.1), "anchors": 1000 * wanted.settings["distill.epochs"]}
        lines.append(json.loads(json.dumps(line | ({"linear": None} if linear is None else {"linear": nets, "knn_10": nets} | figures))))
        assert len(lines) < 100
    return lines


@pytest.mark.parametrize(
    ("lr", "factor", "tried"),
    [
        (0.2, 1.0, [0.06, 0.2, 0.6, 2.0]),
        (2.0, 0.5, [0.06, 0.2, 0.6, 2.0, 6.0]),
        (0.006, 1.0, [0.002, 0.006, 0.02, 0.06, 0.2, 0.6, 2.0]),
        (60.0, 4.0, [0.06, 0.2, 0.6, 2.0, 6.0, 20.0, 60.0, 200.0]),
    ],
)
@pytest.mark.slow
def test_a_climb_ends_where_both_neighbours_on_both_axes_are_worse(plan, lr, factor, tried):
    """Accuracies fall with the distance from the best in both logarithms; learning rates above 100 diverge."""

    def accuracy(wanted: Wanted) -> float | None:
        rate, temperature = wanted.settings["distill.lr"], wanted.settings.get("methods.bingo.temperature", 0.2 * factor)
        return None if rate > 100 else 60 - 2 * abs(math.log(rate / lr)) - 3 * abs(math.log(temperature / 0.2 / factor))

    wishes = Wishes(plan, run_all(plan, accuracy))
    assert wishes.place(wishes.best("method-bingo")) == (lr, factor)
    places = {wishes.place(line) for line in wishes.tuning("method-bingo")}
    up, down = study_plan.next_lr(lr, up=True), study_plan.next_lr(lr, up=False)
    assert {(up, factor), (down, factor), (lr, 2 * factor), (lr, factor / 2)} <= places
    assert sorted({rate for rate, _ in places}) == tried
    assert sorted(rate for rate, _ in map(wishes.place, wishes.tuning("method-simreg"))) == tried, "the same rule for every recipe"
    assert {line["seed"] for line in wishes.tuning("method-bingo")} == {9}


@pytest.mark.slow
def test_a_climb_is_not_ended_by_noise(plan):
    """Half the temperature is slightly worse, by less than `noise_points`; a climb from the best run alone would stop before it."""

    def accuracy(wanted: Wanted) -> float:
        rate, temperature = wanted.settings["distill.lr"], wanted.settings.get("methods.bingo.temperature", 0.2)
        dip = 1.5 if temperature == 0.1 else 0.0
        return 60 - 2 * abs(math.log(rate / 0.2)) - abs(math.log(temperature / 0.05)) - dip

    assert Wishes(plan, run_all(plan, accuracy)).best("method-bingo")["settings"]["methods.bingo.temperature"] == 0.2
    plan = plan.model_copy(update={"tuning": plan.tuning.model_copy(update={"noise_points": 1.0})})
    wishes = Wishes(plan, run_all(plan, accuracy))
    assert wishes.place(wishes.best("method-bingo")) == (0.2, 0.25)
    assert accuracy(wishes.at("method-bingo", 0.2, 0.5)) < accuracy(wishes.at("method-bingo", 0.2, 1.0))


@pytest.mark.slow
def test_a_value_that_params_yaml_does_not_allow_is_not_tried(plan):
    lines = run_all(plan, lambda wanted: 10.0 + wanted.settings.get("methods.disco.key_momentum", 0))
    momenta = {line["settings"].get("methods.disco.key_momentum") for line in lines if line["recipe"] == "method-disco"}
    assert momenta == {0.99, 0.495}, "twice 0.99 is not tried"


@pytest.mark.slow
def test_the_tables_have_the_tuned_settings_at_equal_anchors_and_at_equal_flops(plan):
    def accuracy(wanted: Wanted) -> float:
        best = wanted.settings["distill.lr"] == 0.6
        return 50 + best + wanted.seed * (wanted.recipe == "method-simreg") + (wanted.part == "flops")

    lines = run_all(plan, accuracy)
    first = [(line["recipe"], line["part"]) for line in lines]
    assert first.index(("method-bingo", "anchors")) < first.index(("method-disco", "tuning")), "a round ends before the next begins"
    compared = [line for line in lines if line["part"] != "tuning"]
    assert {line["settings"]["distill.lr"] for line in compared} == {0.6}
    epochs = [(line["recipe"], line["part"], line["seed"], line["settings"]["distill.epochs"]) for line in compared]
    assert epochs == [
        ("method-bingo", "anchors", 4, 8), ("method-simreg", "anchors", 4, 8), ("method-simreg", "flops", 4, 27),
        ("method-bingo", "anchors", 5, 8), ("method-simreg", "anchors", 5, 8), ("method-simreg", "flops", 5, 27),
        ("method-disco", "anchors", 4, 8), ("method-disco", "anchors", 5, 8),
    ]  # fmt: skip
    rows = {row[0]: row for row in study_tables._compared(Wishes(plan, lines), "flops")}
    assert rows["method-simreg"][1:3] == ["2", "56.5 ± 0.7"]
    assert rows["method-simreg"][-1] == "+5.5 (+5.0, +6.0)"
    assert rows["method-simreg"][-2] == f"{0.03 * 27_000 / 1e6:.2g}"
    assert rows["method-disco"][2] == "51.0 ± 0.0", "the run at equal anchors: its FLOPs are the reference's"
    assert (rows["teacher"][2], rows["untrained"][2]) == ("70.0 ± 0.0", "30.0 ± 0.0")
    once_more = [line | {"linear": line["linear"] | {"student": 40.0}} for line in lines if (line["part"], line["seed"]) == ("flops", 5)]
    diverged = [line | {"linear": None} for line in once_more]
    rows = {row[0]: row for row in study_tables._compared(Wishes(plan, lines + once_more + diverged), "flops")}
    assert rows["method-simreg"][1:3] == ["2 (3 runs)", f"{(56 + (57 + 40) / 2) / 2:.1f} ± {(56 - (57 + 40) / 2) / math.sqrt(2):.1f}"]
    assert rows["method-simreg"][3] == "56.5 ± 0.7", "the k-NN accuracy of the other device is the same"
    assert rows["method-simreg"][-1] == "+1.2 (+5.0, -2.5)", "from 51"
    assert rows["teacher"][-1] == "+19.0 (+19.0, +19.0)"
    assert list(study_tables._between_devices(Wishes(plan, lines + once_more + diverged))) == [40.0 - 57.0]
    rows = {row[0]: row for row in study_tables._compared(Wishes(plan, lines + once_more), "flops", "method-simreg", "knn_10")}
    assert rows["method-bingo"][-1] == "-5.5 (-5.0, -6.0)", "51 and 56, 51 and 57"


def test_differences_are_paired_and_from_three_seeds_on_have_an_interval():
    theirs = {0: 50.0, 1: 52.0, 2: 54.0, 9: 0.0}
    assert study_tables.difference({0: 51.0, 1: 54.0, 2: 57.0, 7: 0.0}, theirs) == "+2.0 [-0.5, +4.5]"  # t(0.975, 2) / sqrt(3) = 2.484
    assert study_tables.difference({1: 54.0, 0: 51.0}, theirs) == "+1.5 (+2.0, +1.0)"
    assert (study_tables.difference({0: 51.0}, theirs), study_tables.difference({7: 0.0}, theirs)) == ("+1.0", "")


def test_agreement_is_correlated_with_accuracy_over_the_runs_of_a_part(plan):
    lines = run_all(plan, lambda wanted: 50 - abs(math.log(wanted.settings["distill.lr"])) + wanted.seed)
    for line in lines:
        line["agreement_10"] = {"student": -line["linear"]["student"] if line["part"] == "tuning" else line["linear"]["student"]}
    found = dict(text.split(": ") for text in study_tables._correlations(Wishes(plan, lines)))
    counts = {part: sum(line["part"] == part for line in lines) for part in ("tuning", "anchors")}
    assert found == {
        "tuning": f"-1.00 (-1.00 to -1.00) over {counts['tuning']} runs",
        "anchors": f"1.00 (1.00 to 1.00) over {counts['anchors']} runs",
    }


@pytest.mark.slow
def test_a_variant_is_tuned_or_takes_the_values_of_another_and_without_a_round_is_run_as_in_tuning(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "plan.yaml").write_text(PLAN.partition("rounds:")[0].replace("seed: 9", "seed: 9, variant_seeds: [7]") + VARIANTS)
    best = {None: (0.2, 0.2), 20: (0.6, 0.4), 2: (6.0, 0.8), 3: (0.6, 0.1)}

    def accuracy(wanted: Wanted) -> float:
        lr, temperature = best[wanted.settings.get("bagging.k")]
        distances = wanted.settings["distill.lr"] / lr, wanted.settings["methods.bingo.temperature"] / temperature
        further = (1 + (wanted.recipe == "once")) * (wanted.seed == 7)
        return 60 - sum(abs(math.log(distance)) for distance in distances) + further

    plan = study_plan.read_plan(tmp_path / "plan.yaml")
    lines = run_all(plan, accuracy)
    for count in range(len(lines)):
        study_tables.print_tables(Wishes(plan, lines[:count]))  # of an unfinished study
    tuned = [line["recipe"] for line in lines if line["part"] == "tuning"]
    assert (set(tuned), tuned.count("once")) == ({"method-bingo", "wide", "once"}, 2)
    assert [(line["recipe"], line["settings"].get("bagging.k")) for line in lines if line["seed"] == 7] == [("wide", 20), ("once", 3)]
    assert {line["seed"] for line in Wishes(plan, lines).tuning("wide")} == {9}, "the other seed decides nothing"
    [row] = study_tables._screened(Wishes(plan, lines))
    assert row[:4] == ["once", "wide", "2", f"{60 - math.log(4) + 1:.1f}"], "at the values of `wide`, whose second seed has 61"
    assert row[-1] == f"{0.5 - math.log(4):+.1f} ({-math.log(4):+.1f}, {1 - math.log(4):+.1f})"
    keys = ("bagging.k", "distill.lr", "methods.bingo.temperature")
    compared = {line["recipe"]: [line["settings"].get(key) for key in keys] for line in lines if line["part"] == "anchors"}
    assert compared == {"method-bingo": [None, 0.2, 0.2], "wide": [20, 0.6, 0.4], "longer": [20, 0.6, 0.4], "narrow": [2, 0.2, 0.2]}
    assert {line["settings"]["distill.epochs"] for line in lines if line["recipe"] == "longer"} == {13}
    tables = {part: [row[0] for row in study_tables._compared(Wishes(plan, lines), part)] for part in ("anchors", "flops")}
    assert ("longer" in tables["anchors"], "longer" in tables["flops"]) == (False, True), "it has a different number of anchors"
    assert all(line["settings"].get("bagging.k") == 20 for line in lines if line["recipe"] == "wide")


@pytest.mark.parametrize("name", ["study", "study-digits"])
def test_the_plans_of_this_repository_have_allowed_settings(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = study_plan.read_plan(Path(f"benchmarks/{name}.yaml"))
    wishes = Wishes(plan, study_plan.read_results(study.RESULTS / f"{name}.jsonl"))
    wishes.next()
    for recipe in plan.recipes:
        for part in ("tuning", "anchors"):
            document = deepcopy(wishes.documents[recipe])
            for key, value in plan.fixed(recipe, part).items():
                lay_over(document, study_plan.nested(key, value))
            validate(document, f"{recipe}, {part}")


STAND_IN = """
import json, os, sys
from pathlib import Path

given = sys.argv[1:]
if given[:2] == ["cache", "dir"]:
    print(Path("the-cache").resolve())
elif given[0] != "config":
    import subprocess, time
    import numpy as np
    import yaml
    from bingo.images.listing import Listing, write_listing

    name = given[given.index("--name") + 1]
    with open(os.environ["JOURNAL"], "a") as journal:
        journal.write(json.dumps([name, given[3:]]) + "\\n")
    changed = dict(change.removeprefix("--set-param=").lstrip("+").split("=", 1) for change in given[3:])
    lr = float(changed.get("distill.lr", 0.06))
    if name in os.environ.get("SLOW", "").split():
        time.sleep(60)
    if name in os.environ.get("FAILS", "").split():
        sys.exit("error: no space left on device")
    if lr > 1:
        sys.exit(f"error: distill: bingo: the loss is nan at step 7; lower lr (now {lr})")
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["distill"] |= {"epochs": int(changed["distill.epochs"]), "batch_anchors": 64}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    for folder in ("reports/semi", "data"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    linear = {"student": 50 - abs(lr - 0.2), "teacher": 70.0}
    Path("reports/results.json").write_text(json.dumps({"linear": linear, "knn_10": linear}))
    Path("reports/distill.json").write_text(json.dumps({"gflop_per_anchor": 0.1}))
    Path(".bingo/runs").mkdir(parents=True, exist_ok=True)
    Path(".bingo/runs/distill.json").write_text(json.dumps({"device": "a machine"}))
    if "semi_eval.splits" in changed:
        Path("reports/semi/one.json").write_text(json.dumps({"nets": {"student": {"linear": {"top1_last": 33.0}}}}))
    write_listing("data/listing.parquet", Listing("x", list("a" * 200), np.zeros(200, np.int64), 150, ["a"], [], "0" * 32))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(["git", "update-ref", f"refs/exps/{commit[:2]}/{commit[2:]}/{name}", commit], check=True)
"""


@pytest.fixture
def repository(tmp_path) -> Repository:
    """A repository with images, and a plan of two rounds with one recipe each."""
    repository = Repository(tmp_path)
    (tmp_path / "bin/dvc").write_text(f"#!{sys.executable}\n{STAND_IN}")
    (repository.home / "benchmarks/results").mkdir(parents=True)
    (repository.home / "images/train/cat").mkdir(parents=True)
    (repository.home / "images/train/cat/1.jpg").touch()
    plan = PLAN.replace("{method-bingo: [methods.bingo.temperature], method-simreg: []}", "{method-bingo: []}")
    plan = plan.replace("{method-disco: [methods.disco.key_momentum]}", "{method-simreg: []}").replace("[4, 5]", "[4]")
    (repository.home / "plan.yaml").write_text(plan)
    repository.commit()
    return repository


def start(repository: Repository, *arguments: str, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.study", "--plan", "plan.yaml", *arguments]
    return subprocess.Popen(
        command, cwd=repository.home, env=repository.environment | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def test_an_interrupted_study_resumes_to_the_same_results(repository):
    first = "tuning+method-bingo+lr=0.06-s9"
    process = start(repository, "--root", "images", SLOW="tuning+method-bingo+lr=0.2-s9")
    repository.wait_for(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "")
    process = start(repository, "--root", "images")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    ran = dict(repository.ran())
    rates = ["0.2", "0.6", "2"]
    again = [f"tuning+method-bingo+lr={lr}-s9" for lr in rates] + ["anchors+method-bingo+lr=0.2-s4"]
    second = [f"tuning+method-simreg+lr={lr}-s9" for lr in ["0.06", *rates]] + ["anchors+method-simreg+lr=0.2-s4"]
    assert list(ran) == again + second
    assert f"--set-param=dataset.root='{repository.home / 'images/train'}'" in ran[again[0]]
    assert f"--set-param=dataset.root='{repository.home / 'images'}'" in ran[again[-1]]
    split = "{one:{percent:1.0,list_file:null,trunk_lr:0.1,head_lr:0.2,linear_lr:3.0}}"
    assert f"--set-param=++semi_eval.splits={split}" in ran[again[-1]]
    lines = study_plan.read_results(repository.home / "benchmarks/results/plan.jsonl")
    assert len(lines) == 10
    commit = repository.git("rev-parse", "HEAD")
    assert lines[0].pop("seconds") > 0
    assert lines[0] == {
        "part": "tuning", "recipe": "method-bingo", "seed": 9, "settings": {"distill.epochs": 3, "distill.lr": 0.06}, "commit": commit,
        "linear": {"student": 49.86, "teacher": 70.0}, "knn_10": {"student": 49.86, "teacher": 70.0}, "gflop_per_anchor": 0.1,
        "device": "a machine", "anchors": 3 * 128,
    }  # fmt: skip
    assert first not in ran
    assert [line["linear"] for line in lines if line["settings"]["distill.lr"] == 2.0] == [None, None]
    assert (lines[4]["one"], lines[4]["anchors"]) == ({"student": 33.0}, 8 * 128)
    out, err = start(repository, "--print").communicate(timeout=60)
    assert err == ""
    assert "2: diverged" in out
    assert repository.ran() == []


def test_a_failure_that_is_not_divergence_stops_the_study_without_a_result(repository):
    process = start(repository, "--root", "images", FAILS="tuning+method-bingo+lr=0.2-s9")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "lr=0.2-s9: failed with exit code 1" in err
    assert "error: no space left on device" in err
    assert len(study_plan.read_results(repository.home / "benchmarks/results/plan.jsonl")) == 1


FEW = {
    "dataset": {"train_images": 128, "test_images": 50},
    "teacher": {"pretrain": {"epochs": 1, "lr_warmup_epochs": 0, "probe_every_epochs": 0}},
    "distill": {"epochs": 1, "lr_warmup_epochs": 0, "probe_every_epochs": 0},
    "semi_eval": {"splits": {"ten": {"percent": 10.0, "list_file": None, "trunk_lr": 0.1, "head_lr": 0.2, "linear_lr": 3.0}}},
}
IN_LANES = {
    "base": "digits-short", "reference": "method-simreg", "tables": {"seeds": [4], "settings": FEW}, "rounds": [{"method-simreg": []}],
    "tuning": {"seed": 9, "noise_points": 0.0, "first_lr": [0.06, 1e9], "settings": FEW},
}  # fmt: skip


@pytest.mark.slow
def test_lanes_have_the_results_of_the_stages(tmp_path, monkeypatch, stages):
    (tmp_path / "plan.yaml").write_text(json.dumps(IN_LANES))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    plan, out = study_plan.read_plan(tmp_path / "plan.yaml"), tmp_path / "results.jsonl"
    alone = study.Study(plan, out, None, "a commit")
    interrupted = next(Wishes(plan, []).ready([]))
    place = place_of(
        LaneRun(interrupted, study.laid_over(*alone.laid(interrupted))[0]), tmp_path.resolve() / "lanes" / fingerprint(["a commit"])[:12]
    )
    (place / "models").mkdir(parents=True)  # left by an earlier study, which was killed
    alone.run_in_lanes(2)
    assert not (tmp_path / "lanes" / fingerprint(["a commit"])[:12]).exists()
    lines = study_plan.read_results(out)
    assert Wishes(plan, lines).next() is None
    assert [line["settings"]["distill.lr"] for line in lines if not line["linear"]] == [1e9]
    table = Wishes(plan, lines).compared("anchors", "method-simreg", 4)
    line, document = Wishes(plan, lines).line_of(table), study.laid_over(*alone.laid(table))[0]
    by_itself = new_workspace(tmp_path / "by itself", stages, document)
    for stage in ("scan", "teacher", "extract", "bag", "weights", "distill", "linear_eval", "knn_eval", "semi_eval ten", "report"):
        by_itself.done(stage)
    want = study.figures(by_itself.root)
    assert {key: line[key] for key in want} == json.loads(json.dumps(want))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("tables:", "table:", "plan.yaml: "),
        ("reference: method-bingo", "reference: method-seed", "reference = method-seed: "),
        ("rounds:", "variants: {x: {recipe: method-seed, settings: {}}}\nrounds:", "variants = x: "),
        ("{method-simreg: []}", "{method-simreg: [], method-bingo: []}", "rounds: a recipe is in two"),
        (
            "rounds:\n  - {",
            "variants: {x: {recipe: method-seed, like: method-isd, settings: {}}}\nrounds:\n  - {x: [], ",
            "variants.x.like = method-isd: ",
        ),
        (
            "rounds:\n  - {",
            "variants: {x: {recipe: method-disco, like: method-disco, settings: {}}}\nrounds:\n  - {x: [], ",
            "variants.x.like = method-disco: ",
        ),
        ("method-simreg: []", "method-simmreg: []", "recipe = method-simmreg: "),
        ("epochs: 8", "epochs: 0", "distill.epochs = 0"),
        ("[0.06, 0.2, 0.6, 2.0]", "[0.06, -1]", "tuning.first_lr.1 = -1"),
        ("[0.06, 0.2, 0.6, 2.0]", "[0.06, 0.2, 0.06]", "tuning.first_lr = [0.06, 0.2, 0.06]: "),
        ("seeds: [4]", "seeds: [4, 5, 4]", "tables.seeds = [4, 5, 4]: "),
        ("seed: 9", "seed: 9, variant_seeds: [7, 9]", "tuning: 9 "),
        ("noise_points: 0.0", "noise_points: .inf", "tuning.noise_points = inf: "),
        ("epochs: 3", "lr: 0.1", "distill.lr "),
        ("epochs: 8", "lr: 0.1", "distill.lr "),
        *(
            ("rounds:", f"variants: {{x: {{recipe: method-bingo, like: method-bingo, settings: {settings}}}}}\nrounds:", words)
            for settings, words in [
                ("{bagging: {kk: 3}}", "bagging.kk "),
                ("{bagging: {k: -3}}", "bagging.k = -3: "),
                ("{bagging.k: 3}", "bagging.k "),
                ("{distill: {lr: 0.1}}", "distill.lr "),
                ("{bagging: 3}", "params.yaml with x: bagging = 3: "),
                ("&it {bagging: *it}", "plan.yaml: "),
            ]
        ),
        (
            "rounds:\n  - {",
            "variants:\n  x: {recipe: method-seed, like: method-bingo, settings: {}}\n  y: {recipe: method-seed, like: x, settings: {}}\n"
            "rounds:\n  - {x: [], ",
            "variants.y.like = x: ",
        ),
        *(
            (
                "rounds:\n  - {",
                f"variants: {{x: {{recipe: {x}, settings: {{}}}}, y: {{recipe: {y}, settings: {{}}}}}}\nrounds:\n  - {{x: [], ",
                words,
            )
            for x, y, words in [
                ("x", "x", "variants.x.recipe = x: "),
                ("y", "x", "variants.x.recipe = y: "),
                ("method-seed", "y", "variants.y.recipe = y: "),
            ]
        ),
        ("rounds:", "variants: {method-simreg: {recipe: method-seed, settings: {}}}\nrounds:", "variants = method-simreg: "),
        ("method-simreg: []", "method-simreg: [distill.lr]", "distill.lr = "),
        ("method-simreg: []", "method-simreg: [student.drop_rate]", "student.drop_rate = 0.0: "),
        ("method-simreg: []", "method-simreg: [methods.simreg.temperature]", "methods.simreg.temperature = None: "),
        ("method-simreg: []", "method-simreg: [methods.simreg.target]", "methods.simreg.target = 'keys': "),
    ],
)
def test_mistakes_in_a_plan_are_found_before_anything_runs(repository, monkeypatch, old, new, words):
    monkeypatch.chdir(repository.home)
    plan = Path("plan.yaml")
    plan.write_text(plan.read_text().replace(old, new))
    repository.commit()
    with pytest.raises(UserError, match=re.escape(words)):
        study.Study(study_plan.read_plan(plan), Path("results.jsonl"), "images", "a commit").check()


def test_images_without_labels_are_refused(repository, monkeypatch):
    monkeypatch.chdir(repository.home)
    Path("images/train/cat/1.jpg").rename("images/train/1.jpg")
    Path("images/train/cat").rmdir()
    with pytest.raises(UserError, match="class folders"):
        study.Study(study_plan.read_plan(Path("plan.yaml")), Path("results.jsonl"), "images", "a commit").check()


def test_runs_that_an_earlier_plan_tuned_otherwise_do_not_count(plan):
    """They lack a key that is now tuned, or have values that are not a step of the climb."""
    here = Wishes(plan, []).at("method-bingo", 0.2, 2.0)
    others: list[dict] = [{"methods.bingo.temperature": 0.3}, {"bagging.k": 7}]
    settings = [{key: value for key, value in here.settings.items() if key != "methods.bingo.temperature"}]
    settings += [dict(here.settings) | other for other in others]
    figures = {"linear": {"student": 60.0}, "gflop_per_anchor": 0.1, "anchors": 1000}
    line = {"part": here.part, "recipe": here.recipe, "seed": here.seed, "settings": dict(here.settings)} | figures
    wishes = Wishes(plan, [line | {"settings": one, "linear": {"student": 90.0}} for one in settings] + [line, line])
    assert wishes.best("method-bingo") is wishes.lines[-1]
    assert len(wishes.tuning("method-bingo")) == 2, "the same run twice, of two files put together"
    assert [row[:5] for row in study_tables._tuning(wishes)] == [["method-bingo", "0.2", "temperature 0.4", "60.0", ""]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lanes", "0"], "--lanes = 0: allowed is a whole number from 1"),
        (["--lanes", "-3"], "--lanes = -3: allowed is a whole number from 1"),
        (["--lanes", "1", "--print"], "--lanes = 1: has no effect with --print"),
        (["--commit", "v1"], "--commit = v1: has no effect without --lanes"),
        (["--against", "method-bingo"], "--against = method-bingo: has no effect without --print"),
        (["--print", "--against", "method-x"], "--against = method-x: allowed are method-bingo, "),
        (["--root", ""], "--root is empty"),
        (["--out", "images"], "--out = images: cannot be read"),
        (["--out", "plan.yaml/results.jsonl"], "--out = plan.yaml/results.jsonl: plan.yaml is a file"),
        (["--plan", "images"], "--plan = images: is not a file"),
    ],
)
def test_mistakes_in_the_arguments_are_one_line_before_anything_runs(repository, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(repository.home)
    monkeypatch.setattr(sys, "argv", ["study", "--plan", "plan.yaml", "--root", "images", *arguments])
    with pytest.raises(SystemExit, match="2"):
        study.main()
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), repository.ran()) == ("", 1, [])
    assert words in err


def test_the_folder_of_the_results_is_created(repository, monkeypatch):
    monkeypatch.chdir(repository.home)
    wanted = Wanted("tuning", "method-bingo", 9, {})
    study.Study(study_plan.read_plan(Path("plan.yaml")), Path("new/folder/results.jsonl"), None, "a commit").add(wanted, "x", None, 1.0)
    assert [wanted.is_in(line) for line in study_plan.read_results(Path("new/folder/results.jsonl"))] == [True]


HALF = '{"part": "tuning", "recipe": "x", "seed": 0, "settings": {}, "linear": {"student": 50.0}}'  # without its cost


@pytest.mark.parametrize("line", ['{"part": "tun', '{"part": "tuning"}', "[]", "null", "", "\udcff", HALF])
def test_results_that_were_edited_by_hand_are_read_line_by_line(tmp_path, line):
    run = '{"part": "tuning", "recipe": "x", "seed": 0, "settings": {}, "linear": null}'
    (tmp_path / "results.jsonl").write_bytes(f"{run}\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"results\.jsonl: .*; every line is one run"):
        study_plan.read_results(tmp_path / "results.jsonl")
    assert study_plan.read_results(tmp_path / "other.jsonl") == []
