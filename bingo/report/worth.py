"""The report's first sentence: whether distillation was worth it, judged by the results of the student and other networks on the same test
images.

Shape letter: Q test images.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bingo.params import display_name
from bingo.report.inputs import Artefacts
from bingo.report.results import Column, chance, headline_columns, headline_figures, needs_teacher

FEWEST_TEST_IMAGES = 10
_Z = 1.959964  # of the normal distribution, 95 % lie within


@dataclass(frozen=True)
class Comparison:
    """The student's percent minus another network's, in points, and the bounds of its 95 % interval."""

    net: str
    points: float
    bounds: tuple[float, float]

    @property
    def sign(self) -> int:
        """1: the student is better, -1: worse, 0: the interval contains 0."""
        return (self.bounds[0] > 0) - (self.bounds[1] < 0)


def paired_interval(ours_Q: np.ndarray, theirs_Q: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Mean difference in points of two networks' percent of the same images, and the bounds of its 95 % interval over such images.

    The interval is that of Agresti and Min (2005, Statistics in Medicine 24:729) for matched proportions: the usual one with half an
    image added to each of the four outcomes (right or wrong for either network), so that its width is not 0 for few images or equal
    networks. For values between right and wrong, such as agreement, it is wider than necessary.
    """
    differences_Q = (ours_Q - theirs_Q) / 100
    images = len(differences_Q) + 2
    mean = float(differences_Q.sum()) / images
    variance = (float((differences_Q**2).sum()) + 1) / images - mean**2
    reach = _Z * math.sqrt(variance / images)
    return 100 * float(differences_Q.mean()), (100 * max(-1.0, mean - reach), 100 * min(1.0, mean + reach))


def comparisons(a: Artefacts) -> list[Comparison]:
    """The student against itself before distillation (or untrained), the baselines, supervised weights and raw pixels, by the headline's
    measure."""
    column = headline_columns(a)[0]
    measure = "linear" if column.group == "linear cached" else column.key
    measured = [*headline_figures(a), "pixels"]
    before = "start" if "start" in measured else "untrained"
    ours_Q = a.outcomes.get("student", {}).get(measure, np.zeros(0))
    found = []
    for net in [before, *(net for net in measured if net not in ("student", "teacher", "start", "untrained"))]:
        theirs_Q = a.outcomes.get(net, {}).get(measure)
        if theirs_Q is not None and len(theirs_Q) == len(ours_Q):
            found.append(Comparison(net, *paired_interval(ours_Q, theirs_Q)))
    return found


def headline(a: Artefacts) -> str:
    """Whether distillation was worth it, in one sentence; empty if nothing was measured."""
    if not headline_columns(a):
        return ""
    column, figures, compared = headline_columns(a)[0], headline_figures(a), comparisons(a)
    clauses = [_result(a, column, figures["student"]), *(_clause(a, one, first=i == 0) for i, one in enumerate(compared))]
    sentence = f"the student {', '.join(clauses[:-1])} and {clauses[-1]}" if len(clauses) > 2 else f"the student {', '.join(clauses)}"
    if verdict := _verdict(a, compared, column):
        sentence = f"{verdict}: {sentence}"
    return f"{sentence[0].upper()}{sentence[1:]}{_kept(a, column, figures)}."


def _verdict(a: Artefacts, compared: Iterable[Comparison], column: Column) -> str:
    """The answer, as far as the comparisons and the number of test images give one."""
    signs, work = {one.net: one.sign for one in compared}, "distillation" if needs_teacher(a) else "training"
    if not signs:
        return ""
    if (test_images := len(a.listing.test_rows_N)) < FEWEST_TEST_IMAGES:
        return f"with only {test_images} test images it cannot be said whether {work} was worth it"
    judged = "judged by agreement with the teacher, " if column.group == "agreement" else ""
    if min(signs.get("start", 1), signs.get("untrained", 1)) < 0:
        return f"{judged}{work} made the network worse"
    words = {1: f"{work} was worth it", 0: f"it is not certain that {work} was worth it", -1: f"{work} was not worth it"}
    return judged + words[min(signs.values())]


def _result(a: Artefacts, column: Column, percent: float) -> str:
    k = column.key.removesuffix("_weighted").rpartition("_")[2]
    if column.group == "agreement":
        found = f"finds {percent:.1f} % of the {k} train images that the teacher finds nearest to a test image"
        return f"{found} (chance: {chance(a, column):.1f} %)"
    how = "a linear layer on its features" if column.group.startswith("linear") else f"its {k} nearest train images"
    return f"classifies {percent:.1f} % of the test images correctly by {how}"


def _clause(a: Artefacts, one: Comparison, first: bool) -> str:
    """For example "14.0 points more than the same network untrained (95 % interval: +11.2 to +16.9)"."""
    low, high = (f"{bound:+.1f}".replace("-", "\u2212") for bound in one.bounds)
    size = f"{abs(one.points):.1f}"
    difference = "the same share as" if size == "0.0" else f"{size} points {'more' if one.points > 0 else 'less'} than"
    doubt = "" if one.sign else "possible by chance, "
    return f"{difference} {_named(a, one.net)} ({doubt}{'95 % interval: ' if first else ''}{low} to {high})"


def _named(a: Artefacts, net: str) -> str:
    fixed = {
        "start": f"before {'distillation' if needs_teacher(a) else 'training'}",
        "untrained": "the same network untrained",
        "supervised": "the same network with supervised weights",
        "pixels": "raw pixels",
    }
    return fixed.get(net, f"the same network trained by {display_name(net)} without a teacher")


def _kept(a: Artefacts, column: Column, figures: dict[str, float]) -> str:
    """How much of its teacher's accuracy the student keeps, with the chance level; empty if the teacher was not used, or has no figure."""
    teacher = figures.get("teacher")
    if not teacher or not needs_teacher(a):
        return ""
    share = 100 * figures["student"] / teacher
    if share >= 99.95:
        return "; it is at least as accurate as its teacher"
    return f"; it keeps {share:.0f} % of its teacher's accuracy ({teacher:.1f} %; chance: {chance(a, column):.1f} %)"
