"""Forecasts: what follows from the line, coverage of the bands, and refusals in words."""

import dataclasses

import jax
import numpy as np
import pytest

from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import in_float64
from tailrisk_jax.forecasting import (
    Lack,
    at_least_one,
    explain_support,
    forecast,
    log_exceedance,
    log_p_of,
    psi_of,
    query_risks,
    resample,
    rows_of,
    tail_mean,
    tail_quantile,
)

M, K, R = 60, 10, 199
DEPLOYMENT = (6e2, 6e6)
KEY = jax.random.key(0)


def exponential(seed=0, size=M, scale=0.3, start=-2.6):
    return start + scale * np.random.default_rng(seed).exponential(size=size)


def risk(psi):
    return np.exp(-np.exp(-np.asarray(psi)))


def run(risks, deployment=DEPLOYMENT, thresholds=(0.3,), **options):
    options = {"top": K, **options}
    return in_float64(forecast, KEY, risks, deployment, thresholds=thresholds, **options)


def good(value, **columns):
    """Estimates within 5%, but for what is given."""
    columns = {"stderr": 0.05 * value, "lower": value * 0.9, "upper": value / 0.9, **columns}
    return query_risks(value, **columns)


@pytest.fixture(scope="module")
def found():
    return run(good(risk(exponential())))


def test_figures_follow_from_the_line(found):
    value, tail = np.sort(risk(exponential())), found.tail
    n = np.asarray(DEPLOYMENT)
    np.testing.assert_allclose(found.factor, n / M)
    quantile = in_float64(tail_quantile, tail, n)
    np.testing.assert_allclose(found.worst.value, risk(quantile), rtol=1e-9)
    median = in_float64(tail_quantile, tail, n / np.log(2))
    np.testing.assert_allclose(found.drawn.value, risk(median), rtol=1e-9)
    mean = value[:-K].sum() / M + K / M * in_float64(tail_mean, tail)
    np.testing.assert_allclose(found.mean.value, mean, rtol=1e-9)
    np.testing.assert_allclose(found.harmful.value, n * mean, rtol=1e-9)
    np.testing.assert_allclose(found.aggregate.value, in_float64(at_least_one, mean, n))
    often = np.exp(in_float64(log_exceedance, tail, in_float64(psi_of, np.log(0.3))))
    np.testing.assert_allclose(found.frequency.value, often, rtol=1e-9)
    assert found.exceeds.shape == (2, 1) and 0.2 < found.exceeds[0, 0] < found.exceeds[1, 0] <= 1
    for band in (found.worst, found.drawn, found.mean, found.harmful, found.frequency):
        assert np.all(band.lower < band.value) and np.all(band.value < band.upper)
    wide = [np.log(band.upper / band.lower)[0] for band in (found.drawn, found.worst)]
    assert wide[0] > wide[1]


def test_a_frequency_below_the_tail_is_the_share_of_the_estimates(found):
    value = risk(exponential())
    tau = float(np.median(value))
    often = run(good(value), thresholds=(tau,)).frequency
    assert often.value[0] == np.mean(value > tau) == 0.5
    assert 0.3 < often.lower[0] < 0.5 < often.upper[0] < 0.8


def test_the_order_of_queries_and_filling_change_nothing_but_the_draw(found):
    value = np.random.default_rng(1).permutation(risk(exponential()))
    again = run(good(np.append(value, np.nan)))
    np.testing.assert_allclose(again.worst.value, found.worst.value, rtol=1e-9)
    np.testing.assert_allclose(again.mean.value, found.mean.value, rtol=1e-9)
    np.testing.assert_allclose(again.worst.upper, found.worst.upper, rtol=0.2)
    same = run(good(risk(exponential())))
    assert all(map(np.array_equal, jax.tree.leaves(same.worst), jax.tree.leaves(found.worst)))


