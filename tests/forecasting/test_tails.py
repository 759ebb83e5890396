"""Fits, quantiles and means against scipy, closed forms and lines that are known."""

import warnings

import jax
import numpy as np
import pytest
from scipy import integrate, special, stats

from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import in_float64
from tailrisk_jax.forecasting import (
    FITS,
    Tail,
    at_least_one,
    default_top,
    fit_log_normal,
    fit_tail,
    goodness_of_fit,
    log_exceedance,
    log_normal_exceedance,
    log_normal_mean,
    log_normal_quantile,
    log_p_of,
    psi_of,
    tail_mean,
    tail_quantile,
    worst_exceeds,
)

K, M = 10, 60
PLOTTED = {
    "ols": np.log(np.arange(1, K + 1) / M),
    "midpoint": np.log((np.arange(1, K + 1) - 0.5) / M),
    "digamma": special.digamma(np.arange(1, K + 1)) - special.digamma(M + 1),
}


def exponential(seed=0, size=M, scale=0.4, start=-2.5):
    return start + scale * np.random.default_rng(seed).exponential(size=size)


def test_psi_and_back_without_loss_at_risks_that_underflow():
    log_p = -np.geomspace(2e-3, 1e8, 50)  # p from 0.998 to exp(-1e8)
    psi = in_float64(psi_of, log_p)
    np.testing.assert_allclose(psi, -np.log(-log_p), rtol=1e-14)
    np.testing.assert_allclose(in_float64(log_p_of, psi), log_p, rtol=1e-12)
    edges = in_float64(psi_of, np.asarray([-np.inf, 0.0, np.nan]))
    np.testing.assert_allclose(edges, [-np.inf, -np.log(-np.log(0.999)), np.nan])


@pytest.mark.parametrize("fit", FITS)
def test_fits_are_scipys(fit):
    psi = exponential()
    top = np.sort(psi)[::-1][:K]
    found = in_float64(fit_tail, psi, top=K, fit=fit)
    if fit == "peaks":
        _, scale = stats.expon.fit(top[:-1] - top[-1], floc=0)
        slope, intercept = -1 / scale, np.log(K / M) + top[-1] / scale
    else:
        slope, intercept, *_ = stats.linregress(top, PLOTTED[fit])
    np.testing.assert_allclose([found.slope, found.intercept], [slope, intercept], rtol=1e-9)
    assert (found.threshold, found.num_tail, found.num_queries) == (top[-1], K, M)


@pytest.mark.parametrize("fit", FITS)
def test_what_lies_on_a_line_gives_that_line(fit):
    """For peaks: psi_(j) at the mean of ordered exponentials, whose mean excess is the scale."""
    ranks = np.arange(1, M + 1)
    if fit == "peaks":
        y = np.asarray([np.sum(1 / ranks[j:]) for j in range(M)])
        psi = -2.0 + 0.5 * y
        slope = -1 / 0.5
        intercept = np.log(K / M) + psi[K - 1] / 0.5
    else:
        slope, intercept = -2.0, -3.0
        plotted = np.concatenate([PLOTTED[fit], np.full(M - K, np.log(2))])
        psi = (plotted - intercept) / slope
    found = in_float64(fit_tail, np.random.default_rng(1).permutation(psi), top=K, fit=fit)
    np.testing.assert_allclose([found.slope, found.intercept], [slope, intercept], rtol=1e-9)
    for n in (1e3, 1e9):
        q = in_float64(tail_quantile, found, n)
        np.testing.assert_allclose(q, -(np.log(n) + intercept) / slope, rtol=1e-9)
        np.testing.assert_allclose(in_float64(log_exceedance, found, q), -np.log(n), rtol=1e-9)
        worst = in_float64(worst_exceeds, found, q, n)
        np.testing.assert_allclose(worst, -np.expm1(n * np.log1p(-1 / n)), rtol=1e-6)


def test_zeros_count_in_m_alone_and_missing_ones_do_not():
    psi = exponential(2)
    low = np.argsort(psi)[:20]
    censored, absent = psi.copy(), psi.copy()
    censored[low], absent[low] = -np.inf, np.nan
    whole, zeros, fewer = (in_float64(fit_tail, x, top=K) for x in (psi, censored, absent))
    assert (zeros.slope, zeros.intercept) == (whole.slope, whole.intercept)
    assert (whole.num_queries, zeros.num_queries, fewer.num_queries) == (M, M, M - 20)
    np.testing.assert_allclose(fewer.intercept - whole.intercept, np.log(M / (M - 20)))


def test_edges_few_none_and_equal():
    few = np.full(M, -np.inf)
    few[:4] = exponential(3, 4)
    found = in_float64(fit_tail, few, top=K)
    assert found.num_tail == 4 and found.threshold == few[:4].min()
    np.testing.assert_allclose(-1 / found.slope, np.sum(few[:4] - few[:4].min()) / 3)
    few[1:] = -np.inf
    for fit in FITS:
        assert np.isnan(in_float64(fit_tail, few, top=K, fit=fit).slope)
        equal = in_float64(fit_tail, np.full(M, -2.0), top=K, fit=fit)
        assert equal.slope == -np.inf and in_float64(tail_quantile, equal, 1e6) == -2.0
        risks = np.asarray([-2.1, -1.9])
        exceed = np.exp(in_float64(log_exceedance, equal, risks))
        np.testing.assert_allclose(exceed, [K / M, 0.0])
        np.testing.assert_allclose(in_float64(tail_mean, equal), np.exp(-np.exp(2.0)))


