"""dvc.yaml says the truth: dependencies are what a stage imports, every stage has a description, layers import downwards only."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from closure import ROOT, closure, imported_files
from ruamel.yaml import YAML

from bingo.params import format_names, method_names, read_yaml
from bingo.planning.recipes import lay_over, read_recipe

STAGES = read_yaml(ROOT / "dvc.yaml")["stages"]

# Files whose change cannot alter an output: the command line, launching, records of a run, checkpoints, validation, progress bars.
INFRASTRUCTURE = {
    *(f"bingo/pipeline/{name}.py" for name in ("run", "commands", "launch", "paths", "state")),
    *(str(path.relative_to(ROOT)) for path in ROOT.glob("bingo/runtime/*.py")),
    *(str(path.relative_to(ROOT)) for path in ROOT.glob("bingo/params/*.py")),
    "bingo/training/finite.py",
}
# `bingo report --experiments` compares what runs have left: no part of a run's own report.
INFRASTRUCTURE |= {
    "bingo/cli/experiments.py",
    "bingo/report/experiments.py",
    "bingo/report/experiments_table.py",
    "bingo/report/experiments_page.py",
}
# A network's kNN accuracy beside the work: printed by `extract`, a column of the curves in training. An edit of these must never cost
# a teacher pass or a training, and none of them can reach a network or an embedding.
WATCHING = {
    *(f"bingo/evals/{name}.py" for name in ("knn", "probe", "features", "collapse", "teacher_check")),
    *("bingo/bags/neighbors.py", "bingo/bags/rows.py", "bingo/training/costs.py"),
}
WATCHED = ("teacher", "extract", "distill", "baseline")
# The house from the ground up: what a file imports is on its own layer or below.
LAYERS = [
    ("bingo/runtime/",),
    ("bingo/params/", "bingo/seeds.py", "bingo/schedules.py"),
    ("bingo/nets/", "bingo/images/"),
    ("bingo/bags/", "bingo/teachers/", "bingo/datasets/"),
    ("bingo/methods/", "bingo/report/", "bingo/browse/", "bingo/export/"),
    ("bingo/embeddings/",),
    ("bingo/evals/", "bingo/detection/", "bingo/training/"),
    ("bingo/pipeline/", "bingo/planning/"),
    ("stages/", "bingo/cli/"),
]


def definition(stage: str) -> dict:
    return STAGES[stage].get("do", STAGES[stage])


def module(stage: str) -> str:
    """What a stage runs: stages/NAME.py; for the items of `baselines`, those of stage NAME_baseline too."""
    return stage.removesuffix("_baseline")


def code_deps(stage: str, method: str, teacher_format: str = "moco") -> set[str]:
    chosen = {"${distill.method}": method, "${item}": method, "${teacher.format}": teacher_format}
    deps = definition(stage)["deps"]
    for placeholder, name in chosen.items():
        deps = [dep.replace(placeholder, name) for dep in deps]
    return {dep for dep in deps if dep.endswith(".py")}


def expected_deps(stage: str, method: str) -> set[str]:
    files = closure(f"stages/{module(stage)}.py") - INFRASTRUCTURE - (WATCHING if stage in WATCHED else set())
    if stage in ("teacher", "distill", "baseline"):  # a method is found by its name, which no import shows
        files |= closure(f"bingo/methods/{method}.py") - INFRASTRUCTURE
    if stage == "teacher":  # so is a format
        files |= closure("bingo/teachers/formats/moco.py") - INFRASTRUCTURE
    return files


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_files_that_decide_the_output(stage):
    methods = {"distill": method_names(), "baseline": ["isd", "moco"]}.get(stage, ["moco"])
    # dvc.yaml cannot tell which of the parts that methods share the chosen one uses, so a stage depends on those of all its methods
    own = {f"bingo/methods/{method}.py" for method in methods}
    shared = set().union(*(expected_deps(stage, method) for method in methods)) - own
    for method in methods:
        declared, expected = code_deps(stage, method), shared | (expected_deps(stage, method) & own)
        assert declared == expected, f"{stage} ({method}): add {sorted(expected - declared)}, remove {sorted(declared - expected)}"


@pytest.mark.parametrize("name", format_names())
def test_the_teacher_depends_on_its_format_alone(name):
    assert closure(f"bingo/teachers/formats/{name}.py") - INFRASTRUCTURE <= code_deps("teacher", "moco", name)
    others = {f"bingo/teachers/formats/{other}.py" for other in format_names() if other != name}
    assert not others & (code_deps("teacher", "moco", name) | closure(f"bingo/teachers/formats/{name}.py"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_a_description_and_a_module_of_its_name(stage):
    assert definition(stage).get("desc")
    assert definition(stage)["cmd"] == f"exec python -m stages.{module(stage)}" + (' "$DVC_STAGE"' if "foreach" in STAGES[stage] else "")
    assert (ROOT / f"stages/{module(stage)}.py").is_file()


def layer(file: str) -> int:
    return next(number for number, places in enumerate(LAYERS) if file.startswith(places))


CODE = [str(path.relative_to(ROOT)) for folder in ("bingo", "stages") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("file", [file for file in CODE if Path(file).name != "__init__.py"])
def test_imports_run_downwards(file):
    for other in imported_files(file):
        if not other.endswith("__init__.py"):
            assert layer(other) <= layer(file), f"{file} imports {other}, which is above it"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_do_not_import_each_other(stage):
    others = {f"stages/{module(other)}.py" for other in STAGES if module(other) != module(stage)}
    assert not closure(f"stages/{module(stage)}.py") & others


def test_methods_do_not_import_each_other():
    for name in method_names():
        others = {f"bingo/methods/{other}.py" for other in method_names() if other != name}
        assert not imported_files(f"bingo/methods/{name}.py") & others


def test_no_parameter_has_a_name_that_dvc_ignores():
    def names(section):
        for key, value in section.items():
            yield key
            if isinstance(value, dict):
                yield from names(value)

    assert not {"size", "nfiles"} & set(names(read_yaml(ROOT / "params.yaml")))


def test_coco_depends_on_every_key_of_its_section_but_the_list_of_runs():
    listed = {param.removeprefix("transfer_coco.") for param in STAGES["transfer_coco"]["do"]["params"] if "transfer_coco" in param}
    assert listed == set(read_yaml(ROOT / "params.yaml")["transfer_coco"]) - {"runs"}


@pytest.mark.parametrize(("stage", "section", "named"), [("semi_eval", "semi_eval", "splits"), ("transfer_cifar", "transfer", "datasets")])
def test_an_item_of_a_section_depends_on_every_key_beside_the_items(stage, section, named):
    listed = {param for param in STAGES[stage]["do"]["params"] if param.startswith(f"{section}.")}
    keys = set(read_yaml(ROOT / "params.yaml")[section]) - {named}
    assert listed == {f"{section}.{key}" for key in keys} | {f"{section}.{named}.${{key}}"}
    assert STAGES[stage]["foreach"] == f"${{{section}.{named}}}"


def test_a_stage_of_items_is_in_the_dag_only_where_something_is_named(tmp_path):
    """As DVC itself reads dvc.yaml, with the shipped parameters and with a recipe that names some."""
    found = []
    for name in ("shipped", "downstream-digits"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(ROOT / "dvc.yaml", folder)
        params = read_yaml(ROOT / "params.yaml")
        if name != "shipped":
            lay_over(params, read_recipe(ROOT / "recipes", name).overlay)
        with (folder / "params.yaml").open("w") as file:
            YAML(typ="safe", pure=True).dump(params, file)
        dvc = [sys.executable, "-m", "dvc"]
        subprocess.run([*dvc, "init", "--quiet", "--no-scm"], cwd=folder, check=True)
        listed = subprocess.run([*dvc, "stage", "list", "--name-only"], cwd=folder, check=True, capture_output=True, text=True).stdout
        found.append(set(listed.split()))
    assert {name.partition("@")[0] for name in found[0]} == set(STAGES) - {"semi_eval", "transfer_cifar", "transfer_coco"}
    assert found[1] - found[0] == {"semi_eval@percent_1", "semi_eval@percent_10", "transfer_cifar@digits_24px"}


HOSTILE = "a$(touch pwned)`touch pwned`;touch pwned\ntouch pwned\n'\"&"


@pytest.mark.parametrize(("stage", "section"), [("semi_eval", "semi_eval.splits"), ("transfer_coco", "transfer_coco.runs")])
def test_a_name_in_the_parameters_reaches_no_shell(tmp_path, stage, section):
    """DVC runs the command of a name before BINGO sees it; what the stage then says is the one line of a wrong parameter."""
    params = read_yaml(ROOT / "params.yaml")
    first, last = section.split(".")
    params[first][last] = {HOSTILE: {"percent": 1.0}} if isinstance(params[first][last], dict) else [HOSTILE]
    with (tmp_path / "params.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(params, file)
    dvc = {"stages": {stage: {"foreach": f"${{{section}}}", "do": {"cmd": definition(stage)["cmd"]}}}}
    with (tmp_path / "dvc.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(dvc, file)
    for folder in ("bingo", "stages"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=tmp_path, env=environment, check=True)
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"error: params.yaml: {first}" in done.stderr, done.stderr
    assert not (tmp_path / "pwned").exists()


def test_a_baseline_depends_on_every_key_of_distill_but_method_and_keys():
    listed = {param.removeprefix("distill.") for param in STAGES["baseline"]["do"]["params"] if param.startswith("distill.")}
    assert listed == set(read_yaml(ROOT / "params.yaml")["distill"]) - {"method", "keys"}
