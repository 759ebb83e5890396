"""Variance components, against projections written out and the components of a simulation."""

import jax
import numpy as np

from tailrisk_jax.estimators import in_float64
from tailrisk_jax.forecasting import decompose, decomposition_interval
from tests.forecasting.simulated import KINDS, QUERIES, simulate

SHIFTS = (0.0, 0.4, -0.2)
PARTS = ("queries", "kinds", "variants", "error")


def by_projections(y, s, kinds, mask):
    """Henderson's method III with n x n matrices: sums of squares equal to their expectations."""
    rows = np.nonzero(mask)[0]
    y, v = y[mask], s[mask] ** 2
    of_query = (rows[:, None] == np.arange(QUERIES)).astype(float)
    of_kind = (kinds[mask][:, None] == np.arange(KINDS)).astype(float)
    residual = {
        name: np.eye(len(y)) - x @ np.linalg.pinv(x)
        for name, x in {
            "query": of_query, "kind": of_kind, "both": np.hstack([of_query, of_kind]),
        }.items()
    }  # fmt: skip
    forms = [residual["kind"] - residual["both"], residual["query"] - residual["both"],
             residual["both"]]  # fmt: skip
    sources = [of_query @ of_query.T, of_kind @ of_kind.T, np.eye(len(y))]
    left = np.array([y @ form @ y - np.trace(form * v) for form in forms])
    right = np.array([[np.trace(form @ source) for source in sources] for form in forms])
    return [*np.linalg.solve(right, left), v.mean()]


def components(y, s, kinds, mask):
    found = in_float64(decompose, y, s, mask=mask, kinds=kinds, num_kinds=KINDS)
    return np.asarray([getattr(found, part) for part in PARTS])


def test_it_is_the_method_of_moments():
    _, y, s, kinds, mask = simulate(3, shifts=SHIFTS)
    kinds = np.random.default_rng(0).permuted(kinds, axis=1)  # an unbalanced design
    np.testing.assert_allclose(
        components(y, s, kinds, mask), by_projections(y, s, kinds, mask), rtol=1e-8
    )


def test_components_are_those_of_the_simulation():
    """Unbiased, over shifts of the kinds that are drawn anew too."""
    n, shifts = 200, 0.3 * np.random.default_rng(0).normal(size=(200, KINDS))
    drawn = (simulate(seed, shifts=shifts[seed]) for seed in range(n))
    found = np.asarray([components(y, s, kinds, mask) for _, y, s, kinds, mask in drawn])[:, :3]
    z = (found.mean(axis=0) - [1.0, 0.09, 0.25]) / (found.std(axis=0, ddof=1) / np.sqrt(n))
    assert np.all(np.abs(z) < 4)


def test_limits_hold_the_components_of_many_queries():
    _, y, s, kinds, mask = simulate(0, shifts=SHIFTS)
    options = {"mask": mask, "kinds": kinds, "num_kinds": KINDS}
    lower, upper = in_float64(decomposition_interval, jax.random.key(0), y, s, **options)
    again, _ = in_float64(decomposition_interval, jax.random.key(0), y, s, **options)
    for part, wanted in zip(PARTS, (1.0, np.var(SHIFTS, ddof=1), 0.25), strict=False):
        assert getattr(lower, part) < wanted < getattr(upper, part)
        assert getattr(again, part) == getattr(lower, part)


def test_what_cannot_be_told_is_unknown():
    _, y, s, kinds, mask = simulate(1)
    one_query, one_each, one_kind = mask.copy(), mask.copy(), np.zeros_like(kinds)
    one_query[1:] = False
    one_each[:, 1:] = False
    found = components(y, s, kinds, one_query)
    assert np.isnan(found[0]) and np.isfinite(found[1:]).all()
    assert np.isnan(components(y, s, kinds, one_each)[[0, 2]]).all()
    assert components(y, s, one_kind, mask)[1] == 0
    limits = in_float64(
        decomposition_interval, jax.random.key(0), y, s, mask=one_query, kinds=kinds,
        num_kinds=KINDS,
    )  # fmt: skip
    assert np.isnan(limits[0].variants)
