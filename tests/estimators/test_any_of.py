"""The chance of a hit among k answers, against scipy and its own expectation."""

import numpy as np
import pytest
from scipy import stats

from tailrisk_jax.estimators import any_of, any_of_draws, in_float64

VALUES = np.array([0.0, 1e-12, 1e-6, 0.3, 1.0])


@pytest.mark.parametrize("k", [1, 7, 10_000])
def test_any_of_is_the_binomial_tail(k):
    found = in_float64(any_of, VALUES, k)
    np.testing.assert_allclose(found, stats.binom.sf(0, k, VALUES), rtol=1e-12)


def test_a_limit_above_1_counts_as_1():
    np.testing.assert_array_equal(any_of(np.array([1.2, np.inf, np.nan]), 3), [1, 1, np.nan])


@pytest.mark.parametrize("k", [1, 4, 20])
def test_any_of_draws_is_hypergeometric_and_unbiased(k):
    """sum over c of binom(c; n, P) estimate(c, n, k) = 1 - (1 - P)^k, exactly."""
    n = 20
    hits = np.arange(n + 1)
    found = in_float64(any_of_draws, hits, np.full(n + 1, n), k)
    np.testing.assert_allclose(found, stats.hypergeom.sf(0, n, hits, k), rtol=1e-12, atol=1e-15)
    for p in (1e-3, 0.2):
        mean = stats.binom.pmf(hits, n, p) @ found
        np.testing.assert_allclose(mean, in_float64(any_of, p, k), rtol=1e-12)


def test_any_of_draws_at_its_edges():
    found = in_float64(any_of_draws, np.array([0, 1, 3]), np.array([9, 10_000, 10_000]), 10_000)
    np.testing.assert_array_equal(found, [np.nan, 1.0, 1.0])
    assert in_float64(any_of_draws, 0, 10_000, 10_000) == 0


@pytest.mark.parametrize("call", [lambda: any_of(0.1, 0), lambda: any_of_draws(1, 2, 0)])
def test_no_answers_are_refused(call):
    with pytest.raises(ValueError, match="k is 0"):
        call()
