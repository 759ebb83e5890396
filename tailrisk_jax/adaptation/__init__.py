"""Choosing a proposal: dictionaries of windows, fitted weights, cross-entropy search, selection."""

from tailrisk_jax.adaptation.dictionary import (
    Dictionary,
    components,
    window_log_probs,
    windows,
)
from tailrisk_jax.adaptation.learning import Shares
from tailrisk_jax.adaptation.pilot import Pilot
from tailrisk_jax.adaptation.search import (
    STRENGTHS,
    Grid,
    SearchResult,
    Setting,
    default_grid,
    grid_log_mixture,
    pilot_queries,
    pilot_tokens,
    search,
)
from tailrisk_jax.adaptation.selection import Choice, Costs, choose
from tailrisk_jax.adaptation.shrinkage import Adapted, adapt_shared, adapt_weights
from tailrisk_jax.adaptation.training import Training, init_adapter
from tailrisk_jax.adaptation.weights import MixtureFit, fit_weights

__all__ = [
    "STRENGTHS",
    "Adapted",
    "Choice",
    "Costs",
    "Dictionary",
    "Grid",
    "MixtureFit",
    "Pilot",
    "SearchResult",
    "Setting",
    "Shares",
    "Training",
    "adapt_shared",
    "adapt_weights",
    "choose",
    "components",
    "default_grid",
    "fit_weights",
    "grid_log_mixture",
    "init_adapter",
    "pilot_queries",
    "pilot_tokens",
    "search",
    "window_log_probs",
    "windows",
]
