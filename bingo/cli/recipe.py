"""bingo recipe list | show | use | check: overrides of params.yaml, one file each in recipes/ (bingo/planning/recipes.py)."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bingo.cli.shipped import in_git
from bingo.pipeline.commands import from_here
from bingo.runtime.errors import USER_MISTAKE

if TYPE_CHECKING:
    from bingo.params import TeacherParams
    from bingo.planning.recipes import Recipe

app = typer.Typer(no_args_is_help=True, add_completion=False)
FOLDER = Path("recipes")
PARAMS = Path("params.yaml")
# Headings of the list, by prefix of the name.
GROUPS = {
    "method-": "Methods, for the images set in params.yaml",
    "ablation-": "Ablations of BINGO, for the images set in params.yaml",
    "imagenet-r18-": "ImageNet, ResNet-18",
    "imagenet-r34-": "ImageNet, ResNet-34",
    "imagenet-effb0-": "ImageNet, EfficientNet-B0",
    "imagenet-mobv3-": "ImageNet, MobileNet-v3-large",
    "keys-": "Keys, combined with an ImageNet recipe",
    "lean-": "ImageNet, one view of an image and the expected terms, without published figures",
    "foundation-": "ImageNet, students of foundation models, without published figures",
    "coco-": "COCO, combined with an ImageNet recipe",
    "downstream-": "Few labels and transfer, for the student set in params.yaml",
    "parts/": "Parts included by recipes",
    "": "Your own images, and small datasets",
}
Name = Annotated[str, typer.Argument(help="Name of a recipe, as printed by `bingo recipe list`.")]


@app.command("list")
def list_recipes(everything: Annotated[bool, typer.Option("--all", help="Include the parts shared by recipes.")] = False) -> None:
    """Print all recipes, each with its published linear top-1 / top-5 accuracy in percent, if any, and a description. A recipe that
    cannot be read is listed with its error, and the exit code is 2."""
    from bingo.planning.recipes import recipe_names

    names, broken = recipe_names(FOLDER, parts=everything), False
    for start, heading in GROUPS.items():
        members = [name for name in names if next(prefix for prefix in GROUPS if name.startswith(prefix)) == start]
        if members:
            typer.echo(f"{heading}:")
        for name in members:
            text, whole = _summary(name)
            typer.echo(f"  {name:52} {text}")
            broken |= not whole
    typer.echo("One of them: bingo recipe show NAME; to apply it to params.yaml: bingo recipe use NAME")
    if broken:
        raise SystemExit(USER_MISTAKE)


def _summary(name: str) -> tuple[str, bool]:
    """Figures and description of a recipe and True, or the error in it and False."""
    from bingo.planning.recipes import description, overlay_mistakes, own_about, read_recipe, recipe_path
    from bingo.runtime.errors import UserError

    path = recipe_path(FOLDER, name)
    try:
        lines = [f"{path}: {line}" for line in overlay_mistakes(read_recipe(FOLDER, name).overlay)]
    except UserError as error:
        lines = error.lines
    if lines:
        return f"{'BROKEN':12} {'; '.join(lines)}", False
    expected = own_about(path).expected
    figures = " / ".join(f"{expected[measure]:.1f}" for measure in ("linear_top1", "linear_top5") if measure in expected)
    return f"{figures:12} {description(path)}", True


@app.command()
def show(name: Name) -> None:
    """Print one recipe: the file, all values that it sets (including its parts), the published figures, and the estimated cost of a run."""
    from bingo.cli.recipe_check import cost_lines
    from bingo.params import read_yaml, validate
    from bingo.params.views import spelled_out
    from bingo.planning.recipes import as_text, flattened, lay_over, read_recipe, recipe_path

    recipe = read_recipe(FOLDER, name)
    document = read_yaml(PARAMS)
    lay_over(document, recipe.overlay)
    params = validate(document, f"{PARAMS} with recipe {name}")
    typer.echo(recipe_path(FOLDER, name).read_text())
    typer.echo("It sets:")
    for key, value in flattened(spelled_out(recipe.overlay)):
        if not value and key in ("report.title", "report.published"):  # the values of another recipe are removed; this one sets none
            continue
        typer.echo(f"  {key}: {as_text(value)}")
    typer.echo()
    for line in _about_lines(recipe, params.teacher):
        typer.echo(line)
    typer.echo("\n".join(cost_lines(params, recipe.about)))


def _about_lines(recipe: "Recipe", teacher: "TeacherParams") -> list[str]:
    """The published figures, the teacher, and the differences from the published settings."""
    from bingo.report.measures import measure_label

    about = recipe.about
    lines = [f"published: {measure_label(measure)} {percent} % ({about.source})" for measure, percent in about.expected.items()]
    if about.teacher is not None:
        file = f"{teacher.checkpoint}, format {teacher.format}" if teacher.checkpoint else teacher.arch
        lines.append(f"teacher: {file}, see the {about.teacher.published_by}, linear {about.teacher.linear_top1} %")
    return lines + [f"deviates: {line}" for line in about.deviates]


@app.command()
def use(name: Name, root: Annotated[str | None, typer.Option(help="Folder of the images; sets dataset.root.")] = None) -> None:
    """Apply a recipe to params.yaml: print each change, validate the result, then write it. Comments are kept. A recipe `method-...`
    replaces another one, whose settings are first reset to the committed values."""
    from bingo.params import read_yaml, validate
    from bingo.planning.recipes import as_text, lay_over, read_recipe, replaced

    params = read_yaml(PARAMS)
    validate(params, str(PARAMS))
    overlay = replaced(FOLDER, name, params, _committed() or params)
    lay_over(overlay, read_recipe(FOLDER, name).overlay)
    if root is not None:
        lay_over(overlay, {"dataset": {"root": seen_from_workspace(root)}})
    changes = lay_over(params, overlay)
    validate(params, f"{PARAMS} with recipe {name}")
    write_params(overlay, params)
    for key, old, new in changes:
        typer.echo(f"{key}: {as_text(old)} -> {as_text(new)}")
    undo = "git checkout params.yaml restores the committed values; " if in_git() else ""
    typer.echo(f"params.yaml: {len(changes)} changes; {undo}next: dvc repro")


def _committed() -> dict[str, Any]:
    """The committed params.yaml; empty if git does not have it, or if it cannot be read."""
    from ruamel.yaml import YAML

    if not shutil.which("git"):
        return {}
    shown = subprocess.run(["git", "show", f"HEAD:./{PARAMS}"], capture_output=True, check=False).stdout
    try:
        return dict(YAML(typ="safe", pure=True).load(shown) or {})
    except Exception:  # arbitrary bytes make the parser raise almost anything
        return {}


def seen_from_workspace(root: str) -> str:
    """A folder as written to params.yaml: as given by the user, but relative to the workspace if that is not the current folder."""
    if root.startswith("~"):
        return root
    place = from_here("--root", Path(root))
    return os.path.relpath(place) if place.is_absolute() and not Path(root).is_absolute() else root


def write_params(overlay: dict[str, Any], expected: dict[str, Any]) -> None:
    """Lay `overlay` over the file params.yaml, which then contains `expected`; its comments are kept. Raises UserError if it is
    read-only."""
    from bingo.runtime.artefacts import write_bytes
    from bingo.runtime.errors import UserError

    if not os.access(PARAMS, os.W_OK):
        raise UserError(f"{PARAMS}: is read-only; chmod u+w {PARAMS}")
    write_bytes(PARAMS, _rewritten(overlay, expected).encode())


def _rewritten(overlay: dict[str, Any], expected: dict[str, Any]) -> str:
    """The text of params.yaml with the new values. Comments are kept unless they would break it; the result always equals `expected`."""
    from ruamel.yaml import YAML

    from bingo.planning.recipes import lay_over

    try:
        document = _yaml().load(PARAMS.read_text())
        lay_over(document, overlay)
        _keep_on_one_line(document)
        text = _dumped(document)
        if YAML(typ="safe", pure=True).load(text) == expected:
            return text
    except Exception:  # a comment behind a list, as other tools leave it, makes the library write what it cannot read
        pass
    typer.echo(
        "warning: params.yaml: comments are lost, because one after a value would break the file; see: git diff params.yaml", err=True
    )
    return _dumped(expected)


def _keep_on_one_line(section: Any) -> None:
    """Write new lists as [a, b] and new mappings without sections of their own as {a: 1}, like the others in the file."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    for key, value in section.items():
        if type(value) is list or (type(value) is dict and not any(isinstance(inner, dict) for inner in value.values())):
            section[key] = CommentedSeq(value) if isinstance(value, list) else CommentedMap(value)
            section[key].fa.set_flow_style()
        elif isinstance(value, dict):
            _keep_on_one_line(value)