def limits_of(psi, below, groups, *, fit="peaks", top=K):
    """The bands of Q_psi(100 m), over rows of estimates."""
    size = psi.shape[1]
    rows = rows_of(groups, size)
    risks = query_risks(np.ones(size))

    def limits(key, psi, below):
        own = dataclasses.replace(risks, log_p=log_p_of(psi), below=below, above=below)
        options = {"top": top, "most": top, "fit": fit, "num_resamples": R}
        _, tails = resample(key, own, rows, len(rows), np.zeros(1), **options)
        quantile = tail_quantile(tails.tails, 100.0 * size)
        return jax.numpy.nanquantile(quantile, np.asarray([0.025, 0.975]))

    keys = jax.random.split(jax.random.key(1), len(psi))
    return in_float64(jax.jit(jax.vmap(limits)), keys, psi, below)


@pytest.mark.parametrize("fit", ["peaks", pytest.param("ols", marks=pytest.mark.slow)])
def test_bands_cover_the_truth_with_exact_and_with_noisy_estimates(fit):
    """300 exponential tails, with errors of 0 and of 0.3 nats; the quantiles are of R tails."""
    size, scale, covers = 300, 0.3, 0.95 * (R - 1) / (R + 1)
    log_p = -np.exp(-exponential(2, (size, M), scale))
    truth = -2.6 + scale * np.log(100 * M)
    within = 4 * np.sqrt(covers * (1 - covers) / size)
    noise = np.random.default_rng(3).normal(size=log_p.shape)
    for error in (0.0, 0.3):
        seen = -np.log(-np.minimum(log_p + error * noise, -1e-3))
        lower, upper = limits_of(seen, np.full_like(seen, error), None, fit=fit).T
        assert abs(np.mean((lower < truth) & (truth < upper)) - covers) < within


@pytest.mark.slow
def test_bands_by_base_query_cover_where_variants_are_alike():
    """75 base queries with four like variants: single resampling covers far less."""
    size, scale, covers = 300, 0.3, 0.95 * (R - 1) / (R + 1)
    psi = np.repeat(exponential(4, (size, 75), scale), 4, axis=1)
    psi += 1e-3 * np.random.default_rng(5).normal(size=psi.shape)
    truth = -2.6 + scale * np.log(100 * 300)
    shares = []
    for groups in (np.repeat(np.arange(75), 4), None):
        lower, upper = limits_of(psi, np.zeros_like(psi), groups, top=30).T
        shares.append(np.mean((lower < truth) & (truth < upper)))
    assert abs(shares[0] - covers) < 4 * np.sqrt(covers * (1 - covers) / size)
    assert shares[1] < 0.8


def test_base_queries_are_drawn_together():
    groups = np.asarray([7, 3, 7, 7, 3])
    np.testing.assert_array_equal(rows_of(groups, 5), [[1, 4, -1], [0, 2, 3]])
    np.testing.assert_array_equal(rows_of(None, 2), [[0], [1]])
    with pytest.raises(InputError, match="give each query one"):
        rows_of(groups, 4)


def test_errors_of_estimates_by_their_limits_or_their_standard_error():
    z = 1.959963984540054
    risks = query_risks(
        [1e-6, 1e-3, 1e-3, 0.0, 1e-9],
        stderr=[np.nan, 2e-4, np.nan, np.nan, 1.0],
        lower=[0.5e-6, 0.0, 0.0, 0.0, 0.0],
        upper=[4e-6, np.inf, np.inf, 1e-3, np.inf],
    )
    np.testing.assert_allclose(risks.below, [np.log(2) / z, 0.2, 1, 0, 2])
    np.testing.assert_allclose(risks.above, [np.log(4) / z, 0.2, 1, 0, 2])
    np.testing.assert_allclose(np.exp(risks.limit[[0, 3]]), [4e-6, 1e-3])
    exact = query_risks([0.0, 1e-3])
    assert not exact.below.any() and exact.limit[0] == -np.inf


