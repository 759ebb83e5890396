"""Certified limits: their definition, their coverage by exact sums, and their edges."""

import itertools

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import logsumexp

from tailrisk_jax.estimators import (
    asymptotic_sequence,
    betting_interval,
    betting_lower,
    betting_upper,
    clopper_pearson,
    empirical_bernstein,
    in_float64,
    log_interval,
)
from tailrisk_jax.estimators.certificates import _STAKES, _UPPER_STAKES

RNG = np.random.default_rng(0)


def draws(num, hit_rate=0.3, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    scores = (rng.random(num) < hit_rate).astype(float)
    return scores, rng.normal(size=num) * spread - spread**2 / 2


def log_fortune(gains, stakes):
    """log of the mean over stakes of prod_i (1 - f + f gain_i)."""
    logs = np.log1p(stakes[:, None] * (gains - 1)).sum(axis=1)
    return logsumexp(logs) - np.log(len(stakes))


@pytest.mark.parametrize("num", [20, 400])
@pytest.mark.parametrize("level", [0.9, 0.999])
def test_lower_limit_solves_its_equation(num, level):
    scores, log_w = draws(num)
    x = scores * np.exp(log_w)
    wanted = brentq(
        lambda m: log_fortune(x / np.exp(m), _STAKES) + np.log(1 - level),
        np.log(x.mean()) - 30,
        np.log(x.mean()),
    )
    found = in_float64(betting_lower, scores, log_w, level=level)
    np.testing.assert_allclose(found, np.exp(wanted), rtol=1e-8)
    np.testing.assert_allclose(betting_lower(scores, log_w, level=level), found, rtol=1e-3)


@pytest.mark.parametrize("num", [20, 400])
def test_upper_limit_solves_its_equation(num):
    scores, log_w = draws(num)
    bound = 20.0
    x = scores * np.exp(log_w)
    wanted = brentq(
        lambda m: log_fortune((bound - x) / (bound - m), _UPPER_STAKES) + np.log(0.05),
        x.mean(),
        bound - 1e-9,
    )
    found = in_float64(betting_upper, scores, log_w, np.log(bound))
    np.testing.assert_allclose(found, min(wanted, 1), rtol=1e-8)


def test_upper_limit_of_no_harm_is_its_floor_and_tiny_limits_survive_float32():
    num, bound = 1_000_000, 2.0
    scores = np.zeros(num, np.float32)
    found = float(betting_upper(scores, scores, np.log(bound)))
    floor = bound * np.log(20) / num
    assert floor < found < 1.6 * floor


def test_blocks_are_bets_on_means_and_remain_below():
    scores, log_w = draws(4000, hit_rate=0.05)
    by_block = in_float64(betting_lower, scores, log_w, block=4)
    x = (scores * np.exp(log_w)).reshape(-1, 4).mean(axis=1)
    again = in_float64(betting_lower, np.ones(1000), np.log(np.maximum(x, 1e-300)), block=1)
    np.testing.assert_allclose(by_block, again, rtol=1e-6)
    single = in_float64(betting_lower, scores, log_w, block=1)
    assert 0.85 < by_block / single < 1.1
    default = in_float64(betting_lower, scores, log_w)
    np.testing.assert_allclose(default, by_block, rtol=1e-12)


LOW, HIGH = 0.05, 0.5


@pytest.mark.parametrize(("rate", "weight"), [(0.3, 0.2), (0.02, 3.0), (0.5, 1.0)])
def test_certificates_cover_by_exact_sums_and_asymptotic_intervals_need_not(rate, weight):
    """n draws of w h = weight with probability rate: every limit is a function of the hits."""
    num, truth = 60, rate * weight
    hits = np.arange(num + 1)
    scores = (np.arange(num) < hits[:, None]).astype(float)
    log_w = np.full_like(scores, np.log(weight))
    from scipy.stats import binom

    prob = binom.pmf(hits, num, rate)
    lower = in_float64(betting_lower, scores, log_w, level=0.9)
    assert prob @ (lower <= truth) >= 0.9
    for interval in (
        in_float64(betting_interval, scores, log_w, np.log(4.0), level=0.9),
        in_float64(empirical_bernstein, scores, log_w, np.log(4.0), level=0.9),
    ):
        assert interval.certified
        assert prob @ ((interval.lower <= truth) & (truth <= interval.upper)) >= 0.9


def test_lower_limit_holds_at_all_times_by_exact_sums():
    """P(the limit ever exceeds the mean) over all sequences of 13 coin flips."""
    num, rate = 13, 0.3
    flips = np.array(list(itertools.product([0.0, 1.0], repeat=num)))
    prob = np.prod(np.where(flips == 1, rate, 1 - rate), axis=1)
    exceeded = np.zeros(len(flips), bool)
    for n in range(1, num + 1):
        first = np.broadcast_to(np.arange(num) < n, flips.shape)
        limit = in_float64(betting_lower, flips, np.zeros_like(flips), level=0.6, mask=first)
        exceeded |= limit > rate
    assert 0 < prob @ exceeded <= 0.4


def test_betting_is_tighter_than_bernstein_and_looser_than_clopper_pearson():
    scores, _ = draws(2000, hit_rate=0.02)
    zeros = np.zeros(2000)
    betting = in_float64(betting_interval, scores, zeros, 0.0)
    bernstein = in_float64(empirical_bernstein, scores, zeros, 0.0)
    exact = clopper_pearson(int(scores.sum()), 2000)
    assert bernstein.upper > betting.upper > exact.upper
    assert bernstein.lower < betting.lower < exact.lower


def test_bernstein_is_its_formula():
    scores, log_w = draws(500)
    x = scores * np.exp(log_w)
    found = in_float64(empirical_bernstein, scores, log_w, np.log(30.0), level=0.9)
    c = np.log(40)
    half = x.std(ddof=1) * np.sqrt(2 * c / 500) + 7 * 30 * c / (3 * 499)
    np.testing.assert_allclose(found.lower, max(x.mean() - half, 0), rtol=1e-10)
    np.testing.assert_allclose(found.upper, min(x.mean() + half, 1), rtol=1e-10)


def test_asymptotic_sequence_holds_at_all_times():
    """The rate at which it ever excludes the mean, from n = 100 on; 4 standard errors of slack."""
    repeats, num = 400, 2000
    x = np.random.default_rng(1).exponential(size=(repeats, num))
    ever_sequence, ever_wald = np.zeros(repeats, bool), np.zeros(repeats, bool)
    for n in range(100, num + 1, 20):
        mean, stderr = x[:, :n].mean(axis=1), x[:, :n].std(axis=1, ddof=1) / np.sqrt(n)
        found = asymptotic_sequence(mean, stderr, np.full(repeats, n), 0.9)
        ever_sequence |= np.asarray((found.lower > 1) | (found.upper < 1))
        ever_wald |= np.abs(mean - 1) > 1.645 * stderr
    assert ever_sequence.mean() < 0.1 + 4 * np.sqrt(0.09 / repeats)
    assert ever_wald.mean() > 0.3


def test_asymptotic_sequence_is_about_half_as_wide_again_as_wald_where_it_is_tuned():
    found = asymptotic_sequence(1.0, 0.1, 500, 0.95, tuned_for=500)
    assert 1.4 < (found.upper - 1) / 0.196 < 1.6


@pytest.mark.parametrize(
    ("scores", "log_w", "lower", "upper"),
    [
        ([0.0, 0.0], [0.0, 90.0], 0.0, None),
        ([np.nan, np.nan], [0.0, 0.0], np.nan, np.nan),
        ([1.0], [0.0], None, 1.0),
        ([0.0, 1.0], [np.inf, -np.inf], 0.0, None),
    ],
)
def test_edges(scores, log_w, lower, upper, transform):
    scores, log_w = np.asarray(scores, np.float32), np.asarray(log_w, np.float32)
    found = transform(betting_lower)(scores, log_w)
    assert found <= 1 or np.isnan(found)
    if lower is not None:
        np.testing.assert_array_equal(found, np.float32(lower))
    log_bound = np.float32(0.0)
    top = transform(lambda s, w: betting_upper(s, w, log_bound))(scores, log_w)
    if upper is not None:
        np.testing.assert_array_equal(top, np.float32(upper))
    else:
        assert 0 < top <= 1


def test_overflowing_weights_and_unscored_draws():
    scores, log_w = draws(300)
    plain = in_float64(betting_lower, scores, log_w)
    np.testing.assert_allclose(betting_lower(scores, log_w + 80) / np.exp(80), plain, rtol=1e-3)
    scores = np.concatenate([scores, np.full(40, np.nan)])
    log_w = np.concatenate([log_w, np.zeros(40)])
    np.testing.assert_allclose(in_float64(betting_lower, scores, log_w), plain, rtol=1e-12)
    mask = np.arange(340) < 300
    unmasked = np.where(np.isnan(scores), 1.0, scores)
    found = in_float64(betting_lower, unmasked, log_w, mask=mask)
    np.testing.assert_allclose(found, plain, rtol=1e-12)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"log\(w h\) is 1 at \(1,\), above log_bound 0"):
        betting_upper(np.array([1.0, 1.0]), np.array([0.0, 1.0]), 0.0)
    with pytest.raises(ValueError, match="block is 0"):
        betting_lower(np.ones(3), np.zeros(3), block=0)
    with pytest.raises(ValueError, match="level is 1"):
        betting_lower(np.ones(3), np.zeros(3), level=1)


def test_every_interval_says_what_it_is():
    assert log_interval(0.1, 0.01).kind == "log-delta" and not log_interval(0.1, 0.01).certified
    assert clopper_pearson(1, 10).certified
    assert asymptotic_sequence(0.1, 0.01, 10).kind == "asymptotic-sequence"
