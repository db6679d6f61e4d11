"""Comparisons: statistics against SciPy and closed forms, tables and page literally, overrides through DVC's own parser."""

import copy
import dataclasses
import json
import re
import shutil
import subprocess
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from benchmarks.compare import overrides, written
from bingo.cli import experiments
from bingo.params import read_yaml, validate
from bingo.params.views import spelled_out
from bingo.pipeline import run as common
from bingo.planning.recipes import lay_over, read_recipe
from bingo.report.experiments import (
    Experiment,
    RankCorrelation,
    Variant,
    measures,
    paired_difference,
    rank_correlation,
    record_of,
    spread,
    variants,
)
from bingo.report.experiments_page import _label, build_page
from bingo.report.experiments_table import Table, by_seed, correlation_text, difference_text, settings, summary
from bingo.report.plots import Point, labelled_points
from bingo.runtime.artefacts import write_json
from bingo.runtime.errors import UserError
from tests.report.test_report import ATTACK, Page

ROOT = Path(__file__).parents[2]
SHIPPED = read_yaml(ROOT / "params.yaml")


def experiment(name: str, seed: int, linear: float | None, method: str = "bingo", **costs: float) -> Experiment:
    params = copy.deepcopy(SHIPPED)
    lay_over(params, {"seed": seed, "distill": {"method": method, "epochs": 4}})
    results = {"linear": {"student": linear, "teacher": 80.0}, "knn_10": {"student": linear - 1, "teacher": 75.0}} if linear else {}
    return Experiment(name, params, {"reports/results.json": results, "reports/distill.json": costs})


def changed(one: Experiment, **changes) -> Experiment:
    """The experiment with other parameters."""
    params = copy.deepcopy(one.params)
    lay_over(params, changes)
    return dataclasses.replace(one, params=params)


def record(of: Experiment, **notes) -> dict:
    params = validate(of.params, of.name).model_dump()  # as recorded by a run
    return {"experiment": of.name, "params": params, "seconds": 90.0, "anchors_per_second": 1500.4, "peak_memory_mb": 1083.2, **notes}


BINGO = [experiment(f"method-bingo-s{seed}", seed, value, gflop_per_anchor=0.01234) for seed, value in enumerate((70.0, 71.0, 75.0))]
MOCO = [experiment(f"method-moco-s{seed}", seed, value, "moco", gflop_per_anchor=0.01) for seed, value in enumerate((60.0, 62.0))]
ALONE = [experiment("my-idea", 0, 65.0)]
ALL = [*MOCO, *BINGO, *ALONE]
RECORDS = [record(BINGO[0], device="cpu", cores=2), record(BINGO[1], seconds=30.0), record(MOCO[0], resumed=True)]


def test_spread_is_the_sample_deviation():
    found = spread([1.0, 2.0, 4.0])
    assert (found.mean, found.deviation) == (pytest.approx(7 / 3), pytest.approx((7 / 3) ** 0.5))
    assert spread([5.0]).deviation is None
    assert spread([]) is None


def test_paired_differences_equal_scipys():
    ours, theirs = {0: 70.0, 1: 71.5, 2: 75.0, 9: 1.0}, {2: 64.0, 1: 62.0, 0: 60.0, 8: 2.0}
    found = paired_difference(ours, theirs)
    expected = scipy.stats.ttest_rel([70.0, 71.5, 75.0], [60.0, 62.0, 64.0]).confidence_interval(0.95)
    assert found.bounds == pytest.approx((expected.low, expected.high))
    assert (found.mean, found.pairs) == (pytest.approx(30.5 / 3), 3)


def test_paired_difference_of_two_is_the_closed_form():
    found = paired_difference({0: 3.0, 1: 5.0}, {0: 1.0, 1: 1.0})  # differences 2 and 4: sd / sqrt(2) is 1, t(0.975, 1) = tan(0.475 pi)
    assert found.bounds == pytest.approx((3 - 12.7062047, 3 + 12.7062047))


def test_paired_difference_of_one_seed_has_no_interval_and_of_none_is_none():
    assert (paired_difference({0: 3.0}, {0: 1.0, 1: 9.0}).mean, paired_difference({0: 3.0}, {0: 1.0}).bounds) == (2.0, None)
    assert paired_difference({0: 3.0}, {1: 1.0}) is None


