"""The notebook runs unchanged, in a separate kernel, on a finished workspace, and shows the results of that run."""

import json
import shutil

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from workspace import ROOT, environment

from bingo.bags.index import read_bags
from bingo.images.listing import read_listing

NOTEBOOK = ROOT / "notebooks/bags-and-student.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory, reference):
    """The notebook after running in a folder of a copy of the finished pipeline."""
    root = tmp_path_factory.mktemp("notebook") / "bingo"
    shutil.copytree(reference.root, root, symlinks=True)
    (root / "notebooks").mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(root / "notebooks")}})
    client.execute(
        env=environment(PYTHONWARNINGS="ignore:IProgress", IPYTHONDIR=str(root / ".ipython"), JUPYTER_RUNTIME_DIR=str(root / ".jupyter"))
    )
    return notebook


def printed(notebook) -> str:
    """The standard output of its cells; standard error must be empty."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_the_notebooks_figures_are_those_of_the_stages(executed, reference):
    listing = read_listing(reference.root / "data/listing.parquet")
    members_TK = read_bags(reference.root / "data/bags.zarr", listing).table.members_TK
    purity = np.mean(listing.labels_N[members_TK] == listing.labels_N[: len(members_TK), None])
    student, teacher = (json.loads((reference.root / f"reports/knn/{name}.json").read_text())["knn_10"] for name in ("student", "teacher"))
    text = printed(executed)
    assert f"mean purity {purity:.3f}" in text
    assert f"student {student:.1f}%, teacher {teacher:.1f}%" in text


def test_each_plotting_cell_shows_its_pictures(executed):
    cells = [[output.get("data", {}) for output in cell.outputs] for cell in executed.cells if cell.cell_type == "code"]
    pictures = [sum("image/png" in data or data.get("text/html", "").count("data:image/png") for data in cell) for cell in cells]
    assert pictures == [0, 3, 1, 0, 1, 0, 3]  # bags, the least pure one, the embedding, neighbours


def test_no_output_is_committed():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert not [cell for cell in cells if cell.outputs or cell.execution_count]
