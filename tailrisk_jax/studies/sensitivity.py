"""How far harmless variants of a query move its risk, from a run of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import in_float64
from tailrisk_jax.forecasting import (
    decompose,
    decomposition_interval,
    heterogeneity,
    kind_shifts,
    log10_stderr,
    pooled_heterogeneity,
    reach,
)
from tailrisk_jax.studies.folder import read_study
from tailrisk_jax.studies.results import read_estimates
from tailrisk_jax.studies.variants import ORIGINAL, Variant, find_variants

MEASURED, ZERO, LEFT_OUT = "measured", "zero", "left out"
PARTS = ("queries", "kinds", "variants", "error")


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What a run says of groups of variants; all spreads in orders of magnitude.

    Attributes:
      name: the run's.
      estimand: in words.
      level: of all intervals.
      variants: a row for each variant: id, base, kind, status, value, lower, upper, and why one is
        left out. A zero has no hit: its risk is below `upper`, and it counts as that alone.
      queries: a row for each base query; the columns are those of `heterogeneity` and `reach`,
        with the numbers of variants of each status.
      kinds: a row for each kind: its numbers, the spread within a query (`sd`) and the mean
        `shift` from the original.
      pooled: the spread that all queries share, as `pooled_heterogeneity`.
      pooled_ok: the same of estimates of verdict ok alone.
      parts: by `PARTS`, variance, lower and upper limit, and share of the total.
      absent: variants of the file that the run doesn't have.
      outside: ids of the run's queries that are in no group.
    """

    name: str
    estimand: str
    level: float
    variants: pa.Table
    queries: pa.Table
    kinds: pa.Table
    pooled: Mapping[str, float]
    pooled_ok: Mapping[str, float]
    parts: Mapping[str, Mapping[str, float]]
    absent: int
    outside: list[str]