def of_runs(agreements: list[float], linears: list[float], a_variant: int = 3) -> list[Variant]:
    """Runs with both measures, `a_variant` seeds for each variant."""
    starts = range(0, len(agreements), a_variant)
    both = [(agreements[start : start + a_variant], linears[start : start + a_variant]) for start in starts]
    return [
        Variant(f"v{number}", "bingo", True, range(len(x)), {"agreement_10": dict(enumerate(x)), "linear": dict(enumerate(y))})
        for number, (x, y) in enumerate(both)
    ]


@pytest.mark.parametrize("runs", [5, 12, 40])
def test_rank_correlation_and_its_bootstrap_equal_scipys(runs):
    random = np.random.default_rng(runs)
    x = random.normal(size=runs).round(1)
    y = (x + random.normal(size=runs)).round(1)  # with ties
    found = rank_correlation(list(zip(x.tolist(), y.tolist(), strict=True)))
    assert (found.value, found.runs) == (pytest.approx(scipy.stats.spearmanr(x, y).statistic), runs)

    def spearman(a, b):
        return scipy.stats.spearmanr(a, b).statistic if len(set(a)) > 1 < len(set(b)) else np.nan

    drawn = [spearman(x[draw], y[draw]) for draw in random.integers(0, runs, (3000, runs))]
    assert found.bounds == pytest.approx(np.nanquantile(drawn, [0.025, 0.975]), abs=0.06)


def test_rank_correlation_needs_five_runs_that_differ_and_have_both():
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 4.0, 8.0, 16.0, 32.0]
    assert rank_correlation(list(zip(x, y, strict=True))) == RankCorrelation(pytest.approx(1), pytest.approx((1, 1)), 5)
    assert rank_correlation(list(zip(x, y[::-1], strict=True))).value == pytest.approx(-1)
    assert correlation_text(of_runs(x[:4], y[:4])) == correlation_text(of_runs(x, [1.0] * 5)) == correlation_text([]) == ""
    alone = Variant("linear alone", "bingo", True, [0], {"linear": {0: 1.0}})
    assert re.findall(r"over (\d+)", correlation_text([*of_runs(x, y), alone])) == ["5"]
    assert re.findall(r"[−\d.]+", correlation_text(of_runs(x, y[::-1])).partition("over ")[2]) == ["5", "−1.00", "−1.00", "−1.00"]


def test_experiments_are_grouped_by_name_without_their_own_seed():
    found = variants([*ALL, experiment("ablation-k-1-s10", 10, 50.0), experiment("odd-s3", 4, 40.0)], [])
    assert [(variant.name, list(variant.seeds)) for variant in found] == [
        ("method-bingo", [0, 1, 2]), ("my-idea", [0]), ("method-moco", [0, 1]), ("ablation-k-1", [10]), ("odd-s3", [4]),
    ]  # fmt: skip
    assert [variant.with_teacher for variant in found] == [True, True, False, True, True]
    assert found[0].values["linear"] == {0: 70.0, 1: 71.0, 2: 75.0}
    assert found[0].values["of_teacher"][0] == 87.5
    assert "of_teacher" not in found[2].values
    assert found[0].values["gflop_per_image"][0] == pytest.approx(4 * 0.01234)


def test_a_missing_measurement_is_not_zero():
    assert measures(experiment("a", 0, None), {}) == {}


def test_timings_belong_to_the_same_training():
    first, other = BINGO[0], experiment("same-under-another-name-s0", 0, 1.0)
    assert record_of(first, RECORDS) is RECORDS[0]
    assert record_of(other, RECORDS) is RECORDS[0], "DVC took its student from the cache"
    assert record_of(other, [*RECORDS, mine := record(other)]) is mine
    assert record_of(BINGO[2], RECORDS) == {}
    assert record_of(MOCO[0], RECORDS) == {}, "the time of an interrupted run is not complete"
    changed = copy.deepcopy(first.params)
    lay_over(changed, {"methods": {"bingo": {"temperature": 0.5}}})
    assert record_of(Experiment(first.name, changed, {}), RECORDS) == {}, "the record belongs to an earlier run with this name"
    lay_over(changed, {"methods": {"bingo": {"temperature": 0.1}, "moco": {"temperature": 0.5}}, "knn_eval": {"k": [1]}})
    assert record_of(Experiment(first.name, changed, {}), RECORDS) is RECORDS[0], "parameters of other stages do not matter"


