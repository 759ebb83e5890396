"""Queries in, estimates out."""

from tailrisk_jax.studies.analysis import Results, Weighting, analyse
from tailrisk_jax.studies.folder import (
    Study,
    check_output,
    check_same,
    estimand,
    open_run,
    open_store,
    read_study,
)
from tailrisk_jax.studies.merge import Merged, keep_merged, merge
from tailrisk_jax.studies.observations import Observations, observations
from tailrisk_jax.studies.progress import Progress
from tailrisk_jax.studies.proposals import Proposal, parse_proposal
from tailrisk_jax.studies.provenance import (
    environment,
    file_hashes,
    judge_identity,
    session,
    tokens_identity,
)
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
    "Merged",
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
    "check_same",
    "check_study",
    "environment",
    "estimand",
    "estimates_table",
    "file_hashes",
    "judge_identity",
    "keep_merged",
    "locked",
    "merge",
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
    "tokens_identity",
    "weighting_of",
]
