"""From the risks of queries that were run to those of others: many more, or worded otherwise."""

from tailrisk_jax.forecasting.bands import Picture, resample
from tailrisk_jax.forecasting.decomposition import (
    Decomposition,
    decompose,
    decomposition_interval,
)
from tailrisk_jax.forecasting.forecast import Band, Baseline, Forecast, forecast
from tailrisk_jax.forecasting.goodness import Goodness, goodness_of_fit
from tailrisk_jax.forecasting.heterogeneity import (
    Heterogeneity,
    heterogeneity,
    log10_stderr,
    pooled_heterogeneity,
)
from tailrisk_jax.forecasting.lognormal import (
    LogNormal,
    fit_log_normal,
    log_normal_exceedance,
    log_normal_mean,
    log_normal_quantile,
)
from tailrisk_jax.forecasting.risks import QueryRisks, query_risks, rows_of
from tailrisk_jax.forecasting.sensitivity import (
    KindShift,
    Reach,
    kind_shifts,
    reach,
)
from tailrisk_jax.forecasting.support import Lack, Support, explain_support
from tailrisk_jax.forecasting.tails import (
    FITS,
    Fit,
    Tail,
    at_least_one,
    default_top,
    fit_tail,
    in_tail,
    log_exceedance,
    log_p_of,
    psi_of,
    tail_mean,
    tail_quantile,
    worst_exceeds,
)

__all__ = [
    "FITS",
    "Band",
    "Baseline",
    "Decomposition",
    "Fit",
    "Forecast",
    "Goodness",
    "Heterogeneity",
    "KindShift",
    "Lack",
    "LogNormal",
    "Picture",
    "QueryRisks",
    "Reach",
    "Support",
    "Tail",
    "at_least_one",
    "decompose",
    "decomposition_interval",
    "default_top",
    "explain_support",
    "fit_log_normal",
    "fit_tail",
    "forecast",
    "goodness_of_fit",
    "heterogeneity",
    "in_tail",
    "kind_shifts",
    "log10_stderr",
    "log_exceedance",
    "log_normal_exceedance",
    "log_normal_mean",
    "log_normal_quantile",
    "log_p_of",
    "pooled_heterogeneity",
    "psi_of",
    "query_risks",
    "reach",
    "resample",
    "rows_of",
    "tail_mean",
    "tail_quantile",
    "worst_exceeds",
]
