"""Figures in each logger, read with its library, are those of the training; and loggers do not change the training."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bingo.runtime import loggers
from bingo.runtime.errors import Interrupted, UserError
from bingo.runtime.loggers import LoggedRun, TrainingLog, wanted_loggers
from bingo.schedules import learning_rate
from tests.training.test_train import ScriptedProbe, same_state, stop_at, trainer
from tests.workspace import until

EPOCHS, PERCENTS = 9, [float(percent) for percent in range(10, 100, 10)]  # 36 steps: 1, 17 and 33 are shown
PICTURE = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
UNTIMED = ("train/anchors_per_second", "train/data_wait", "train/peak_memory_mb")


@pytest.fixture(autouse=True)
def _nobodys_variables(monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_DIR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", loggers.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def measured(network) -> dict[str, float]:
    """A function of the weights, so that measuring a network too late or too early gives other figures."""
    return {"effective_rank": float(sum(weight.double().sum() for weight in network.state_dict().values()))}


def logged_run(folder: Path, **more) -> LoggedRun:
    return LoggedRun(**{"id": "x1", "name": "k10/distill", "params": {"distill.lr": 0.1}, "root": folder / "logs"} | more)


def log_of(folder: Path, names: list[str], warn=pytest.fail, **more) -> TrainingLog:
    return TrainingLog(names, logged_run(folder, **more), warn, measured, lambda: {"bags/row-0": PICTURE})


def with_log(folder: Path, names: list[str], probes: list[float] = PERCENTS, state: str = "state", **more):
    """A trainer of 36 steps with loggers that write to `folder`."""
    run = trainer(folder / state, epochs=EPOCHS, network="batchnorm", probe=ScriptedProbe(probes))
    run.log = log_of(folder, names, **more)
    return run


def observed(run) -> dict[int, dict[str, float]]:
    """The terms of a training by step, and the norm of the gradients passed to the optimizer, observed from outside."""
    seen: dict[int, dict[str, float]] = {}

    def terms(module, inputs, output):
        seen[run.step + 1] = {f"train/{name}": float(value.detach()) for name, value in output.items()}

    def norm(optimizer, arguments, more):
        squares = sum(float((weight.grad.double() ** 2).sum()) for weight in run.method.parameters() if weight.grad is not None)
        seen[run.step + 1]["train/grad_norm"] = math.sqrt(squares)

    run.method.register_forward_hook(terms)
    run.optimizer.register_step_pre_hook(norm)
    return seen


def json_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "logs/k10/distill/x1/log.jsonl").read_text().splitlines()]


def scalars(lines: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name, except values that depend on the machine."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", *UNTIMED):
                found.setdefault(name, []).append((line["step"], value))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete training with JSON lines, and the values observed from outside."""
    folder = tmp_path_factory.mktemp("whole")
    run = with_log(folder, ["jsonl"])
    seen = observed(run)
    result = run.run()
    run.log.close(True)
    return folder, run, result, seen


def test_every_figure_equals_the_trainings(whole):
    folder, run, result, seen = whole
    steps = [line for line in json_lines(folder) if "epoch" not in line]
    assert [line["step"] for line in steps] == [1, 17, 33]
    for line in steps:
        done = line["step"]
        assert line["train/lr"] == learning_rate(done - 1, 4, run.schedule.lr, run.schedule)
        for name, value in seen[done].items():
            assert line[name] == pytest.approx(value, rel=1e-5), name
        assert set(line) == {"step", "train/lr", *seen[done], *UNTIMED}
    epochs = [line for line in json_lines(folder) if "epoch" in line]
    shown = [{name.removeprefix("epoch/"): value for name, value in line.items() if name != "step"} for line in epochs]
    assert [line["step"] for line in epochs] == [4 * number for number in range(1, EPOCHS + 1)]
    probe = run.probe.seen
    assert shown == [record | {"effective_rank": pytest.approx(sum(float(w.double().sum()) for w in weights.values()))}
                     for record, weights in zip(result.history, probe, strict=True)]  # fmt: skip


def test_a_training_with_loggers_equals_one_without(tmp_path, whole):
    _, run, result, _ = whole
    plain = trainer(tmp_path, epochs=EPOCHS, network="batchnorm", probe=ScriptedProbe(PERCENTS))
    assert plain.run().history == result.history
    assert same_state(plain.method, run.method)


def killed_and_resumed(folder: Path, names: list[str], monkeypatch) -> None:
    """Stopped after 18 steps. A figure of step 20 has been added, as from a process that was killed after its last checkpoint."""
    first = with_log(folder, names)
    stop_at(first, 18, monkeypatch)
    with pytest.raises(Interrupted):
        first.run()
    first.log.summary(20, "epoch", {"epoch": 5, "loss": 1e9})
    first.log.close(False)
    second = with_log(folder, names, PERCENTS[4:])
    second.run()
    second.log.close(True)


