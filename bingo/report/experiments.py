"""Comparison of experiments: runs of a variant with several seeds, their means, and differences from a reference, paired by seed.

A variant is the name of an experiment without its seed: `method-bingo` for `method-bingo-s2`. Every figure is stored by seed,
{measure: {seed: value}}, so that differences are taken between runs of the same seed, which share split, teacher and bags.
"""

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import ValidationError
from scipy.stats import rankdata, spearmanr
from scipy.stats import t as student_t

from bingo.params import Params, method_names, method_section

LEVEL, LEAST_RUNS = 0.95, 5  # a correlation of fewer runs means nothing
UNREAD = object()  # in place of a parameter that a run does not have or read
_DRAWS = 10_000
ACCURACIES = ("linear", "knn_10", "agreement_10")  # by which variants are compared, the preferred one first
_RESULTS, _DISTILL = "reports/results.json", "reports/distill.json"
_UPSTREAM = ("seed", "dataset", "image", "teacher", "extract", "bagging", "student", "distill")  # that determine a training's timing


@dataclass(frozen=True)
class Experiment:
    """One run: its parameters (params.yaml as read), its metrics {file: figures}, and whether the workspace has its outputs."""

    name: str
    params: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]
    in_workspace: bool = False

    @property
    def seed(self) -> int:
        return self.params["seed"]

    @property
    def variant(self) -> str:
        return re.sub(rf"-s{self.seed}$", "", self.name)


@dataclass(frozen=True)
class Variant:
    """The runs of one variant. `values` holds the value for each seed of each measure; see `measures`. `workspace_seed` is the seed of the
    run whose outputs the workspace has, None if it is none of them."""

    name: str
    method: str
    with_teacher: bool
    seeds: Sequence[int]
    values: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    workspace_seed: int | None = None

    @property
    def title(self) -> str:
        """The name, with a mark if the workspace has the outputs of a run that has another name."""
        if self.workspace_seed is None or self.name == "workspace":
            return self.name
        return f"{self.name} (workspace{f': seed {self.workspace_seed}' if len(self.seeds) > 1 else ''})"

    def spread(self, measure: str) -> "Spread | None":
        """Mean and standard deviation over the seeds, None if no seed has the measure."""
        return spread(self.values.get(measure, {}).values())


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (over n - 1; None of a single value)."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Difference:
    """Mean difference over the seeds that both have, with the bounds of its 95 % interval (None of a single seed)."""

    mean: float
    bounds: tuple[float, float] | None
    pairs: int


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation, from -1 to 1, with the bounds of its 95 % bootstrap interval and the number of runs."""

    value: float
    bounds: tuple[float, float]
    runs: int


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and sample standard deviation; None without values."""
    known = list(values)
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None) if known else None


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours minus theirs over the common seeds, with Student's t-interval of paired samples: mean ± t(n - 1) sd / sqrt(n).

    None without a common seed.
    """
    common = spread(ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys()))
    if common is None:
        return None
    pairs = len(ours.keys() & theirs.keys())
    if common.deviation is None:
        return Difference(common.mean, None, pairs)
    reach = float(student_t.ppf((1 + LEVEL) / 2, pairs - 1)) * common.deviation / math.sqrt(pairs)
    return Difference(common.mean, (common.mean - reach, common.mean + reach), pairs)


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> RankCorrelation | None:
    """Spearman's rank correlation of two measures, one pair for each run, with a percentile bootstrap interval: runs are drawn with
    replacement 10,000 times, with a fixed seed; draws in which a measure is constant have no correlation and do not count.

    None for fewer than 5 runs, or if a measure is the same for all.
    """
    if len(pairs) < LEAST_RUNS or any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return None
    pairs_R2 = np.array(sorted(pairs))
    draws_DR = np.random.default_rng(0).integers(0, len(pairs), (_DRAWS, len(pairs)))
    ranks = rankdata(pairs_R2[draws_DR], axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    covariance_D22 = np.einsum("drx,dry->dxy", ranks, ranks)
    scale_D = np.sqrt(covariance_D22[:, 0, 0] * covariance_D22[:, 1, 1])
    drawn = covariance_D22[scale_D > 0, 0, 1] / scale_D[scale_D > 0]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return RankCorrelation(float(spearmanr(pairs_R2).statistic), (float(low), float(high)), len(pairs))


def variants(experiments: Sequence[Experiment], records: Sequence[Mapping[str, Any]]) -> list[Variant]:
    """The experiments by variant, the most accurate first. `records` are those of distill stages (bingo/pipeline/run.py), of any run."""
    names = dict.fromkeys(experiment.variant for experiment in experiments)
    found = [_variant([one for one in experiments if one.variant == name], records) for name in names]
    return sorted(found, key=lambda variant: -_rank(variant))


def _rank(variant: Variant) -> float:
    known = next((spread for measure in ACCURACIES if (spread := variant.spread(measure))), None)
    return known.mean if known else -math.inf


def _variant(runs: Sequence[Experiment], records: Sequence[Mapping[str, Any]]) -> Variant:
    values: dict[str, dict[int, float]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        for measure, value in measures(run, record_of(run, records)).items():
            values.setdefault(measure, {})[run.seed] = value
    seeds, workspace = sorted({run.seed for run in runs}), next((run.seed for run in runs if run.in_workspace), None)
    return Variant(runs[0].variant, runs[0].params["distill"]["method"], _with_teacher(runs[0]), seeds, values, workspace)


def differing(experiments: Sequence[Experiment]) -> dict[str, list[Any]]:
    """The parameters in which experiments differ, by their dotted names: the value of each experiment, UNREAD if it does not read it.

    Seeds, the name of the method and the report's section are left out, and so are the sections of methods that are not trained.
    """
    return dict(_differing([_settings(experiment.params) for experiment in experiments], ""))


def _settings(params: Mapping[str, Any]) -> dict[str, Any]:
    method = params["distill"]["method"]
    distill = {key: value for key, value in params["distill"].items() if key != "method"}
    return {**params, "distill": distill, "methods": {method: params["methods"].get(method, {})}, "seed": UNREAD, "report": UNREAD}


def _differing(values: Sequence[Any], name: str) -> Iterator[tuple[str, list[Any]]]:
    known = [value for value in values if value is not UNREAD]
    if known and all(isinstance(value, Mapping) for value in known):
        for key in dict.fromkeys(key for value in known for key in value):
            below = [UNREAD if value is UNREAD else value.get(key, UNREAD) for value in values]
            yield from _differing(below, f"{name}.{key}" if name else key)
    elif any(value != known[0] for value in known):
        yield name, list(values)


def _with_teacher(experiment: Experiment) -> bool:
    method = experiment.params["distill"]["method"]
    return method not in method_names() or method_section(method).needs_teacher


def record_of(experiment: Experiment, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The record of the training that produced the student: the experiment's own, or that of another experiment with the same parameters,
    whose student DVC took from its cache. Empty if there is none, or if the training was interrupted, so that its time is incomplete."""
    method, params = experiment.params["distill"]["method"], _as_run(experiment.params)

    def is_of(record: Mapping[str, Any]) -> bool:
        noted = {section: record["params"].get(section) for section in _UPSTREAM}
        return _within({**noted, "methods": {method: record["params"].get("methods", {}).get(method)}}, params)

    same = [record for record in records if is_of(record)]
    own = [record for record in same if record.get("experiment") == experiment.name]
    record = next(iter(own or same), {})
    return {} if record.get("resumed") else record


