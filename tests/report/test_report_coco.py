"""The report's COCO table: each figure in its row, published rows next to their run, and no table without a run."""

from bingo.report.downstream import MEASURES, coco_rows, sections
from bingo.report.inputs import read_optional_json
from bingo.report.page import build_page
from bingo.runtime.artefacts import write_json
from tests.report.test_report import Page, artefacts, params


def scores(first: float) -> dict:
    """Figures that increase by one from `first`; none for large masks."""
    values = {kind: {key: first + 6 * place + i for i, key in enumerate(MEASURES)} for place, kind in enumerate(("box", "mask"))}
    values["mask"]["AP_large"] = None
    return values


def test_measured_and_published_figures_are_in_their_rows(tmp_path):
    write_json(tmp_path / "c.json", scores(10.0))  # as written by the stage
    a = artefacts(coco={"fpn-1x": read_optional_json(tmp_path / "c.json")})
    page = Page(build_page(a))
    own = page.rows[f"{params().student.arch} by BINGOmeasured, fpn-1x"]
    assert own[:-1] == [f"{10.0 + i:.1f}" for i in range(11)]
    assert own[-1] == "–unknown"
    published = page.rows["ResNet-18 by BINGOpublished, fpn-1x"]
    assert published == ["32.0", "51.0", "34.7", "17.1", "34.1", "42.0", "29.6", "48.2", "31.5", "12.8", "30.8", "43.0"]
    assert [label for label, _, _ in coco_rows(a)][1:] == ["ResNet-18 by MoCo-v2", "ResNet-18 by BINGO"]
    assert len(page.all("caption")) == len(page.all("table"))


def test_c4_is_beside_the_resnet_34_rows_and_other_schedules_beside_none():
    rows = coco_rows(artefacts(coco={"c4-2x": scores(0.0), "fpn-short": scores(1.0)}))
    origins = [origin for _, origin, _ in rows]
    assert [origin for origin in origins if origin.startswith("measured")] == ["measured, c4-2x", "measured, fpn-short"]
    assert {origin for origin in origins if not origin.startswith("measured")} == {"published, head and schedule not stated"}
    assert rows[4][2][:6] == [39.9, 59.4, 43.5, 22.8, 43.3, 52.1]
    assert all(len(figures) == 12 for _, _, figures in rows)


def test_without_a_run_there_is_no_table():
    assert list(sections(artefacts())) == []
    assert "COCO" not in Page(build_page(artefacts())).words.partition("Parameters")[0]


def test_names_are_escaped():
    hostile = "<img src=x onerror=alert(1)>"
    table = str(next(sections(artefacts(coco={hostile: scores(0.0)}))).html)
    assert "<img" not in table
    assert "&lt;img" in table