def test_json_lines_of_a_resumed_training_equal_those_of_an_uninterrupted_one(tmp_path, whole, monkeypatch):
    killed_and_resumed(tmp_path, ["jsonl"], monkeypatch)
    wanted, found = scalars(json_lines(whole[0])), scalars(json_lines(tmp_path))
    again = {name: [(step, value) for step, value in values if step != 19] for name, values in found.items()}  # the first step after 18
    assert again == wanted
    assert [path.name for path in (tmp_path / "logs/k10/distill").iterdir()] == ["x1"]


def test_tensorboard_shows_the_same_for_a_resumed_training(tmp_path, whole, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed_and_resumed(tmp_path, ["tensorboard"], monkeypatch)
    events = EventAccumulator(str(tmp_path / "logs/k10/distill/x1"), {"scalars": 0, "images": 0, "tensors": 0}).Reload()
    found = {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}
    wanted = scalars(json_lines(whole[0]))
    assert set(found) == {*wanted, *UNTIMED}
    for name, values in wanted.items():
        assert {step: value for step, value in found[name].items() if step != 19} == pytest.approx(dict(values), rel=1e-6), name
    (picture,) = events.Images("bags/row-0")
    assert (picture.height, picture.width) == (4, 5)
    assert json.loads(events.Tensors("params/text_summary")[0].tensor_proto.string_val[0].decode().strip("`\n")) == {"distill.lr": 0.1}


def records(file: Path) -> list:
    """The records in a file of W&B: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, part, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        part, at = part + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # complete, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


def test_weights_and_biases_receives_the_same_in_one_run(tmp_path, whole, monkeypatch):
    pytest.importorskip("wandb")
    killed_and_resumed(tmp_path, ["wandb"], monkeypatch)
    files = sorted((tmp_path / "logs/k10/distill/x1/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2, "offline, each part has a folder, and `wandb sync` joins them by their id"
    kinds = [lambda file=file: [record.WhichOneof("record_type") for record in records(file)] for file in files]
    until(lambda: all("exit" in kinds_of() for kinds_of in kinds))  # another process writes them
    found: dict[str, dict[int, float]] = {}
    for number, file in enumerate(files):
        (run,) = [record.run for record in records(file) if record.WhichOneof("record_type") == "run"][:1]
        assert (run.run_id, run.display_name, run.run_group, run.job_type, run.project) == ("x1", "k10/distill", "k10", "distill", "bingo")
        assert {item.key: json.loads(item.value_json) for item in run.config.update}["distill.lr"] == 0.1
        history = [record.history for record in records(file) if record.WhichOneof("record_type") == "history"]
        for items in ({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in one.item} for one in history):
            assert ("bags/row-0" in items) == (number == 0 and "step" not in items)
            for name, value in items.items():
                found.setdefault(name, {})[items.get("step", 0)] = value
        (ended,) = [record.exit.exit_code for record in records(file) if record.WhichOneof("record_type") == "exit"]
        assert ended == (1, 0)[number]
    for name, values in scalars(json_lines(whole[0])).items():
        assert {step: value for step, value in found[name].items() if step != 19} == dict(values), name


@pytest.mark.filterwarnings("ignore")  # from the libraries in which MLflow stores its figures
def test_mlflow_receives_the_same_in_one_run(tmp_path, whole, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    killed_and_resumed(tmp_path, ["mlflow"], monkeypatch)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'logs/mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("bingo").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params) == ("k10/distill", "FINISHED", {"distill.lr": "0.1"})
    for name, values in scalars(json_lines(whole[0])).items():
        history = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        assert {step: value for step, value in history.items() if step != 19} == dict(values), name
    assert [file.path for file in client.list_artifacts(run.info.run_id, "bags")] == ["bags/row-0.png"]


def test_the_picture_is_logged_once_with_equal_pixels(tmp_path):
    for resumed in (0, 5):
        log = log_of(tmp_path, ["jsonl"])
        log.begin(resumed, 10, 1, "images")
        file = tmp_path / "logs/k10/distill/x1/bags/row-0.png"
        assert file.exists() == (resumed == 0)
        if not resumed:
            assert np.array_equal(np.asarray(Image.open(file)), np.asarray(PICTURE))
            file.unlink()


def test_speed_and_waiting_are_since_the_last_figures_without_the_end_of_epochs(tmp_path, monkeypatch):
    now, waited = [100.0], [0.0]
    monkeypatch.setattr(loggers.time, "monotonic", lambda: now[0])
    log = log_of(tmp_path, ["jsonl"])
    log.begin(0, 99, 64, "anchors", lambda: waited[0])
    for step, seconds, wait in ((1, 2.0, 0.5), (17, 8.0, 6.0)):
        now[0], waited[0] = now[0] + seconds, waited[0] + wait
        log.keep(step, 0.1, {"loss": torch.tensor(1.0)})
        log.flush()
    now[0], waited[0] = now[0] + 3, waited[0] + 3  # steps 18 to 20, then the end of the epoch
    log.summary(20, "epoch", {"epoch": 1})
    now[0], waited[0] = now[0] + 4, waited[0] + 1
    log.keep(33, 0.1, {"loss": torch.tensor(1.0)})
    log.flush()
    shown = [(line["train/anchors_per_second"], line["train/data_wait"]) for line in json_lines(tmp_path) if "epoch" not in line]
    assert shown == [(64 / 2, 0.25), (16 * 64 / 8, 0.75), (13 * 64 / 4, 0.25)]


def test_a_logger_that_fails_later_is_dropped_and_the_others_continue(tmp_path, whole, monkeypatch):
    calls, warnings = [], []

    class Full(loggers.JsonLines):
        def figures(self, step, figures):
            calls.append(step)
            raise OSError(28, "No space left on device")

    monkeypatch.setitem(loggers._LOGGERS, "full", (Full, None, ""))
    run = with_log(tmp_path, ["full", "jsonl"], warn=warnings.append)
    assert run.run().history == whole[2].history
    run.log.close(True)
    assert calls == [1]
    assert len(warnings) == 1
    assert "full has failed" in warnings[0]
    assert "No space left on device" in warnings[0]
    assert scalars(json_lines(tmp_path)) == scalars(json_lines(whole[0]))


@pytest.mark.parametrize("place", ["", "workspace", "workspace/x"])
def test_a_file_in_place_of_a_logs_folder_is_one_line(tmp_path, place):
    logs = tmp_path / "logs"
    (logs / place).parent.mkdir(parents=True, exist_ok=True)
    (logs / place).touch()
    log = loggers.TrainingLog(["jsonl"], loggers.LoggedRun("an id", "workspace/x", {}, logs))
    with pytest.raises(UserError, match=r"^BINGO_LOGGERS = jsonl: there is a file in place of .*; move it elsewhere"):
        log.begin(0, 1, 1, "anchors")


def test_a_logger_that_cannot_be_opened_ends_the_training_before_its_first_step(tmp_path, monkeypatch):
    def refuse(run, step):
        raise RuntimeError("no API key\n  was given")

    monkeypatch.setitem(loggers._LOGGERS, "wandb", (refuse, None, "run `wandb login`"))
    run = with_log(tmp_path, ["jsonl", "wandb"])
    with pytest.raises(UserError, match=r"^BINGO_LOGGERS = wandb: cannot be opened \(no API key was given\); run `wandb login`"):
        run.run()
    assert run.step == 0


def test_a_finished_training_opens_no_logger(tmp_path):
    state = {"every_seconds": 0, "epochs": 1}
    trainer(tmp_path / "state", **state).run()
    run = trainer(tmp_path / "state", **state)
    run.log = log_of(tmp_path, ["jsonl"])
    run.run()
    run.log.close(True)
    assert not (tmp_path / "logs").exists()


def test_figures_that_are_not_finite_are_null_and_incomplete_lines_are_removed(tmp_path):
    log = log_of(tmp_path, ["jsonl"])
    log.begin(0, 10, 1, "images")
    log.summary(3, "epoch", {"loss": math.nan, "knn_10": math.inf, "lr": 0.5})
    file = tmp_path / "logs/k10/distill/x1/log.jsonl"
    file.write_text(file.read_text() + '{"step": 3, "ep')
    again = log_of(tmp_path, ["jsonl"])
    again.begin(3, 10, 1, "images")
    again.summary(4, "epoch", {"lr": 0.25})
    assert json_lines(tmp_path) == [
        {"step": 3, "epoch/loss": None, "epoch/knn_10": None, "epoch/lr": 0.5},
        {"step": 4, "epoch/lr": 0.25},
    ]


@pytest.mark.parametrize(("value", "names"), [("", []), (" , ", []), ("jsonl", ["jsonl"]), (" jsonl,wandb ,jsonl", ["jsonl", "wandb"])])
def test_names_are_separated_by_commas(monkeypatch, value, names):
    monkeypatch.setenv(loggers.VARIABLE, value)
    monkeypatch.setattr(loggers, "find_spec", lambda package: package)
    assert wanted_loggers() == names


def test_names_that_are_unknown_and_packages_that_are_missing_are_all_reported_at_once(monkeypatch):
    monkeypatch.setenv(loggers.VARIABLE, "tensorbord,mlflow,JSONL,jsonl")
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    with pytest.raises(UserError) as error:
        wanted_loggers()
    assert [line.partition(":")[0] for line in error.value.lines] == [
        f"BINGO_LOGGERS = {name}" for name in ("tensorbord", "mlflow", "JSONL")
    ]
    assert "did you mean tensorboard?" in error.value.lines[0]
    assert "pip install mlflow" in error.value.lines[1]
    assert "did you mean jsonl?" in error.value.lines[2]
