"""params.yaml and dvc.yaml after other tools have rewritten them: DVC's overrides (`dvc exp run -S`), its commands on stages, and `bingo
recipe use`."""

import json
import re
import shutil
from pathlib import Path

import pytest
from dvc.dvcfile import ParametrizedDumpError
from dvc.repo import Repo
from dvc.utils.hydra import apply_overrides, to_hydra_overrides

from bingo.cli.recipe import write_params
from bingo.params import load_params, read_yaml
from bingo.planning.recipes import lay_over, read_recipe

ROOT = Path(__file__).parents[2]
PARAMS = ROOT / "params.yaml"
FORMS = [
    "null",
    "[]",
    "[a]",
    "3",
    "[a,b,c]",
    "1e-05",
    "'1e-05'",
    "'on'",
    "'null'",
    "'[x'",
    "'# x'",
    "'a: b'",
    r"'it\'s'",
    "''",
    "' x '",
    "'\"'",
    "'line\nline'",
    "true",
    "[[1,2],[]]",
    "'" + "long words " * 30 + "'",
    "[" + ",".join(str(number) for number in range(100)) + "]",
    "[]",
]


def leaves(section: dict, above: str = "") -> dict:
    """Every value that is not a section, by its dotted key; an empty section is a value."""
    found = {}
    for key, value in section.items():
        found |= leaves(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return found


SHIPPED = leaves(read_yaml(PARAMS))


def in_form(form: str):
    return to_hydra_overrides([f"key={form}"])[0].value()


def remarks(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.lstrip().startswith("#")]


@pytest.fixture
def rewritten(tmp_path) -> Path:
    return Path(shutil.copy(PARAMS, tmp_path / "params.yaml"))


def as_override(value) -> str:
    """A shipped value in the grammar of `-S`."""
    if isinstance(value, list):
        return f"[{','.join(map(as_override, value))}]"
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)


def override(key: str, value: str) -> str:
    """A setting in the grammar of `-S`, in which a key that begins with a digit is enclosed in braces (the schedules 1x and 2x)."""
    section, _, last = key.rpartition(".")
    return f"{section}={{{last}: {value}}}" if last[0].isdigit() else f"{key}={value}"


def scalars_and_lists() -> dict:
    return {key: value for key, value in SHIPPED.items() if not isinstance(value, dict)}


@pytest.mark.slow
def test_every_key_survives_every_form_and_back(rewritten):
    keys = scalars_and_lists()
    for form in FORMS:
        apply_overrides(rewritten, [override(key, form) for key in keys])
        assert {key: value for key, value in leaves(read_yaml(rewritten)).items() if key in keys} == dict.fromkeys(keys, in_form(form))
    apply_overrides(rewritten, [override(key, as_override(value)) for key, value in keys.items()])
    assert read_yaml(rewritten) == read_yaml(PARAMS)
    assert remarks(rewritten.read_text()) == remarks(PARAMS.read_text())
    load_params(rewritten)


def named_by_override(kind: type) -> list[str]:
    return [key for key, value in SHIPPED.items() if isinstance(value, kind)]


def kind_of_place(key: str) -> tuple[int, bool, bool, bool]:
    """Properties that decide how a list is written back: its depth, whether it is empty, whether it ends its section or is on one line."""
    section = key.rpartition(".")[0]
    on_one_line = f"{section.rpartition('.')[2]}: {{" in PARAMS.read_text()
    return key.count("."), not SHIPPED[key], key == [other for other in SHIPPED if other.startswith(section)][-1], on_one_line


@pytest.mark.slow
@pytest.mark.parametrize("key", {kind_of_place(key): key for key in named_by_override(list)}.values())
def test_a_single_list_survives_the_forms_that_once_broke_it(rewritten, key):
    for form in ("[a,b]", "[]", "null", "[[a],[]]", "[]"):
        apply_overrides(rewritten, [override(key, form)])
        assert leaves(read_yaml(rewritten)) == SHIPPED | {key: in_form(form)}
    assert remarks(rewritten.read_text()) == remarks(PARAMS.read_text())


@pytest.mark.parametrize("key", named_by_override(dict))
def test_a_section_with_the_users_own_keys_is_filled_and_emptied(rewritten, key):
    for override, expected in [
        (f"++{key}={{a: {{b: [1, 2]}}}}", {f"{key}.a.b": [1, 2]}),
        (f"{key}.a.b=[]", {f"{key}.a.b": []}),
        (f"~{key}.a", {key: {}}),
    ]:
        apply_overrides(rewritten, [override])
        others = {name: value for name, value in SHIPPED.items() if name != key}
        assert leaves(read_yaml(rewritten)) == others | expected
    assert remarks(rewritten.read_text()) == remarks(PARAMS.read_text())


def test_comments_are_at_the_head_of_sections_and_name_their_keys():
    """The only layout of comments that survives rewriting: none behind a value, no empty lines, none between keys."""
    lines = PARAMS.read_text().splitlines()
    for number, line in enumerate(lines):
        assert line.strip(), f"line {number + 1} is empty: a rewrite keeps it as part of a list, and breaks there"
        if not line.lstrip().startswith("#"):
            assert " #" not in line
            continue
        above = next((lines[i] for i in range(number - 1, -1, -1) if not lines[i].lstrip().startswith("#")), None)
        assert above is None or above.endswith(":"), line
    keys = set(re.findall(r"^ *(\w+):", PARAMS.read_text(), re.MULTILINE))
    named = re.findall(r"^ *# (\w+) {2,}", PARAMS.read_text(), re.MULTILINE)
    assert len(named) > 30
    assert not set(named) - keys


