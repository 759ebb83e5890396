"""Every response of a 4-token, 3-step model: exact totals, exact expectations, exact frequencies.

The exact log-probabilities come from `logits` of prompt and response as one text, in float64: no
cache, no blocks, no scoring code.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tailrisk_jax.estimators import importance, monte_carlo
from tailrisk_jax.policies import Mixture, Policy, ablate, at_temperature, from_tokens, mixture
from tailrisk_jax.policies import steer as steer_policy
from tailrisk_jax.rollouts import (
    Draws,
    draw,
    log_prob,
    mixture_token_log_probs,
    sample,
    token_log_probs,
    weigh,
)
from tests.oracles import (
    as_draws,
    as_rows,
    exact_log_probs,
    exact_token_log_probs,
    frequency_p_value,
    random_model,
    responses,
    tiny_config,
    unit_vector,
)

ENDS = {"no-end": (), "one-end": (3,), "two-ends": (2, 0)}
PROMPT, LENGTH, SAMPLES = [1, 2, 0], 3, 16384
NAMES = (
    "target", "ablated", "half-ablated", "steered", "hot", "cold-ablated", "other-model",
    "mixture", "defensive",
)  # fmt: skip


def make_policies(config) -> dict[str, Policy | Mixture]:
    target = Policy(random_model(config, seed=3))
    d, v = unit_vector(config, 0), unit_vector(config, 1)
    single = {
        "target": target,
        "ablated": ablate(target, d, 1.0),
        "half-ablated": ablate(target, d, 0.5, positions="response"),
        "steered": steer_policy(target, v, 1, 2.0, positions="prompt"),
        "hot": at_temperature(target, 2.0),
        "cold-ablated": at_temperature(ablate(target, d, -0.7), 0.6),
        "other-model": Policy(random_model(config, seed=4)),
    }
    pair = mixture([single["ablated"], single["hot"]], [0.7, 0.3])
    three = mixture([target, single["steered"], single["other-model"]], [0.2, 0.5, 0.3])
    return single | {"mixture": pair, "defensive": three}


@dataclasses.dataclass
class World:
    """One model and all of its responses; scores are computed once."""

    policies: dict[str, Policy | Mixture]
    rows: list[tuple[int, ...]]
    draws: Draws

    @functools.cached_property
    def scored(self) -> dict[str, np.ndarray]:
        """log q(y) of every response as `log_prob` gives it, in float64."""
        return {
            name: np.asarray(log_prob(policy, self.draws), np.float64)[0]
            for name, policy in self.policies.items()
        }

    @functools.cached_property
    def exact(self) -> dict[str, np.ndarray]:
        out = {}
        for name, policy in self.policies.items():
            if isinstance(policy, Policy):
                out[name] = exact_log_probs(policy, PROMPT, self.rows)
            else:
                parts = [exact_log_probs(one, PROMPT, self.rows) for one in policy.components]
                weights = np.asarray(policy.weights, np.float64)[:, None]
                out[name] = scipy.special.logsumexp(parts, axis=0, b=weights)
        return out

    @functools.cached_property
    def event(self) -> np.ndarray:
        """A hit: token 1 comes up exactly once, or the response is a single token."""
        return np.array([float(row.count(1) == 1 or len(row) == 1) for row in self.rows])

    @functools.cached_property
    def drawn(self) -> dict[str, tuple[Draws, np.ndarray]]:
        """Draws from every policy, and which of all responses each of them is."""
        code = functools.partial(np.dot, b=5 ** np.arange(LENGTH))
        padded = [np.add(row + (-1,) * (LENGTH - len(row)), 1) for row in self.rows]
        number = np.full(5**LENGTH, -1)
        number[code(np.array(padded))] = np.arange(len(self.rows))
        out = {}
        for seed, (name, policy) in enumerate(self.policies.items()):
            draws = draw(
                jax.random.key(seed), policy, self.draws.prompts, SAMPLES, LENGTH, batch_size=4096
            )
            tokens, mask = np.asarray(draws.tokens)[0], np.asarray(draws.mask)[0]
            out[name] = draws, number[code(np.where(mask, tokens + 1, 0))]
            assert np.all(out[name][1] >= 0)
        return out


@functools.cache
def make_world(ends: str) -> World:
    config = tiny_config(end_ids=ENDS[ends])
    rows = responses(config.vocab_size, LENGTH, config.end_ids)
    draws = as_draws(rows, from_tokens([PROMPT]), config, LENGTH)
    return World(make_policies(config), rows, draws)


@pytest.fixture(params=ENDS)
def world(request):
    return make_world(request.param)


@pytest.fixture
def two_ends():
    """For what costs a compilation and has little to do with how responses end."""
    return make_world("two-ends")


def test_there_are_as_many_responses_as_there_should_be(world):
    ends = len(world.policies["target"].model.config.end_ids)
    others = 4 - ends
    assert len(world.rows) == ends * (1 + others + others**2) + others**3
    assert len(set(world.rows)) == len(world.rows)


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_of_all_responses_sum_to_one(world, name):
    assert abs(np.exp(world.scored[name]).sum() - 1) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_log_probs_are_exact(world, name):
    np.testing.assert_allclose(world.scored[name], world.exact[name], rtol=0, atol=2e-5)
    assert np.ptp(world.exact[name]) > 2


@pytest.mark.parametrize("name", NAMES[1:])
def test_proposals_differ_from_the_target(world, name):
    assert np.abs(world.exact[name] - world.exact["target"]).max() > 0.1


def test_policies_scored_together_score_as_they_do_alone(two_ends):
    names = ("steered", "target", "other-model", "ablated", "cold-ablated", "hot")
    together = token_log_probs([two_ends.policies[name] for name in names], two_ends.draws)
    for name, row in zip(names, np.asarray(together.sum(-1)), strict=True):
        np.testing.assert_allclose(row[0], two_ends.scored[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_expected_weight_is_one(world, name):
    """E_q[p / q] over the exact law of q."""
    weights = np.exp(world.scored["target"] - world.scored[name])
    assert abs(np.sum(np.exp(world.exact[name]) * weights) - 1) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_expectation_of_the_importance_estimator_is_the_exact_probability(world, name):
    """E[estimate] over every pair of draws, weighted by the exact probability of the pair."""
    exact = np.sum(np.exp(world.exact["target"]) * world.event)
    assert 0.02 < exact < 0.98
    pairs = np.array(list(itertools.product(range(len(world.rows)), repeat=2)))
    log_weights = world.scored["target"] - world.scored[name]
    estimate = importance(world.event[pairs], jnp.asarray(log_weights[pairs], jnp.float32))
    law = np.exp(world.exact[name][pairs].sum(axis=1))
    assert abs(np.sum(law * np.asarray(estimate.value, np.float64)) - exact) < 1e-5
    if name == "target" and len(world.rows) == 22:  # one compilation is enough
        plain = np.asarray(monte_carlo(world.event[pairs]).value, np.float64)
        assert abs(np.sum(law * plain) - exact) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_defect_03_the_density_sampled_is_the_density_recorded(world, name):
    draws, drawn = world.drawn[name]
    labels, recorded = (np.asarray(x)[0] for x in (draws.labels, draws.drawn_log_probs.sum(-1)))
    policy = world.policies[name]
    components = policy.components if isinstance(policy, Mixture) else (policy,)
    for k, component in enumerate(components):
        exact, own = exact_log_probs(component, PROMPT, world.rows), labels == k
        # Recorded: what was written beside each draw is its log-probability ...
        np.testing.assert_allclose(recorded[own], exact[drawn[own]], rtol=0, atol=1e-4)
        # ... sampled: and every response comes up as often as that says.
        counts = np.bincount(drawn[own], minlength=len(world.rows))
        assert frequency_p_value(counts, np.exp(exact)) > 1e-3
    counts = np.bincount(drawn, minlength=len(world.rows))
    assert frequency_p_value(counts, np.exp(world.scored[name])) > 1e-3


@pytest.mark.parametrize("name", ["mixture", "defensive"])
def test_components_are_drawn_with_their_weights(world, name):
    weights = np.asarray(world.policies[name].weights, np.float64)
    labels = np.asarray(world.drawn[name][0].labels)[0]
    assert frequency_p_value(np.bincount(labels, minlength=len(weights)), weights) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_importance_sampling_finds_the_exact_probability(two_ends, name):
    """The whole path, sampled: within 4 standard errors, mean weight included."""
    draws, drawn = two_ends.drawn[name]
    target, proposal = two_ends.policies["target"], two_ends.policies[name]
    weighed = weigh(target, proposal, draws, batch_size=SAMPLES)
    estimate = importance(two_ends.event[drawn][None], weighed.log_weights)
    exact = np.sum(np.exp(two_ends.exact["target"]) * two_ends.event)
    assert abs(float(estimate.value[0]) - exact) < 4 * max(float(estimate.stderr[0]), 1e-6)
    if name != "target":
        assert abs(float(estimate.mean_weight_z[0])) < 4
    np.testing.assert_allclose(weighed.log_p[0], two_ends.scored["target"][drawn], atol=1e-5)
    np.testing.assert_allclose(weighed.log_q[0], two_ends.scored[name][drawn], atol=1e-5)
    assert float(np.max(weighed.rescore_noise)) < 1e-4


@pytest.mark.parametrize("name", ["hot", "mixture"])
def test_rollouts_carry_the_log_prob_of_what_they_were_sampled_from(two_ends, name):
    prompts = two_ends.draws.prompts
    rollouts = sample(jax.random.key(0), two_ends.policies[name], prompts, 32, LENGTH)
    law = dict(zip(two_ends.rows, two_ends.exact[name], strict=True))
    wanted = [law[row] for row in as_rows(rollouts)]
    np.testing.assert_allclose(rollouts.log_prob[0], wanted, rtol=0, atol=1e-4)
    scored = log_prob(two_ends.policies[name], rollouts)
    np.testing.assert_allclose(rollouts.log_prob, scored, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["mixture", "defensive"])
def test_token_log_probs_of_a_mixture_are_its_conditionals(two_ends, name):
    """q(y_t | y_<t) from prefix sums over all responses that continue the prefix."""
    policy = two_ends.policies[name]
    parts = token_log_probs(policy.components, two_ends.draws)
    ours = np.asarray(mixture_token_log_probs(parts, jnp.log(policy.weights)))[0]
    law = dict(zip(two_ends.rows, np.exp(two_ends.exact[name]), strict=True))

    def mass(prefix):
        return sum(q for row, q in law.items() if row[: len(prefix)] == prefix)

    for row, got in zip(two_ends.rows, ours, strict=True):
        wanted = [np.log(mass(row[: t + 1]) / mass(row[:t])) for t in range(len(row))]
        np.testing.assert_allclose(got[: len(row)], wanted, rtol=0, atol=2e-5)
        assert np.all(got[len(row) :] == 0)


@pytest.mark.parametrize("name", ["target", "half-ablated", "cold-ablated"])
def test_every_token_is_scored_as_the_logits_say(two_ends, name):
    ours = np.asarray(token_log_probs([two_ends.policies[name]], two_ends.draws))[0, 0]
    exact = exact_token_log_probs(two_ends.policies[name], PROMPT, two_ends.rows)
    for got, wanted in zip(ours, exact, strict=True):
        np.testing.assert_allclose(got[: len(wanted)], wanted, rtol=0, atol=2e-5)
        assert np.all(got[len(wanted) :] == 0)
