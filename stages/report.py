"""report: one offline page with results, curves, bags and parameters; timings are in a separate file, since they differ from run to run.

python -m stages.report      reads all existing outputs; writes reports/index.html, reports/results.json (the few
figures that `dvc metrics` and `dvc exp show` compare) and, no output of the stage, reports/run.js
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bingo.pipeline import paths
from bingo.pipeline.run import Run, chosen_networks, run_command, stage_run

if TYPE_CHECKING:
    from bingo.report.inputs import Artefacts

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main() -> None:
    """Write the page of this run."""
    with stage_run("report") as run:
        from bingo.report.page import build_page, run_script
        from bingo.report.results import compared_figures
        from bingo.report.semi import figures as semi_figures
        from bingo.report.transfer import figures as transfer_figures
        from bingo.runtime.artefacts import read_json, write_bytes, write_json
        from bingo.runtime.progress import progress_bar

        records = [read_json(path) for path in sorted(paths.RUNS.glob("*.json")) if path.stem != "report"]
        with progress_bar("report"):
            artefacts = _artefacts(run)
            write_bytes(paths.REPORTS / "index.html", build_page(artefacts).encode())
        write_json(paths.REPORTS / "results.json", compared_figures(artefacts) | semi_figures(artefacts) | transfer_figures(artefacts))
        write_bytes(paths.REPORTS / "run.js", run_script(records).encode())
        run.say(f"report: {(paths.REPORTS / 'index.html').resolve().as_uri()}")


def _artefacts(run: Run) -> "Artefacts":
    from bingo.bags.index import read_bags
    from bingo.images.images import open_images
    from bingo.images.listing import read_listing
    from bingo.report.inputs import Artefacts, by_protocol, read_curves, read_network_facts, read_optional_json

    params, listing = run.params, read_listing(paths.LISTING)
    nets = chosen_networks(params, None)
    terms = {name: read_optional_json(paths.REPORTS / f"{name}.json") for name in ("teacher", "distill")}
    terms |= {f"baseline-{method}": read_optional_json(paths.REPORTS / f"baselines/{method}.json") for method in params.baselines}
    coco = {name: read_optional_json(paths.REPORTS / f"coco/{name}.json") for name in params.transfer_coco.runs}
    return Artefacts(
        params=params,
        params_text=Path("params.yaml").read_text(encoding="utf-8"),
        listing=listing,
        images=open_images(listing, paths.IMAGES, params.dataset) if paths.IMAGES.exists() else None,
        bags=read_bags(paths.BAGS, listing) if paths.BAGS.exists() else None,
        bag_metrics=read_optional_json(paths.REPORTS / "bags.json"),
        teacher=read_network_facts(paths.TEACHER, "backbone."),
        student=read_network_facts(paths.STUDENT),
        knn=_present("knn", nets),
        linear=by_protocol(_present("linear", nets)),
        terms=terms,
        semi=_present("semi", params.semi_eval.splits),
        transfer=_present("transfer", params.transfer.datasets),
        curves={name: read_curves(paths.PLOTS / f"{name}.csv") for name in terms},
        coco={name: scores for name, scores in coco.items() if scores},
    )


def _present(folder: str, names: Iterable[str]) -> dict[str, dict]:
    """The content of the existing files reports/FOLDER/NAME.json."""
    from bingo.report.inputs import read_optional_json

    found = {name: read_optional_json(paths.REPORTS / folder / f"{name}.json") for name in names}
    return {name: value for name, value in found.items() if value}


if __name__ == "__main__":
    run_command(app)
