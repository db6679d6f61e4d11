"""README and docs: every link leads somewhere, generated pages are up to date, and every example runs."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from ruamel.yaml import YAML
from typer.main import get_command
from workspace import ROOT, Workspace

from bingo.cli.main import app
from bingo.params import read_yaml
from docs.tools import api, parameters

RESULTS = sorted((ROOT / "benchmarks/results").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *RESULTS]
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
IN_REPOSITORY = re.compile(r"`((?:bingo|stages|tests|recipes|docs|benchmarks)/[\w/.-]+)`")


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(prose(page)):
        place, _, anchor = unquote(link).partition("#")
        target = (page.parent / place).resolve() if place else page
        if "://" in link:
            continue
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    made = {title for _, title, _ in FENCE.findall((ROOT / "docs/extending.md").read_text())}
    names = set(IN_REPOSITORY.findall(page.read_text())) - made
    assert not [name for name in names if "NAME" not in name and not (ROOT / name).exists()]


def test_every_page_is_reachable_from_the_readme():
    indices = [ROOT / "README.md", ROOT / "benchmarks/results/README.md"]
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in indices for link in LINK.findall(prose(page))}
    assert set(PAGES) - {ROOT / "README.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_exist(page):
    text, missing = page.read_text(), []
    for flag, name in re.findall(r"python (-m )?((?:bingo|stages|tests|benchmarks|docs)[\w./]+)", text):
        path = ROOT / (name.rstrip(".").replace(".", "/") if flag else name)
        missing += [] if path.with_suffix(".py").is_file() or (path / "__main__.py").is_file() else [name]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing += sorted(set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) - targets)
    for line in re.findall(r"(?:^|[`$] ?|&& )bingo ((?:[^\n`#&]|`(?=\w))+)", text, re.MULTILINE):
        missing += [line] if unknown_words(get_command(app), line.split()) else []
    assert not missing


def unknown_words(command: Any, words: list[str]) -> bool:
    """Whether a command line of bingo contains an unknown command or option."""
    while hasattr(command, "get_command") and words and not words[0].startswith("-"):
        command, words = command.get_command(None, words[0]), words[1:]
        if command is None:
            return True
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    return any(word.rstrip(".,:") not in options for word in words if word.startswith("--"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_parameters_that_a_page_names_exist(page):
    shipped = read_yaml(ROOT / "params.yaml")
    names = re.findall(r"(?<![\w/.])([a-z_]+(?:\.[a-z_]+)+)(?:=|`|: )", page.read_text())
    files = ("ipynb", "py", "md")
    named = [name.split(".") for name in names if not name.endswith(files)]
    assert not [name for name in named if name[0] in shipped and not known(shipped, name)]


def known(section: Any, parts: list[str]) -> bool:
    return not parts or (isinstance(section, dict) and parts[0] in section and known(section[parts[0]], parts[1:]))


def test_the_page_of_parameters_is_up_to_date():
    way_out = "params.yaml or its schema has changed: python -m docs.tools.parameters > docs/parameters.md"
    assert (ROOT / "docs/parameters.md").read_text() == parameters.page(), way_out


def test_every_parameter_and_remark_stands_on_the_page():
    text, page, shipped, section = (ROOT / "params.yaml").read_text(), parameters.page(), {}, ""
    for line in page.splitlines():
        if heading := re.fullmatch(r"##+ ([\w.]+)", line):
            section = f"{heading[1]}."
        elif row := re.match(r"\| `(\w+)` \| `(.*?)` \|", line):
            shipped[section + row[1]] = YAML(typ="safe", pure=True).load(row[2])
    leaves = dict(_leaves(read_yaml(ROOT / "params.yaml"), "", shipped))
    assert leaves == shipped
    sections = [list(dict.fromkeys(key.rpartition(".")[0] for key in keys)) for keys in (leaves, shipped)]
    assert sections[0] == sections[1], "the sections are in another order than in params.yaml"
    assert not re.findall(r"\| `(\w+)` .* \|  \|$", page, re.MULTILINE), "say what they mean in docs/tools/parameters.py"
    words = " ".join(re.findall(r"^ +# (.*)$", text, re.MULTILINE)).replace("|", r"\|").replace("*", r"\*").split()
    assert not [word for word in set(words) if word.strip(":.") not in page]


def _leaves(section: dict[str, Any], prefix: str, rows: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and prefix + key not in rows:
            yield from _leaves(value, f"{prefix}{key}.", rows)
        else:
            yield prefix + key, value


def run(workspace: Workspace, module: str) -> str:
    """What a module prints that is run in the workspace, with its arguments."""
    done = workspace.stages.start_module(module, workspace.root).wait()
    assert done.status == 0, f"{module}\n{done.out}\n{done.err}"
    return done.out


def test_the_page_of_the_api_is_up_to_date():
    way_out = "a function or its docstring has changed: python -m docs.tools.api > docs/api.md"
    assert (ROOT / "docs/api.md").read_text() == api.page(), way_out


EXAMPLES = re.split(r"^## ", (ROOT / "docs/extending.md").read_text(), flags=re.MULTILINE)[1:]
WRITTEN = {
    "A method": ["models/student.safetensors", "reports/distill.json"],
    "A teacher format": ["models/teacher.safetensors"],
    "A dataset": ["data/listing.parquet"],
    "An export target": ["out/net.npz", "out/net.npz.md"],
}


def write_example(root: Path, text: str) -> list[list[str]]:
    """Write the files of a section of docs/extending.md, change those that it changes, and return its commands."""
    commands = []
    for language, title, code in FENCE.findall(text):
        if language == "console":
            commands += [line.removeprefix("$ ").split() for line in code.splitlines()]
        elif language == "diff":
            lines = code.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
            changed = (root / title).read_text()
            assert old in changed, f"{title} has no such lines:\n{old}"
            (root / title).write_text(changed.replace(old, new))
        elif title == "params.yaml: methods":
            path = root / "params.yaml"
            path.write_text(
                path.read_text().replace("\nmethods:\n", "\nmethods:\n" + "".join(f"  {line}\n" for line in code.splitlines()), 1)
            )
        elif title:
            (root / title).parent.mkdir(exist_ok=True)
            (root / title).write_text(code)
            if language == "python":
                compile(code, title, "exec")  # a SyntaxWarning is an error too
    return commands


@pytest.mark.parametrize("text", EXAMPLES, ids=lambda text: text.partition("\n")[0])
def test_the_examples_of_extending_run(text, workspace):
    root, heading = workspace.root, text.partition("\n")[0]
    for name in ("bingo", "stages"):
        (root / name).unlink()
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for output in WRITTEN[heading]:
        (root / output).unlink(missing_ok=True)
    commands = write_example(root, text)
    assert commands
    for program, *arguments in commands:
        module = ["bingo.cli.main"] if program == "bingo" else [Path(arguments.pop(0)).stem]
        run(workspace, " ".join(module + arguments))
    assert all((root / output).stat().st_size for output in WRITTEN[heading])


def test_every_section_of_extending_has_a_test():
    assert [text.partition("\n")[0] for text in EXAMPLES] == list(WRITTEN)


def test_pages_name_no_path_of_a_machine():
    assert not [page for page in PAGES if re.search(r"/(?:work|root)/", page.read_text())]
