"""Loggers show the metrics of a training while it runs. BINGO_LOGGERS lists them; no output of a stage depends on them.

`TrainingLog` collects metrics and passes them to one adapter for each logger: `figures` takes them by name with the number of steps
done, `picture` takes an image, and `close` whether the training was completed. Without loggers, nothing is measured for them.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bingo.runtime.artefacts import canonical_json, write_bytes
from bingo.runtime.errors import UserError, near_matches, reason_of
from bingo.runtime.memory import peak_memory

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

VARIABLE, PROJECT = "BINGO_LOGGERS", "bingo"
EVERY_STEPS = 16  # the interval at which LossWatch waits for a GPU

Figures = Mapping[str, float]


@dataclass(frozen=True)
class LoggedRun:
    """The description of a training for loggers. `id` does not change when it resumes; `name` is EXPERIMENT/STAGE; `params` have dotted
    keys; loggers write their files to `folder`, and files shared by all runs to `root`."""

    id: str
    name: str
    params: dict[str, Any]
    root: Path

    @property
    def folder(self) -> Path:
        return self.root / self.name / self.id


class JsonLines:
    """log.jsonl with one object per line, and pictures as PNG files. Lines that a killed run wrote after its checkpoint are removed."""

    def __init__(self, run: LoggedRun, step: int):
        self.folder, self.file = run.folder, run.folder / "log.jsonl"
        lines = self.file.read_bytes().splitlines(keepends=True) if self.file.exists() else []
        write_bytes(self.file, b"".join(line for line in lines if _step(line) <= step))

    def figures(self, step: int, figures: Figures) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        with open(self.file, "a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def picture(self, name: str, image: "Image") -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        image.save(self.folder / f"{name}.png")

    def close(self, whole: bool) -> None:
        pass


def _step(line: bytes) -> float:
    """The step of a line; inf if the line is incomplete."""
    with suppress(ValueError):
        return json.loads(line)["step"]
    return math.inf


class TensorBoard:
    """Event files. Events that a killed run wrote after its checkpoint are hidden (`purge_step`)."""

    def __init__(self, run: LoggedRun, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder), purge_step=step + 1 if step else None)
        if not step:
            self.writer.add_text("params", f"```\n{canonical_json(run.params)}```")

    def figures(self, step: int, figures: Figures) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, name: str, image: "Image") -> None:
        import numpy as np

        self.writer.add_image(name, np.asarray(image), dataformats="HWC")

    def close(self, whole: bool) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which its own variables configure (WANDB_PROJECT, WANDB_MODE=offline); steps that a resumed run repeats
    have the same figures."""

    def __init__(self, run: LoggedRun, step: int):
        import wandb

        group, _, job = run.name.partition("/")
        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            id=run.id,
            resume="allow",
            name=run.name,
            group=group,
            job_type=job,
            config=run.params,
            settings=wandb.Settings(console="off"),
        )
        self.run.define_metric("*", step_metric="step")

    def figures(self, step: int, figures: Figures) -> None:
        self.run.log({"step": step, **figures})

    def picture(self, name: str, image: "Image") -> None:
        self.run.log({name: self.wandb.Image(image)})

    def close(self, whole: bool) -> None:
        self.run.finish(exit_code=0 if whole else 1)


class MLflow:
    """A run of MLflow at MLFLOW_TRACKING_URI, by default in mlflow.db; steps that a resumed run repeats have the same figures."""

    def __init__(self, run: LoggedRun, step: int):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        files = run.root.absolute()
        self.metric, self.written = Metric, list[Any]()
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{files / 'mlflow.db'}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(name)
        place = None if os.environ.get("MLFLOW_TRACKING_URI") else (files / "mlflow").as_uri()
        experiment = known.experiment_id if known else self.client.create_experiment(name, artifact_location=place)
        runs = self.client.search_runs([experiment], f"tags.bingo = '{run.id}'")
        self.id = (runs[0] if runs else self.client.create_run(experiment, run_name=run.name, tags={"bingo": run.id})).info.run_id
        params = [] if runs else [Param(name, str(value)[:500]) for name, value in run.params.items()]
        for first in range(0, len(params), 100):  # the most that a server accepts at once
            self.client.log_batch(self.id, params=params[first : first + 100])
        self.client.update_run(self.id, "RUNNING")

    def figures(self, step: int, figures: Figures) -> None:
        now = time.time_ns() // 10**6
        metrics = [self.metric(name, value, now, step) for name, value in figures.items()]
        self.written = [self.client.log_batch(self.id, metrics=metrics, synchronous=False)]

    def picture(self, name: str, image: "Image") -> None:
        self.client.log_image(self.id, image, artifact_file=f"{name}.png")

    def close(self, whole: bool) -> None:
        for last in self.written:
            last.wait()
        self.client.set_terminated(self.id, "FINISHED" if whole else "KILLED")


# By name in BINGO_LOGGERS: the adapter, the package that it needs, and what to do if it cannot be opened.
_LOGGERS: dict[str, tuple[Callable[[LoggedRun, int], Any], str | None, str]] = {
    "jsonl": (JsonLines, None, "make its folder writable"),
    "tensorboard": (TensorBoard, "tensorboard", "reinstall it: pip install -U tensorboard"),
    "wandb": (WeightsAndBiases, "wandb", "run `wandb login`, or set WANDB_MODE=offline"),
    "mlflow": (MLflow, "mlflow", "set MLFLOW_TRACKING_URI to a server that can be reached, or unset it"),
}


