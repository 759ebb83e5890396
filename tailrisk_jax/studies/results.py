"""Results to files and back: two Parquet tables and one JSON summary."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import explain
from tailrisk_jax.studies.analysis import Results
from tailrisk_jax.studies.store import write_atomically, write_json


def save_results(results: Results, folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes estimates.parquet, samples.parquet and summary.json, in the place of earlier ones.

    The summary comes last: where it is, the tables are of one run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    tables = {
        "estimates": estimates_table(results, summary["estimand"]),
        "samples": results.samples,
    }
    for name, table in tables.items():
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        write_atomically(folder / f"{name}.parquet", buffer.getvalue())
    write_json(folder / "summary.json", summary)


def summarise(results: Results) -> dict[str, Any]:
    """The figures of a summary: what was drawn, how it was judged, how sure it is."""
    observed, report = results.observations, results.report
    present = observed.present
    words, counts = np.unique([one.word for one in explain(report.verdict)], return_counts=True)
    value = np.asarray(report.estimate.value)
    noise = observed.rescore_noise.max(initial=0.0)
    return {
        "components": list(results.weighting.names),
        "num_queries": len(observed.queries),
        "num_samples": int(present.sum()),
        "tokens": int(observed.lengths.sum()),
        "hits": int(np.asarray(report.estimate.hits).sum()),
        "unscored": int(np.isnan(observed.scores[present]).sum()),
        "cut_off": int((~observed.ended & present).sum()),
        "rescore_noise": float(noise),
        "verdicts": dict(zip(words.tolist(), counts.tolist(), strict=True)),
        "mean_risk": None if np.isnan(value).all() else float(np.nanmean(value)),
        "highest_risk": None if np.isnan(value).all() else float(np.nanmax(value)),
    }


def read_estimates(folder: Path) -> pa.Table:
    """A run's estimates.parquet.

    Raises:
      InputError: there is none, or it is damaged.
    """
    return _read(folder, "estimates", None)


def read_samples(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A run's samples.parquet, or some of its columns.

    Raises:
      InputError: there is none, it is damaged, or has no such columns.
    """
    return _read(folder, "samples", columns)


def _read(folder: Path, name: str, columns: Sequence[str] | None) -> pa.Table:
    path = folder / f"{name}.parquet"
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns))
    except FileNotFoundError:
        way_out = f"finish it with: tailrisk resume {folder}"
        if not (folder / "study.json").exists():
            way_out = "check the folder"
        raise InputError(f"run {folder} has no {path.name}; {way_out}") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} can't be read ({reason}); make it anew: tailrisk estimate {folder}"
        ) from error


def json_text(content: Any) -> str:
    """One JSON document; NaN and infinities, which JSON doesn't have, become null."""
    return json.dumps(_known(content))


def _known(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _known(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_known(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def estimates_table(results: Results, estimand: str) -> pa.Table:
    """One row per query: the estimate, its diagnostics, each component's, and the verdict."""
    report, observed = results.report, results.observations
    queries, present = observed.queries, observed.present
    columns: dict[str, Any] = {
        "query_id": [query.id for query in queries],
        "query": [query.text for query in queries],
        "estimand": [estimand] * len(queries),
    }
    for name, value in report.estimate.__dict__.items():
        columns[name] = np.broadcast_to(value, len(queries))
    for name in ("lower_certificate", "upper_certificate", "k_hat", "k_hat_harm"):
        columns[name] = np.asarray(getattr(report, name))
    columns["unscored"] = np.sum(np.isnan(observed.scores) & present, axis=1)
    columns["truncated"] = np.mean(~observed.ended, axis=1, where=present)
    columns["rescore_noise"] = observed.rescore_noise.max(axis=1)
    if report.components is None:
        columns["component_mean_weight"] = report.estimate.mean_weight[:, None].tolist()
        columns["component_draws"] = report.estimate.num_samples[:, None].tolist()
    else:
        columns["component_mean_weight"] = report.components.mean_weight.T.tolist()
        columns["component_stderr"] = report.components.stderr.T.tolist()
        columns["component_draws"] = report.components.count.T.tolist()
        columns["component_coverage"] = report.components.coverage.T.tolist()
        columns["target_share"] = report.target_share
        columns["covered_hits"] = report.covered_hits
    running = results.running
    columns["running_samples"] = [running.num_samples.tolist()] * len(queries)
    for name in ("value", "lower", "upper"):
        columns[f"running_{name}"] = getattr(running, name).tolist()
    if results.replicates is not None:
        columns["replicate_values"] = results.replicates.values.tolist()
        columns["replicate_spread"] = results.replicates.spread
        columns["replicate_claimed"] = results.replicates.claimed
    explanations = explain(report.verdict)
    columns["verdict"] = [explanation.word for explanation in explanations]
    columns["why"] = [explanation.sentence for explanation in explanations]
    return pa.table(columns)