def tied():
    return np.repeat(risk(exponential(7, M // 3)), 3)


def zeros(count):
    value = np.sort(risk(exponential()))
    value[:count] = 0
    return value


def saturated():
    value = risk(exponential())
    value[np.argsort(value)[-K:]] = 1.0
    return value


def bent():
    value = risk(np.linspace(-2.6, -2.5, M))
    value[:K] = risk(np.r_[np.full(K - 1, -1.0) + 0.001 * np.arange(K - 1), -2.0])
    return value


LACKS = {
    "few": (lambda: good(zeros(M - 3)), Lack.FEW, "only 3 queries", "unusable"),
    "no hit": (lambda: good(zeros(M)), Lack.FEW, "only 0 queries", "unusable"),
    "saturated": (lambda: good(saturated()), Lack.SATURATED, "risk near 1", "unusable"),
    "ties": (lambda: good(tied()), Lack.TIES, "repeats another", "unusable"),
    "unseen": (
        lambda: good(zeros(40), upper=np.full(M, np.inf)), Lack.UNSEEN, "had no hit", "unusable",
    ),
    "verdicts": (
        lambda: good(risk(exponential()), verdict=np.full(M, 2)), Lack.NOT_USABLE,
        "verdict unusable", "unusable",
    ),
    "noise": (
        lambda: query_risks(risk(exponential(scale=0.02)), stderr=risk(exponential(scale=0.02))),
        Lack.NOISE, "error in the tail", "unusable",
    ),
    "misfit": (lambda: good(bent()), Lack.MISFIT, "not the line", "doubtful"),
    "truncated": (
        lambda: good(risk(exponential()), truncated=np.ones(M)), Lack.TRUNCATED, "cut off",
        "doubtful",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LACKS)
def test_what_a_tail_lacks_is_said_and_refused(name):
    make, lack, words, verdict = LACKS[name]
    found = run(make())
    [said, _] = explain_support(found.support)
    assert found.support.lack[0] == lack and words in said.sentence
    assert said.word == verdict
    refused = verdict == "unusable"
    for figure in (found.worst.value[0], found.aggregate.upper[0], found.exceeds[0, 0]):
        assert np.isnan(figure) == refused


def test_far_forecasts_are_doubtful_and_wide_ones_refused(found):
    assert explain_support(found.support)[0].word == "ok"
    assert found.support.lack[1] == Lack.FAR and found.support.code[1] == 1
    wide = run(good(risk(exponential(scale=0.5, start=-4.5))))
    assert wide.support.lack[0] == Lack.WIDE and "orders of magnitude" in (
        explain_support(wide.support)[0].sentence
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"deployment": [10.0]}, "deployment of 10 queries is no forecast from 60"),
        ({"deployment": [np.inf]}, "deployment of inf"),
        ({"thresholds": [1.5]}, "threshold 1.5 is no risk"),
        ({"top": 61}, "hold 61 of 60"),
        ({"top": 1}, "hold 1 of 60"),
        ({"level": 1.0}, "level is 1.0"),
        ({"fit": "gumbel"}, "fit is 'gumbel'"),
        ({"groups": [1, 2]}, "give each query one"),
        ({"num_resamples": 0}, "num_resamples is 0"),
    ],
)
def test_bad_input_is_named(options, words):
    with pytest.raises(InputError, match=words):
        run(good(risk(exponential())), **options)


def test_risks_that_are_none_are_named():
    with pytest.raises(InputError, match="an estimate is -1"):
        query_risks([0.1, -1.0])
    with pytest.raises(InputError, match=r"value has shape \(2, 2\)"):
        query_risks(np.full((2, 2), 0.1))
    with pytest.raises(InputError, match=r"upper has shape \(3,\)"):
        query_risks([0.1, 0.2], upper=[0.3, 0.3, 0.3])
    with pytest.raises(InputError, match="1 queries show no tail"):
        run(query_risks([0.1]))
