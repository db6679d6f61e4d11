"""bingo experiments: compare the DVC experiments of one commit, and its own run, in a page, and as Markdown on stdout.

Parameters and metrics come from `dvc exp show`; timings come from the records of stages in .bingo/runs/EXPERIMENT
(bingo/pipeline/run.py).
"""

import json
import subprocess
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bingo import paths
from bingo.runtime.artefacts import read_json, write_bytes
from bingo.runtime.errors import UserError, near_matches

if TYPE_CHECKING:
    from bingo.report.experiments import Experiment

PAGE = paths.REPORTS / "experiments.html"
AGAINST = "method-moco"


def main(
    prefixes: Annotated[list[str] | None, typer.Argument(help="Only experiments whose names start with one of these.")] = None,
    against: Annotated[str | None, typer.Option(help="Reference variant of the differences; by default method-moco.")] = None,
    rev: Annotated[str, typer.Option(help="The commit whose experiments are compared.")] = "HEAD",
) -> None:
    """Compare DVC's experiments with each other, the committed run (`committed`) and the results in this folder (`workspace`): write
    reports/experiments.html, and print its tables."""
    from bingo.report.experiments import variants
    from bingo.report.experiments_page import build_page
    from bingo.report.experiments_table import by_seed, correlation_text, settings, summary
    from bingo.runtime.progress import progress_bar

    with progress_bar("reading the experiments"):
        commit, known = _experiments(rev)
    names = {experiment.variant for experiment in known}
    if against is not None and against not in names:
        raise UserError(f"--against = {against}: allowed are {', '.join(sorted(names)) or 'none'}{near_matches(against, sorted(names))}")
    reference = against or _reference(names)
    asked = [one for one in known if not prefixes or one.name.startswith(tuple(prefixes))]
    if not asked:
        raise UserError(
            f"{' '.join(prefixes or [])}: no experiment of {commit[:7]} has such a name; allowed are {', '.join(sorted(names))}"
        )
    chosen = [one for one in known if one in asked or one.variant == reference]
    records = [read_json(path) | {"experiment": path.parent.name} for path in sorted(paths.RUNS.glob("*/distill.json"))]
    if (own := paths.RUNS / "distill.json").exists():
        records.append(read_json(own) | {"experiment": "workspace"})
    found = variants(chosen, records)
    tables = {"summary": summary(found, reference)}
    if differing := settings(found, chosen):
        tables["settings"] = differing
    tables["seeds"] = by_seed(found)
    timed = {one.name for one in chosen} | {"workspace" for one in chosen if one.in_workspace}
    used = [record for record in records if record["experiment"] in timed]
    write_bytes(PAGE, build_page(commit[:7], chosen, found, tables, reference, used).encode())
    typer.echo("\n\n".join(part for part in (*(table.markdown() for table in tables.values()), correlation_text(found)) if part))
    typer.echo(f"report: {PAGE.resolve().as_uri()}", err=True)


def _reference(names: Collection[str]) -> str | None:
    """The variant AGAINST, or otherwise the only variant in which it is applied to a base recipe (benchmarks/compare.py)."""
    found = [name for name in names if name.rpartition("+")[2] == AGAINST]
    return AGAINST if AGAINST in names else found[0] if len(found) == 1 else None


def _experiments(revision: str) -> "tuple[str, list[Experiment]]":
    """The commit, and its finished experiments, the committed run and that of the workspace. Raises UserError if there are none."""
    from bingo.cli.revisions import artefacts
    from bingo.report.experiments import Experiment

    if revision != "HEAD" and artefacts(revision).is_workspace:
        raise UserError(f"--rev = {revision}: is not a commit; leave --rev out: the workspace's results are in that table, too")
    entries = [entry for entry in reversed(_shown_by_dvc(revision)) if entry["rev"] != "workspace" or revision == "HEAD"]
    shown = next((entry for entry in entries if entry["rev"] != "workspace"), None)
    commit = shown["rev"] if shown else revision
    runs = [one["revs"][0] for one in (shown or {}).get("experiments") or [] if not one.get("executor")]
    complete = [run for run in runs if run["name"] and (run["data"] or {}).get("metrics", {}).get("reports/results.json", {}).get("data")]
    runs = _standing(entries) + [
        Experiment(run["name"], run["data"]["params"]["params.yaml"]["data"], _figures(run["data"]["metrics"])) for run in complete
    ]
    if not runs:
        way_out = "see those of other commits: dvc exp list --all-commits, or run one: dvc exp run -S bagging.k=10"
        raise UserError(f"--rev = {revision}: commit {commit[:7]} has no finished experiment; {way_out}")
    return commit, _merged(runs)


def _merged(runs: "list[Experiment]") -> "list[Experiment]":
    """The runs without the workspace's if it equals another one, which is marked instead."""
    own = next((run for run in runs if run.in_workspace), None)
    same = next((run for run in runs if own and run is not own and (run.params, run.metrics) == (own.params, own.metrics)), None)
    return [replace(run, in_workspace=True) if run is same else run for run in runs if same is None or run is not own]


def _standing(entries: list[dict[str, Any]]) -> "list[Experiment]":
    """The run of the commit, and that of the workspace, each with the parameters of its report in dvc.lock."""
    from bingo.report.experiments import Experiment

    found: list[Experiment] = []
    for entry in entries:
        params, metrics = _reported_params(entry["rev"]), _figures((entry.get("data") or {}).get("metrics", {}))
        if params and "reports/results.json" in metrics:
            own = entry["rev"] == "workspace"
            found.append(Experiment("workspace" if own else "committed", params, metrics, own))
    return found


def _reported_params(revision: str) -> dict[str, Any]:
    """All parameters of the run that made the report, which may differ from params.yaml; empty if there is no such run."""
    from ruamel.yaml import YAML

    if revision == "workspace":
        text = Path("dvc.lock").read_text() if Path("dvc.lock").exists() else ""
    else:
        text = subprocess.run(["git", "show", f"{revision}:./dvc.lock"], capture_output=True, text=True, check=False).stdout
    lock = YAML(typ="safe", pure=True).load(text) or {}
    return lock.get("stages", {}).get("report", {}).get("params", {}).get("params.yaml", {})


def _figures(metrics: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {file: content["data"] for file, content in metrics.items() if content.get("data")}


def _shown_by_dvc(revision: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json", "--rev", revision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"--rev = {revision}: DVC says: {' '.join(done.stderr.split())}")
    return json.loads(done.stdout)
