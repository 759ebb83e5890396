"""What can be sampled and scored: policies, steered policies, mixtures, prompts."""

from tailrisk_jax.policies.directions import difference_in_means, residual_stream
from tailrisk_jax.policies.mixtures import Mixture, mixture
from tailrisk_jax.policies.policy import Policy, at_temperature, check_comparable, logits
from tailrisk_jax.policies.prompts import Prompts, Query, encode, from_tokens
from tailrisk_jax.policies.steering import ablate, steer
from tailrisk_jax.policies.token_rule import draw, log_distribution, token_log_prob

__all__ = [
    "Mixture",
    "Policy",
    "Prompts",
    "Query",
    "ablate",
    "at_temperature",
    "check_comparable",
    "difference_in_means",
    "draw",
    "encode",
    "from_tokens",
    "log_distribution",
    "logits",
    "mixture",
    "residual_stream",
    "steer",
    "token_log_prob",
]
