"""The chance of a hit among k answers, against scipy and its own expectation."""

import numpy as np
import pytest
from scipy import stats

from tailrisk_jax.estimators import any_of_draws, in_float64


@pytest.mark.parametrize("k", [1, 4, 20])
def test_any_of_draws_is_hypergeometric_and_unbiased(k):
    """sum over c of binom(c; n, P) estimate(c, n, k) = 1 - (1 - P)^k, exactly."""
    n = 20
    hits = np.arange(n + 1)
    found = in_float64(any_of_draws, hits, np.full(n + 1, n), k)
    np.testing.assert_allclose(found, stats.hypergeom.sf(0, n, hits, k), rtol=1e-12, atol=1e-15)
    for p in (1e-3, 0.2):
        mean = stats.binom.pmf(hits, n, p) @ found
        np.testing.assert_allclose(mean, stats.binom.sf(0, k, p), rtol=1e-12)


def test_any_of_draws_at_its_edges():
    found = in_float64(any_of_draws, np.array([0, 1, 3]), np.array([9, 10_000, 10_000]), 10_000)
    np.testing.assert_array_equal(found, [np.nan, 1.0, 1.0])
    assert in_float64(any_of_draws, 0, 10_000, 10_000) == 0


def test_no_answers_are_refused():
    with pytest.raises(ValueError, match="k is 0"):
        any_of_draws(1, 2, 0)
