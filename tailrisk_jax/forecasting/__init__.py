"""From estimates per query to what they say of other queries: pure functions of arrays."""

from tailrisk_jax.forecasting.decomposition import (
    Decomposition,
    decompose,
    decomposition_interval,
)
from tailrisk_jax.forecasting.heterogeneity import (
    Heterogeneity,
    heterogeneity,
    log10_stderr,
    pooled_heterogeneity,
)
from tailrisk_jax.forecasting.sensitivity import (
    KindShift,
    Reach,
    kind_shifts,
    reach,
)

__all__ = [
    "Decomposition",
    "Heterogeneity",
    "KindShift",
    "Reach",
    "decompose",
    "decomposition_interval",
    "heterogeneity",
    "kind_shifts",
    "log10_stderr",
    "pooled_heterogeneity",
    "reach",
]
