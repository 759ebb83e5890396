"""Fitted weights against scipy's minimisers, closed forms and exact enumeration."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from tailrisk_jax import InputError
from tailrisk_jax.adaptation import Pilot, adapt_shared, adapt_weights, fit_weights
from tailrisk_jax.adaptation.pilot import first_columns
from tests.adaptation.enumerated import tiny

TIGHT = dict(tolerance=1e-5, max_steps=100_000)


def random_pilot(seed=0, components=4, queries=3, draws=30):
    rng = np.random.default_rng(seed)
    log_q = rng.normal(-20, 2, (components, queries, draws))
    log_m = scipy.special.logsumexp(log_q, axis=0) - np.log(components)
    scores = rng.choice([0, 0.3, 1.0, np.nan], size=(queries, draws))
    return Pilot(log_q, log_m, scores)


def test_harmful_draws_are_enough_where_the_others_are_counted():
    pilot = random_pilot()
    columns, real = first_columns(np.asarray(pilot.scores) > 0)
    rows = np.arange(3)[:, None]
    alone = Pilot(
        np.asarray(pilot.component_log_probs)[:, rows, columns],
        np.asarray(pilot.log_m)[rows, columns],
        np.where(real, np.asarray(pilot.scores)[rows, columns], np.nan),
        np.sum(~np.isnan(pilot.scores), axis=1),
    )
    for fit in (fit_weights, adapt_weights, adapt_shared):
        every, harmful = fit(pilot), fit(alone)
        np.testing.assert_array_equal(harmful.weights, every.weights)
        np.testing.assert_array_equal(harmful.log_second_moment, every.log_second_moment)


def objective_of(pilot, kind, weights, query):
    """log J, or the cross-entropy, of one query in float64 from its definition."""
    log_q, log_m = np.asarray(pilot.component_log_probs)[:, query], np.asarray(pilot.log_m)[query]
    h = np.asarray(pilot.scores)[query]
    kept = h > 0
    log_p = log_q[0, kept]
    with np.errstate(divide="ignore"):
        log_mixed = scipy.special.logsumexp(log_q[:, kept], axis=0, b=np.asarray(weights)[:, None])
    if kind == "second-moment":
        terms = 2 * np.log(h[kept]) + 2 * log_p - log_m[kept] - log_mixed
        return scipy.special.logsumexp(terms) - np.log(np.sum(~np.isnan(h)))
    r = h[kept] * np.exp(log_p - log_m[kept])
    return -np.sum(r * log_mixed) / r.sum()


def least(pilot, kind, queries, fixed):
    """scipy's minimum of the sum over queries: fixed + free * softmax(x), from several starts."""
    free, num = 1 - fixed.sum(), len(fixed)

    def value(x):
        return sum(objective_of(pilot, kind, fixed + free * scipy.special.softmax(x), q)
                   for q in queries)  # fmt: skip

    starts = [np.zeros(num), *(3 * np.eye(num))]
    return min(scipy.optimize.minimize(value, x, method="BFGS").fun for x in starts)


