"""Queries in, estimates out."""

from tailrisk_jax.studies.proposals import parse_proposal
from tailrisk_jax.studies.queries import StudyQuery, read_queries
from tailrisk_jax.studies.results import check_output, save_results
from tailrisk_jax.studies.run import Results, Settings, run_study

__all__ = [
    "Results",
    "Settings",
    "StudyQuery",
    "check_output",
    "parse_proposal",
    "read_queries",
    "run_study",
    "save_results",
]
