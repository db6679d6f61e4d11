"""The report's first sentence: intervals against a bootstrap and the paper's formula, and the answer in every situation."""

import dataclasses
import math
import re

import numpy as np
import pytest

from bingo.report.worth import comparisons, headline, paired_interval
from tests.report.test_report import artefacts, make_listing, params

TEST = 400


def hits(share: float, images: int = TEST) -> np.ndarray:
    """100 for the first images, which are right, and 0 for the others."""
    found = np.zeros(images)
    found[: round(share * images)] = 100
    return found


def found(figures: dict, measure="linear", listing=None, **changes):
    """Artefacts with these percentages for each test image and network."""
    images = len(next(iter(figures.values())))
    listing = listing or dataclasses.replace(make_listing(), paths=["x"] * (12 + images), labels_N=np.zeros(12 + images, int))
    means = {net: float(values.mean()) for net, values in figures.items()}
    linear = {"cached": {net: {"top1_last": mean} for net, mean in means.items()}} if measure == "linear" else {}
    knn = {} if measure == "linear" else {net: {measure: mean} for net, mean in means.items()}
    outcomes = {net: {measure: values} for net, values in figures.items()}
    return artefacts(listing=listing, linear=linear, knn=knn, outcomes=outcomes, **changes)


@pytest.mark.parametrize("shares", [(0.9, 0.7), (0.52, 0.5), (0.3, 0.35)])
@pytest.mark.parametrize("possible", [1, 10])
def test_the_interval_equals_that_of_resampled_images(shares, possible):
    random = np.random.default_rng(3)
    ours, theirs = (100 * random.binomial(possible, share, TEST) / possible for share in shares)
    mean, bounds = paired_interval(ours, theirs)
    assert mean == pytest.approx(ours.mean() - theirs.mean())
    resampled = random.integers(0, TEST, (4000, TEST))
    expected = np.percentile((ours - theirs)[resampled].mean(axis=1), [2.5, 97.5])
    assert bounds == pytest.approx(expected, abs=0.8)


@pytest.mark.parametrize(("better", "worse", "same"), [(12, 3, 85), (0, 0, 10), (10, 0, 0), (0, 1, 19)])
def test_the_interval_of_hits_is_that_of_agresti_and_min(better, worse, same):
    ours = np.array([100.0] * better + [0.0] * worse + [100.0] * same)
    theirs = np.array([0.0] * better + [100.0] * worse + [100.0] * same)
    b, c, n = better + 0.5, worse + 0.5, better + worse + same + 2
    reach = 1.959964 * math.sqrt((b + c) - (b - c) ** 2 / n) / n
    mean, (low, high) = paired_interval(ours, theirs)
    assert (low, high) == pytest.approx((max(-100, 100 * ((b - c) / n - reach)), min(100, 100 * ((b - c) / n + reach))))
    assert low < high
    assert low <= mean <= high


STUDENT = hits(0.8)


def test_a_student_that_starts_from_weights_is_compared_with_them():
    nets = {"student": STUDENT, "start": hits(0.7), "untrained": hits(0.3), "moco": hits(0.6), "supervised": hits(0.9), "teacher": hits(1)}
    assert [one.net for one in comparisons(found(nets))] == ["start", "moco", "supervised"]
    assert [one.net for one in comparisons(found({net: nets[net] for net in ("student", "untrained")}))] == ["untrained"]


@pytest.mark.parametrize("measure", ["agreement_10", "linear"])
def test_raw_pixels_are_compared_too(measure):
    nets = {"student": STUDENT, "untrained": hits(0.3), "pixels": hits(0.9)}
    assert [one.net for one in comparisons(found(nets, measure))] == ["untrained", "pixels"]
    assert "was not worth it" in opening(headline(found(nets, measure)))
    assert "was worth it" in opening(headline(found(nets | {"pixels": hits(0.4)}, measure)))


NEAR = np.roll(STUDENT, 10)  # right on ten other images
SITUATIONS = {  # networks besides the student, and the sign of each comparison
    "worth it": ({"untrained": hits(0.3), "moco": hits(0.6)}, [1, 1]),
    "within chance of a baseline": ({"untrained": hits(0.3), "moco": NEAR}, [1, 0]),
    "below supervised weights": ({"untrained": hits(0.3), "supervised": hits(0.9)}, [1, -1]),
    "worse than its start": ({"start": hits(0.9), "untrained": hits(0.3)}, [-1]),
    "no other network": ({}, []),
}


def opening(sentence: str) -> str:
    return sentence.partition(":")[0] if re.search(r"\w: the student", sentence) else ""


@pytest.mark.parametrize("method", ["bingo", "moco"])
@pytest.mark.parametrize("measure", ["linear", "knn_10", "agreement_10"])
def test_each_situation_has_its_own_answer_with_the_figures(measure, method):
    openings = set()
    for others, signs in SITUATIONS.values():
        a = found({"student": STUDENT, **others}, measure, params=params(distill__method=method))
        assert [one.sign for one in comparisons(a)] == signs
        sentence = headline(a)
        assert sentence.count(".") == len(re.findall(r"\d\.\d", sentence)) + 1, "one sentence"
        assert "80.0 %" in sentence
        assert sentence[0].isupper()
        for one in comparisons(a):
            assert f"{abs(one.points):.1f} points {'more' if one.points > 0 else 'less'}" in sentence or abs(one.points) < 0.05
            assert all(f"{bound:+.1f}".replace("-", "−") in sentence for bound in one.bounds)
        openings.add(opening(sentence))
    assert len(openings) == len(SITUATIONS)


def test_how_much_of_the_teacher_is_kept():
    kept = headline(found({"student": STUDENT, "teacher": hits(0.9)})).partition("keeps")[2]
    assert re.findall(r"[\d.]+ %", kept) == ["89 %", "90.0 %", "33.3 %"]  # of the teacher's accuracy; that; chance for 3 classes
    assert "teacher" not in headline(found({"student": STUDENT, "teacher": hits(0.9)}, params=params(distill__method="moco")))
    assert "%" not in headline(found({"student": STUDENT, "teacher": hits(0.7)})).partition("teacher")[0].rpartition(";")[2]


def test_few_images_give_figures_without_a_verdict():
    few = {"student": hits(1, images=9), "untrained": hits(0, images=9)}
    more = {net: np.append(values, values[0]) for net, values in few.items()}
    assert comparisons(found(few))[0].sign == 1
    answers = [opening(headline(found(nets))) for nets in (few, more)]
    assert "9 test images" in answers[0]
    assert not any(character.isdigit() for character in answers[1])
    assert headline(artefacts(linear={}, knn={})) == ""


def test_networks_measured_on_other_images_are_not_compared():
    a = found({"student": STUDENT, "moco": hits(0.6)})
    other = {**a.outcomes, "moco": {"linear": hits(0.6, images=TEST - 1)}}
    assert comparisons(dataclasses.replace(a, outcomes=other)) == []
