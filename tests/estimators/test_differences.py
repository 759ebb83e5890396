"""Differences and ratios: published intervals, moments by other means, and coverage."""

import numpy as np
import pytest
from scipy import stats

from tailrisk_jax.estimators import (
    Interval,
    Spread,
    difference_interval,
    importance,
    in_float64,
    log_ratio_interval,
    mean_interval,
    paired_log_ratio,
    paired_spread,
    spread_interval,
    spread_of,
)

NAN, INF = np.nan, np.inf
RUNS, DRAWS = 1500, 250


@pytest.mark.parametrize(
    "hits_a, num_a, hits_b, num_b, lower, upper",
    [  # Newcombe 1998, Statistics in Medicine 17, table II, method 10
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (6, 7, 2, 7, 0.0582, 0.8062),
        (5, 56, 0, 29, -0.0381, 0.1926),
        (0, 10, 0, 10, -0.2775, 0.2775),
    ],
)
def test_margins_combine_as_published(hits_a, num_a, hits_b, num_b, lower, upper):
    sides = []
    for hits, num in ((hits_a, num_a), (hits_b, num_b)):
        wilson = stats.binomtest(hits, num).proportion_ci(method="wilson")
        sides += [hits / num, Interval(lower=wilson.low, upper=wilson.high)]
    found = in_float64(difference_interval, *sides)
    np.testing.assert_allclose([found.lower, found.upper], [lower, upper], atol=6e-5)
    positive = hits_b > 0
    ratio = in_float64(log_ratio_interval, *sides)
    value = np.log(sides[0] / sides[2]) if positive else INF
    assert ratio.lower < value and (ratio.upper > value or not positive)


def test_margins_of_a_mean_are_those_of_a_difference():
    """The mean of a and -b is half of a - b; of one estimate, its own interval."""
    a, b = Interval(lower=0.1, upper=0.5), Interval(lower=0.05, upper=0.2)
    whole = in_float64(rank_one_mean, [0.3, -0.1], [0.1, -0.2], [0.5, -0.05])
    half = in_float64(difference_interval, 0.3, a, 0.1, b)
    np.testing.assert_allclose([whole.lower, whole.upper], [half.lower / 2, half.upper / 2])
    alone = in_float64(rank_one_mean, [0.3], [0.1], [np.inf])
    np.testing.assert_allclose([alone.lower, alone.upper], [0.1, np.inf])


def rank_one_mean(value, lower, upper):
    return mean_interval(np.array(value), Interval(lower=np.array(lower), upper=np.array(upper)))


def test_a_ratio_to_nothing_is_bounded_by_the_limits():
    exact = Interval(lower=0.0, upper=0.01), Interval(lower=0.1, upper=0.4)
    found = in_float64(log_ratio_interval, 0.0, exact[0], 0.2, exact[1])
    assert found.lower == -INF and np.isclose(found.upper, np.log(0.01 / 0.1))
    unknown = in_float64(log_ratio_interval, NAN, exact[0], 0.2, exact[1])
    assert np.isnan(unknown.lower) and np.isnan(unknown.upper)


def weighted_draws(rng, shape, hit=0.15, spread=1.0):
    """Scores, log-weights, and the true mean of w h."""
    log_w = rng.normal(-3, spread, shape)
    return (rng.random(shape) < hit).astype(float), log_w, hit * np.exp(-3 + spread**2 / 2)


def stderr(spread):
    return in_float64(lambda spread: spread.stderr, spread)


def test_a_spread_is_that_of_the_draws():
    rng = np.random.default_rng(0)
    a, log_w, _ = weighted_draws(rng, (3, 40))
    b, other, _ = weighted_draws(rng, (3, 40), hit=0.5)
    a[:, :2] = 1
    one, plain = in_float64(spread_of, a, log_w), in_float64(importance, a, log_w)
    for mine, theirs in ((one.value, plain.value), (stderr(one), plain.stderr)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)
    np.testing.assert_allclose(in_float64(lambda x: x.ess, one), plain.ess_harm, rtol=1e-12)
    both = in_float64(paired_spread, a, log_w, b, other)
    terms = np.exp(log_w) * a - np.exp(other) * b
    np.testing.assert_allclose(both.value, terms.mean(1), rtol=1e-12)
    np.testing.assert_allclose(stderr(both), stats.sem(terms, axis=1), rtol=1e-12)
    biased = (39 / 40) ** 1.5  # the third moment over the standard deviation with n, not n - 1
    skewness = stats.skew(terms, axis=1) / np.sqrt(40) * biased
    np.testing.assert_allclose(in_float64(lambda x: x.skewness, both), skewness, rtol=1e-12)
    pooled = in_float64(Spread.mean, both)
    np.testing.assert_allclose(stderr(pooled), np.linalg.norm(stderr(both)) / 3, rtol=1e-12)