def wanted_loggers() -> list[str]:
    """The names in BINGO_LOGGERS, separated by commas. Raises UserError for names that are not known, and for packages that are missing."""
    names = list(dict.fromkeys(filter(None, (name.strip() for name in os.environ.get(VARIABLE, "").split(",")))))
    mistakes = []
    for name in names:
        if name not in _LOGGERS:
            mistakes.append(f"{VARIABLE} = {name}: allowed are {', '.join(_LOGGERS)}, separated by commas{near_matches(name, _LOGGERS)}")
        elif (package := _LOGGERS[name][1]) and find_spec(package) is None:
            mistakes.append(f"{VARIABLE} = {name}: the package {package} is not installed; pip install {package}, or leave {name} out")
    if mistakes:
        raise UserError(mistakes)
    return names


class TrainingLog:
    """Passes the metrics of one training to its loggers, on the first process; false if there are no loggers.

    `measure` computes metrics of the network that only loggers show; `pictures` are images by name, which are shown once, at the start. A
    logger that fails later is switched off with a warning, and the training continues.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        run: LoggedRun | None = None,
        warn: Callable[[str], None] = print,
        measure: Callable[[Any], Figures] | None = None,
        pictures: Callable[[], "Mapping[str, Image]"] | None = None,
    ):
        self._names, self._run, self._warn, self._measure, self._pictures = names, run, warn, measure, pictures
        self._loggers: dict[str, Any] | None = None if names else {}
        self._kept: tuple[int, dict[str, float], Mapping[str, Tensor]] | None = None
        self._measured: Figures = {}

    def begin(self, step: int, total: int, rows_per_step: int, unit: str, wait_seconds: Callable[[], float] | None = None) -> None:
        """Open all loggers for a training that starts or resumes at `step` of `total`, unless it has already ended.

        `wait_seconds` is the time spent waiting for data so far. Raises UserError if a logger cannot be opened.
        """
        if self and step < total:
            self._begun, self._rows, self._unit, self._wait_seconds = step, rows_per_step, unit, wait_seconds
            self._open()
            self._restart_clock(step)

    def _restart_clock(self, step: int) -> None:
        self._since = step, time.monotonic(), self._wait_seconds() if self._wait_seconds else 0.0

    def due(self, step: int) -> bool:
        """Whether the metrics of the step after `step` others are kept: those of every 16th step, and of the first."""
        return bool(self) and (step % EVERY_STEPS == 0 or step == self._begun)

    def __bool__(self) -> bool:
        return self._loggers is None or bool(self._loggers)

    def keep(self, step: int, lr: float, values: "Mapping[str, Tensor]") -> None:
        """Keep scalars of this step, on their device, until `flush`. Does not wait for the device."""
        first, begun, waited = self._since
        self._restart_clock(step)
        seconds = max(self._since[1] - begun, 1e-9)
        figures = {"lr": lr, f"{self._unit}_per_second": (step - first) * self._rows / seconds, **peak_memory()}
        if self._wait_seconds is not None:
            figures["data_wait"] = (self._since[2] - waited) / seconds
        self._kept = step, figures, values

    def flush(self) -> None:
        """Pass on the kept scalars. Called when the training has just waited for the device, so that reading them does not wait."""
        if self._kept is not None:
            import torch

            (step, figures, values), self._kept = self._kept, None
            numbers = torch.stack([value.double() for value in values.values()]).tolist()
            self._show(step, "train", figures | dict(zip(values, numbers, strict=True)))

    def measure(self, network: Any) -> None:
        """Measure the network for the next epoch's figures."""
        if self and self._measure is not None:
            self._measured = self._measure(network)

    def summary(self, step: int, part: str, figures: Figures) -> None:
        """Pass on the metrics of an epoch, or of another interval. Work at its end does not count for the speed of the next steps."""
        if self:
            self._show(step, part, {**figures, **self._measured})
            self._measured = {}
            self._restart_clock(step)

    def _show(self, step: int, part: str, figures: Figures) -> None:
        self._send("figures", step, {name if name == part else f"{part}/{name}": value for name, value in figures.items()})

    def _open(self) -> None:
        assert self._run is not None, "a log with names has a run"
        try:
            self._run.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            problem = f"{VARIABLE} = {','.join(self._names)}: there is a file in place of the folder {self._run.folder}"
            raise UserError(f"{problem}; move it elsewhere, or unset {VARIABLE}") from None
        self._loggers = {}
        for name in self._names:
            adapter, _, way_out = _LOGGERS[name]
            try:
                self._loggers[name] = adapter(self._run, self._begun)
            except Exception as error:  # each library raises different errors
                raise UserError(f"{VARIABLE} = {name}: cannot be opened ({reason_of(error)}); {way_out}, or leave {name} out") from error
        if self._pictures is not None and not self._begun:
            for title, image in self._pictures().items():
                self._send("picture", title, image)

    def _send(self, what: str, *values: Any) -> None:
        for name, logger in list((self._loggers or {}).items()):
            try:
                getattr(logger, what)(*values)
            except Exception as error:  # of a server that is gone, or a full disk
                self._warn(f"{VARIABLE}: {name} has failed ({reason_of(error)}) and is switched off; the training continues")
                del self._loggers[name]  # type: ignore[union-attr]

    def close(self, whole: bool) -> None:
        """End the run in all loggers; `whole`: whether the training was completed."""
        self._send("close", whole)
