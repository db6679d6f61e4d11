"""bingo recipe list | show | use: overlays on params.yaml, one YAML file each in recipes/."""

from pathlib import Path
from typing import Annotated, Any

import typer

from stages.common import mistakes_as_lines

app = typer.Typer(no_args_is_help=True, add_completion=False)
FOLDER = Path("recipes")
Name = Annotated[str, typer.Argument(help="A recipe's name, as `bingo recipe list` prints it.")]


@app.command("list")
def list_recipes() -> None:
    """Print every recipe with its first line."""
    with mistakes_as_lines():
        from bingo.errors import UserError

        if not FOLDER.is_dir():
            raise UserError(f"{FOLDER}: there is no such folder here; run from the repository's top level")
        for path in sorted(FOLDER.glob("*.yaml")):
            typer.echo(f"{path.stem:24} {path.read_text().partition(chr(10))[0].lstrip('# ')}")


@app.command()
def show(name: Name) -> None:
    """Print one recipe."""
    with mistakes_as_lines():
        typer.echo(_path(name).read_text(), nl=False)


@app.command()
def use(name: Name, root: Annotated[str | None, typer.Option(help="Where the images are: sets dataset.root.")] = None) -> None:
    """Lay a recipe over params.yaml: print each change, check the result whole, then write it (comments stay)."""
    with mistakes_as_lines():
        from ruamel.yaml import YAML

        from bingo.artefacts import write_bytes
        from bingo.errors import UserError
        from bingo.params import read_yaml, validate

        if root == "":
            raise UserError("--root is empty: give the folder of the images")
        validate(read_yaml("params.yaml"), "params.yaml")
        text, changes = _overlaid(read_yaml(_path(name)) or {}, root, YAML())
        validate(YAML(typ="safe", pure=True).load(text), f"params.yaml with recipe {name}")
        write_bytes("params.yaml", text.encode())
        for key, old, new in changes:
            typer.echo(f"{key}: {old} -> {new}")
        typer.echo(f"params.yaml: {len(changes)} changes; back: git checkout params.yaml; next: dvc repro")


def _overlaid(overlay: dict, root: str | None, yaml: Any) -> tuple[str, list[tuple[str, Any, Any]]]:
    """params.yaml's text with the overlay's values in place, and each change as (dotted key, old, new)."""
    import io

    yaml.width = 200
    yaml.preserve_quotes = True
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))  # not an empty field
    document = yaml.load(Path("params.yaml").read_text())
    changes: list[tuple[str, Any, Any]] = []
    _lay_over(document, overlay, "", changes)
    if root is not None:
        _lay_over(document, {"dataset": {"root": root}}, "", changes)
    text = io.StringIO()
    yaml.dump(document, text)
    return text.getvalue(), changes


def _lay_over(document: dict, overlay: dict, prefix: str, changes: list[tuple[str, Any, Any]]) -> None:
    for key, value in overlay.items():
        if isinstance(value, dict) and isinstance(document.get(key), dict) and document[key]:
            _lay_over(document[key], value, f"{prefix}{key}.", changes)
        elif document.get(key, ...) != value:
            changes.append((f"{prefix}{key}", document.get(key), value))
            document[key] = value


def _path(name: str) -> Path:
    from bingo.errors import UserError, near_matches

    path = FOLDER / f"{name}.yaml"
    if Path(name).name != name or not path.is_file():
        names = [file.stem for file in sorted(FOLDER.glob("*.yaml"))]
        raise UserError(f"recipe = {name}: allowed are {', '.join(names)}{near_matches(name, names)}")
    return path
