"""How likely is a harmful answer? Tail risks of language models by importance sampling in JAX."""

from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import Estimate, importance, monte_carlo
from tailrisk_jax.models import (
    Model,
    ModelConfig,
    load_model,
    read_adapter,
    save_adapter,
    save_model,
)
from tailrisk_jax.organisms import Organism, load_organism
from tailrisk_jax.policies import (
    Component,
    Context,
    LogitPath,
    Mixture,
    Policy,
    Prompts,
    TokenMixture,
    ablate,
    at_temperature,
    difference_in_means,
    encode,
    in_context,
    interpolate,
    logit_path,
    logits,
    mixture,
    steer,
    switch,
    token_mixture,
    window,
    with_adapter,
)
from tailrisk_jax.rollouts import Rollouts, log_prob, sample

__version__ = "0.1.0"

__all__ = [
    "Component",
    "Context",
    "Estimate",
    "InputError",
    "LogitPath",
    "Mixture",
    "Model",
    "ModelConfig",
    "Organism",
    "Policy",
    "Prompts",
    "Rollouts",
    "TokenMixture",
    "ablate",
    "at_temperature",
    "difference_in_means",
    "encode",
    "importance",
    "in_context",
    "interpolate",
    "load_model",
    "load_organism",
    "log_prob",
    "logit_path",
    "logits",
    "mixture",
    "monte_carlo",
    "read_adapter",
    "sample",
    "save_adapter",
    "save_model",
    "steer",
    "switch",
    "token_mixture",
    "window",
    "with_adapter",
]