def _as_run(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters as a run records them, with names replaced by what they stand for; unchanged if this version does not allow them."""
    try:
        return Params.model_validate(params).model_dump()
    except ValidationError:
        return params


def _within(part: Any, whole: Any) -> bool:
    """Whether every key of `part`, at any depth, has the same value in `whole`."""
    if isinstance(part, Mapping):
        return isinstance(whole, Mapping) and all(key in whole and _within(value, whole[key]) for key, value in part.items())
    return part == whole


def measures(experiment: Experiment, record: Mapping[str, Any]) -> dict[str, float]:
    """The known figures of one run.

    linear, knn_10: the student's top-1, percent; agreement_10: its agreement with the teacher, percent;
    teacher_linear, teacher_knn_10: its teacher's; of_teacher: linear as percent of the teacher's;
    gflop_per_anchor; gflop_per_image: gflop_per_anchor times the epochs, the cost of training for each train image;
    anchors_per_second, peak_memory_mb, peak_gpu_memory_mb, minutes: of the distill stage's run.
    """
    results, distill = experiment.metrics.get(_RESULTS, {}), experiment.metrics.get(_DISTILL, {})
    figures = {measure: results.get(measure, {}).get("student") for measure in ACCURACIES}
    figures |= {f"teacher_{measure}": results.get(measure, {}).get("teacher") for measure in ("linear", "knn_10")}
    if _with_teacher(experiment) and figures["linear"] is not None and figures["teacher_linear"]:
        figures["of_teacher"] = 100 * figures["linear"] / figures["teacher_linear"]
    if cost := distill.get("gflop_per_anchor"):
        figures |= {"gflop_per_anchor": cost, "gflop_per_image": cost * experiment.params["distill"]["epochs"]}
    figures |= {measure: record.get(measure) for measure in ("anchors_per_second", "peak_memory_mb", "peak_gpu_memory_mb")}
    figures["minutes"] = record["seconds"] / 60 if "seconds" in record else None
    return {measure: value for measure, value in figures.items() if value is not None}
