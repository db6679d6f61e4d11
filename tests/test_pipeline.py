"""dvc.yaml is correct: a stage depends on the files and folders that it imports, and every stage has a description."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from closure import ROOT, closure
from dvc.repo import Repo
from ruamel.yaml import YAML

from bingo.params import format_names, method_names, read_yaml
from bingo.params.known import OWN
from bingo.params.views import PLACES
from bingo.pipeline.run import code_fingerprint
from bingo.planning.recipes import lay_over, read_recipe

STAGES = read_yaml(ROOT / "dvc.yaml")["stages"]

# Files whose change cannot affect an output: launching, records of a run, checkpoints, validation, progress bars; nor can files that
# only these import.
INFRASTRUCTURE = {
    "bingo/paths.py",
    *(
        str(path.relative_to(ROOT))
        for folder in ("runtime", "params", "pipeline", "planning")
        for path in ROOT.glob(f"bingo/{folder}/*.py")
    ),
} - {f"bingo/pipeline/{name}.py" for name in ("training", "backbones", "classifying")}  # these affect training and evaluation
# k-NN accuracy of a network for information: printed by `extract`, and a column of the training curves. An edit of these must never
# cause a teacher pass or a training, because they cannot affect a network or an embedding.
WATCHING = {
    *(f"bingo/evals/{name}.py" for name in ("agreement", "knn", "probe", "features", "collapse", "teacher_check")),
    *("bingo/bags/neighbors.py", "bingo/bags/rows.py"),
}
WATCHED = ("teacher", "extract", "distill", "baseline")


def definition(stage: str) -> dict:
    return STAGES[stage].get("do", STAGES[stage])


def module(stage: str) -> str:
    """The module of a stage, stages/NAME.py; a stage NAME_baseline, for the items of `baselines`, has the same module."""
    return stage.removesuffix("_baseline")


def code_deps(stage: str, method: str) -> list[str]:
    """The files and folders of code that dvc.yaml lists."""
    deps = [dep.replace("${distill.method}", method).replace("${item}", method) for dep in definition(stage)["deps"]]
    return [dep for dep in deps if dep.startswith(("bingo/", "stages/")) and not dep.endswith(".yaml")]


def files_in(dep: str) -> set[str]:
    """The source files covered by a dependency."""
    return {dep} if dep.endswith(".py") else {str(path.relative_to(ROOT)) for path in (ROOT / dep).rglob("*.py") if path.stem != "__init__"}


def dep_files(stage: str, method: str) -> set[str]:
    return set().union(*(files_in(dep) for dep in code_deps(stage, method)))


def expected_deps(stage: str, method: str) -> set[str]:
    roots = {f"stages/{module(stage)}.py"}
    if stage in ("teacher", "distill", "baseline"):  # methods are imported by name, which the syntax tree does not show
        roots |= {f"bingo/methods/{method}.py"}
    if stage in ("teacher", "weights"):  # formats, too: `teacher.name` may stand for one
        roots |= {f"bingo/teachers/formats/{name}.py" for name in format_names()}
        roots |= {str(path.relative_to(ROOT)) for path in ROOT.glob("bingo/nets/own/*.py") if path.stem != "__init__"}
    return set().union(*(closure(root, INFRASTRUCTURE) for root in roots)) - (WATCHING if stage in WATCHED else set())


def methods_of(stage: str) -> list[str]:
    return {"distill": method_names(), "baseline": ["isd", "moco"]}.get(stage, ["moco"])


@pytest.mark.parametrize("stage", STAGES)
def test_the_deps_of_a_stage_cover_its_imports_and_nothing_else(stage):
    imported = set().union(*(expected_deps(stage, method) for method in methods_of(stage)))
    for method in methods_of(stage):
        missing = expected_deps(stage, method) - dep_files(stage, method)
        assert not missing, f"{stage} ({method}): dvc.yaml must list {sorted(missing)}, or a folder that contains them"
        needless = [dep for dep in code_deps(stage, method) if not files_in(dep) & imported]
        assert not needless, f"{stage} ({method}): dvc.yaml lists {needless}, but imports nothing from it"


def test_teacher_and_extract_depend_on_exactly_the_files_they_import():
    """A folder with other files in it causes a needless rerun. Teacher and extract may take days, so they list no folder except that of the
    loop."""
    for stage in ("teacher", "extract"):
        assert dep_files(stage, "moco") - files_in("bingo/training") == expected_deps(stage, "moco") - files_in("bingo/training")


def test_no_edit_of_a_method_the_training_or_an_evaluation_reruns_extract():
    above = tuple(f"bingo/{folder}/" for folder in ("methods", "training", "evals", "detection", "report", "bags"))
    assert not [file for file in dep_files("extract", "moco") if file.startswith(above)]
    # Nor does it rerun the teacher, except for MoCo and the loop, with which it may be pretrained. Without pretraining, the stage takes
    # seconds and writes the same bytes, so that DVC reruns nothing after it.
    method = {f"bingo/methods/{name}.py" for name in ("contract", "moco", "parts/losses", "parts/momentum")}
    pretraining = files_in("bingo/training") | method
    assert {file for file in dep_files("teacher", "moco") if file.startswith(above)} == pretraining


@pytest.mark.parametrize("stage", ["teacher", "distill", "baseline"])
def test_no_edit_of_an_evaluation_reruns_a_training(stage):
    for method in methods_of(stage):
        above = ("bingo/evals/", "bingo/detection/", "bingo/report/")
        assert not [file for file in dep_files(stage, method) if file.startswith(above)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from libraries of DVC
def test_dvc_reruns_exactly_the_stages_that_an_edit_concerns(tmp_path, monkeypatch):
    """Checked with DVC itself: every stage is recorded as done, a line is added to one file, and `dvc status` lists the stages to rerun."""
    stages = {}
    for name, stage in STAGES.items():
        code = {"cmd": "true", "deps": [dep for dep in definition(name)["deps"] if dep.startswith(("bingo/", "stages/"))]}
        stages[name] = {"foreach": ["moco"], "do": code} if "foreach" in stage else code
    write_yaml(tmp_path / "dvc.yaml", {"stages": stages})
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copy(ROOT / ".dvcignore", tmp_path)
    for folder in ("bingo", "stages"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))

    for command in (["init", "--quiet", "--no-scm"], ["repro", "--quiet"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    with Repo() as repo:

        def to_run() -> set[str]:
            return {name.partition("@")[0] for name in repo.status()}

        assert to_run() == set()
        (tmp_path / "bingo/images/__pycache__").mkdir()
        (tmp_path / "bingo/images/__pycache__/draws.pyc").touch()
        assert to_run() == set(), "compiled files are no dependencies"
        trainings, judging = {"distill", "baseline"}, {"linear_eval", "linear_eval_baseline", "knn_eval", "knn_eval_baseline"}
        judging |= {"semi_eval", "transfer_cifar"}
        edits = {
            "bingo/methods/bingo.py": {"distill"} if read_yaml(ROOT / "params.yaml")["distill"]["method"] == "bingo" else set(),
            "bingo/methods/moco.py": {"teacher", "baseline"},
            "bingo/training/loop.py": {"teacher", *trainings},
            "bingo/evals/linear.py": judging,
            "bingo/bags/kmeans.py": {"bag"},
            "bingo/embeddings/extract.py": {"extract"},
            "bingo/teachers/formats/dino.py": {
                "teacher",
                "weights",
            },  # of all names, because the file of a name says which format it stands for
            "bingo/teachers/formats/added.py": {"teacher", "weights"},
            "bingo/teachers/known/added.yaml": {"weights"},
            "bingo/teachers/known/own.yaml": {"teacher", "weights"},
            "bingo/teachers/known/dinov2-s.yaml": {"weights"},
            "bingo/runtime/checkpoints.py": set(),
            "bingo/params/views.yaml": {"teacher", "extract", *trainings},
        }
        for file, expected in edits.items():
            path = tmp_path / file
            before = path.read_bytes() if path.exists() else None
            path.write_bytes((before or b"") + b"# edited\n")
            assert to_run() == expected, file
            path.unlink() if before is None else path.write_bytes(before)


def write_yaml(path: Path, content: dict) -> None:
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(content, file)


def test_the_fingerprint_of_a_stage_covers_all_files_of_its_folders(tmp_path, monkeypatch):
    """Training does not resume from a checkpoint of other code, wherever in a folder listed in dvc.yaml the edit was."""
    shutil.copytree(ROOT / "bingo", tmp_path / "bingo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = code_fingerprint("distill", "seed")
    (tmp_path / "bingo/images/__pycache__").mkdir()
    (tmp_path / "bingo/images/__pycache__/draws.cpython.pyc").write_bytes(b"x")
    for file, counts in {"images/draws.py": True, "methods/seed.py": True, "methods/moco.py": False, "evals/knn.py": False}.items():
        assert code_fingerprint("distill", "seed") == before
        path = tmp_path / "bingo" / file
        text = path.read_text()
        path.write_text(text + "# edited\n")
        assert (code_fingerprint("distill", "seed") != before) == counts, file
        path.write_text(text)


def test_stages_that_draw_views_by_name_depend_on_the_file_of_their_numbers():
    def reads_views(stage: str) -> bool:
        keys = [str(param) for param in definition(stage)["params"]]
        return any(f"{place}.".startswith(f"{key}.") for key in keys for place in PLACES)

    listing = {stage for stage in STAGES if "bingo/params/views.yaml" in definition(stage)["deps"]}
    assert listing == {stage for stage in STAGES if reads_views(stage)} == set(WATCHED)


def test_dvc_yaml_lists_code_in_at_most_130_lines():
    assert sum(len(code_deps(stage, "moco")) for stage in STAGES) <= 130


def test_the_teacher_depends_only_on_the_file_of_its_own_name():
    assert [dep for dep in definition("teacher")["deps"] if "known" in dep] == ["bingo/teachers/known/${teacher.name}.yaml"]
    assert read_yaml(ROOT / "params.yaml")["teacher"]["name"] == OWN
    assert (ROOT / f"bingo/teachers/known/{OWN}.yaml").is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_a_description_and_a_module_of_its_name(stage):
    assert definition(stage).get("desc")
    assert definition(stage)["cmd"] == f"exec python -m stages.{module(stage)}" + (' "$DVC_STAGE"' if "foreach" in STAGES[stage] else "")
    assert (ROOT / f"stages/{module(stage)}.py").is_file()


def test_no_parameter_has_a_name_that_dvc_ignores():
    def names(section):
        for key, value in section.items():
            yield key
            if isinstance(value, dict):
                yield from names(value)

    assert not {"size", "nfiles"} & set(names(read_yaml(ROOT / "params.yaml")))


def test_coco_depends_on_every_key_of_its_section_except_the_list_of_runs():
    listed = {param.removeprefix("transfer_coco.") for param in STAGES["transfer_coco"]["do"]["params"] if "transfer_coco" in param}
    assert listed == set(read_yaml(ROOT / "params.yaml")["transfer_coco"]) - {"runs"}


@pytest.mark.parametrize(("stage", "section", "named"), [("semi_eval", "semi_eval", "splits"), ("transfer_cifar", "transfer", "datasets")])
def test_an_item_of_a_section_depends_on_every_key_beside_the_items(stage, section, named):
    listed = {param for param in STAGES[stage]["do"]["params"] if param.startswith(f"{section}.")}
    keys = set(read_yaml(ROOT / "params.yaml")[section]) - {named}
    assert listed == {f"{section}.{key}" for key in keys} | {f"{section}.{named}.${{key}}"}
    assert STAGES[stage]["foreach"] == f"${{{section}.{named}}}"


@pytest.mark.slow
def test_a_stage_with_items_is_in_the_dag_only_if_the_parameters_name_some(tmp_path):
    """Read by DVC itself, with the shipped parameters and with a recipe that names items."""
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


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "section"), [("semi_eval", "semi_eval.splits"), ("transfer_coco", "transfer_coco.runs")])
def test_no_name_in_the_parameters_is_run_by_a_shell(tmp_path, stage, section):
    """DVC runs the command with a name before BINGO sees it; the stage then reports one line about a wrong parameter."""
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


def test_a_baseline_depends_on_every_key_of_distill_except_those_of_the_student_alone():
    listed = {param.removeprefix("distill.") for param in STAGES["baseline"]["do"]["params"] if param.startswith("distill.")}
    assert listed == set(read_yaml(ROOT / "params.yaml")["distill"]) - {"method", "keys", "keep_best", "student_ema"}
