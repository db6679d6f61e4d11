"""The state folder of a stage: kept after a kill, and until dvc.lock shows that DVC has committed the outputs."""

from pathlib import Path

import pytest

from bingo.pipeline.state import state_folder, sweep
from bingo.runtime.artefacts import read_json
from bingo.runtime.errors import UserError

VALUES = {"seed": 0}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    for name in ("DVC_STAGE", "DVC_ROOT", "BINGO_STATE_DIR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lock(md5: str) -> None:
    """dvc.lock after a commit of stage `teacher`."""
    Path("dvc.lock").write_text(f"stages:\n  teacher:\n    outs: [{{path: models/teacher.safetensors, md5: {md5}}}]\n")


def work(values: dict = VALUES, ends_well: bool = True) -> bool:
    """Run the stage; returns whether it found a checkpoint."""
    with state_folder("teacher", values) as folder:
        found = (folder / "checkpoint").exists()
        (folder / "checkpoint").touch()
        if not ends_well:
            raise KeyboardInterrupt
    return found


def folders() -> list[Path]:
    return [path for path in Path(".bingo/state/teacher").iterdir() if path.is_dir()]


def test_a_stage_that_failed_keeps_its_state():
    with pytest.raises(KeyboardInterrupt):
        work(ends_well=False)
    sweep()
    assert work()


def test_without_dvc_the_state_is_removed_at_once():
    assert not work()
    assert not folders()


def test_a_stage_run_by_dvc_keeps_its_state_until_the_commit(monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "teacher")
    assert not work()
    sweep()
    assert work(), "dvc was killed before it had committed"
    lock("a")
    sweep()
    assert not folders()


@pytest.mark.parametrize("locked", ["", "a: [", "- a", "stages: {bag: {}}"])
def test_a_lock_file_without_the_stage_does_not_show_a_commit(monkeypatch, locked):
    monkeypatch.setenv("DVC_STAGE", "teacher")
    Path("dvc.lock").write_text(locked)
    assert not work()
    sweep()
    assert work()


def test_every_forced_rerun_starts_from_the_beginning(monkeypatch):
    """A forced rerun does not change dvc.lock."""
    monkeypatch.setenv("DVC_STAGE", "teacher")
    assert not work()
    lock("a")
    for _ in range(3):
        sweep()
        assert not work()
    sweep()
    assert not work({"seed": 1}), "other parameters"
    sweep()
    assert work({"seed": 1})
    lock("b")
    sweep()
    assert not folders()


def test_the_state_of_an_experiment_is_removed_with_its_folder(monkeypatch, here):
    monkeypatch.setenv("DVC_STAGE", "teacher")
    monkeypatch.setenv("DVC_ROOT", str(here))
    experiment = here / "experiment"
    experiment.mkdir()
    monkeypatch.chdir(experiment)
    assert not work()
    monkeypatch.chdir(here)
    lock("a")
    sweep()
    assert folders(), "another workspace's dvc.lock does not show a commit here"
    experiment.rmdir()
    sweep()
    assert not folders()


def test_a_state_that_another_run_removes_meanwhile(monkeypatch):
    """Workspaces that share a folder of states may start stages at the same time; a damaged mark is nevertheless reported."""
    monkeypatch.setenv("DVC_STAGE", "teacher")
    work()
    lock("a")

    def read_late(mark: Path) -> dict:
        mark.unlink()
        return read_json(mark)

    with monkeypatch.context() as late:
        late.setattr("bingo.pipeline.state.read_json", read_late)
        sweep()
    (mark,) = (folder / "finished.json" for folder in folders())
    mark.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        sweep()


def test_leftovers_of_an_interrupted_removal_are_removed(here):
    left = here / ".bingo/state/teacher/.abc.partial"
    left.mkdir(parents=True)
    sweep()
    assert not left.exists()


def test_a_second_run_is_refused(capsys):
    with state_folder("teacher", VALUES) as folder:
        with pytest.raises(SystemExit) as left, state_folder("teacher", VALUES):
            pass
        assert folder.exists()
    assert left.value.code == 75
    assert "another teacher with the same parameters holds" in capsys.readouterr().err