@pytest.mark.parametrize(
    ("setting", "key", "expected"),
    [
        ("methods.seed.small_crops=2", "methods.seed.small_crops", 2),
        ("methods.isd.projection_width=null", "methods.isd.projection_width", None),
        ("teacher.image.mean=[0.1,0.2,0.3]", "teacher.image.mean", [0.1, 0.2, 0.3]),
        ("distill.augment={name: weak}", "distill.augment", {"name": "weak"}),
        ("extract.augment={name: weak, flip_p: 0.0}", "extract.augment", {"name": "weak", "flip_p": 0.0}),
        ("transfer_coco.schedules={1x: [60, 80, 90]}", "transfer_coco.schedules.1x", [60, 80, 90]),
    ],
)
def test_one_setting_changes_in_a_section_on_one_line_or_in_a_block(rewritten, setting, key, expected):
    apply_overrides(rewritten, [setting])
    changed = read_yaml(PARAMS)
    *sections, last = key.split(".")
    section = changed
    for name in sections:
        section = section[name]
    section[last] = expected
    assert read_yaml(rewritten) == changed
    assert remarks(rewritten.read_text()) == remarks(PARAMS.read_text())
    load_params(rewritten)


def test_a_long_comment_behind_a_section_is_kept(rewritten, monkeypatch):
    remark = "  # tried before: " + ", ".join(f"k{i}: {{views: {i}}}" for i in range(12))
    rewritten.write_text(re.sub(r"^(extract: .*)$", rf"\1{remark}", rewritten.read_text(), flags=re.MULTILINE))
    before = rewritten.read_text().splitlines()
    monkeypatch.chdir(rewritten.parent)
    overlay, expected = {"methods": {"bingo": {"terms": "expected"}}}, read_yaml(rewritten)
    lay_over(expected, overlay)
    write_params(overlay, expected)
    changed = [line for line in rewritten.read_text().splitlines() if line not in before]
    assert changed == ["    terms: expected"]


@pytest.mark.parametrize("name", ["method-seed", "downstream-digits", "coco-fpn", "imagenet-r18-seed-r50w2", "keys-stored"])
def test_applying_and_undoing_a_recipe_leaves_the_file_unchanged(rewritten, monkeypatch, name):
    """Sections on one line of up to 140 columns stay there, and only lines with changed values change."""
    monkeypatch.chdir(rewritten.parent)
    shipped, changed, text = read_yaml(PARAMS), read_yaml(PARAMS), PARAMS.read_text()
    overlay = read_recipe(ROOT / "recipes", name).overlay
    lay_over(changed, overlay)
    write_params(overlay, changed)
    assert read_yaml(rewritten) == changed
    assert (rewritten.read_text() == text) == (changed == shipped)
    assert max(len(line) for line in rewritten.read_text().splitlines() if "{" in line) <= 140
    write_params(shipped, shipped)
    assert rewritten.read_text() == text


def resolved_stages() -> dict[str, tuple]:
    """The commands, inputs and outputs of each stage of the repository here, as DVC reads them."""
    with Repo(".") as repo:
        return {
            stage.addressing: (
                stage.cmd,
                sorted(map(str, stage.deps)),
                sorted(map(str, stage.outs)),
                [sorted(p.params) for p in stage.params],
            )
            for stage in repo.index.stages
        }


def in_any_order(value):
    """Sorted lists, because DVC sorts deps, params and outs when writing."""
    if isinstance(value, dict):
        return {key: in_any_order(item) for key, item in value.items()}
    return sorted(map(in_any_order, value), key=str) if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")  # from pygtrie, which DVC uses
def test_dvcs_own_commands_on_stages_lose_nothing_of_dvc_yaml(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, name)
    file, text, stages = Path("dvc.yaml"), Path("dvc.yaml").read_text(), in_any_order(read_yaml("dvc.yaml"))
    with Repo.init(".", no_scm=True) as repo:
        resolved, frozen = resolved_stages(), []
        assert {name.partition("@")[0] for name in resolved} >= {"scan", "teacher", "extract", "bag", "distill", "linear_eval", "report"}
        for name in resolved.keys() & stages["stages"].keys():  # DVC cannot find a stage with foreach by its name to freeze it
            try:
                repo.freeze(name)
                assert in_any_order(read_yaml(file)["stages"][name]) == stages["stages"][name] | {"frozen": True}
                repo.unfreeze(name)
                frozen.append(name)
            except ParametrizedDumpError:  # a stage with ${...}: nothing is written
                pass
        repo.stage.add(name="own", cmd="true", deps=["params.yaml"], outs=["own.txt"])
        assert resolved_stages().keys() - resolved.keys() == {"own"}
        repo.remove("own")
    assert "scan" in frozen
    assert in_any_order(read_yaml(file)) == stages
    assert resolved_stages() == resolved
    assert remarks(file.read_text()) == remarks(text)
