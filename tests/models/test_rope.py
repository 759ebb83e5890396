"""Frequencies and attention factors against transformers' own functions, for every kind."""

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tailrisk_jax.errors import InputError
from tailrisk_jax.models.rope import rope_frequencies, rope_from_hf, rope_to_hf

YARN = {
    "rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096,
    "short_factor": [1 + 0.1 * i for i in range(32)], "long_factor": [2.0] * 32,
}  # fmt: skip
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
    "yarn": YARN,
    "yarn-olmo3": YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.2079},
    "yarn-betas": YARN | {"beta_fast": 20.0, "beta_slow": 2.5, "rope_theta": 1e6},
    "yarn-scales": YARN | {"mscale": 0.707, "mscale_all_dim": 1.2},
    "yarn-one-scale": YARN | {"mscale": 0.707},
    "longrope": LONG,
    "longrope-factor": LONG | {"factor": 16.0},
    "longrope-attention": LONG | {"attention_factor": 1.3},
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers(name):
    parameters, sizes = ROPES[name], {"hidden_size": 128, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, max_position_embeddings=65536, rope_parameters=parameters)
    wanted, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device="cpu")
    ours = rope_from_hf(parameters, max_positions=65536, head_dim=64)
    np.testing.assert_allclose(rope_frequencies(ours, 64), wanted.numpy(), rtol=2e-6)
    np.testing.assert_allclose(ours.attention_factor, factor, rtol=1e-12)
    assert rope_from_hf(rope_to_hf(ours), max_positions=65536, head_dim=64) == ours


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"short_factor": [1.0]}, "short_factor with 1 entries"),
        ({"long_factor": None}, "without long_factor"),
        ({"beta_fast": 32.0}, "beta_fast=32.0"),
        ({"rope_type": "dynamic"}, "rope_type='dynamic'"),
        ({"rope_type": "proportional"}, "rope_type='proportional'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, named):
    with pytest.raises(InputError, match=named):
        rope_from_hf(LONG | changes, max_positions=65536, head_dim=64)


def test_the_rotated_share_must_be_even():
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    assert rope_frequencies(
        rope_from_hf(parameters, max_positions=64, head_dim=8, partial=True), 8
    ).shape == (3,)
