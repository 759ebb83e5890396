"""What can be sampled and scored: policies, steered policies, mixtures, prompts."""

from tailrisk_jax.policies.constructions import in_context, in_int8, interpolate, with_adapter
from tailrisk_jax.policies.context import Context, Query
from tailrisk_jax.policies.directions import (
    difference_in_means,
    intensity_for,
    mean_differences,
    mean_residuals,
    post_instruction_tokens,
    residual_stream,
)
from tailrisk_jax.policies.directions_selection import (
    REFUSAL_OPENERS,
    DirectionScores,
    choose_direction,
    refusal_log_odds,
    refusal_tokens,
    score_directions,
)
from tailrisk_jax.policies.mixtures import Mixture, mixture
from tailrisk_jax.policies.persona import (
    Answers,
    PersonaVectors,
    layer_of_row,
    mean_activations,
    persona_vectors,
    vector_of_layer,
)
from tailrisk_jax.policies.policy import Policy, at_temperature, check_comparable, logits
from tailrisk_jax.policies.prompts import Prompts, encode, from_tokens, own_prompts
from tailrisk_jax.policies.steering import ablate, steer
from tailrisk_jax.policies.token_mixtures import (
    Component,
    LogitPath,
    TokenMixture,
    is_diluted,
    logit_path,
    switch,
    token_mixture,
    window,
)
from tailrisk_jax.policies.token_rule import (
    draw,
    draw_from_mixture,
    log_distribution,
    log_masses,
    path_log_masses,
    token_log_prob,
)

__all__ = [
    "REFUSAL_OPENERS",
    "Answers",
    "Component",
    "Context",
    "DirectionScores",
    "LogitPath",
    "Mixture",
    "PersonaVectors",
    "Policy",
    "Prompts",
    "Query",
    "TokenMixture",
    "ablate",
    "at_temperature",
    "check_comparable",
    "choose_direction",
    "difference_in_means",
    "draw",
    "draw_from_mixture",
    "encode",
    "from_tokens",
    "in_context",
    "in_int8",
    "intensity_for",
    "interpolate",
    "is_diluted",
    "layer_of_row",
    "log_distribution",
    "log_masses",
    "logit_path",
    "logits",
    "mean_activations",
    "mean_differences",
    "mean_residuals",
    "mixture",
    "own_prompts",
    "path_log_masses",
    "persona_vectors",
    "post_instruction_tokens",
    "refusal_log_odds",
    "refusal_tokens",
    "residual_stream",
    "score_directions",
    "steer",
    "switch",
    "token_log_prob",
    "token_mixture",
    "vector_of_layer",
    "window",
    "with_adapter",
]
