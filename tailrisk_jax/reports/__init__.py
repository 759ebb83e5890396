"""Tables, pictures and pages of results; nothing here knows of models."""

from tailrisk_jax.reports.baseline import BaselinePoints
from tailrisk_jax.reports.html import SAMPLE_COLUMNS, RunRecord, SensitivitySection, html_report
from tailrisk_jax.reports.plots import plot_against_truth
from tailrisk_jax.reports.sensitivity import VariantPoints, plot_sensitivity
from tailrisk_jax.reports.tables import (
    ComparisonRow,
    comparison_table,
    estimates_table,
    spread_line,
)

__all__ = [
    "SAMPLE_COLUMNS",
    "BaselinePoints",
    "ComparisonRow",
    "RunRecord",
    "SensitivitySection",
    "VariantPoints",
    "comparison_table",
    "estimates_table",
    "html_report",
    "plot_against_truth",
    "plot_sensitivity",
    "spread_line",
]
