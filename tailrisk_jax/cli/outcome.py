"""The end of every command that makes or changes a run: files, and what is shown."""

import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa

from tailrisk_jax.cli.progress import table_console
from tailrisk_jax.errors import InputError
from tailrisk_jax.models.sharding import off_mesh
from tailrisk_jax.reports import estimates_table as shown_table
from tailrisk_jax.reports import spread_line
from tailrisk_jax.studies import (
    Results,
    Study,
    analyse,
    environment,
    estimates_table,
    json_text,
    locked,
    observations,
    open_store,
    read_study,
    save_results,
    stored_samples,
    summarise,
)


def finish(
    samples: pa.Table, study: Study, folder: Path, *, quiet: bool, as_json: bool, missing: int = 0
) -> None:
    """Writes the results of a run's samples and shows them; of several processes, the first does.

    Args:
      missing: responses that aren't there yet.
    """
    if jax.process_index() > 0:
        return
    observed = observations(study.queries, samples)
    with off_mesh():
        results = analyse(observed, samples, study.weighting, study.settings)
    summary = {
        "estimand": study.estimand,
        **summarise(results),
        "missing": missing,
        "identity": study.identity,
        "settings": study.record()["settings"],
        "selection": study.selection,
        "origin": study.origin,
        "environment": environment(),
    }
    save_results(results, folder, summary)
    table = estimates_table(results, study.estimand).to_pydict()
    if as_json:
        rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
        print(json_text({**summary, "run": str(folder), "estimates": rows}))
    elif not quiet:
        _show(results, table, study, folder)
    if missing and not quiet:
        print(
            f"tailrisk: {missing:,} responses of run {folder} are still missing; "
            f"go on with: tailrisk resume {folder}",
            file=sys.stderr,
        )


def recompute(folder: Path, *, quiet: bool, as_json: bool) -> None:
    """The statistics of what a run holds, anew.

    Raises:
      InputError: no run, or one that holds nothing yet.
    """
    study = read_study(folder)
    with locked(folder):
        samples, missing = stored_samples(study.queries, study.settings, open_store(folder))
        if not samples.num_rows:
            raise InputError(f"run {folder} holds no judged responses yet; see `tailrisk resume`")
        finish(samples, study, folder, quiet=quiet, as_json=as_json, missing=missing)


def _show(results: Results, table: dict[str, list], study: Study, folder: Path) -> None:
    show_table(table)
    console = table_console()
    console.print(
        f"Components (mean weights in this order): {', '.join(results.weighting.names)}. "
        f"Seed {study.settings.seed}."
    )
    for line in _convergence(results):
        console.print(line, highlight=False)
    for query, word, why in zip(table["query_id"], table["verdict"], table["why"], strict=True):
        if word != "ok":
            console.print(f"{query}: {why}", highlight=False, markup=False)
    console.print(f"Written to {folder}", highlight=False, markup=False)


def show_table(table: dict[str, list]) -> None:
    """The columns of estimates.parquet, for people."""
    table_console().print(shown_table(table))


def _convergence(results: Results) -> list[str]:
    """What rounds, repeats and judges showed, in a line each."""
    lines, observed = [], results.observations
    counts = observed.present.sum(axis=1)
    if counts.min() != counts.max():
        lines.append(
            f"Answers per query: {counts.min():,} to {counts.max():,}, {counts.sum():,} in all."
        )
    unscored = int(np.isnan(observed.scores[observed.present]).sum())
    if unscored:
        lines.append(
            f"{unscored:,} of {counts.sum():,} answers are unscored and count for nothing; "
            "the same command again asks the judge once more."
        )
    if results.replicates is not None:
        lines.append(spread_line(results.replicates))
    return lines
