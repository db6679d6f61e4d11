"""params.yaml under the tools that rewrite it: DVC's own overrides (`dvc exp run -S`), and `bingo recipe use`."""

import json
import re
import shutil
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides, to_hydra_overrides

from bingo.params import load_params, read_yaml

PARAMS = Path(__file__).parents[2] / "params.yaml"
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
    """Every value that is no section, by its dotted key; an empty section is a value."""
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


def scalars_and_lists() -> dict:
    """All that `-S` can name: in its grammar a key begins with a letter, which the schedules 1x and 2x do not."""
    return {key: value for key, value in SHIPPED.items() if not isinstance(value, dict) and not key.endswith((".1x", ".2x"))}


@pytest.mark.slow
def test_every_key_goes_through_every_form_and_back(rewritten):
    keys = scalars_and_lists()
    for form in FORMS:
        apply_overrides(rewritten, [f"{key}={form}" for key in keys])
        assert {key: value for key, value in leaves(read_yaml(rewritten)).items() if key in keys} == dict.fromkeys(keys, in_form(form))
    apply_overrides(rewritten, [f"{key}={as_override(value)}" for key, value in keys.items()])
    assert read_yaml(rewritten) == read_yaml(PARAMS)
    assert remarks(rewritten.read_text()) == remarks(PARAMS.read_text())
    load_params(rewritten)


def named_by_override(kind: type) -> list[str]:
    return [key for key, value in SHIPPED.items() if isinstance(value, kind) and not key.endswith((".1x", ".2x"))]


@pytest.mark.slow
@pytest.mark.parametrize("key", named_by_override(list))
def test_one_list_alone_goes_through_the_forms_that_broke_it(rewritten, key):
    for form in ("[a,b]", "[]", "null", "[[a],[]]", "[]"):
        apply_overrides(rewritten, [f"{key}={form}"])
        assert leaves(read_yaml(rewritten)) == SHIPPED | {key: in_form(form)}
    assert remarks(rewritten.read_text()) == remarks(PARAMS.read_text())


@pytest.mark.parametrize("key", named_by_override(dict))
def test_a_section_of_the_users_own_words_is_filled_and_emptied(rewritten, key):
    for override, expected in [
        (f"++{key}={{a: {{b: [1, 2]}}}}", {f"{key}.a.b": [1, 2]}),
        (f"{key}.a.b=[]", {f"{key}.a.b": []}),
        (f"~{key}.a", {key: {}}),
    ]:
        apply_overrides(rewritten, [override])
        others = {name: value for name, value in SHIPPED.items() if name != key}
        assert leaves(read_yaml(rewritten)) == others | expected
    assert remarks(rewritten.read_text()) == remarks(PARAMS.read_text())


def test_remarks_stand_at_the_head_of_sections_and_name_their_keys():
    """The only layout of remarks that survives: nothing behind a value, no empty line, none between keys."""
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
