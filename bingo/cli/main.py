"""The command `bingo`: one subcommand for each stage, and tools for the results of a run. Large libraries are imported only by the commands
that need them."""

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from bingo.cli import browse, embed, experiments, export, init, recipe, teachers
from bingo.cli.shipped import HOME
from bingo.pipeline.commands import app_of, run_command

STAGES = (
    "scan", "teacher", "extract", "bag", "weights", "distill", "baseline", "linear_eval", "knn_eval", "semi_eval", "transfer_cifar",
    "transfer_coco", "report",
)  # fmt: skip


class Commands(TyperGroup):
    """The group of all commands. A stage is imported only when its command is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The stages in the order of the pipeline, then the other commands."""
        return [*STAGES, *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command called `name`, or None."""
        if cmd_name not in STAGES:
            return super().get_command(ctx, cmd_name)
        if str(HOME) not in sys.path:
            sys.path.insert(0, str(HOME))  # which holds `stages`
        command: Any = typer.main.get_command(app_of(importlib.import_module(f"stages.{cmd_name}").main))
        command.name, command.rich_help_panel = cmd_name, "Stages (dvc repro runs them in order)"
        return command


app = typer.Typer(
    name="bingo",
    cls=Commands,
    help="Distil a large self-supervised vision teacher into a small network through bags of similar images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (init, export, embed, experiments, teachers):
    app.command(module.__name__.rpartition(".")[2], rich_help_panel="Tools")(module.main)
app.add_typer(browse.app, name="bags", help="Inspect the bags of a run.", rich_help_panel="Tools")
app.add_typer(recipe.app, name="recipe", help="List, show, check and apply recipes (named settings).", rich_help_panel="Tools")


def main() -> None:
    """Run the command with this code."""
    run_command(app)


if __name__ == "__main__":
    main()