def test_batches_are_their_rows():
    psi = exponential(4, (3, M))
    found = in_float64(fit_tail, psi, top=K, fit="digamma")
    rows = [in_float64(fit_tail, row, top=K, fit="digamma").slope for row in psi]
    np.testing.assert_allclose(found.slope, rows)


@pytest.mark.parametrize("scale", [0.02, 0.3, 5.0])
def test_the_mean_over_a_tail_is_the_incomplete_gamma_function(scale):
    start, share = -2.6, 0.1
    one = np.float64
    tail = Tail(one(-1 / scale), one(np.log(share) + start / scale), one(start), one(5), one(50))
    a, t = 1 / scale, np.exp(-start)
    wanted = np.exp(special.gammaln(1 + a) - a * np.log(t)) * special.gammainc(a, t)
    np.testing.assert_allclose(in_float64(tail_mean, tail), wanted, rtol=1e-6)


def test_at_least_one_of_many_rare_ones():
    found = in_float64(at_least_one, np.asarray([1e-12, 1e-20, 1e-3, 1.0]), 1e9)
    np.testing.assert_allclose(found, [-np.expm1(-1e-3), 1e-11, 1, 1], rtol=1e-9)


def test_peaks_have_their_known_mean_and_spread_and_ols_forecasts_too_high():
    """In an exponential tail, 100 times the queries: the mean and variance of Q are sums of 1/i."""
    size, m, k, factor = 4000, 100, 10, 100
    psi = np.random.default_rng(5).exponential(size=(size, m))
    truth, ranks = np.log(factor * m), np.arange(1, m + 1)
    quantiles = {}
    for fit in FITS:
        tail = in_float64(fit_tail, psi, top=k, fit=fit)
        quantiles[fit] = in_float64(tail_quantile, tail, float(factor * m))
    mean = np.sum(1 / ranks[k - 1 :]) + np.log(factor * k)
    variance = np.sum(1 / ranks[k - 1 :] ** 2.0) + np.log(factor * k) ** 2 / (k - 1)
    z = (quantiles["peaks"].mean() - mean) / np.sqrt(variance / size)
    assert abs(z) < 4 and abs(mean - truth) < 0.06
    too_high = {fit: np.mean(q > truth) for fit, q in quantiles.items()}
    error = 4 * np.sqrt(0.25 / size)
    assert too_high["ols"] > 0.6 + error
    assert all(abs(too_high[fit] - 0.5) < 0.06 + error for fit in FITS if fit != "ols")


def test_log_normal_by_its_own_scores_and_scipy():
    scores = stats.norm.ppf((np.arange(M) + 0.5) / M)
    log_p = -9 + 2.5 * scores
    exact = in_float64(fit_log_normal, log_p)
    np.testing.assert_allclose([exact.mean, exact.sd], [-9, 2.5], rtol=1e-9)
    log_p[:20] = -np.inf
    shuffled = np.append(np.random.default_rng(0).permutation(log_p), np.nan)
    found = in_float64(fit_log_normal, shuffled)
    np.testing.assert_allclose([found.mean, found.sd], [-9, 2.5], rtol=1e-9)
    quantile = in_float64(log_normal_quantile, found, np.asarray([1e2, 1e9]))
    wanted = np.minimum(stats.norm.isf([1e-2, 1e-9], -9, 2.5), 0)
    np.testing.assert_allclose(quantile, wanted, rtol=1e-9)
    np.testing.assert_allclose(
        in_float64(log_normal_exceedance, found, np.log(1e-3)),
        stats.norm.logsf(np.log(1e-3), -9, 2.5),
    )
    density = stats.norm(-9, 2.5).pdf
    mean, _ = integrate.quad(lambda x: np.exp(min(x, 0)) * density(x), -40, 20, points=[0, -3])
    np.testing.assert_allclose(in_float64(log_normal_mean, found), mean, rtol=1e-6)
    assert np.isnan(in_float64(fit_log_normal, np.full(M, -np.inf)).mean)


def test_goodness_is_scipys_statistic_and_its_p_values_are_uniform():
    psi = np.sort(exponential(6, (400, M)), axis=-1)[:, ::-1][:, :K]
    peaks = psi[0, :-1] - psi[0, -1]
    found = in_float64(jax.vmap(goodness_of_fit), jax.random.split(jax.random.key(0), 400), psi)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what its p-values are to become
        wanted = stats.anderson(peaks, "expon").statistic
    np.testing.assert_allclose(found.anderson_darling[0], wanted, rtol=1e-9)
    slope = stats.linregress(psi[0], np.log(np.arange(1, K + 1)))
    np.testing.assert_allclose(found.r_squared[0], slope.rvalue**2, rtol=1e-9)
    assert stats.kstest(found.p_value, "uniform").pvalue > 1e-4
    bent = in_float64(goodness_of_fit, jax.random.key(0), np.r_[np.linspace(5, 4, 9), 0.0])
    assert bent.p_value < 0.01
    nothing = in_float64(goodness_of_fit, jax.random.key(0), np.full(K, -1.0))
    assert np.isnan(nothing.p_value) and np.isnan(nothing.r_squared)


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"'gumbel'; give one of peaks"):
        fit_tail(np.zeros(5), top=3, fit="gumbel")  # pyright: ignore
    with pytest.raises(InputError, match="hold 6 of 5 queries"):
        fit_tail(np.zeros(5), top=6)
    assert [default_top(m) for m in (20, 99, 313)] == [10, 10, 31]
