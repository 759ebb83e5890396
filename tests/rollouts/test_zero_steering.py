"""Zero steering, or an adapter of strength zero, gives log-weights of exactly 0, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tailrisk_jax.models.adapters import LowRank
from tailrisk_jax.policies import (
    Policy,
    ablate,
    at_temperature,
    from_tokens,
    mixture,
    steer,
    with_adapter,
)
from tailrisk_jax.rollouts import log_prob, sample, weigh
from tests.oracles import random_model, tiny_config, unit_vector

CONFIG = tiny_config(vocab_size=13, end_ids=(3,))
D, V = unit_vector(CONFIG, 0), 5 * unit_vector(CONFIG, 1)
ADAPTER = {
    "layers": {
        "mlp": {"up": {"kernel": LowRank(jnp.ones((2, 3, 8)), jnp.ones((2, 12, 3)), jnp.ones(2))}}
    }
}
ZERO = {
    "ablate": lambda policy: ablate(policy, D, 0.0),
    "ablate-prompt": lambda policy: ablate(policy, D, 0.0, positions="prompt"),
    "steer": lambda policy: steer(policy, V, 1, 0.0),
    "both": lambda policy: steer(ablate(policy, D, 0.0), V, 0, 0.0, positions="response"),
    "there-and-back": lambda policy: steer(steer(policy, V, 1, 2.0), V, 1, -2.0),
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def drawn(request):
    """(target, rollouts from it): two queries, a dozen responses each."""
    target = Policy(random_model(CONFIG, dtype=jnp.dtype(request.param)))
    rollouts = sample(jax.random.key(0), target, from_tokens([[1, 2, 5], [7, 4]]), 12, 4)
    assert 0 < np.mean(rollouts.ended) < 1
    return target, rollouts


@pytest.mark.parametrize("name", ZERO)
def test_log_prob(drawn, name):
    target, rollouts = drawn
    log_weights = log_prob(target, rollouts) - log_prob(ZERO[name](target), rollouts)
    np.testing.assert_array_equal(log_weights, np.zeros((2, 12), np.float32))


@pytest.mark.parametrize("name", ZERO)
def test_defect_04_policies_of_one_pass_follow_one_numerical_path(drawn, name):
    """`weigh` scores both in one pass; float32 or bfloat16, there is no noise between them."""
    target, rollouts = drawn
    weighed = weigh(target, ZERO[name](target), rollouts)
    assert weighed.log_p.dtype == rollouts.token_log_probs.dtype == np.float32
    np.testing.assert_array_equal(weighed.log_weights, np.zeros((2, 12), np.float32))


def test_an_adapter_of_strength_zero(drawn):
    target, rollouts = drawn
    weighed = weigh(target, with_adapter(target, ADAPTER, 0.0), rollouts)
    np.testing.assert_array_equal(weighed.log_weights, np.zeros((2, 12), np.float32))


@pytest.mark.parametrize("name", ZERO)
def test_within_mixtures(drawn, name):
    """A component may be replaced by its zero-steered twin, whatever stands beside it."""
    target, rollouts = drawn
    other = at_temperature(ablate(target, D, 1.0), 1.5)
    plain, steered = (mixture([one, other], [0.4, 0.6]) for one in (target, ZERO[name](target)))
    np.testing.assert_array_equal(log_prob(plain, rollouts), log_prob(steered, rollouts))
    difference = np.abs(log_prob(plain, rollouts) - log_prob(target, rollouts))
    assert np.max(difference) > 0.1


@pytest.mark.parametrize("name", ZERO)
def test_samples(drawn, name):
    target, rollouts = drawn
    again = sample(jax.random.key(0), ZERO[name](target), rollouts.prompts, 12, 4)
    np.testing.assert_array_equal(again.tokens, rollouts.tokens)
    np.testing.assert_array_equal(again.token_log_probs, rollouts.token_log_probs)
