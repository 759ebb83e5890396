"""From scores and log-weights to estimates, intervals and verdicts: pure functions of arrays."""

from tailrisk_jax.estimators.diagnostics import Explanation, Reason, Verdict, explain, verdict
from tailrisk_jax.estimators.estimate import Estimate, importance, monte_carlo
from tailrisk_jax.estimators.intervals import (
    Interval,
    bootstrap_interval,
    clopper_pearson,
    log_interval,
    wald_interval,
)
from tailrisk_jax.estimators.weights import (
    ComponentWeights,
    component_mean_weights,
    covered_hits,
    mixture_log_prob,
    target_share,
)

__all__ = [
    "ComponentWeights",
    "Estimate",
    "Explanation",
    "Interval",
    "Reason",
    "Verdict",
    "bootstrap_interval",
    "clopper_pearson",
    "component_mean_weights",
    "covered_hits",
    "explain",
    "importance",
    "log_interval",
    "mixture_log_prob",
    "monte_carlo",
    "target_share",
    "verdict",
    "wald_interval",
]
