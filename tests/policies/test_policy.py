"""Policies and mixtures that cannot be are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tailrisk_jax.errors import InputError
from tailrisk_jax.models.adapters import LowRank
from tailrisk_jax.policies import (
    Policy,
    at_temperature,
    from_tokens,
    interpolate,
    logit_path,
    mixture,
    switch,
    token_mixture,
    window,
    with_adapter,
)
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
        ([POLICY, POLICY], [[0.5, 0.5], [0.5, 0.6]], "row 1 of the mixture weights sums to 1.1"),
        ([POLICY, POLICY], [[1.5, -0.5]], "row 0 .* its least is -0.5"),
        ([POLICY, POLICY], [[float("nan"), 1.0]], "row 0 .* sums to nan"),
        ([POLICY, POLICY], [[0.0, 1.0], [0.0, 1.0]], "component 0 has no weight for any query"),
        ([POLICY, POLICY], [[1.0], [1.0]], r"weights of shape \[2, 1\]"),
        ([POLICY, POLICY], np.zeros((0, 2)), r"weights of shape \[0, 2\]"),
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


def test_mixture_weights_per_query_are_picked_with_the_queries():
    rows = np.array([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5]], np.float32)
    shared, own = mixture([POLICY] * 2, rows[0]), mixture([POLICY] * 2, rows)
    assert own.per_query and not shared.per_query
    np.testing.assert_array_equal(own.weights, rows)
    np.testing.assert_array_equal(own.for_queries([2, 0, 0]).weights, rows[[2, 0, 0]])
    np.testing.assert_array_equal(own.for_queries(slice(1, None)).log_alphas(2)[0], [0, -np.inf])
    assert shared.for_queries([2, 0]) is shared
    np.testing.assert_array_equal(shared.log_alphas(4), np.tile(np.log(rows[0]), (4, 1)))
    with pytest.raises(InputError, match="weights for 3 queries and is used with 2"):
        own.log_alphas(2)


def adapter(name="query", layers=2, rank=1, inputs=8, outputs=12):
    a, b = jnp.ones((layers, rank, inputs)), jnp.ones((layers, outputs, rank))
    return {"layers": {"attention": {name: {"kernel": LowRank(a, b, jnp.ones(layers))}}}}


ADAPTED, MIXED = with_adapter(POLICY, adapter()), token_mixture([POLICY, POLICY], [0.5, 0.5])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: with_adapter(POLICY, {}), "empty"),
        (lambda: with_adapter(POLICY, adapter("gate")), "layers/attention/gate/kernel"),
        (lambda: with_adapter(POLICY, {"final_norm": {"scale": 1.0}}), "float at final_norm"),
        (lambda: with_adapter(POLICY, adapter(outputs=6)), "12, 1"),
        (lambda: with_adapter(POLICY, adapter(layers=3)), "2, 1, 8"),
        (lambda: with_adapter(ADAPTED, adapter()), "an adapter already"),
        (lambda: interpolate(POLICY, OTHER_VOCABULARY.model, 0.5), "vocab_size=5 and 4"),
        (lambda: token_mixture([], []), "0 experts"),
        (lambda: token_mixture([POLICY], [0.5, 0.5]), "1 experts"),
        (lambda: token_mixture([POLICY, POLICY], [[[0.5, 0.5]]]), r"\[1, 1, 2\]"),
        (lambda: token_mixture([POLICY, POLICY], [[0.5, 0.5], [0.5, 0.4]]), "summing to 1"),
        (lambda: token_mixture([POLICY, POLICY], [1.5, -0.5]), "at least 0"),
        (lambda: token_mixture([POLICY, POLICY], [float("nan"), 1.0]), "finite"),
        (lambda: token_mixture([POLICY, MIXED], [0.5, 0.5]), "TokenMixture"),
        (lambda: token_mixture([POLICY, OTHER_END], [0.5, 0.5]), "end_ids"),
        (lambda: logit_path([POLICY, OTHER_VOCABULARY], [2.0, -1.0]), "vocab_size"),
        (lambda: logit_path([POLICY, POLICY], [float("inf"), 0.0]), "finite"),
        (lambda: switch(POLICY, POLICY, -1), "step=-1"),
        (lambda: switch(POLICY, POLICY, 1, 1.5), "bias=1.5"),
        (lambda: window(POLICY, POLICY, 2, 1), "window 2-1"),
        (lambda: window(POLICY, POLICY, -1, 1), "window -1-1"),
        (lambda: mixture([MIXED, OTHER_END], [0.5, 0.5]), "end_ids"),
    ],
)
def test_impossible_constructions_are_refused(make, named):
    with pytest.raises(InputError, match=named) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_schedules_are_no_longer_than_a_response_can_be():
    positions = POLICY.model.config.max_positions
    assert len(switch(POLICY, POLICY, 10**12).weights) == positions + 1
    assert len(window(POLICY, POLICY, 10**12, 10**13).weights) == positions + 1
