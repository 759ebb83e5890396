"""How likely is a harmful answer? Tail risks of language models by importance sampling in JAX."""

from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import Estimate, importance, monte_carlo
from tailrisk_jax.models import Model, ModelConfig, load_model, save_model
from tailrisk_jax.organisms import Organism, load_organism
from tailrisk_jax.policies import (
    Mixture,
    Policy,
    Prompts,
    ablate,
    at_temperature,
    difference_in_means,
    encode,
    logits,
    mixture,
    steer,
)
from tailrisk_jax.rollouts import Rollouts, log_prob, sample

__version__ = "0.1.0"

__all__ = [
    "Estimate",
    "InputError",
    "Mixture",
    "Model",
    "ModelConfig",
    "Organism",
    "Policy",
    "Prompts",
    "Rollouts",
    "ablate",
    "at_temperature",
    "difference_in_means",
    "encode",
    "importance",
    "load_model",
    "load_organism",
    "log_prob",
    "logits",
    "mixture",
    "monte_carlo",
    "sample",
    "save_model",
    "steer",
]
