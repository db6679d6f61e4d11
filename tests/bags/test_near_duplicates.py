"""Near-duplicates against scikit-learn, and of real digits: copies of an image are found, and other images are not."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from bingo.bags.near_duplicates import near_duplicate_cosine, rows_near

DIGITS = (load_digits().data + 8).astype(np.float16)  # on grey, so that cosines are near 1 as for outputs of a network
TRAIN, TEST = DIGITS[:700], DIGITS[700:1000]


def cosines_to_nearest(queries: np.ndarray, rows: np.ndarray, place: int) -> np.ndarray:
    search = NearestNeighbors(n_neighbors=place, metric="cosine", algorithm="brute").fit(rows.astype(np.float64))
    return 1 - search.kneighbors(queries.astype(np.float64))[0][:, -1]


@pytest.mark.parametrize("fraction", [0.05, 0.3])
@pytest.mark.parametrize("rows", [4, 11, 700])
def test_the_limit_is_a_fraction_of_the_usual_distance_to_the_tenth_nearest(fraction, rows):
    place = min(10, rows - 1)
    usual = np.median(1 - cosines_to_nearest(TRAIN[:rows], TRAIN[:rows], place + 1))  # the first is the row itself
    assert near_duplicate_cosine(TRAIN[:rows], fraction, 0) == pytest.approx(1 - fraction * usual, abs=1e-6)


def test_of_many_rows_a_thousand_are_drawn_by_seed():
    found = [near_duplicate_cosine(DIGITS, 0.1, seed) for seed in (0, 0, 1)]
    usual = np.median(1 - cosines_to_nearest(DIGITS, DIGITS, 11))
    assert found[0] == found[1] != found[2]
    assert found == pytest.approx([1 - 0.1 * usual] * 3, abs=0.01 * usual)


@pytest.mark.parametrize("rows", [TRAIN[:1], TRAIN])
def test_there_are_none_without_a_fraction_or_a_second_row(rows):
    cosine = near_duplicate_cosine(rows, 0.0 if len(rows) > 1 else 0.1, 0)
    assert rows_near(rows, rows, cosine).tolist() == []


@pytest.mark.parametrize("copies", [1, 9])
def test_copies_are_found_and_other_images_are_not(copies):
    random = np.random.default_rng(0)
    brighter = (TEST[::3] * 1.2 + random.normal(0, 0.1, TEST[::3].shape)).astype(np.float16)
    train = np.concatenate([np.repeat(TRAIN, copies, axis=0), brighter])
    limit = near_duplicate_cosine(train, 0.1, 0)
    assert rows_near(TEST, train, limit).tolist() == list(range(0, 300, 3))
    assert rows_near(TEST, train, limit, search_seed=0).tolist() == list(range(0, 300, 3))


def test_rows_are_near_by_the_definition():
    cosines = cosines_to_nearest(TEST, TRAIN, 1)
    for limit in np.quantile(cosines, [0.1, 0.5, 0.9]).tolist():
        surely, perhaps = (set(np.flatnonzero(cosines > limit + margin)) for margin in (1e-6, -1e-6))
        assert surely <= set(rows_near(TEST, TRAIN, limit)) <= perhaps
        few = TRAIN[:250]  # its 16 lists are all searched
        assert rows_near(TEST, few, limit, search_seed=0).tolist() == rows_near(TEST, few, limit).tolist()
    assert rows_near(TEST[:0], TRAIN, 0.5).tolist() == []
