"""Intervals against scipy, hand formulas and their own nominal coverage."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tailrisk_jax.estimators import (
    bootstrap_interval,
    clopper_pearson,
    importance,
    intervals,
    log_interval,
    log_t_interval,
    wald_interval,
)

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_clopper_pearson_is_scipys(level):
    pairs = [
        (k, n)
        for n in (1, 2, 3, 10, 1000, 10_000, 1_000_000)
        for k in sorted({0, 1, 2, 3, 7, 50, n // 3, n // 2, n - 5, n - 1, n})
        if 0 <= k <= n
    ]
    hits, num = np.array(pairs).T
    found = clopper_pearson(hits, num, level)
    tail = (1 - level) / 2
    lower = np.where(hits == 0, 0, stats.beta.ppf(tail, np.maximum(hits, 1), num - hits + 1))
    upper = np.where(hits == num, 1, stats.beta.ppf(1 - tail, hits + 1, np.maximum(num - hits, 1)))
    np.testing.assert_allclose(found.lower, lower, rtol=1e-5)
    np.testing.assert_allclose(found.upper, upper, rtol=1e-5)
    # Near 1, where the lower limit's distance from 1 is what counts.
    near_one = (hits > 0) & (num > 1000) & (num - hits < 6)
    np.testing.assert_allclose(1 - found.lower[near_one], 1 - lower[near_one], atol=1.2e-7)


@pytest.mark.parametrize("num", [20, 200])
def test_clopper_pearson_covers_at_every_p_by_exact_enumeration(num):
    hits = np.arange(num + 1)
    interval = clopper_pearson(hits, np.full(num + 1, num), 0.9)
    for p in np.geomspace(1e-4, 0.5, 60):
        inside = (np.asarray(interval.lower) <= p) & (p <= np.asarray(interval.upper))
        coverage = stats.binom.pmf(hits, num, p) @ inside
        assert coverage >= 0.9 - 1e-9
    assert coverage < 0.97  # so the limits aren't needlessly wide


def test_normal_intervals_by_hand(transform):
    value, stderr = jnp.array([0.2, 1e-7]), jnp.array([0.05, 4e-8])
    z = 1.6448536
    wald = transform(lambda v, s: wald_interval(v, s, 0.9))(value, stderr)
    np.testing.assert_allclose(wald.lower, value - z * stderr, rtol=1e-5)
    np.testing.assert_allclose(wald.upper, value + z * stderr, rtol=1e-5)
    log = transform(lambda v, s: log_interval(v, s, 0.9))(value, stderr)
    np.testing.assert_allclose(log.lower, value / np.exp(z * stderr / value), rtol=1e-5)
    np.testing.assert_allclose(log.upper, value * np.exp(z * stderr / value), rtol=1e-5)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_log_t_interval_by_hand_and_by_scipy(level, transform):
    ess, skewness = jnp.array([5.0, 12.0, 40.0, 500.0]), jnp.array([0.0, 0.5, -0.2, 0.1])
    value, stderr = jnp.full(4, 1e-4), jnp.full(4, 2e-5)
    found = transform(lambda *x: log_t_interval(*x, level))(value, stderr, ess, skewness)
    t = stats.t.ppf((1 + level) / 2, np.array(ess) - 1)
    below, above = np.log(1e-4 / found.lower), np.log(np.array(found.upper) / 1e-4)
    np.testing.assert_allclose(below, 0.2 * t, rtol=0.01)
    np.testing.assert_allclose(above, below * (1 + np.abs(skewness)), rtol=1e-3)
    alone = log_t_interval(1e-4, 2e-5, 1.0, 0.1)
    assert (alone.lower, alone.upper, alone.kind) == (0, np.inf, "log-t")


def test_an_unknown_standard_error_gives_the_whole_range(transform):
    value = jnp.array([0.3, 0.3, 0.0, 0.0, INF, NAN])
    stderr = jnp.array([NAN, INF, NAN, 0.1, INF, NAN])
    log = transform(log_interval)(value, stderr)
    np.testing.assert_array_equal(log.lower, [0, 0, 0, 0, 0, NAN])
    np.testing.assert_array_equal(log.upper, [INF, INF, INF, INF, INF, NAN])
    wald = transform(wald_interval)(value[:3], stderr[:3])
    np.testing.assert_array_equal(wald.lower, [-INF] * 3)
    np.testing.assert_array_equal(wald.upper, [INF] * 3)
    assert np.isnan(log_interval(-0.1, 0.1).lower)


def test_no_draws_leave_no_interval(transform):
    found = transform(clopper_pearson)(jnp.array([0]), jnp.array([0]))
    assert np.isnan(found.lower[0]) and np.isnan(found.upper[0])


def test_log_interval_covers_as_often_as_it_says():
    # Many independent samples of a four-outcome space; binomial error on the count of covers.
    p, q = np.array([0.985, 0.01, 0.004, 0.001]), np.array([0.4, 0.3, 0.2, 0.1])
    h = np.array([0.0, 1, 1, 1])
    repeats, num = 2000, 1000
    draws = np.random.default_rng(0).choice(4, size=(repeats, num), p=q)
    estimate = importance(h[draws], np.log(p / q)[draws])
    for level in (0.8, 0.95):
        found = log_interval(estimate.value, estimate.stderr, level)
        covers = np.mean((found.lower <= p @ h) & (p @ h <= found.upper))
        assert abs(covers - level) < 4 * np.sqrt(level * (1 - level) / repeats)


def bootstrap_case():
    rng = np.random.default_rng(1)
    scores = (rng.random((3, 80)) < 0.4).astype(float)
    return scores, rng.normal(size=(3, 80)) - 12


def test_bootstrap_is_scipys_percentile_interval():
    scores, log_w = (part[0] for part in bootstrap_case())
    found = bootstrap_interval(jax.random.key(0), scores, log_w, level=0.9, num_resamples=4000)
    theirs = stats.bootstrap(
        (scores * np.exp(log_w),),
        np.mean,
        confidence_level=0.9,
        n_resamples=4000,
        method="percentile",
        rng=2,
    )
    low, high = theirs.confidence_interval
    # A 5% quantile of 4000 means errs by sqrt(.05 * .95 / 4000) / phi(1.645) = 0.033 of their
    # standard deviation; the difference of two such by 0.047, and 4 sigma of that is 0.19.
    assert abs(found.lower - low) < 0.19 * theirs.standard_error
    assert abs(found.upper - high) < 0.19 * theirs.standard_error


def test_bootstrap_rows_depend_on_their_own_key_alone():
    scores, log_w = bootstrap_case()
    keys = jax.random.split(jax.random.key(7), 3)
    many = bootstrap_interval(keys, scores, log_w, num_resamples=4000)
    for row in range(3):
        one = bootstrap_interval(keys[row], scores[row], log_w[row], num_resamples=4000)
        chex.assert_trees_all_close(jax.tree.map(lambda x, row=row: x[row], many), one)
    shared = bootstrap_interval(keys[1], scores, log_w, num_resamples=4000)
    np.testing.assert_allclose(shared.lower[1], many.lower[1])
    assert shared.lower[0] != many.lower[0]
    raw = bootstrap_interval(jax.random.PRNGKey(5), scores, log_w, num_resamples=4000)
    typed = bootstrap_interval(jax.random.key(5), scores, log_w, num_resamples=4000)
    chex.assert_trees_all_equal(raw, typed)


def test_bootstrap_edges_and_two_draws_by_enumeration(transform):
    rows = jnp.array([[0, 0, 0], [1, NAN, NAN], [1, 1, 1], [NAN, NAN, NAN], [1, 0, 0], [0, 1, NAN]])
    log_w = jnp.zeros((6, 3)).at[4, 0].set(INF).at[5].set(-40)
    key = jax.random.key(3)

    def run(rows, log_w, level=0.95):
        return bootstrap_interval(key, rows, log_w, level=level, num_resamples=800)

    found = transform(run)(rows, log_w)
    np.testing.assert_array_equal(found.lower[:5], [0, 0, 0, NAN, 0])
    np.testing.assert_array_equal(found.upper[:5], [INF, INF, INF, NAN, INF])
    # Resampled means of {0, 1}: 0, 1/2, 1 with probability 1/4, 1/2, 1/4.
    np.testing.assert_allclose([found.lower[5], found.upper[5]], [0, np.exp(-40)], rtol=1e-5)
    middle = run(rows, log_w, 0.4)
    np.testing.assert_allclose([middle.lower[5], middle.upper[5]], np.exp(-40) / 2, rtol=1e-5)


def largest_array(jaxpr):
    """Elements of the largest intermediate, inner loops included."""
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    inner = [
        getattr(part, "jaxpr", part)
        for eqn in jaxpr.eqns
        for value in eqn.params.values()
        for part in (value if isinstance(value, (list, tuple)) else [value])
    ]
    return max(sizes + [largest_array(part) for part in inner if hasattr(part, "eqns")])


def test_bootstrap_never_holds_all_resamples():
    rows, num, resamples = 4, 5000, 2000
    keys, draws = jax.random.split(jax.random.key(0), rows), jnp.zeros((rows, num))
    traced = jax.make_jaxpr(partial(intervals._bootstrap, num_resamples=resamples))(
        keys, draws, draws, 0.025
    )
    assert rows * num <= largest_array(traced.jaxpr) <= 2 * intervals._RESAMPLES_AT_ONCE * num


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clopper_pearson(5, 3), "hits is 5 of num_samples 3"),
        (lambda: clopper_pearson(1, 3, 1.0), "level is 1.0"),
        (lambda: wald_interval(0.1, 0.1, 0), "level is 0"),
        (lambda: log_interval(0.1, 0.1, -1), "level is -1"),
        (
            lambda: bootstrap_interval(
                jax.random.key(0), np.zeros(2), np.zeros(2), num_resamples=0
            ),
            "num_resamples is 0",
        ),
        (
            lambda: bootstrap_interval(
                jax.random.split(jax.random.key(0), 2), np.zeros((3, 2)), np.zeros((3, 2))
            ),
            r"key has shape \(2,\); give one key, or keys of shape \(3,\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
