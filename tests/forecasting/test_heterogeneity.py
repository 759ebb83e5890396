"""Spreads with estimation error removed, against published meta-analyses, scipy and simulation."""

import numpy as np
import pytest
from scipy import stats

from tailrisk_jax.estimators import in_float64
from tailrisk_jax.forecasting import heterogeneity, log10_stderr, pooled_heterogeneity
from tests.forecasting.simulated import QUERIES, SD, VARIANTS, simulate

# BCG vaccine against tuberculosis, 13 trials (Colditz et al. 1994): cases and others, treated and
# controls. Published of it: for log risk ratios tau^2 = 0.318 (Paule-Mandel), its
# Q-profile interval (0.1197, 1.1115), and for log odds ratios (0.1302, 1.1812); R package metafor
# and van Houwelingen et al. 2002.
BCG = np.array([
    [4, 119, 11, 128], [6, 300, 29, 274], [3, 228, 11, 209], [62, 13536, 248, 12619],
    [33, 5036, 47, 5761], [180, 1361, 372, 1079], [8, 2537, 10, 619], [505, 87886, 499, 87892],
    [29, 7470, 45, 7232], [17, 1699, 65, 1600], [186, 50448, 141, 27197], [5, 2493, 3, 2338],
    [27, 16886, 29, 17825],
], float).T  # fmt: skip


def padded(*rows):
    """Rows of one shape with all other tests, so that nothing compiles twice."""
    whole = np.zeros((QUERIES, VARIANTS))
    whole[: len(rows)] = rows
    return whole


def of(y, s, mask=None, level=0.95):
    return in_float64(heterogeneity, y, s, mask=np.ones(y.shape, bool) if mask is None else mask,
                      level=level)  # fmt: skip


def test_published_meta_analyses():
    a, b, c, d = BCG
    ratio = np.log(a / (a + b) / (c / (c + d)))
    ratio_variance = 1 / a - 1 / (a + b) + 1 / c - 1 / (c + d)
    odds = np.log(a * d / (b * c)).round(4)  # both as they were printed
    odds_variance = (1 / a + 1 / b + 1 / c + 1 / d).round(4)
    found = of(padded(ratio, odds), np.sqrt(padded(ratio_variance, odds_variance)))
    np.testing.assert_allclose(found.sd[0] ** 2, 0.3181, atol=5e-5)
    np.testing.assert_allclose(found.lower[:2] ** 2, [0.1197, 0.1302], atol=5e-5)
    np.testing.assert_allclose(found.upper[:2] ** 2, [1.1115, 1.1812], atol=5e-5)


def test_exact_values_have_the_sample_variance_and_its_interval():
    truth, _, _, _, mask = simulate(0)
    found = of(truth, np.zeros_like(truth), mask)
    for q in range(QUERIES):
        own = truth[q, mask[q]]
        squares, n = np.sum((own - own.mean()) ** 2), len(own)
        np.testing.assert_allclose(found.sd[q], own.std(ddof=1), rtol=1e-6)
        np.testing.assert_allclose(found.observed_sd[q], own.std(ddof=1), rtol=1e-6)
        wanted = np.sqrt(squares / stats.chi2.ppf([0.975, 0.025], n - 1))
        np.testing.assert_allclose([found.lower[q], found.upper[q]], wanted, rtol=1e-6)
        np.testing.assert_allclose(found.mean[q], own.mean(), rtol=1e-6)
        assert found.count[q] == n
    whole = in_float64(pooled_heterogeneity, truth, np.zeros_like(truth), mask=mask)
    about = sum(np.sum((y[k] - y[k].mean()) ** 2) for y, k in zip(truth, mask, strict=True))
    freedom = mask.sum() - QUERIES
    np.testing.assert_allclose(whole.sd, np.sqrt(about / freedom), rtol=1e-6)
    wanted = np.sqrt(about / stats.chi2.ppf([0.975, 0.025], freedom))
    np.testing.assert_allclose([whole.lower, whole.upper], wanted, rtol=1e-6)


def test_intervals_cover_and_error_alone_is_no_spread():
    """Q-profile is exact, so 800 groups cover as a binomial says."""
    n, covered, alone, pooled = 20 * QUERIES, 0, [], 0
    for seed in range(20):
        _, y, s, _, mask = simulate(seed)
        found = of(y, s, mask)
        covered += np.sum((found.lower <= SD) & (found.upper >= SD))
        whole = in_float64(pooled_heterogeneity, y, s, mask=mask)
        pooled += (whole.lower <= SD) & (whole.upper >= SD)
        _, y, s, _, mask = simulate(seed, sd=0.0)
        found = of(y, s, mask)
        alone.append(found.lower == 0)
    assert abs(covered / n - 0.95) < 4 * np.sqrt(0.95 * 0.05 / n)
    assert abs(np.mean(alone) - 0.975) < 4 * np.sqrt(0.975 * 0.025 / n)
    assert pooled >= stats.binom.ppf(1e-4, 20, 0.95)


def test_the_spread_is_right_where_the_errors_are_large():
    """Error removed: the pooled variance is that of the truth, not the larger one observed."""
    found = [
        in_float64(pooled_heterogeneity, y, s, mask=mask)
        for _, y, s, _, mask in (simulate(seed, sd=0.2) for seed in range(30))
    ]
    variances = np.asarray([one.sd**2 for one in found])
    z = (variances.mean() - 0.04) / (variances.std(ddof=1) / np.sqrt(30))
    assert abs(z) < 4
    assert all(one.observed_sd > 0.28 and one.error_sd > 0.2 for one in found)


def test_edges():
    y, s, mask = (
        padded([1.0] * VARIANTS),
        np.full((QUERIES, VARIANTS), 0.1),
        np.ones((40, 13), bool),
    )
    mask[1, 1:], mask[2] = False, False
    y[3, :2], mask[3, 2:] = (0.0, 100.0), False
    y[1, 5] = s[1, 6] = np.nan  # where nothing is
    found = of(y, s, mask)
    assert found.sd[0] == found.lower[0] == found.upper[0] == 0
    assert found.count[1] == 1 and np.isnan(found.sd[1]) and found.mean[1] == 0
    np.testing.assert_allclose(found.mean_stderr[0], 0.1 / np.sqrt(VARIANTS))
    assert found.count[2] == 0 and np.isnan([found.mean[2], found.sd[2], found.error_sd[2]]).all()
    np.testing.assert_allclose(found.sd[3], np.sqrt(5000 - 0.01))
    assert np.isfinite(found.upper[3]) and found.upper[3] > 1000
    with pytest.raises(ValueError, match="shapes differ"):
        heterogeneity(np.zeros(3), np.zeros(4))


def test_standard_errors_of_log10():
    lower, upper = np.array([0.01, 0.1, 0.0, 0.1, np.nan]), np.array([1.0, 0.1, 1.0, np.inf, 1.0])
    found = in_float64(log10_stderr, lower, upper, level=0.9)
    np.testing.assert_allclose(found[:2], [1 / stats.norm.ppf(0.95), 0])
    assert np.isnan(found[2:]).all()
