"""Policies and mixtures that cannot be are refused."""

import jax
import numpy as np
import pytest

from tailrisk_jax.errors import InputError
from tailrisk_jax.policies import Policy, at_temperature, from_tokens, mixture
from tailrisk_jax.rollouts import sample
from tests.oracles import random_model, tiny_config

POLICY = Policy(random_model(tiny_config()))
OTHER_VOCABULARY = Policy(random_model(tiny_config(vocab_size=5)))
OTHER_END = Policy(random_model(tiny_config(end_ids=(1,))))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperatures_that_are_not_positive_are_refused(temperature):
    with pytest.raises(InputError, match="temperature"):
        at_temperature(POLICY, temperature)
    with pytest.raises(InputError, match="temperature"):
        sample(jax.random.key(0), Policy(POLICY.model, None, temperature), from_tokens([[1]]), 1, 1)


@pytest.mark.parametrize(
    ("components", "weights", "named"),
    [
        ([], [], "0 components"),
        ([POLICY, POLICY], [1.0], "2 components"),
        ([POLICY, POLICY], [0.5, 0.6], "sum to 1"),
        ([POLICY, POLICY], [1.0, 0.0], "positive"),
        ([POLICY, POLICY], [1.5, -0.5], "positive"),
        ([POLICY, POLICY], [float("nan"), 1.0], "positive"),
        ([POLICY, mixture([POLICY], [1.0])], [0.5, 0.5], "itself a mixture"),
        ([POLICY, OTHER_VOCABULARY], [0.5, 0.5], "vocab_size"),
        ([POLICY, OTHER_END], [0.5, 0.5], "end_ids"),
    ],
)
def test_impossible_mixtures_are_refused(components, weights, named):
    with pytest.raises(InputError, match=named):
        mixture(components, weights)


def test_mixture_weights_are_float32_and_sum_to_one():
    weights = np.asarray(mixture([POLICY] * 3, [0.2, 0.3, 0.5]).weights)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [0.2, 0.3, 0.5], rtol=1e-7)
