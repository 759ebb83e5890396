"""Results to files: two Parquet tables and one JSON summary."""

import importlib.metadata
import json
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import explain
from tailrisk_jax.studies.run import Results

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "tailrisk-jax")


def check_output(folder: str | Path, *, replace: bool = False) -> Path:
    """The output folder, before any work is done for it.

    Args:
      replace: earlier results in it may be replaced (but nothing else).

    Raises:
      InputError: it holds something already, or can't be made.
    """
    folder = Path(folder)
    earlier = replace and (folder / "summary.json").exists()
    if not earlier and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output {folder} exists and is not empty; give a new --out folder")
    parent = next(p for p in folder.absolute().parents if p.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(
            f"output {folder} can't be written ({error.strerror}); give another --out folder"
        ) from error
    return folder


def save_results(
    results: Results, folder: Path, summary: Mapping[str, Any], *, replace: bool = False
) -> None:
    """Writes estimates.parquet, samples.parquet and summary.json; all or nothing.

    Args:
      replace: put them in the place of earlier results.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        pq.write_table(estimates_table(results), temporary / "estimates.parquet")
        pq.write_table(samples_table(results), temporary / "samples.parquet")
        content = json.dumps({**summary, "environment": environment()}, indent=2) + "\n"
        (temporary / "summary.json").write_text(content)
        temporary.chmod(0o755)
        if replace and (folder / "summary.json").exists():
            shutil.rmtree(folder)
        elif folder.exists():
            folder.rmdir()  # empty, or `check_output` would have refused it
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def estimates_table(results: Results) -> pa.Table:
    """One row per query: the estimate, its diagnostics, each component's, and the verdict."""
    report, present = results.report, results.present
    columns: dict[str, Any] = {
        "query_id": [query.id for query in results.queries],
        "query": [query.text for query in results.queries],
    }
    for name, value in report.estimate.__dict__.items():
        columns[name] = np.broadcast_to(value, len(results.queries))
    for name in ("lower_certificate", "upper_certificate", "k_hat", "k_hat_harm"):
        columns[name] = np.asarray(getattr(report, name))
    columns["truncated"] = np.mean(~results.draws.ended, axis=1, where=present)
    columns["rescore_noise"] = results.weighed.rescore_noise.max(axis=1)
    if report.components is None:
        columns["component_mean_weight"] = report.estimate.mean_weight[:, None].tolist()
        columns["component_draws"] = report.estimate.num_samples[:, None].tolist()
    else:
        columns["component_mean_weight"] = report.components.mean_weight.T.tolist()
        columns["component_stderr"] = report.components.stderr.T.tolist()
        columns["component_draws"] = report.components.count.T.tolist()
        columns["target_share"] = report.target_share
        columns["covered_hits"] = report.covered_hits
    running = results.running
    columns["running_samples"] = [running.num_samples.tolist()] * len(results.queries)
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


def samples_table(results: Results) -> pa.Table:
    """One row per response, with all that a re-judging or a re-weighing needs."""
    draws, weighed = results.draws, results.weighed
    queries, samples, _ = draws.tokens.shape
    lengths = draws.mask.sum(axis=-1)
    tokens = [
        row[:length]
        for query, counts in zip(draws.tokens, lengths, strict=True)
        for row, length in zip(query, counts, strict=True)
    ]
    table = pa.table(
        {
            "query_id": np.repeat([query.id for query in results.queries], samples),
            "sample": np.tile(np.arange(samples), queries),
            "text": [text for texts in draws.text for text in texts],
            "tokens": pa.array(tokens, pa.list_(pa.int32())),
            "ended": draws.ended.ravel(),
            "component": draws.labels.ravel(),
            "score": results.scores.ravel(),
            "log_p": weighed.log_p.ravel(),
            "log_q": weighed.log_q.ravel(),
            "component_log_q": np.moveaxis(np.asarray(weighed.component_log_probs), 0, -1)
            .reshape(queries * samples, -1)
            .tolist(),
        }
    )
    return table.filter(pa.array(results.present.ravel()))


def environment() -> dict[str, Any]:
    """Versions and devices, for the record."""
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": [device.device_kind for device in jax.devices()],
        "backend": jax.default_backend(),
    }
