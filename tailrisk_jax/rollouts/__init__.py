"""The only two loops over tokens: sampling and scoring."""

from tailrisk_jax.rollouts.rollouts import Draws, Rollouts
from tailrisk_jax.rollouts.sample import draw, sample
from tailrisk_jax.rollouts.score import log_prob, mixture_token_log_probs, token_log_probs
from tailrisk_jax.rollouts.weigh import Weighed, weigh

__all__ = [
    "Draws",
    "Rollouts",
    "Weighed",
    "draw",
    "log_prob",
    "mixture_token_log_probs",
    "sample",
    "token_log_probs",
    "weigh",
]