def sensitivity(folder: Path, file: Path | None = None, *, seed: int = 0) -> Sensitivity:
    """The sensitivity of a run's queries to how they are put.

    Estimates with a verdict "unusable", or without a known error, are left out and counted;
    doubtful ones stay, and are counted. One without a hit enters by its upper limit: the smaller
    of the interval's and the certificate's; it is left out where neither is below 1.

    Args:
      folder: of the run.
      file: which query is a variant of which, as `read_variants`; None where the run's own query
        file said so.
      seed: of the draws and resamples behind the intervals.

    Raises:
      InputError: no run or no results, a file that can't be used or asks other texts under the
        run's ids, no groups, or no group with two measured variants.
    """
    study, table = read_study(folder), read_estimates(folder)
    grouped, absent = find_variants(study.queries, file, folder)
    if not grouped:
        raise InputError(
            f"run {folder} doesn't say which of its queries are variants of one another; give "
            "--perturbations FILE, the file that `tailrisk perturb` wrote"
        )
    outside = [query.id for query in study.queries if query.id not in grouped]
    rows = _rows(table, grouped, study.settings.level)
    arrays = _padded(rows)
    if not (arrays.measured.sum(axis=1) > 1).any():
        raise InputError(
            f"run {folder}: no query has two variants with a usable estimate, so no spread is "
            "known; draw more answers"
        )
    return _analysed(
        arrays, rows, study.settings.level, seed, name=folder.resolve().name,
        estimand=study.estimand, absent=absent, outside=outside,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """Variants by group, padded to the largest."""

    bases: list[str]
    kind_names: list[str]
    place: list[list[int]]  # rows of each group
    log10: Float[np.ndarray, "Q M"]
    stderr: Float[np.ndarray, "Q M"]
    measured: Bool[np.ndarray, "Q M"]
    ok: Bool[np.ndarray, "Q M"]  # of these, by their verdict
    zeros: Bool[np.ndarray, "Q M"]
    limits: Float[np.ndarray, "Q M"]
    kinds: Int[np.ndarray, "Q M"]
    original: Int[np.ndarray, " Q"]


def _rows(table: pa.Table, grouped: Mapping[str, Variant], level: float) -> list[dict[str, Any]]:
    """A record for each variant that the run has, by group."""
    rows = []
    limits = [table[name].to_numpy() for name in ("lower", "upper")]
    stderr = in_float64(log10_stderr, *limits, level=level)
    for record, error in zip(table.to_pylist(), stderr.tolist(), strict=True):
        variant = grouped.get(record["query_id"])
        if variant is None:
            continue
        row = {"id": record["query_id"], "base": variant.base, "kind": variant.kind}
        row |= {name: record[name] for name in ("query", "value", "lower", "upper", "verdict")}
        row |= {"log10_stderr": error, "status": MEASURED, "why": ""}
        if np.isnan(row["value"]):
            row |= {"status": LEFT_OUT, "why": record["why"]}
        elif row["value"] <= 0:
            limit = np.fmin(row["upper"], record["upper_certificate"])
            row |= {"upper": limit, "status": ZERO}
            if not limit < 1:
                row |= {"status": LEFT_OUT, "why": "No hit, and no upper limit is known."}
        elif row["verdict"] == "unusable":
            row |= {"status": LEFT_OUT, "why": record["why"]}
        elif np.isnan(error):
            row |= {"status": LEFT_OUT, "why": "The standard error is unknown."}
        rows.append(row)
    order = {base: i for i, base in enumerate(dict.fromkeys(row["base"] for row in rows))}
    return sorted(rows, key=lambda row: (order[row["base"]], row["kind"] != ORIGINAL))


def _padded(rows: Sequence[Mapping[str, Any]]) -> _Arrays:
    bases = list(dict.fromkeys(row["base"] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    place = [[i for i, row in enumerate(rows) if row["base"] == base] for base in bases]
    shape = (len(bases), max(map(len, place)))
    nowhere, zero = np.zeros(shape, bool), np.zeros(shape)
    found = _Arrays(
        bases, kinds, place, log10=zero, stderr=zero.copy(), measured=nowhere, ok=nowhere.copy(),
        zeros=nowhere.copy(), limits=zero.copy(), kinds=np.zeros(shape, int),
        original=np.full(len(bases), -1),
    )  # fmt: skip
    for q, own in enumerate(place):
        for m, i in enumerate(own):
            row = rows[i]
            found.kinds[q, m] = kinds.index(row["kind"])
            if row["kind"] == ORIGINAL:
                found.original[q] = m
            if row["status"] == MEASURED:
                found.measured[q, m] = True
                found.ok[q, m] = row["verdict"] == "ok"
                found.log10[q, m] = np.log10(row["value"])
                found.stderr[q, m] = row["log10_stderr"]
            elif row["status"] == ZERO:
                found.zeros[q, m] = True
                found.limits[q, m] = np.log10(row["upper"])
    return found


def _analysed(
    arrays: _Arrays,
    rows: Sequence[Mapping[str, Any]],
    level: float,
    seed: int,
    **about: Any,
) -> Sensitivity:
    y, s, mask = arrays.log10, arrays.stderr, arrays.measured
    of_kinds: Any = {"kinds": arrays.kinds, "num_kinds": len(arrays.kind_names)}
    keys = jax.random.split(jax.random.key(seed))
    spread = in_float64(heterogeneity, y, s, mask=mask, level=level)
    far = in_float64(
        reach, keys[0], y, s, mask=mask, original=arrays.original, limits=arrays.limits,
        censored=arrays.zeros, level=level,
    )  # fmt: skip
    pooled, pooled_ok = (
        in_float64(pooled_heterogeneity, y, s, mask=which, level=level)
        for which in (mask, arrays.ok)
    )
    whole = in_float64(decompose, y, s, mask=mask, **of_kinds)
    limits = in_float64(decomposition_interval, keys[1], y, s, mask=mask, level=level, **of_kinds)
    return Sensitivity(
        level=level,
        variants=pa.Table.from_pylist([dict(row) for row in rows]),
        queries=pa.table(_query_columns(arrays, rows, {**vars(spread), **vars(far)})),
        kinds=pa.table(_kind_columns(arrays, rows, level)),
        pooled={name: float(value) for name, value in vars(pooled).items()},
        pooled_ok={name: float(value) for name, value in vars(pooled_ok).items()},
        parts={
            part: {
                "variance": float(getattr(whole, part)),
                "lower": float(getattr(limits[0], part)),
                "upper": float(getattr(limits[1], part)),
                "share": float(np.maximum(getattr(whole, part), 0) / whole.total),
            }
            for part in PARTS
        },
        **about,
    )


def _counts(parts: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, list[int]]:
    """Of each part's variants: all, by status, and the doubtful among the measured."""
    columns = {"variants": [len(part) for part in parts]}
    for status in (MEASURED, ZERO, LEFT_OUT):
        columns[status.replace(" ", "_")] = [
            sum(row["status"] == status for row in part) for part in parts
        ]
    columns["doubtful"] = [
        sum(row["status"] == MEASURED and row["verdict"] != "ok" for row in part) for part in parts
    ]
    return columns


def _query_columns(
    arrays: _Arrays, rows: Sequence[Mapping[str, Any]], figures: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "base": arrays.bases,
        "query": [rows[own[0]]["query"] for own in arrays.place],  # the original's, if there is one
    }
    columns |= _counts([[rows[i] for i in own] for own in arrays.place])
    columns["original_value"] = [
        rows[own[m]]["value"] if m >= 0 else np.nan
        for own, m in zip(arrays.place, arrays.original, strict=True)
    ]
    names = {"lower": "sd_lower", "upper": "sd_upper"}
    columns |= {
        names.get(name, name): value
        for name, value in figures.items()
        if name not in ("count", "riskiest")
    }
    columns["riskiest"] = [
        rows[own[m]]["id"] if m >= 0 else ""
        for own, m in zip(arrays.place, figures["riskiest"], strict=True)
    ]
    return columns


def _kind_columns(
    arrays: _Arrays, rows: Sequence[Mapping[str, Any]], level: float
) -> dict[str, Any]:
    y, s, mask, names = arrays.log10, arrays.stderr, arrays.measured, arrays.kind_names
    shift = in_float64(
        kind_shifts, y, mask=mask, original=arrays.original, kinds=arrays.kinds,
        num_kinds=len(names), level=level,
    )  # fmt: skip
    within = [
        in_float64(pooled_heterogeneity, y, s, mask=mask & (arrays.kinds == k), level=level)
        for k in range(len(names))
    ]
    columns: dict[str, Any] = {"kind": names}
    columns |= _counts([[row for row in rows if row["kind"] == kind] for kind in names])
    for name in ("sd", "lower", "upper"):
        columns[name if name == "sd" else f"sd_{name}"] = [float(getattr(w, name)) for w in within]
    columns["shift_queries"] = shift.queries
    columns |= {"shift": shift.shift, "shift_lower": shift.lower, "shift_upper": shift.upper}
    return columns
