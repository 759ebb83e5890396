"""The search against brute force in numpy and exact expectations on a tiny model."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.special

from tailrisk_jax import InputError
from tailrisk_jax.adaptation import (
    STRENGTHS,
    Grid,
    default_grid,
    grid_log_mixture,
    pilot_queries,
    pilot_tokens,
    search,
)
from tailrisk_jax.policies import mixture, switch
from tailrisk_jax.rollouts import log_prob
from tests.adaptation.enumerated import LENGTH, tiny

GRID = Grid((0, 1, 2, 3), (0.25, 0.6, 1.0))


def log_density(target, unsafe, bias, step):
    """log q(y) of one setting for one response, by a loop over its tokens, in float64."""
    total = 0.0
    for t, (p, u) in enumerate(zip(target, unsafe, strict=True)):
        total += np.log(bias * np.exp(u) + (1 - bias) * np.exp(p)) if t < step else p
    return total


def random_draws(queries=3, samples=12, length=3, policies=2, seed=0):
    rng = np.random.default_rng(seed)
    target = np.log(rng.uniform(0.01, 0.9, (queries, samples, length)))
    unsafe = np.log(rng.uniform(0.01, 0.9, (policies, queries, samples, length)))
    scores = rng.choice([0, 0.4, 1.0, np.nan], size=(queries, samples))
    return target, unsafe, scores


def brute_force(target, unsafe, log_m, scores, grid, kind):
    """The surface [Q, S, B, W] from the definitions, one response and setting at a time."""
    out = np.full((len(scores), len(unsafe), len(grid.biases), len(grid.switches)), np.nan)
    for q, s, b, w in np.ndindex(out.shape):
        kept = [n for n in range(scores.shape[1]) if scores[q, n] > 0]
        if not kept:
            continue
        log_p = np.array([target[q, n].sum() for n in kept])
        h = scores[q, kept]
        setting = grid.biases[b], grid.switches[w]
        log_q = np.array([log_density(target[q, n], unsafe[s, q, n], *setting) for n in kept])
        if kind == "cross-entropy":
            weights = h * np.exp(log_p - log_m[q, kept])
            out[q, s, b, w] = -np.sum(weights * log_q) / weights.sum()
        else:
            terms = h**2 * np.exp(2 * log_p - log_m[q, kept] - log_q)
            out[q, s, b, w] = np.log(terms.sum() / np.sum(~np.isnan(scores[q])))
    return out


@pytest.mark.parametrize("kind", ["cross-entropy", "second-moment"])
def test_the_surface_is_brute_force(kind):
    target, unsafe, scores = random_draws()
    scores[1] = np.where(np.isnan(scores[1]), np.nan, 0)  # no harmful draw of this query
    log_m = np.asarray(grid_log_mixture(target, unsafe, GRID), np.float64)
    wanted_m = [
        [log_density(target[q, n], unsafe[s, q, n], b, w)
         for s in range(2) for b in GRID.biases for w in GRID.switches]
        for q, n in np.ndindex(scores.shape)
    ]  # fmt: skip
    np.testing.assert_allclose(
        log_m.ravel(), scipy.special.logsumexp(wanted_m, axis=1) - np.log(24), atol=1e-5
    )
    found = search(target, unsafe, log_m, scores, GRID, objective=kind, prior_hits=0)
    wanted = brute_force(target, unsafe, log_m, scores, GRID, kind)
    np.testing.assert_allclose(found.surface, wanted, rtol=0, atol=2e-5)
    assert found.without_hits.tolist() == [1] and found.per_query[1] is None
    np.testing.assert_array_equal(found.hits, (scores > 0).sum(axis=1))
    for query in (0, 2):
        own = found.per_query[query]
        assert own.objective == found.surface[query].min()
        place = own.policy, GRID.biases.index(own.bias), GRID.switches.index(own.switch)
        assert np.argmin(wanted[query]) == np.ravel_multi_index(place, wanted.shape[1:])
    mean = wanted[[0, 2]].mean(axis=0)
    np.testing.assert_allclose(found.shared.objective, mean.min(), atol=2e-5)


def test_exact_expectations_choose_the_least_divergence():
    """All responses of a tiny model: KL(p h / P || q) of the engine's own switches is least there,
    and the objective is that divergence less a constant."""
    world = tiny()
    log_m = np.full(world.harm.shape, -np.log(world.harm.shape[1]))
    found = search(world.scored[0], world.scored[1:], log_m, world.harm, GRID, prior_hits=0)
    tilted = np.exp(world.log_q[0]) * world.harm
    tilted /= tilted.sum(axis=1, keepdims=True)
    divergence = np.empty(found.surface.shape)
    for s, b, w in np.ndindex(divergence.shape[1:]):
        policy = switch(world.unsafe[s], world.target, GRID.switches[w], GRID.biases[b])
        log_q = np.asarray(log_prob(policy, world.draws), np.float64)
        divergence[:, s, b, w] = np.sum(scipy.special.rel_entr(tilted, np.exp(log_q)), axis=1)
    entropy = -np.sum(scipy.special.xlogy(tilted, tilted), axis=1)
    np.testing.assert_allclose(found.surface - entropy[:, None, None, None], divergence, atol=1e-4)
    assert np.ptp(divergence.reshape(2, -1), axis=1).min() > 0.1
    for query, own in enumerate(found.per_query):
        best = divergence[query].min()
        place = own.policy, GRID.biases.index(own.bias), GRID.switches.index(own.switch)
        assert divergence[query][place] < best + 1e-4


def test_few_harmful_draws_lean_on_the_other_queries():
    target, unsafe, scores = random_draws(queries=8)
    scores[1] = 0.0
    log_m = np.zeros(scores.shape)
    hits = (scores > 0).sum(axis=1)
    for prior in (0.5, 4.0):
        found = search(target, unsafe, log_m, scores, GRID, prior_hits=prior)
        mean = found.surface[hits > 0].mean(axis=0)
        for query in np.flatnonzero(hits):
            share = hits[query] / (hits[query] + prior)
            blended = share * found.surface[query] + (1 - share) * mean
            place = np.unravel_index(np.argmin(blended), blended.shape)
            own = found.per_query[query]
            got = own.policy, GRID.biases.index(own.bias), GRID.switches.index(own.switch)
            assert got == place and own.objective == found.surface[query][place]
        assert found.per_query[1] is None
    leaning = search(target, unsafe, log_m, scores, GRID, prior_hits=1e9)
    shared = dataclasses.replace(leaning.shared, objective=0.0)
    own = [one for one in leaning.per_query if one is not None]
    assert all(dataclasses.replace(one, objective=0.0) == shared for one in own)
    alone = search(target, unsafe, log_m, scores, GRID, prior_hits=0.0)
    assert alone.per_query != leaning.per_query
    with pytest.raises(ValueError, match="prior_hits=-1"):
        search(target, unsafe, log_m, scores, GRID, prior_hits=-1)


def test_the_mixture_over_a_grid_is_the_engines():
    world, grid = tiny(), Grid((1, 3), (0.5, 1.0))
    parts = [switch(u, world.target, w, b)
             for u in world.unsafe for b in grid.biases for w in grid.switches]  # fmt: skip
    engine = log_prob(mixture(parts, [1 / 8] * 8), world.draws)
    ours = grid_log_mixture(world.scored[0], world.scored[1:], grid)
    np.testing.assert_allclose(ours, engine, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.exp(ours).sum(axis=1), 1, atol=1e-5)
    assert LENGTH == 3  # so that a switch at 3 never hands back


def test_settings_that_make_harm_impossible_are_never_chosen():
    target, unsafe, scores = random_draws(policies=1)
    unsafe[0, :, :, 0] = -np.inf
    found = search(target, unsafe, np.zeros(scores.shape), scores, Grid((0, 2), (0.5, 1.0)))
    assert (
        np.isposinf(found.surface[:, :, 1, 1]).all() and np.isfinite(found.surface[:, :, 0]).all()
    )
    with pytest.raises(InputError, match="biases below 1"):
        search(target, unsafe, np.zeros(scores.shape), scores, Grid((2,), (1.0,)))


def test_default_grids_pilot_queries_and_cost():
    reference = default_grid(150)
    assert reference.switches == (*range(0, 150, 5), 150) and len(reference.biases) == 25
    assert default_grid(24).switches == tuple(range(25)) and default_grid(1).switches == (0, 1)
    assert reference.biases[0] == 0.04 and reference.biases[-1] == 1
    assert STRENGTHS == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

    picked = [pilot_queries(jax.random.key(seed), 50, 0.1) for seed in (0, 0, 1)]
    assert len(set(picked[0].tolist())) == 5 and np.all(np.diff(picked[0]) > 0)
    np.testing.assert_array_equal(picked[0], picked[1])
    assert (
        picked[0].tolist() != picked[2].tolist() and len(pilot_queries(jax.random.key(0), 3)) == 1
    )
    # Two prompts of 10 and 20, four responses of 5: 4 policies drawing in pairs, 6 scoring.
    spent = pilot_tokens([10, 20], np.full((2, 2), 5), drawing=4, scoring=6, experts=2)
    assert spent == 30 * 10 + 20 * 8


def test_bad_input():
    target, unsafe, scores = random_draws()
    log_m = np.zeros(scores.shape)
    for error, words, *inputs in (
        (InputError, "has a score", target, unsafe, log_m, scores * np.nan, GRID),
        (InputError, "is harmful", target, unsafe, log_m, scores * 0, GRID),
        (ValueError, "must be", target[..., :2], unsafe, log_m, scores, GRID),
        (ValueError, "log_m", target, unsafe, log_m - np.inf, scores, GRID),
        (ValueError, "beyond T = 3", target, unsafe, log_m, scores, Grid((4,), (1.0,))),
    ):
        with pytest.raises(error, match=words):
            search(*inputs)
    for switches, biases in (
        ((), (1.0,)),
        ((1,), ()),
        ((-1,), (1.0,)),
        ((1,), (1.5,)),
        ((1,), (-0.5,)),
    ):
        with pytest.raises(InputError, match="grid"):
            Grid(switches, biases)
    for share, count in ((0, 5), (1.5, 5), (0.5, 0)):
        with pytest.raises(InputError, match="share"):
            pilot_queries(jax.random.key(0), count, share)