def test_timings_are_found_if_names_stand_for_other_parameters():
    known = copy.deepcopy(BINGO[0].params)
    lay_over(known, {"teacher": {"name": "moco-v2-r50-800"}, "distill": {"augment": "weak"}, "extract": {"augment": {"flip_p": 0.5}}})
    ours = Experiment("named-s0", known, {})
    assert record_of(ours, [noted := record(ours)]) is noted
    other = copy.deepcopy(known)
    lay_over(other, {"distill": {"augment": {"flip_p": 0.0}}})
    assert record_of(Experiment("named-s0", other, {}), [noted]) == {}


def test_the_summary_as_markdown():
    lines = summary(variants(ALL, RECORDS), "method-moco").markdown().splitlines()
    assert lines == [
        "| variant | method | seeds | linear, top-1 | k-NN, k = 10 | linear, top-1, minus method-moco | k-NN, k = 10, minus method-moco"
        " | linear, top-1, % of its teacher | GFLOP per anchor | anchors/s | peak memory, MB | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| method-bingo | BINGO | 3 | 72.0 ± 2.6 | 71.0 ± 2.6 | +9.5 (+3.1 to +15.9), 2 of 3 seeds | +9.5 (+3.1 to +15.9), 2 of 3 seeds"
        " | 90.0 | 0.0123 | 1,500 | 1,083 | 1.00 |",
        "| my-idea | BINGO | 1 | 65.0 | 64.0 | +5.0 | +5.0 | 81.2 | – | 1,500 | 1,083 | 1.50 |",
        "| method-moco | MoCo-v2 | 2 | 61.0 ± 1.4 | 60.0 ± 1.4 | – | – | – | 0.01 | – | – | – |",
    ]


def test_without_a_reference_there_are_no_differences():
    assert summary(variants(ALONE, []), None).headers == [
        "variant",
        "method",
        "seeds",
        "linear, top-1",
        "k-NN, k = 10",
        "linear, top-1, % of its teacher",
    ]


def test_seed_by_seed():
    assert by_seed(variants(ALL, [])).rows == [
        ["method-bingo", "70.0 / 69.0", "71.0 / 70.0", "75.0 / 74.0"],
        ["my-idea", "65.0 / 64.0", "–", "–"],
        ["method-moco", "60.0 / 59.0", "62.0 / 61.0", "–"],
    ]


def test_settings_are_those_in_which_runs_differ_and_which_they_read():
    one = changed(BINGO[0], dataset={"root": "a|b"}, methods={"seed": {"head_hidden": 7}})
    other = changed(experiment("wide-s0", 0, 1.0), methods={"bingo": {"terms": "expected"}}, bagging={"k": 9}, report={"title": "t"})
    seed = changed(experiment("seed", 3, 0.5, "seed"), distill={"augment": {"name": "weak", "flip_p": 0.5}}, image={"mean": [0.5] * 3})
    again = changed(experiment("seed-s4", 4, 0.5, "seed"), bagging={"k": 9})
    runs = [one, other, seed, again]
    found = settings(variants(runs, []), runs)
    assert found.headers == ["variant", "dataset.root", "bagging.k", "distill.augment", "methods.bingo.terms"]
    augment = "{name: weak, flip_p: 0.5}"
    assert {row[0]: row[1:] for row in found.rows} == {
        "method-bingo": ["a|b", "5", "digits", "symmetric"],
        "wide": ["null", "9", "digits", "expected"],
        "seed": ["null", "5 or 9", f"{augment} or digits", "–"],
    }
    assert r"| a\|b | 5 |" in found.markdown()
    assert settings(variants(BINGO, []), BINGO) is None, "they differ in their seeds only"
    words = Page(page_of(variants(runs, []), "wide", {"settings": found})).words
    assert all(cell in words for cell in (*found.headers, f"{augment} or digits"))


def test_the_row_whose_results_the_workspace_has_is_marked():
    runs = [dataclasses.replace(one, in_workspace=one is BINGO[1]) for one in ALL]
    assert [row[0] for row in by_seed(variants(runs, [])).rows] == ["method-bingo (workspace: seed 1)", "my-idea", "method-moco"]
    alone = [dataclasses.replace(one, in_workspace=one is ALONE[0]) for one in ALL]
    found = variants(alone, [])
    assert [row[0] for row in summary(found, None).rows] == ["method-bingo", "my-idea (workspace)", "method-moco"]
    assert Page(page_of(found, "my-idea")).all("tr")[2] == {"class": "student"}


def test_signs():
    assert difference_text(paired_difference({0: 1.0, 1: 1.0}, {0: 1.04, 1: 0.96}), 2) == "0.0 (−0.5 to +0.5)"
    assert difference_text(paired_difference({0: 1.0}, {0: 2.0}), 1) == "−1.0"


