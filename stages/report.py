"""report: one offline page, reports/index.html, with results, curves, bags and parameters, from all existing outputs.

The figures that `dvc metrics` and `dvc exp show` compare go to reports/results.json. Timings, which differ from run to run, go to
reports/run.js next to the page, and `bingo export` lists its files in reports/exports.js; neither is an output of the stage.
"""

from bingo import paths
from bingo.pipeline.commands import run_command
from bingo.pipeline.run import stage_run


def main() -> None:
    """Write the page of this run."""
    with stage_run("report", builds_networks=False) as run:
        from bingo.report.downstream import figures
        from bingo.report.inputs import read_artefacts
        from bingo.report.page import build_page, run_script
        from bingo.report.results import compared_figures
        from bingo.runtime.artefacts import read_json, write_bytes, write_json
        from bingo.runtime.progress import progress_bar

        records = [read_json(path) for path in sorted(paths.RUNS.glob("*.json")) if path.stem != "report"]
        with progress_bar("report"):
            artefacts = read_artefacts(run.params, run.networks())
            write_bytes(paths.REPORTS / "index.html", build_page(artefacts).encode())
        write_json(paths.REPORTS / "results.json", compared_figures(artefacts) | figures(artefacts))
        write_bytes(paths.REPORTS / "run.js", run_script(records).encode())
        if not paths.EXPORTS.exists():
            write_bytes(paths.EXPORTS, b"window.bingoExports = [];\n")
        run.say(f"report: {(paths.REPORTS / 'index.html').resolve().as_uri()}")


if __name__ == "__main__":
    run_command(main)
