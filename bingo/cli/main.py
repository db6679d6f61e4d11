"""bingo: every stage, and what people use beside the pipeline. Nothing heavy is imported before a command needs it."""

import typer

from bingo.cli import bags, embed, export, recipe
from bingo.pipeline.run import run_command
from stages import bag, baseline, distill, extract, knn_eval, linear_eval, report, scan, semi_eval, teacher, transfer_cifar, transfer_coco

app = typer.Typer(
    name="bingo",
    help="Distil a large self-supervised vision teacher into a small network through bags of similar images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
STAGES = (scan, teacher, extract, bag, distill, baseline, linear_eval, knn_eval, semi_eval, transfer_cifar, transfer_coco, report)
for module in STAGES:
    app.command(module.__name__.rpartition(".")[2], rich_help_panel="Stages (dvc repro runs them in order)")(module.main)
for module in (export, embed):
    app.command(module.__name__.rpartition(".")[2], rich_help_panel="Beside the pipeline")(module.main)
app.add_typer(bags.app, name="bags", help="Look into the cached bags.", rich_help_panel="Beside the pipeline")
app.add_typer(recipe.app, name="recipe", help="Whole settings by name.", rich_help_panel="Beside the pipeline")


def main() -> None:
    """The console script."""
    run_command(app)


if __name__ == "__main__":
    main()
