"""Counter-based randomness: a function of its key alone, uniform, without correlation between keys."""

import numpy as np

from bingo import seeds


def splitmix(state: int) -> int:
    """SplitMix64's output function in Python's own integers."""
    mask = 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_a_draw_is_the_published_mixer_of_its_key():
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    key = int(seeds._key(3, "order", 5))
    x = splitmix((splitmix((key + 11 * golden) & mask) + (2 + 1) * golden) & mask)
    expected = [(splitmix((x + (j + 1) * golden) & mask) >> 11) * 2.0**-53 for j in range(4)]
    assert seeds.uniforms(3, "order", 5, [11], 2, 4)[0].tolist() == expected


def test_rows_do_not_depend_on_their_company():
    everything = seeds.uniforms(0, "view", 1, np.arange(100), np.arange(100) % 3, 5)
    some = seeds.uniforms(0, "view", 1, [40, 7], [40 % 3, 7 % 3], 5)
    assert np.array_equal(some, everything[[40, 7]])


def test_draws_are_uniform_and_uncorrelated_between_neighbouring_keys():
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


def test_a_permutation_holds_every_row_once_and_changes_with_the_epoch():
    first, second = seeds.permutation(0, "order", 0, 1000), seeds.permutation(0, "order", 1, 1000)
    assert sorted(first) == list(range(1000))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, seeds.permutation(0, "order", 0, 1000))


def test_the_first_of_a_permutation_are_drawn_without_the_others():
    whole = seeds.permutation(2, "negatives", 9, 5000)
    for count in (1, 700, 4999, 5000, 6000):
        assert np.array_equal(seeds.first_of_permutation(2, "negatives", 9, 5000, count), whole[:count])
