"""The command `bingo`, also as `python -m bingo.cli`. If the workspace that contains the current folder has its own code, this runs it, as
the stages do."""

import os
import sys
from pathlib import Path


def main() -> None:
    """The console script."""
    if (root := _workspace_with_other_code()) is not None:
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        os.execve(sys.executable, [sys.executable, "-m", "bingo.cli", *sys.argv[1:]], {**os.environ, "PYTHONPATH": path})
    from bingo.cli.main import main as run

    run()


def _workspace_with_other_code() -> str | None:
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "params.yaml").exists() and (folder / "dvc.yaml").exists():
            own = folder / "bingo/cli/__main__.py"
            handed_over = os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] == str(folder)
            return str(folder) if own.exists() and not own.samefile(__file__) and not handed_over else None
    return None


if __name__ == "__main__":
    main()
