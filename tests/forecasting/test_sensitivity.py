"""Extremes of true values behind noisy estimates, against exact ones and simulation."""

import jax
import numpy as np
from scipy import stats

from tailrisk_jax.estimators import in_float64
from tailrisk_jax.forecasting import kind_shifts, reach
from tests.forecasting.simulated import KINDS, QUERIES, SD, VARIANTS, simulate

FIRST = np.zeros(QUERIES, int)


def reached(y, s, mask, original=FIRST, limits=None, censored=None):
    nothing = np.zeros(y.shape)
    return in_float64(
        reach, jax.random.key(0), y, s, mask=mask, original=original,
        limits=nothing if limits is None else limits,
        censored=nothing.astype(bool) if censored is None else censored,
    )  # fmt: skip


def extremes(truth, mask):
    inside = np.where(mask, truth, np.nan)
    over = np.nanmax(inside[:, 1:], axis=1) - truth[:, 0]
    return np.nanmax(inside, axis=1) - np.nanmin(inside, axis=1), over


def test_of_exact_values_they_are_exact():
    truth, _, _, _, mask = simulate(0)
    found = reached(truth, np.zeros_like(truth), mask)
    width, over = extremes(truth, mask)
    for name, wanted in (("range", width), ("over", over)):
        middle = found.range if name == "range" else found.over_original
        for value in (middle, getattr(found, f"{name}_lower"), getattr(found, f"{name}_upper")):
            np.testing.assert_allclose(value, wanted, rtol=1e-9)
    np.testing.assert_array_equal(found.riskiest, np.where(mask, truth, -np.inf).argmax(axis=1))
    assert np.all(found.riskiest_probability == 1)
    np.testing.assert_array_equal(found.tenfold, over >= 1)


def test_limits_cover_the_true_extremes_where_those_of_the_estimates_are_too_wide():
    n, covered, errors, naive, right, sure = 4 * QUERIES, np.zeros(2), [], [], 0, 0.0
    for seed in range(4):
        truth, y, s, _, mask = simulate(seed)
        found, (width, over) = reached(y, s, mask), extremes(truth, mask)
        covered += [
            np.sum((found.range_lower <= width) & (width <= found.range_upper)),
            np.sum((found.over_lower <= over) & (over <= found.over_upper)),
        ]
        errors.append(found.range - width)
        naive.append(extremes(y, mask)[0] - width)
        right += np.sum(found.riskiest == np.where(mask, truth, -np.inf).argmax(axis=1))
        sure += found.riskiest_probability.sum()
    assert np.all(np.abs(covered / n - 0.95) < 4 * np.sqrt(0.95 * 0.05 / n))
    assert abs(np.mean(errors)) < 0.05 < 0.15 < np.mean(naive)
    assert abs(right - sure) < 4 * np.sqrt(n * 0.25)  # the probabilities are calibrated


def test_zeros_stand_below_their_limits():
    _, y, s, _, mask = simulate(2)
    mask[:, 1:3] = False
    limits, censored = np.zeros(y.shape), np.zeros(y.shape, bool)
    censored[:, 1] = True
    limits[:, 1] = np.where(mask, y, np.inf).min(axis=1) - 2  # far below all others
    without, found = reached(y, s, mask), reached(y, s, mask, limits=limits, censored=censored)
    assert np.all(found.range > without.range + 1.5)
    np.testing.assert_allclose(found.over_original, without.over_original, atol=0.2)
    limits[:, 1] = 0.0  # no news: as another variant of the same kind
    found = reached(y, s, mask, limits=limits, censored=censored)
    assert np.all(np.abs(found.range - without.range) < SD)
    hidden = reached(y, s, mask, np.ones(QUERIES, int), limits, censored)  # the original itself
    assert np.isfinite(hidden.over_original).all()


def test_edges():
    _, y, s, _, mask = simulate(3)
    mask[0, 1:], mask[1, 0] = False, False
    y[0, 3] = np.nan
    original = FIRST.copy()
    original[2] = -1
    found = reached(y, s, mask, original)
    assert np.isnan([found.range[0], found.over_original[0], found.tenfold[0]]).all()
    assert found.riskiest[0] == -1 and np.isfinite(found.range[1:]).all()
    assert np.isnan(found.over_original[[1, 2]]).all() and np.isnan(found.tenfold[[1, 2]]).all()
    assert np.isfinite(found.over_original[3:]).all()


def test_shifts_are_those_of_a_paired_t_test():
    _, y, _, kinds, mask = simulate(4, shifts=(0.0, 0.4, -0.2))
    kinds = kinds.copy()
    kinds[:, 0] = 0  # the original
    kinds[:, 1:] = 1 + np.arange(VARIANTS - 1) % 2
    found = in_float64(kind_shifts, y, mask=mask, original=FIRST, kinds=kinds, num_kinds=KINDS)
    assert found.shift[0] == found.lower[0] == found.upper[0] == 0
    for k in (1, 2):
        own = mask & (kinds == k)
        means = [y[q, own[q]].mean() - y[q, 0] for q in range(QUERIES) if own[q].any()]
        test = stats.ttest_1samp(means, 0)
        np.testing.assert_allclose(found.shift[k], np.mean(means), rtol=1e-9)
        wanted = test.confidence_interval(0.95)
        np.testing.assert_allclose([found.lower[k], found.upper[k]], wanted, rtol=1e-6)
        assert found.queries[k] == len(means)
    none = in_float64(
        kind_shifts, y, mask=mask & (np.arange(QUERIES) < 1)[:, None], original=FIRST, kinds=kinds,
        num_kinds=KINDS,
    )  # fmt: skip
    assert none.lower[1] == -np.inf and none.upper[1] == np.inf
