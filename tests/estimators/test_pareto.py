"""Pareto smoothing against arviz-stats, and its edges."""

import arviz_stats.base.array as arviz
import jax
import numpy as np
import pytest
from scipy.special import logsumexp

from tailrisk_jax.estimators import importance, in_float64, pareto_k, psis

ARVIZ = arviz.BaseArray()
SHAPES = (-0.3, 0.2, 0.7, 1.3)


def weights(shape, num, seed=0):
    u = np.random.default_rng(seed).random(num)
    return np.log(np.expm1(-shape * np.log(u)) / shape + 0.1)


@pytest.mark.parametrize("num", [30, 225, 1000, 10_000])
@pytest.mark.parametrize("shape", SHAPES)
def test_k_hat_is_that_of_arviz(shape, num):
    log_w = weights(shape, num)
    _, wanted = ARVIZ.psislw(-log_w)  # it takes log-likelihoods, and negates them
    np.testing.assert_allclose(in_float64(pareto_k, log_w), wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(pareto_k(log_w), wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_smoothed_weights_are_those_of_arviz(shape):
    log_w = weights(shape, 1000)
    smoothed, _ = ARVIZ.psislw(-log_w)
    body = np.argmin(log_w)  # not smoothed, which tells arviz's normalisation
    wanted = np.exp(logsumexp(smoothed) - smoothed[body] + log_w[body]) / 1000
    found = in_float64(psis, np.ones(1000), log_w)
    np.testing.assert_allclose(found.value, wanted, rtol=1e-9)
    assert found.value != in_float64(importance, np.ones(1000), log_w).value


def test_rows_of_different_length_are_as_if_alone():
    rows = [weights(0.5, num, seed) for seed, num in enumerate((40, 301))]
    padded = np.full((2, 400), 50.0)
    mask = np.zeros((2, 400), bool)
    for i, row in enumerate(rows):
        padded[i, : len(row)], mask[i, : len(row)] = row, True
    found = in_float64(pareto_k, padded, mask=mask)
    alone = [in_float64(pareto_k, row) for row in rows]
    np.testing.assert_allclose(found, alone, rtol=1e-9)
    value = in_float64(psis, np.ones((2, 400)), padded, mask=mask).value
    alone = [in_float64(psis, np.ones(len(row)), row).value for row in rows]
    np.testing.assert_allclose(value, alone, rtol=1e-9)


@pytest.mark.parametrize(
    ("log_w", "k"),
    [
        (np.zeros(100), np.inf),  # ties: nothing lies above the cutoff
        (np.full(100, -np.inf), np.inf),
        (np.where(np.arange(100) < 4, 1.0, -np.inf), np.inf),  # four values above zero
        (np.zeros(1), np.inf),
        (np.where(np.arange(100) == 0, np.nan, 0.0), np.nan),
        (np.where(np.arange(100) == 0, np.inf, 0.0), np.nan),
    ],
)
def test_edges(log_w, k, transform):
    log_w = np.asarray(log_w, np.float32)
    np.testing.assert_array_equal(transform(pareto_k)(log_w), np.float32(k))


def test_weights_that_overflow_change_nothing_but_the_scale():
    log_w = weights(0.7, 500)
    np.testing.assert_allclose(
        in_float64(pareto_k, log_w + 90), in_float64(pareto_k, log_w), rtol=1e-9
    )
    assert jax.numpy.isfinite(pareto_k(log_w + 90))
