"""Counter-based randomness: a function of seed, purpose, epoch, row and view only, uniform and uncorrelated."""

import numpy as np
import pytest

from bingo import seeds


def splitmix(state: int) -> int:
    """SplitMix64's output function with Python integers."""
    mask = 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_a_draw_is_the_published_mixer_of_its_seed_row():
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    start = int(seeds._start(3, "order", 5))
    x = splitmix((splitmix((start + 11 * golden) & mask) + (2 + 1) * golden) & mask)
    expected = [(splitmix((x + (j + 1) * golden) & mask) >> 11) * 2.0**-53 for j in range(4)]
    assert seeds.uniforms(3, "order", 5, [11], 2, 4)[0].tolist() == expected


def test_draws_of_a_row_do_not_depend_on_the_other_rows():
    everything = seeds.uniforms(0, "view", 1, np.arange(100), np.arange(100) % 3, 5)
    some = seeds.uniforms(0, "view", 1, [40, 7], [40 % 3, 7 % 3], 5)
    assert np.array_equal(some, everything[[40, 7]])


def test_draws_are_uniform_and_uncorrelated_between_neighbouring_rows():
    u = seeds.uniforms(0, "a", 0, np.arange(20000), 0, 2)
    counts, _ = np.histogram(u, bins=50, range=(0, 1))
    expected = u.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 90  # chi-square, 49 degrees: 99.97 % below
    others = [
        seeds.uniforms(1, "a", 0, np.arange(20000)),
        seeds.uniforms(0, "b", 0, np.arange(20000)),
        seeds.uniforms(0, "a", 1, np.arange(20000)),
    ]
    others += [seeds.uniforms(0, "a", 0, np.arange(20000), 1), seeds.uniforms(0, "a", 0, np.arange(1, 20001)), u[:, 1:]]
    for other in others:
        assert abs(np.corrcoef(u[:, 0], other[:, 0])[0, 1]) < 0.03


def test_a_permutation_contains_every_row_once_and_changes_with_the_epoch():
    first, second = seeds.permutation(0, "order", 0, 1000), seeds.permutation(0, "order", 1, 1000)
    assert sorted(first) == list(range(1000))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, seeds.permutation(0, "order", 0, 1000))


def test_distinct_numbers_are_distinct_and_in_order():
    for n in (1, 2, 7, 64, 65, 5000):
        for count in {1, n // 3 + 1, max(1, n - 1), n, n + 1}:
            drawn = seeds.distinct(2, "negatives", 9, n, count)
            assert drawn.dtype == np.int64
            assert len(drawn) == min(count, n)
            assert np.all(np.diff(drawn) > 0)
            assert 0 <= drawn[0] <= drawn[-1] < n
    assert np.array_equal(seeds.distinct(2, "a", 9, 5000, 70), seeds.distinct(2, "a", 9, 5000, 70))
    assert not np.array_equal(seeds.distinct(2, "a", 9, 5000, 70), seeds.distinct(2, "a", 10, 5000, 70))


def test_a_few_of_very_many_numbers_are_drawn_without_enumerating_them():
    drawn = seeds.distinct(0, "negatives", 0, 10**15, 1000)
    assert len(np.unique(drawn)) == 1000
    assert abs(drawn.mean() / 10**15 - 0.5) < 0.05  # 5 standard deviations


@pytest.mark.slow
@pytest.mark.parametrize(("n", "count"), [(5, 2), (20, 5), (130, 65)])
def test_every_number_and_every_pair_is_drawn_equally_often(n, count):
    """Chi-square over 4,000 draws, of numbers and of pairs. The numbers of a draw are not independent, which only makes the first
    smaller."""
    draws = 4000
    counts_NN = np.zeros((n, n))
    for epoch in range(draws):
        drawn = seeds.distinct(0, "negatives", epoch, n, count)
        counts_NN[np.ix_(drawn, drawn)] += 1
    single_N, pairs = counts_NN.diagonal(), counts_NN[np.triu_indices(n, 1)]
    for found, p in ((single_N, count / n), (pairs, count * (count - 1) / n / (n - 1))):
        chi_square = ((found - draws * p) ** 2 / (draws * p * (1 - p))).sum()
        assert chi_square < len(found) + 5 * (2 * len(found)) ** 0.5, (chi_square, len(found))