def page_of(found, reference="method-moco", more=None) -> str:
    tables = {"summary": summary(found, reference), "seeds": by_seed(found), **(more or {})}
    return build_page("abc1234", ALL, found, tables, reference, RECORDS)


def test_the_page_is_offline_accessible_and_repeatable():
    found = variants([*ALL, experiment(f"{ATTACK}-s0", 0, 55.0, gflop_per_anchor=1.0)], RECORDS)
    text = page_of(found)
    assert text == page_of(found)
    assert ATTACK not in text
    page = Page(text)
    assert not [tag for tag, attrs in page.tags if tag in ("script", "link", "img") or "onerror" in attrs]
    assert "http" not in text.replace("http-equiv", "")
    assert page.rows["method-bingo"][:5] == ["BINGO", "3", "72.0 ± 2.6", "71.0 ± 2.6", "+9.5(+3.1 to +15.9), 2 of 3 seeds"]
    assert page.rows["method-moco"][4] == "–none"
    svgs = [attrs for tag, attrs in page.tags if tag == "svg" and "aria-hidden" not in attrs]
    assert [attrs["role"] for attrs in svgs] == ["img", "img"]
    assert "MoCo-v2 61.0 percent at 0.04" in svgs[0]["aria-label"]
    assert len(page.all("caption")) == len(page.all("table")) == 2
    assert "Circles: with a teacher; squares: without." in page.words
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("name", "method", "prefix", "label"),
    [
        ("method-coss", "coss", "method-", "CoSS"),
        ("method-coss-1", "coss", "", "CoSS-1"),
        ("base+method-bingo-paper", "bingo", "base+", "BINGO-paper"),
        ("ablation-k-1", "bingo", "ablation-", "k-1"),
        ("seed-sweep", "bingo", "", "seed-sweep"),
        ("method-mine", "bingo", "", "method-mine"),
        ("moco", "moco", "", "MoCo-v2"),
    ],
)
def test_points_have_the_names_of_methods_in_papers(name, method, prefix, label):
    assert _label(Variant(name, method, True, [0]), prefix) == label


def test_the_page_of_one_variant_has_no_chart():
    assert "Costs are known for fewer than two variants." in page_of(variants(ALONE, []), None)


def test_names_of_points_do_not_overlap():
    points = [Point(f"a rather long name {number}", 1.0 + 0.01 * number, 90.0 + 0.01 * number, 0.5, 0) for number in range(6)]
    svg = labelled_points("p", [*points, Point("far", 100.0, 50.0, None, 2)], "cost", "accuracy", ("teacher", 95.0), "so")
    heights = [float(y) for y in re.findall(r'<text[^>]*? y="([-\d.]+)"[^>]*>a rather', svg)]
    assert len(heights) == 6
    assert min(after - before for before, after in pairwise(sorted(heights))) > 8, "they start at the same x, so each needs its own line"
    assert svg == labelled_points("p", [*points, Point("far", 100.0, 50.0, None, 2)], "cost", "accuracy", ("teacher", 95.0), "so")


def laid_by_dvc(folder: Path, given: list[str]) -> dict:
    """params.yaml after DVC has applied `-S` for each of `given`."""
    from dvc.utils.cli_parse import to_path_overrides
    from dvc.utils.hydra import apply_overrides

    shutil.copy(ROOT / "params.yaml", folder / "params.yaml")
    for file, changes in to_path_overrides(given).items():
        apply_overrides(folder / file, changes)
    return read_yaml(folder / "params.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset.root", "/a b/it's: x=1, [y] {z} \\ \\' $ ~\\"),
        ("dataset.root", "ümläut \\\\"),
        ("report.title", "123"),
        ("teacher.checkpoint", "null"),
        ("dataset.source", ""),
        ("dataset.train_images", None),
        ("distill.lr", 1e-05),
        ("image.mean", [0.1, 2, -3.5e-07]),
        ("baselines", []),
        ("linear_eval.crops.nets", ["student", "moco"]),
        ("bagging.mutual", True),
    ],
)
def test_a_value_survives_dvcs_parser(tmp_path, key, value):
    got = laid_by_dvc(tmp_path, [f"{key}={written(value)}"])
    expected = copy.deepcopy(SHIPPED)
    *sections, last = key.split(".")
    place, wanted = got, expected
    for section in sections:
        place, wanted = place[section], wanted[section]
    wanted[last] = value
    assert got == expected
    assert type(place[last]) is type(value)


