"""Queries in, estimates out."""

from tailrisk_jax.studies.analysis import Results, Weighting, analyse
from tailrisk_jax.studies.folder import Study, check_output, open_run, open_store, read_study
from tailrisk_jax.studies.observations import Observations, observations
from tailrisk_jax.studies.progress import Progress
from tailrisk_jax.studies.proposals import Proposal, parse_proposal
from tailrisk_jax.studies.provenance import environment, file_hashes, session
from tailrisk_jax.studies.queries import StudyQuery, read_queries
from tailrisk_jax.studies.results import estimates_table, save_results, summarise
from tailrisk_jax.studies.run import (
    check_study,
    rejudge,
    rescore,
    run_study,
    stored_samples,
    weighting_of,
)
from tailrisk_jax.studies.settings import Settings
from tailrisk_jax.studies.store import SetAside, Store, append_session, locked

__all__ = [
    "Observations",
    "Progress",
    "Proposal",
    "Results",
    "SetAside",
    "Settings",
    "Store",
    "Study",
    "StudyQuery",
    "Weighting",
    "analyse",
    "append_session",
    "check_output",
    "check_study",
    "environment",
    "estimates_table",
    "file_hashes",
    "locked",
    "observations",
    "open_run",
    "open_store",
    "parse_proposal",
    "read_queries",
    "read_study",
    "rejudge",
    "rescore",
    "run_study",
    "save_results",
    "session",
    "stored_samples",
    "summarise",
    "weighting_of",
]
