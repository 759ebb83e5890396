"""Queries in, estimates out."""

from tailrisk_jax.studies.analysis import Results, Weighting, analyse, report_of
from tailrisk_jax.studies.baselines import Baseline, Matched, read_baseline
from tailrisk_jax.studies.comparison import Comparison, baseline_side, compare, run_side
from tailrisk_jax.studies.folder import (
    Study,
    check_output,
    check_same,
    estimand,
    open_run,
    open_store,
    read_study,
)
from tailrisk_jax.studies.formats import Trait, read_trait
from tailrisk_jax.studies.inspect_log import write_inspect_log
from tailrisk_jax.studies.merge import Merged, keep_merged, merge
from tailrisk_jax.studies.observations import Observations, observations
from tailrisk_jax.studies.pilots import Material
from tailrisk_jax.studies.progress import Progress
from tailrisk_jax.studies.proposals import Proposal, parse_proposal
from tailrisk_jax.studies.provenance import (
    environment,
    file_hashes,
    judge_identity,
    model_identity,
    tokens_identity,
)
from tailrisk_jax.studies.queries import Selection, StudyQuery
from tailrisk_jax.studies.query_weights import read_query_weights, with_query_weights
from tailrisk_jax.studies.readers import read_queries
from tailrisk_jax.studies.results import (
    estimates_table,
    json_text,
    read_estimates,
    read_samples,
    save_results,
    summarise,
)
from tailrisk_jax.studies.run import (
    check_finished,
    check_study,
    draw_study,
    rejudge,
    rescore,
    run_study,
    stored_samples,
    weighting_of,
)
from tailrisk_jax.studies.sensitivity import Sensitivity, sensitivity
from tailrisk_jax.studies.settings import Settings
from tailrisk_jax.studies.store import SetAside, Store, locked, stop_writing
from tailrisk_jax.studies.tuning import (
    Tuned,
    choose_proposal,
    read_tuned,
    save_tuned,
    search_proposal,
    window_proposal,
)
from tailrisk_jax.studies.variants import (
    Made,
    Variant,
    base_groups,
    base_queries,
    find_variants,
    make_variants,
    read_variants,
    variants_file,
)

__all__ = [
    "Baseline",
    "Comparison",
    "Made",
    "Matched",
    "Material",
    "Merged",
    "Observations",
    "Progress",
    "Proposal",
    "Results",
    "Selection",
    "Sensitivity",
    "SetAside",
    "Settings",
    "Store",
    "Study",
    "StudyQuery",
    "Trait",
    "Tuned",
    "Variant",
    "Weighting",
    "analyse",
    "base_groups",
    "base_queries",
    "baseline_side",
    "check_finished",
    "check_output",
    "check_same",
    "check_study",
    "choose_proposal",
    "compare",
    "draw_study",
    "environment",
    "estimand",
    "estimates_table",
    "file_hashes",
    "find_variants",
    "json_text",
    "judge_identity",
    "keep_merged",
    "locked",
    "make_variants",
    "merge",
    "model_identity",
    "observations",
    "open_run",
    "open_store",
    "parse_proposal",
    "read_baseline",
    "read_estimates",
    "read_queries",
    "read_query_weights",
    "read_samples",
    "read_study",
    "read_trait",
    "read_tuned",
    "read_variants",
    "rejudge",
    "report_of",
    "rescore",
    "run_side",
    "run_study",
    "save_results",
    "save_tuned",
    "search_proposal",
    "sensitivity",
    "stop_writing",
    "stored_samples",
    "summarise",
    "tokens_identity",
    "variants_file",
    "weighting_of",
    "window_proposal",
    "with_query_weights",
    "write_inspect_log",
]
