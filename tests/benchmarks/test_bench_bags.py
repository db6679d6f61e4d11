"""The benchmark of bags: the figures that it computes from its measurements; both searches run on a few rows."""

from argparse import Namespace

import numpy as np
import pytest

from benchmarks.bench_bags import Grown, exponent, make_features, recall, search_exactly, search_flat, spread_of, stored, timed


def test_exponents_are_slopes_without_very_short_times():
    cubic = [Grown(rows, 2e-9 * rows**3, "", False, 0) for rows in (1000, 3000, 9000)]
    assert exponent(cubic) == pytest.approx(3)
    assert exponent([Grown(10, 0.5, "", False, 0), *cubic]) == pytest.approx(3)
    assert np.isnan(exponent(cubic[:1]))


def test_recall_is_the_share_of_exact_members_found():
    exact, found = np.array([[1, 2], [3, 4]]), np.array([[0, 2, 1], [1, 3, -1]])
    assert recall(found, exact) == 0.75


def test_a_small_measurement(tmp_path):
    options = Namespace(width=8, k=3, device="cpu")
    make_features(tmp_path / "store", 300, 8)
    assert stored(tmp_path / "store", 200)[:].shape == (200, 8)
    assert len(search_exactly(tmp_path / "store", 300, 40, options, 2000)) == 3
    peer = timed(search_flat, tmp_path / "store", 300, 40, options)
    assert peer.peak_mb > 10
    assert spread_of(peer) == f"[{min(peer.seconds):.1f} .. {max(peer.seconds):.1f}]"