def test_draws_that_one_side_could_not_score_count_as_a_jackknife_counts_them():
    rng = np.random.default_rng(1)
    a, log_w, _ = weighted_draws(rng, (200,), hit=0.4)
    b = np.where(rng.random(200) < 0.8, a, 1 - a)
    a[:20], b[10:40] = NAN, NAN

    def difference(kept):
        sides = (np.nanmean(np.exp(log_w[kept]) * side[kept]) for side in (a, b))
        return next(sides) - next(sides)

    every = np.arange(200)
    left_out = np.array([difference(every != i) for i in every])
    jackknife = np.sqrt(199 / 200 * np.sum((left_out - left_out.mean()) ** 2))
    found = in_float64(paired_spread, a, log_w, b, log_w)
    np.testing.assert_allclose(found.value, difference(every == every), rtol=1e-12)
    np.testing.assert_allclose(stderr(found), jackknife, rtol=0.02)


def test_what_shows_no_spread_is_unknown():
    ones, log_w = np.ones((1, 5)), np.log([[0.1, 0.2, 0.3, 0.2, 0.1]])
    one_differs = np.array([[1, 1, 0, 1, 1.0]])
    nothing, equal = np.full((1, 5), NAN), np.full((1, 5), np.log(0.3))
    unknown = in_float64(spread_interval, in_float64(spread_of, ones, equal))
    assert unknown.lower == -INF and unknown.upper == INF
    for a, b in ((ones, ones), (ones, one_differs), (0 * ones, 0 * ones)):
        found = in_float64(spread_interval, in_float64(paired_spread, a, log_w, b, log_w))
        assert found.lower == -INF and found.upper == INF
        ratio = in_float64(paired_log_ratio, a, log_w, b, log_w)
        assert ratio.lower == -INF and ratio.upper == INF
    assert np.isnan(in_float64(paired_spread, ones, log_w, nothing, log_w).value)


def covered(interval, truth):
    return np.mean((interval.lower <= truth) & (truth <= interval.upper))


def width(interval):
    return np.median(interval.upper - interval.lower)


def test_coverage_with_known_truth():
    """At 0.95: another judge and another target on the same draws, and independent draws."""
    rng = np.random.default_rng(2)
    a, log_w, mean_a = weighted_draws(rng, (RUNS, DRAWS))
    stricter = a * (rng.random(a.shape) < 0.7)
    change = rng.normal(-0.2, 0.4, a.shape)
    cases = {
        "judge": (stricter, log_w, 0.7),
        "target": (a, log_w + change, np.exp(-0.2 + 0.08)),
    }
    own = in_float64(importance, a, log_w)
    for name, (scores, log_weights, share) in cases.items():
        spread = in_float64(paired_spread, a, log_w, scores, log_weights)
        found = in_float64(spread_interval, spread)
        assert 0.925 < covered(found, mean_a * (1 - share)) < 0.99, name
        ratio = in_float64(paired_log_ratio, a, log_w, scores, log_weights)
        assert 0.925 < covered(ratio, -np.log(share)) < 0.995, name
        other = in_float64(importance, scores, log_weights)
        as_if = in_float64(difference_interval, own.value, own, other.value, other)
        assert width(found) < 0.55 * width(as_if), name  # what pairing is for
    b, other_w, mean_b = weighted_draws(rng, (RUNS, DRAWS), hit=0.08, spread=0.8)
    other = in_float64(importance, b, other_w)
    found = in_float64(difference_interval, own.value, own, other.value, other)
    assert 0.94 < covered(found, mean_a - mean_b) < 0.99
    ratio = in_float64(log_ratio_interval, own.value, own, other.value, other)
    assert 0.94 < covered(ratio, np.log(mean_a / mean_b)) < 0.995
    apart = in_float64(
        Spread.minus, *(in_float64(spread_of, *x) for x in ((a, log_w), (b, other_w)))
    )
    groups = Spread(**{name: x.reshape(-1, 5) for name, x in vars(apart).items()})
    total = in_float64(spread_interval, in_float64(Spread.mean, groups))
    assert 0.90 < covered(total, mean_a - mean_b) < 0.995
