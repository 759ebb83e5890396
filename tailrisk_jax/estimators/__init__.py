"""From scores and log-weights to estimates, intervals and verdicts: pure functions of arrays."""

from tailrisk_jax.estimators.any_of import any_of_draws
from tailrisk_jax.estimators.certificates import (
    asymptotic_sequence,
    betting_interval,
    betting_lower,
    betting_upper,
    empirical_bernstein,
)
from tailrisk_jax.estimators.control_variates import control_variates
from tailrisk_jax.estimators.diagnostics import Explanation, Reason, Verdict, explain, verdict
from tailrisk_jax.estimators.differences import (
    Spread,
    difference_interval,
    log_ratio_interval,
    mean_interval,
    paired_log_ratio,
    paired_spread,
    spread_interval,
    spread_of,
)
from tailrisk_jax.estimators.estimate import Estimate, importance, monte_carlo, self_normalised
from tailrisk_jax.estimators.intervals import (
    Interval,
    bootstrap_interval,
    clopper_pearson,
    log_interval,
    log_t_interval,
    wald_interval,
)
from tailrisk_jax.estimators.pareto import pareto_k, psis
from tailrisk_jax.estimators.precision import in_float64
from tailrisk_jax.estimators.report import MixtureDraws, Report, report
from tailrisk_jax.estimators.rounds import Combined, balance_log_weights, combine_rounds
from tailrisk_jax.estimators.sequences import (
    Replicates,
    Running,
    relative_width,
    replicates,
    running,
    watched_interval,
)
from tailrisk_jax.estimators.weights import (
    ComponentWeights,
    component_mean_weights,
    covered_hits,
    mixture_log_prob,
    target_share,
)

__all__ = [
    "Combined",
    "ComponentWeights",
    "Estimate",
    "Explanation",
    "Interval",
    "MixtureDraws",
    "Reason",
    "Replicates",
    "Report",
    "Running",
    "Spread",
    "Verdict",
    "any_of_draws",
    "asymptotic_sequence",
    "balance_log_weights",
    "betting_interval",
    "betting_lower",
    "betting_upper",
    "bootstrap_interval",
    "clopper_pearson",
    "combine_rounds",
    "component_mean_weights",
    "control_variates",
    "covered_hits",
    "difference_interval",
    "empirical_bernstein",
    "explain",
    "importance",
    "in_float64",
    "log_interval",
    "log_ratio_interval",
    "log_t_interval",
    "mean_interval",
    "mixture_log_prob",
    "monte_carlo",
    "paired_log_ratio",
    "paired_spread",
    "pareto_k",
    "psis",
    "relative_width",
    "replicates",
    "report",
    "running",
    "self_normalised",
    "spread_interval",
    "spread_of",
    "target_share",
    "verdict",
    "wald_interval",
    "watched_interval",
]
