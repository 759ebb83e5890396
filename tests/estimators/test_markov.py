"""Rare events of a Markov chain, whose probability and variance are exact."""

import itertools

import numpy as np
import pytest

from tailrisk_jax.estimators import (
    component_mean_weights,
    importance,
    mixture_log_prob,
    target_share,
)
from tailrisk_jax.estimators.weights import COVERAGE_RATIO
from tailrisk_jax.organisms.markov import MarkovPolicy, ladder, second_moment

HEIGHT, STEPS = 8, 10
UPS = (0.05, 0.08, 0.12, 0.2, 0.4)
NUM = 4000


def weighted(target, proposal, rng):
    paths = proposal.sample(rng, NUM)
    return target.event(paths), target.log_prob(paths) - proposal.log_prob(paths)


def test_the_oracle_agrees_with_plain_sampling():
    chain = ladder(0.4, 3, 6)
    hits = chain.event(chain.sample(np.random.default_rng(0), 20000)).mean()
    truth = chain.event_prob()
    assert abs(hits - truth) < 4 * np.sqrt(truth * (1 - truth) / 20000)
    np.testing.assert_allclose(second_moment(chain, chain), truth)
    np.testing.assert_allclose(ladder(0.4, 3, 3).event_prob(), 0.4**3)


@pytest.mark.parametrize("seed", [0, 1])
def test_tilted_chain_estimates_a_tail_within_its_exact_error(seed):
    rng = np.random.default_rng(seed)
    proposal = ladder(0.7, HEIGHT, STEPS)
    targets = [ladder(up, HEIGHT, STEPS) for up in UPS]
    scores, log_w = map(
        np.stack, zip(*(weighted(target, proposal, rng) for target in targets), strict=True)
    )
    truth = np.array([target.event_prob() for target in targets])
    assert truth[0] < 1e-9 and truth[1] < 1e-8 and truth[-1] > 1e-3
    moment = np.array([second_moment(target, proposal) for target in targets])
    exact_stderr = np.sqrt((moment - truth**2) / NUM)
    found = importance(scores, log_w)
    z = (np.asarray(found.value, float) - truth) / exact_stderr
    assert np.abs(z).max() < 4
    np.testing.assert_allclose(found.stderr, exact_stderr, rtol=0.25)
    assert (exact_stderr / truth < 0.1).all()  # sharp enough for z to mean something


def test_chain_given_the_event_has_no_variance():
    target = ladder(0.08, HEIGHT, STEPS)
    scores, log_w = weighted(target, target.conditioned(), np.random.default_rng(2))
    found = importance(scores, log_w)
    np.testing.assert_allclose(found.value, target.event_prob(), rtol=1e-5)
    assert found.hits == NUM
    np.testing.assert_allclose(found.ess_harm, NUM, rtol=1e-5)
    np.testing.assert_allclose(found.kl, 0, atol=1e-5)
    assert not found.stderr > 1e-6 * found.value


def test_defensive_mixture_of_chains():
    rng = np.random.default_rng(3)
    target, tilted = ladder(0.12, HEIGHT, STEPS), ladder(0.7, HEIGHT, STEPS)
    policies, alphas = (target, tilted), np.array([0.2, 0.8])
    labels = rng.choice(2, size=NUM, p=alphas)
    drawn = np.stack([policy.sample(rng, NUM) for policy in policies])
    paths = drawn[labels, np.arange(NUM)]
    log_probs = np.stack([policy.log_prob(paths) for policy in policies])
    log_w = log_probs[0] - np.asarray(mixture_log_prob(log_probs, np.log(alphas)))
    scores = target.event(paths)
    found = importance(scores, log_w)

    assert np.abs(found.value - target.event_prob()) < 4 * found.stderr
    assert found.stderr < 0.1 * found.value
    assert np.abs(found.mean_weight_z) < 4
    assert log_w.max() <= np.log(1 / 0.2) + 1e-5
    own = component_mean_weights(log_probs[0], log_probs, labels)
    np.testing.assert_allclose(own.mean_weight[0], 1, rtol=1e-6)
    np.testing.assert_allclose(
        own.mean_weight[1], np.exp(log_probs[0] - log_probs[1])[labels == 1].mean(), rtol=1e-4
    )
    share = np.exp(log_w) * scores
    np.testing.assert_allclose(
        target_share(scores, log_w, labels), share[labels == 0].sum() / share.sum(), atol=1e-6
    )


def windowed(target, unsafe):
    """The target, then `unsafe` in every window of steps with the target around it."""
    pairs = itertools.combinations(range(STEPS + 1), 2)
    out = [target]
    for start, stop in pairs:
        steps = np.array(target.transitions)
        steps[start:stop] = unsafe.transitions[start:stop]
        out.append(MarkovPolicy(steps))
    return out


def drawn_from(policies, alphas, num, rng):
    """Labels [N], paths [N, T + 1] and log-probabilities [K, N]."""
    labels = rng.choice(len(policies), size=num, p=alphas)
    paths = np.zeros((num, STEPS + 1), int)
    for k in np.unique(labels):
        paths[labels == k] = policies[k].sample(rng, int((labels == k).sum()))
    return labels, paths, np.stack([policy.log_prob(paths) for policy in policies])


def test_coverage_of_windows_is_told_by_the_draws_of_all():
    # 56 components and 300 draws: most made a handful. The truth is a sum over all paths.
    rng = np.random.default_rng(4)
    policies = windowed(ladder(0.05, HEIGHT, STEPS), ladder(0.9, HEIGHT, STEPS))
    alphas = np.array([0.1, *[0.9 / (len(policies) - 1)] * (len(policies) - 1)])
    labels, _, log_probs = drawn_from(policies, alphas, 300, rng)
    found = component_mean_weights(log_probs[0], log_probs, labels)

    moves = np.array(list(itertools.product([1, -1], repeat=STEPS)))
    paths = np.zeros((len(moves), STEPS + 1), int)
    for t in range(STEPS):
        moved = np.maximum(paths[:, t] + moves[:, t], 0)
        paths[:, t + 1] = np.where(paths[:, t] == HEIGHT, HEIGHT, moved)
    paths = np.unique(paths, axis=0)
    densities = np.exp([policy.log_prob(paths) for policy in policies])
    np.testing.assert_allclose(densities.sum(axis=1), 1)
    shown = np.minimum(densities[0], COVERAGE_RATIO * densities)
    mixture = np.bincount(labels, minlength=len(policies)) / len(labels) @ densities
    exact = shown.sum(axis=1)
    variance = (shown**2 / mixture).sum(axis=1) - exact**2
    shares = np.bincount(labels, minlength=len(policies))[:, None] / len(labels)
    weights = np.exp(log_probs[0]) / np.sum(shares * np.exp(log_probs), axis=0)
    gap = np.asarray(found.coverage) * max(weights.mean(), 1) - exact
    assert (np.abs(gap) < 4 * np.sqrt(variance / len(labels)) + 1e-6).all()
    covers = exact >= 0.5
    assert 10 < covers.sum() < 50 and np.median(found.count) < 10
    clear = np.abs(exact - 0.5) > 0.2
    np.testing.assert_array_equal((np.asarray(found.coverage) >= 0.5)[clear], covers[clear])
