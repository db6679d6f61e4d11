"""bingo teachers: the teachers that can be selected by `teacher.name`, each described by a file in bingo/teachers/known/."""

from typing import TYPE_CHECKING, Annotated

import typer

from bingo.runtime.errors import UserError, near_matches

if TYPE_CHECKING:
    from bingo.params.known import KnownTeacher


def main(name: Annotated[str | None, typer.Argument(help="A teacher to describe.")] = None) -> None:
    """List the teachers that can be selected by name, or describe one: network, weights, licence, image size and normalisation, cost."""
    from bingo.params.known import known_names, known_teacher

    if name is None:
        typer.echo(_listed({name: known_teacher(name) for name in known_names()}))
    elif name in known_names():
        typer.echo(_shown(name, known_teacher(name)))
    else:
        raise UserError(f"NAME = {name}: unknown teacher; see: bingo teachers{near_matches(name, known_names())}")


def _listed(teachers: "dict[str, KnownTeacher]") -> str:
    from bingo.cli.browse_tables import table

    heads = ["name", "px", "key", "params (M)", "GFLOP", "linear", "k-NN", "on disk", "licence", "what it is"]
    rows = []
    for name, known in teachers.items():
        figures = ("" if figure is None else f"{figure:.1f}" for figure in (known.linear_top1, known.knn_top1))
        costs = str(known.image.crop_px), str(known.key_width), f"{known.parameters_m:.1f}", f"{known.gflop:.2f}"
        rows.append([name, *costs, *figures, "yes" if known.on_disk else "no", known.licence or "?", known.title])
    foot = (
        "key: width of the keys that are stored. linear, k-NN: published top-1 on ImageNet in percent. "
        "One of them: bingo teachers NAME; to use it: teacher.name: NAME"
    )
    return f"{table(heads, rows, 'lrrrrrr')}\n{foot}"


def _shown(name: str, known: "KnownTeacher") -> str:
    network, image = known.teacher, known.image
    figures = [f"{what} {figure:.1f} %" for what, figure in (("linear", known.linear_top1), ("k-NN", known.knn_top1)) if figure is not None]
    rows = {
        "licence": known.licence or "not known",
        "weights": known.address,
        "file": known.place or f"{network.source} downloads it; without network access: {known.way_in()}",
        "network": f"{network.arch} x {network.width:g}, {known.parameters_m:.1f} M parameters, {known.gflop:.2f} GFLOP per image",
        "feature, key": f"{known.feature_width}, {known.key_width} numbers" + (f" (pooling {network.pooling})" if network.pooling else ""),
        "sees": f"short side resized to {image.resize_px} px ({image.interpolation}), central {image.crop_px} px",
        "mean, std": f"{image.mean}, {image.std}",
        "ImageNet top-1": f"{', '.join(figures)} ({known.published_by})" if figures else "not known",
        "to use it": f"dvc exp run -S teacher.name={name}",
    }
    width = max(map(len, rows))
    return "\n".join([f"{name}: {known.title}", *(f"  {key:{width}}  {value}" for key, value in rows.items())])