RECIPES = [
    "method-moco",
    "method-coss",
    "ablation-keys-stored-relation-student",
    "cifar10",
    "imagenet-r18-compress-1q-swav-r50",
    "downstream-digits",
]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_dvcs_parser(tmp_path, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    expected = copy.deepcopy(SHIPPED)
    title = expected["report"]
    lay_over(expected, {"baselines": [], "linear_eval": {"crops": {"nets": []}}})
    lay_over(expected, {**read_recipe(ROOT / "recipes", name).overlay, "seed": 7, "report": title})
    if root := expected["dataset"]["root"]:
        expected["dataset"]["root"] = str(ROOT / root)  # experiments run in other folders
    assert spelled_out(laid_by_dvc(tmp_path, list(overrides(name, 7)))) == spelled_out(expected)


def test_an_invalid_recipe_is_reported_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    Path("recipes").mkdir()
    Path("recipes/worse.yaml").write_text("# worse\ndistill: {lr: high}\n")
    with pytest.raises(UserError, match=r"with recipe worse: distill\.lr = 'high'"):
        overrides("worse", 0)
    Path("recipes/worst.yaml").write_text("# worst\ndataset: 5\n")
    with pytest.raises(UserError, match=r"with recipe worst: dataset = 5: allowed is a section"):
        overrides("worst", 0)


def shown_by_dvc(*runs: Experiment) -> list[dict]:
    """The parts of the output of `dvc exp show --json` that are read."""
    entries = [{"name": "half-s0", "executor": {"state": "running"}, "revs": [{"name": "half-s0", "data": None}]}]
    entries += [{"name": "broken-s0", "executor": None, "revs": [{"name": "broken-s0", "data": None}]}]
    for run in runs:
        data = {"params": {"params.yaml": {"data": run.params}}, "metrics": {file: {"data": found} for file, found in run.metrics.items()}}
        entries.append({"name": run.name, "executor": None, "revs": [{"name": run.name, "data": data}]})
    commit = {"rev": "30b9f93d617b004bd7cfbc469f196d855a93b5b6", "experiments": entries}
    return [{"rev": "workspace", "experiments": None}, commit]


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """A folder in which DVC shows ALL and timings are recorded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "_shown_by_dvc", lambda revision: shown_by_dvc(*ALL))
    for one in RECORDS:
        write_json(Path(".bingo/runs") / one["experiment"] / "distill.json", one)
    write_json(Path(".bingo/runs/distill.json"), {"params": {}})
    return tmp_path


def test_the_report_prints_tables_and_writes_the_page(shown, capsys):
    experiments.main([], None, "HEAD")
    out, err = capsys.readouterr()
    found = variants(ALL, RECORDS)
    assert out == f"{summary(found, 'method-moco').markdown()}\n\n{by_seed(found).markdown()}\n"
    assert err.startswith("report: file://")
    text = (shown / "reports/experiments.html").read_text()
    assert "commit 30b9f93" in text
    assert "(cpu, 2 cores; unknown device, ? cores)" in text


def test_prefixes_select_experiments_and_keep_the_reference(shown, capsys):
    experiments.main(["my-"], None, "HEAD")
    assert re.findall(r"^\| (m\S+)", capsys.readouterr().out, re.MULTILINE) == ["my-idea", "method-moco"] * 2
    experiments.main(["method-b"], "my-idea", "HEAD")
    assert "minus my-idea" in capsys.readouterr().out


def test_over_a_base_the_reference_is_found_and_the_base_is_on_no_chart(shown, monkeypatch, capsys):
    based = [dataclasses.replace(one, name=f"my-base+{one.name}") for one in (*MOCO, *BINGO)]
    monkeypatch.setattr(experiments, "_shown_by_dvc", lambda revision: shown_by_dvc(*based))
    experiments.main([], None, "HEAD")
    assert "minus my-base+method-moco" in capsys.readouterr().out
    assert "MoCo-v2 61.0 percent at 0.04" in (shown / "reports/experiments.html").read_text()
    assert "my-base+method-moco 61.0" not in (shown / "reports/experiments.html").read_text()
    monkeypatch.setattr(
        experiments, "_shown_by_dvc", lambda revision: shown_by_dvc(*based, dataclasses.replace(MOCO[0], name="b+method-moco"))
    )
    experiments.main([], None, "HEAD")
    assert "minus" not in capsys.readouterr().out  # two could be meant


def test_wrong_choices_are_one_line(shown, monkeypatch):
    with pytest.raises(
        UserError, match="nothing-: no experiment of 30b9f93 has such a name; allowed are method-bingo, method-moco, my-idea"
    ):
        experiments.main(["nothing-"], None, "HEAD")
    with pytest.raises(UserError, match=r"--against = method-mco: allowed are .*did you mean method-moco"):
        experiments.main([], "method-mco", "HEAD")
    monkeypatch.setattr(experiments, "_shown_by_dvc", lambda revision: shown_by_dvc())
    with pytest.raises(UserError, match=r"commit 30b9f93 has no finished experiment; .*dvc exp list --all-commits"):
        experiments.main([], None, "HEAD")


def locked(run: Experiment) -> None:
    """The dvc.lock of a run."""
    Path("dvc.lock").write_text(json.dumps({"stages": {"report": {"params": {"params.yaml": run.params}}}}))


def test_the_committed_run_and_the_workspace_are_compared_too(shown, monkeypatch, capsys):
    """Each with the parameters of its run, from dvc.lock, because params.yaml may have changed since then."""
    committed, own = experiment("", 7, 50.0), experiment("", 8, 51.0, "seed")
    run = partial(subprocess.run, check=True, capture_output=True, text=True)
    run(["git", "init", "-q"])
    locked(committed)
    run(["git", "add", "dvc.lock"])
    run(["git", "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x"])
    commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()

    def rows(workspace: Experiment, rev: str = "HEAD", runs: tuple = (ALONE[0],)) -> list[list[str]]:
        entries = shown_by_dvc(*runs)
        for entry, one in zip(entries, (workspace, committed), strict=True):
            metrics = {file: {"data": found} for file, found in one.metrics.items()}
            entry["data"] = {"params": {"params.yaml": {"data": SHIPPED}}, "metrics": metrics}
        entries[1]["rev"] = commit
        monkeypatch.setattr(experiments, "_shown_by_dvc", lambda revision: entries)
        experiments.main([], None, rev)
        table = capsys.readouterr().out.partition("\n\n")[0].splitlines()[2:]
        return [[cell.strip() for cell in row.split("|")[1:5]] for row in table]

    mine = ["my-idea", "BINGO", "1", "65.0"]
    assert rows(committed) == [mine, ["committed (workspace)", "BINGO", "1", "50.0"]]
    locked(own)
    same = ["same (workspace)", "SEED", "1", "51.0"]
    assert rows(own, runs=(dataclasses.replace(own, name="same"),)) == [same, ["committed", "BINGO", "1", "50.0"]]
    other = changed(dataclasses.replace(own, name="other"), bagging={"k": 9})
    workspace = ["workspace", "SEED", "1", "51.0"]
    assert rows(own, runs=(other,)) == [workspace, ["other", "SEED", "1", "51.0"], ["committed", "BINGO", "1", "50.0"]]
    assert rows(own) == [mine, ["workspace", "SEED", "1", "51.0"], ["committed", "BINGO", "1", "50.0"]]
    assert rows(own, rev=commit) == [mine, ["committed", "BINGO", "1", "50.0"]]
    assert rows(own, runs=()) == [["workspace", "SEED", "1", "51.0"], ["committed", "BINGO", "1", "50.0"]]
    Path("dvc.lock").unlink()
    assert rows(own) == [mine, ["committed", "BINGO", "1", "50.0"]]


def test_records_of_experiments_outlive_their_clones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    for name in ("DVC_EXP_NAME", "DVC_ROOT", "BINGO_RUNS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(common, "die_with_parent", lambda: None)

    def run() -> None:
        with common.stage_run("scan") as stage:
            stage.notes["images"] = 5

    run()
    monkeypatch.setenv("DVC_EXP_NAME", "a-s0")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "home"))
    run()
    monkeypatch.setenv("BINGO_RUNS", str(tmp_path / "elsewhere"))
    run()
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("scan.json")}
    assert names == {".bingo/runs/scan.json", "home/.bingo/runs/a-s0/scan.json", "elsewhere/a-s0/scan.json"}
    kept = json.loads(Path("elsewhere/a-s0/scan.json").read_text())
    assert 20 < kept["peak_memory_mb"] < 10**5
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", kept["ended"])
    assert kept["params"]["teacher"]["pretrain"]["moco"]["queue_rows"] == SHIPPED["teacher"]["pretrain"]["moco"]["queue_rows"]


def test_markdown_of_nothing():
    assert Table(["variant", "n"], []).markdown() == "| variant | n |\n| --- | ---: |"
