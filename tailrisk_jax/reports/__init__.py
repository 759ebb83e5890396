"""Tables and pictures of results; nothing here knows of models."""

from tailrisk_jax.reports.plots import plot_against_truth
from tailrisk_jax.reports.tables import (
    ComparisonRow,
    comparison_table,
    estimates_table,
    spread_line,
)

__all__ = [
    "ComparisonRow",
    "comparison_table",
    "estimates_table",
    "plot_against_truth",
    "spread_line",
]