@pytest.mark.parametrize("kind", ["second-moment", "cross-entropy"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("floors", [(0.0, 0.0), (0.1, 0.3)])
def test_weights_are_the_minimisers_that_scipy_finds(kind, shared, floors):
    pilot = random_pilot()
    shares = dict(target_share=floors[0], uniform_share=floors[1])
    fit = fit_weights(pilot, objective=kind, shared=shared, **shares, **TIGHT)
    np.testing.assert_allclose(fit.weights.sum(axis=1), 1, rtol=1e-12)
    fixed = np.full(4, floors[1] / 4) + np.eye(4)[0] * floors[0]
    assert np.all(fit.weights >= fixed - 1e-6)
    for queries in [[0, 1, 2]] if shared else [[0], [1], [2]]:
        ours = sum(objective_of(pilot, kind, fit.weights[q], q) for q in queries)
        best = least(pilot, kind, queries, fixed)
        assert best - 1e-4 < ours < best + 1e-4
        # And the objective is not flat: the uniform weights are worse.
        assert sum(objective_of(pilot, kind, np.full(4, 0.25), q) for q in queries) > best + 1e-3
    for q in range(3):
        wanted = objective_of(pilot, "second-moment", fit.weights[q], q)
        np.testing.assert_allclose(fit.log_second_moment[q], wanted, atol=1e-5)


def test_the_duality_gap_bounds_what_is_left():
    pilot = random_pilot(seed=4, components=6)
    fine = fit_weights(pilot, uniform_share=0.0, target_share=0.0, tolerance=1e-6, max_steps=10**6)
    for steps in (0, 1, 3, 10, 30):
        rough = fit_weights(
            pilot, uniform_share=0.0, target_share=0.0, tolerance=0, max_steps=steps
        )
        excess = rough.log_second_moment - fine.log_second_moment
        assert np.all(excess > -1e-5) and excess.max() <= rough.gap + 1e-5
        assert rough.steps == steps


def test_two_disjoint_components_have_a_closed_form():
    """Harm in two cells, each reached by one component: alpha_k proportional to p(cell) / sqrt(q).

    For J = sum_k p_k^2 / (alpha_k q_k) the minimiser is alpha_k ~ p_k / sqrt(q_k); for the
    cross-entropy alpha_k ~ p_k.
    """
    p, q = np.array([3e-5, 1e-6]), np.array([0.5, 0.02])
    log_q = np.full((3, 1, 2), -np.inf)
    log_q[0, 0], log_q[1, 0, 0], log_q[2, 0, 1] = np.log(p), np.log(q[0]), np.log(q[1])
    pilot = Pilot(log_q, np.zeros((1, 2)), np.ones((1, 2)))
    none = dict(target_share=0.0, uniform_share=0.0)
    for kind, wanted in (("second-moment", p / np.sqrt(q)), ("cross-entropy", p)):
        fit = fit_weights(pilot, objective=kind, **none, **TIGHT)
        np.testing.assert_allclose(fit.weights[0, 1:], wanted / wanted.sum(), rtol=2e-3)
        assert fit.weights[0, 0] < 1e-3


def test_exact_expectations_give_the_true_minimiser():
    """Every response of a tiny model, in place of draws: no other weights have a smaller J."""
    world = tiny()
    fit = fit_weights(world.exact_pilot, target_share=0.0, uniform_share=0.0, **TIGHT)
    p = np.exp(world.log_q[0])
    q = np.exp(world.log_q)

    def second_moment(alpha, query):
        return np.sum(world.harm[query] ** 2 * p[query] ** 2 / np.tensordot(alpha, q[:, query], 1))

    rng = np.random.default_rng(0)
    for query in range(2):
        best = second_moment(fit.weights[query], query)
        np.testing.assert_allclose(np.log(best), fit.log_second_moment[query], atol=1e-5)
        bounds = dict(bounds=[(0, 1)] * len(q), method="SLSQP")
        simplex = dict(constraints={"type": "eq", "fun": lambda a: a.sum() - 1})
        other = scipy.optimize.minimize(
            second_moment, np.full(len(q), 1 / len(q)), (query,), **bounds, **simplex
        )
        assert best <= other.fun * (1 + 1e-4)
        assert other.fun < second_moment(np.full(len(q), 1 / len(q)), query) * 0.99
        for alpha in rng.dirichlet(np.full(len(q), 0.3), 200):
            assert second_moment(alpha, query) >= best * (1 - 1e-4)


def split_world(seed, draws, rare, queries=40, cells=12):
    """Harm in cells of unequal mass, each with a component that reaches it ten times better.

    Returns the pilot from the uniform mixture, and the exact log J of any weights.
    """
    rng = np.random.default_rng(seed)
    own = 1e-3 * rng.dirichlet(np.ones(cells), queries) * np.r_[1, rare * np.ones(cells - 1)]
    q = np.full((cells + 1, queries, cells), 3e-4)
    q[0] = own
    q[1:] += 0.3 * np.eye(cells)[:, None]
    m = q.mean(axis=0)
    counts = np.array([rng.multinomial(draws, [*row, 1 - row.sum()])[:-1] for row in m])
    log_q, log_m = np.zeros((cells + 1, queries, draws)), np.zeros((queries, draws))
    scores = np.zeros((queries, draws))
    for i, row in enumerate(counts):
        cell = np.repeat(np.arange(cells), row)
        log_q[:, i, : len(cell)] = np.log(q[:, i, cell])
        log_m[i, : len(cell)], scores[i, : len(cell)] = np.log(m[i, cell]), 1

    def log_moment(weights):
        return np.log([(own[i] ** 2 / (w @ q[:, i])).sum() for i, w in enumerate(weights)])

    return Pilot(log_q, log_m, scores), log_moment


@pytest.mark.parametrize("draws", [60, 2000])
def test_shrunk_weights_where_the_truth_is_known(draws):
    """With few draws the plain fit loses to the uniform, and with many it is all but kept."""
    pilot, log_moment = split_world(0, draws, 0.3)
    num = len(np.asarray(pilot.component_log_probs))
    uniform = log_moment(np.tile(0.05 * np.eye(num)[0] + 0.95 / num, (40, 1)))
    plain = log_moment(fit_weights(pilot, uniform_share=0.0).weights)
    adapted = adapt_weights(pilot)
    shrunk = log_moment(adapted.weights)
    if draws == 60:
        assert plain.mean() > uniform.mean() + 0.5 and (plain - uniform).max() > np.log(10)
        assert shrunk.mean() < uniform.mean() - 0.2
    else:
        assert plain.mean() < uniform.mean() - 0.5
        assert shrunk.mean() < plain.mean() - np.log(1 - 0.05 - 0.1) + 0.01
    assert (shrunk - uniform).max() < np.log(10)  # what uniform_share = 0.1 guarantees
    assert np.all(adapted.shares >= [0.05, 0.1, 0, 0] - np.float64(1e-6))
    # Held-out draws tell the second moment that the weights have, in the mean over queries.
    assert abs(np.mean(adapted.log_second_moment - shrunk)) < 0.15


def test_the_shared_fit_for_other_queries():
    pilot, log_moment = split_world(1, 400, 0.3)
    log_q, half = np.asarray(pilot.component_log_probs), 20
    part = Pilot(log_q[:, :half], np.asarray(pilot.log_m)[:half], np.asarray(pilot.scores)[:half])
    adapted = adapt_shared(part)
    assert np.all(adapted.weights == adapted.weights[0]) and np.all(adapted.shares[:, 3] == 0)
    everywhere = log_moment(np.tile(adapted.weights[0], (40, 1)))[half:]
    uniform = log_moment(np.tile(0.05 * np.eye(13)[0] + 0.95 / 13, (40, 1)))[half:]
    assert everywhere.mean() < uniform.mean()
    assert abs(np.mean(adapted.log_second_moment) - everywhere.mean()) < 0.5


def test_queries_without_hits_and_single_queries():
    pilot = random_pilot(queries=3)
    scores = np.array(pilot.scores)
    scores[1] = np.where(np.isnan(scores[1]), np.nan, 0.0)
    some = Pilot(pilot.component_log_probs, pilot.log_m, scores)
    fit = fit_weights(some, target_share=0.1, uniform_share=0.2)
    np.testing.assert_allclose(fit.weights[1], 0.1 * np.eye(4)[0] + 0.9 / 4, rtol=1e-5)
    assert fit.without_hits.tolist() == [1] and np.isnan(fit.log_second_moment[1])
    adapted = adapt_weights(some)
    assert adapted.without_hits.tolist() == [1] and np.all(np.isfinite(adapted.weights))
    assert np.isnan(adapted.log_second_moment).tolist() == [False, True, False]

    scores[2] = scores[1]
    one = Pilot(pilot.component_log_probs, pilot.log_m, scores)
    for fitted, last in ((adapt_weights(one), 3), (adapt_shared(one), 2)):
        np.testing.assert_allclose(fitted.shares[0, [1, last]], [1 / 3, 1 - 0.05 - 1 / 3])
    nothing = Pilot(pilot.component_log_probs, pilot.log_m, np.zeros((3, 30)))
    for fitted in (fit_weights(nothing), adapt_weights(nothing), adapt_shared(nothing)):
        assert fitted.without_hits.tolist() == [0, 1, 2] and fitted.gap == 0
        assert np.all(fitted.weights[:, 0] > 0.05)
        np.testing.assert_allclose(fitted.weights[:, 1:], fitted.weights[:, 1:].mean(), rtol=1e-5)


def test_impossible_draws_and_bad_input():
    pilot = random_pilot()
    log_q = np.array(pilot.component_log_probs)
    log_q[2] = -np.inf  # a component that reaches nothing gets no more than its floor
    log_q[0, 0, :] = -np.inf  # a query whose harm the target can't produce has no hits
    fit = fit_weights(Pilot(log_q, pilot.log_m, pilot.scores), uniform_share=0.2, **TIGHT)
    np.testing.assert_allclose(fit.weights[1:, 2], 0.05, atol=1e-6)
    assert fit.without_hits.tolist() == [0]

    log_m, scores = np.array(pilot.log_m), np.array(pilot.scores)
    table = [
        (InputError, "pilot draws has a score", pilot.component_log_probs, log_m, scores * np.nan),
        (ValueError, r"\[0, 1\]", pilot.component_log_probs, log_m, scores * 5),
        (ValueError, "NaN", np.asarray(pilot.component_log_probs) * np.nan, log_m, scores),
        (ValueError, "log_m", pilot.component_log_probs, log_m - np.inf, scores),
        (ValueError, "must be", pilot.component_log_probs, log_m[:1], scores),
    ]
    for error, words, *parts in table:
        with pytest.raises(error, match=words):
            fit_weights(Pilot(*parts))
    for bad in (dict(target_share=-0.1), dict(target_share=0.8, uniform_share=0.3)):
        with pytest.raises(InputError, match="target_share"):
            fit_weights(pilot, **bad)
        with pytest.raises(InputError, match="target_share"):
            adapt_weights(pilot, **bad)
    with pytest.raises(InputError, match="folds=1"):
        adapt_weights(pilot, folds=1)
    with pytest.raises(InputError, match="least"):
        fit_weights(pilot, objective="least")