def _dumped(document: Any) -> str:
    import io

    text = io.StringIO()
    _yaml().dump(document, text)
    return re.sub(r"^( *)\w+: \{[^#\n]{99,}\}$", _folded, text.getvalue(), flags=re.MULTILINE)


def _folded(line: "re.Match[str]") -> str:
    """A one-line section, folded to lines of at most 140 columns, like those in the shipped file."""
    return line[0] if len(line[0]) <= 140 else re.sub(r"(.{80,138},) (?=\w+: )", rf"\1\n{line[1]}    ", line[0])


def _yaml() -> Any:
    """A YAML reader and writer that keeps comments and quotes."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 4096  # no additional line breaks
    yaml.preserve_quotes = True
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))  # not an empty field
    return yaml


@app.command()
def check(name: Annotated[str | None, typer.Argument(help="A recipe to apply first; by default params.yaml as it is.")] = None) -> None:
    """Dry run: build the networks, read the teacher's checkpoint if it exists, train one step on synthetic images, and report the costs
    and anything missing. Exit code 0: nothing is missing; 2: something is missing or wrong."""
    from bingo.cli import recipe_check
    from bingo.params import read_yaml, validate
    from bingo.planning.recipes import About, lay_over, read_recipe

    document, about, origin = read_yaml(PARAMS), About(), str(PARAMS)
    if name is not None:
        recipe = read_recipe(FOLDER, name)
        lay_over(document, recipe.overlay)
        about, origin = recipe.about, f"{PARAMS} with recipe {name}"
    missing = recipe_check.check(validate(document, origin), about, typer.echo)
    for line in missing:
        typer.echo(f"missing: {line}")
    if missing:
        raise SystemExit(USER_MISTAKE)
