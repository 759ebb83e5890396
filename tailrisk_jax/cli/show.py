"""`tailrisk show`: the results of a run, as they were written."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from tailrisk_jax.cli.outcome import show_table
from tailrisk_jax.cli.progress import table_console
from tailrisk_jax.errors import InputError
from tailrisk_jax.studies import json_text, read_estimates, read_samples, store

_WEIGHTY = 10  # answers of a query that are shown
_LINE = 100  # characters of each
_FIGURES = ("score", "log_weight", "share", "component", "ended")  # in front of each


@dataclasses.dataclass(frozen=True)
class Show:
    """Show the estimates of a run, or all that is known of one query."""

    run: tyro.conf.Positional[Path]
    """Its folder."""
    query: str | None = None
    """Id of one query: its whole record, and its most weighty answers."""
    sort: Literal["id", "risk"] = "id"
    """Order of the table: as the run has the queries, or the highest risk first."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The same as JSON on standard output."""


def show(options: Show) -> None:
    """Runs the command."""
    estimates = read_estimates(options.run)
    if options.query is not None:
        _show_query(options, estimates)
        return
    if options.sort == "risk":
        values = np.asarray(estimates["value"])
        estimates = estimates.take(np.argsort(-np.nan_to_num(values, nan=-1.0), kind="stable"))
    summary = _summary(options.run)
    if options.json:
        print(json_text({**summary, "run": str(options.run), "estimates": estimates.to_pylist()}))
        return
    say = table_console().print
    say(summary["estimand"], highlight=False, markup=False)
    show_table(estimates.to_pydict())
    if summary.get("missing"):
        say(f"{summary['missing']:,} responses are still missing: tailrisk resume {options.run}")


def _show_query(options: Show, estimates: pa.Table) -> None:
    chosen = estimates.filter(pc.field("query_id") == options.query).to_pylist()
    if not chosen:
        ids = estimates["query_id"].to_pylist()
        raise InputError(
            f"run {options.run} has no query {options.query!r}; it has {len(ids)}: "
            f"{', '.join(ids[:5])}{', ..' * (len(ids) > 5)}"
        )
    record, weighty = chosen[0], weighty_samples(options.run, options.query or "")
    if options.json:
        print(json_text({**record, "run": str(options.run), "samples": weighty}))
        return
    say = table_console().print
    for name, value in record.items():
        if not name.startswith("running_"):
            say(f"{name:22s} {_shown(value)}", highlight=False, markup=False)
    say(f"\nThe {len(weighty)} answers of the largest share, of {record['num_samples']:,}:")
    for row in weighty:
        figures = "  ".join(f"{name} {_shown(row[name])}" for name in _FIGURES)
        say(f"#{row['sample']}  {figures}\n    {_line(row['text'])}", highlight=False, markup=False)


def weighty_samples(folder: Path, query_id: str) -> list[dict[str, Any]]:
    """The answers to a query that make up most of its estimate, each with its share of it.

    Where none has a score above 0, they are those that the target is likeliest to give, compared
    with the proposal.

    Raises:
      InputError: there are no samples, or they are damaged.
    """
    samples = read_samples(folder)
    rows = samples.filter(pc.field("query_id") == query_id).to_pylist()
    if not rows:
        return []
    names = _summary(folder)["components"]
    log_weights = np.asarray([row["log_p"] - row["log_q"] for row in rows])
    scores = np.nan_to_num(np.asarray([row["score"] for row in rows], float))
    with np.errstate(divide="ignore"):
        log_x = np.log(scores) + log_weights
    shares = np.exp(log_x - np.logaddexp.reduce(log_x)) if scores.any() else np.zeros(len(rows))
    order = np.lexsort((-log_weights, -shares)).tolist()
    for row, log_weight, share in zip(rows, log_weights.tolist(), shares.tolist(), strict=True):
        row |= {"component": names[row["component"]], "log_weight": log_weight, "share": share}
    most = min(_WEIGHTY, int(np.sum(shares > 0)) or _WEIGHTY)
    return [rows[i] for i in order[:most]]


def _summary(folder: Path) -> dict[str, Any]:
    absent = f"run {folder} has no results yet; finish it with: tailrisk resume {folder}"
    return store.read_json(folder / "summary.json", absent)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(text: str) -> str:
    """Text on one line, control characters and all as Python writes them."""
    line = repr(" ".join(text.split()))
    return line if len(line) <= _LINE else f"{line[:_LINE]}.. ({len(text):,} characters)"
