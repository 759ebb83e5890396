"""(a) Importance sampling against Monte Carlo: estimate against estimate, with intervals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from experiments.paper.bench import LEAST_HITS, LEVEL, Bench, holds, limits_of, middle, words
from experiments.paper.cost import Planned, policies_of
from experiments.paper.record import Record, figure, percent, table
from experiments.paper.setting import Options
from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import (
    Estimate,
    difference_interval,
    in_float64,
    log_ratio_interval,
)
from tailrisk_jax.judges import Threshold
from tailrisk_jax.studies import read_baseline, read_study
from tailrisk_jax.studies.store import is_run

NAME = "baseline"
FIELDS = ("value", "stderr", "lower", "upper", "hits", "num_samples")


@dataclasses.dataclass(frozen=True)
class Baseline(Options):
    """(a) Importance sampling with few answers against Monte Carlo with many, query by query."""

    proposal: str = "target"
    """What is drawn from; see `tailrisk estimate --help`."""
    sizes: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [..]")] = (500, 1000)
    """Answers per query of the estimates; the smaller ones are the first of the largest."""
    monte_carlo: Annotated[int, tyro.conf.arg(metavar="B")] = 10_000
    """Answers per query of the baseline that is drawn."""
    baseline: Annotated[Path | None, tyro.conf.arg(metavar="FILE|RUN")] = None
    """A baseline that is there already, of every query: JSON lines of the paper's code, or a run
    with --proposal target and another seed."""


def planned(options: Baseline) -> list[Planned]:
    """What is drawn."""
    own = [Planned("Importance sampling", max(options.sizes), policies_of(options.proposal))]
    if options.baseline is not None:
        return own
    return [Planned("Monte Carlo", options.monte_carlo, 0), *own]


def main(options: Baseline, record: Record) -> None:
    """Draws what is missing, compares and writes."""
    bench = Bench(options)
    baseline = _baseline(options, bench)
    run = bench.run("Importance sampling", options.proposal, max(options.sizes))
    found = {size: run.report(size) for size in sorted(set(options.sizes))}
    rows = [row for size, report in found.items() for row in _rows(bench, baseline, size, report)]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    tables = [_agreement(columns, options)]
    if bench.truth_known:
        tables.append(_against_truth(bench, columns))
    figures = {
        str(size): _summary({k: v[columns["samples"] == size] for k, v in columns.items()})
        for size in found
    }
    record.write(bench, rows, tables, figures, _picture(columns, bench))


def _baseline(options: Baseline, bench: Bench) -> dict[str, np.ndarray]:
    """The fields of its estimate, [Q].

    Raises:
      InputError: one that is given lacks a query, or shares the draws of the estimates.
    """
    if options.baseline is None:
        estimate = bench.monte_carlo(options.monte_carlo).report().estimate
        return {name: np.asarray(getattr(estimate, name), float) for name in FIELDS}
    if is_run(options.baseline) and read_study(options.baseline).settings.seed == options.seed:
        raise InputError(
            f"baseline {options.baseline} was drawn with seed {options.seed}, as the estimates "
            "would be, so they would share draws; give another --seed"
        )
    judge, threshold = bench.inputs.judge, None
    if not options.baseline.is_dir() and isinstance(judge, Threshold):
        threshold = judge.tau
    given = read_baseline(options.baseline, threshold=threshold, level=LEVEL)
    matched = given.match([query.text for query in bench.queries])
    if matched.without:
        raise InputError(
            f"baseline {options.baseline} lacks {len(matched.without)} of {len(bench.queries)} "
            "queries, "
            f"{bench.queries[matched.without[0]].id!r} first; leave them out with --exclude"
        )
    return {name: matched.figures(name) for name in FIELDS}


def _rows(bench: Bench, baseline: dict[str, np.ndarray], size: int, report: Any) -> Any:
    """A row per query."""
    estimate: Estimate = report.estimate
    own = limits_of(estimate.lower, estimate.upper)
    limits = limits_of(baseline["lower"], baseline["upper"])
    apart = in_float64(difference_interval, estimate.value, own, baseline["value"], limits)
    ratio = in_float64(log_ratio_interval, estimate.value, own, baseline["value"], limits)
    verdicts, truth = words(report), bench.truth
    held = holds(own, truth)
    mc_held = holds(limits, truth)
    for q, query in enumerate(bench.queries):
        yield {
            "query": query.id,
            "samples": size,
            "truth_lower": truth[q, 0],
            "truth_upper": truth[q, 1],
            "value": float(estimate.value[q]),
            "lower": float(estimate.lower[q]),
            "upper": float(estimate.upper[q]),
            "hits": int(estimate.hits[q]),
            "verdict": str(verdicts[q]),
            "mc_value": baseline["value"][q],
            "mc_lower": baseline["lower"][q],
            "mc_upper": baseline["upper"][q],
            "mc_hits": int(baseline["hits"][q]),
            "mc_samples": int(baseline["num_samples"][q]),
            "agrees": bool(apart.lower[q] <= 0 <= apart.upper[q]),
            "ratio_lower": float(np.exp(ratio.lower[q])),
            "ratio_upper": float(np.exp(ratio.upper[q])),
            "holds": bool(held[q]),
            "mc_holds": bool(mc_held[q]),
        }


def _summary(rows: dict[str, np.ndarray]) -> dict[str, Any]:
    """Of one N."""
    tells = rows["mc_hits"] >= LEAST_HITS
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.exp(np.abs(np.log(rows["value"] / rows["mc_value"])))[tells]
    ok = rows["verdict"] == "ok"
    return {
        "queries": len(tells),
        "told_by_monte_carlo": int(tells.sum()),
        "without_a_hit": int((rows["hits"] == 0).sum()),
        "monte_carlo_without_a_hit": int((rows["mc_hits"] == 0).sum()),
        "median_factor": float(np.median(factor)) if tells.any() else float("nan"),
        "within_factor_2": float(np.mean(factor <= 2)) if tells.any() else float("nan"),
        "agree": int(rows["agrees"].sum()),
        "ok": int(ok.sum()),
        "ok_that_agree": int((rows["agrees"] & ok).sum()),
    }


def _agreement(columns: dict[str, np.ndarray], options: Baseline) -> str:
    lines = []
    for size in sorted(set(columns["samples"].tolist())):
        one = _summary({k: v[columns["samples"] == size] for k, v in columns.items()})
        lines.append([
            f"{size:,}", f"{one['without_a_hit']} / {one['monte_carlo_without_a_hit']}",
            f"{one['told_by_monte_carlo']} of {one['queries']}", f"{one['median_factor']:.2f}",
            percent(one["within_factor_2"]), f"{one['agree']} of {one['queries']}",
            f"{one['ok_that_agree']} of {one['ok']}",
        ])  # fmt: skip
    titles = [
        "N", "no hit / of Monte Carlo", f"Monte Carlo tells ({LEAST_HITS} hits)",
        "median factor apart", "within a factor 2", "intervals agree", "where ok",
    ]  # fmt: skip
    drawn = int(columns["mc_samples"].max())
    return table(f"Against Monte Carlo of {drawn:,} answers a query", titles, lines)


def _against_truth(bench: Bench, columns: dict[str, np.ndarray]) -> str:
    """By decade: what each estimate is off by, and whether its interval holds the truth."""
    truth = np.sqrt(columns["truth_lower"] * columns["truth_upper"])
    decade, lines = bench.decades(truth), []
    for size in sorted(set(columns["samples"].tolist())):
        for one in sorted(set(decade.tolist()), reverse=True):
            own = (decade == one) & (columns["samples"] == size)
            error = np.abs(columns["value"][own] / truth[own] - 1)
            plain = np.abs(columns["mc_value"][own] / truth[own] - 1)
            ok = columns["verdict"][own] == "ok"
            held = columns["holds"][own]
            counts = (held, columns["mc_holds"][own], ok, held & ok, columns["mc_hits"][own] == 0)
            errors = (percent(float(np.median(one))) for one in (error, plain))
            lines.append([f"{size:,}", f"1e{one:.0f}", f"{own.sum()}", *errors,
                          *(f"{count.sum()}" for count in counts)])  # fmt: skip
    titles = ["N", "truth", "queries", "median error", "of Monte Carlo", "intervals hold it",
              "of Monte Carlo", "ok", "of these hold it", "Monte Carlo without a hit"]  # fmt: skip
    return table("Against the exact truth", titles, lines)


def _picture(columns: dict[str, np.ndarray], bench: Bench) -> bytes:
    """Estimate against Monte Carlo, with both intervals; a panel for each N, and for the truth."""
    known = bench.truth_known
    sizes = sorted(set(columns["samples"].tolist()))
    whole, png = figure(4.4 * (len(sizes) + known), 4.4)
    panels = whole.subplots(1, len(sizes) + known, squeeze=False, sharey=True)[0]
    positive = columns["value"][columns["value"] > 0]
    least = min([1e-4, *positive]) / 3
    for axes, size in zip(panels, sizes, strict=False):
        own = columns["samples"] == size
        x, x_limits = columns["mc_value"][own], (columns["mc_lower"][own], columns["mc_upper"][own])
        seen = x > 0
        _points(axes, columns, own, np.where(seen, x, x_limits[1]), least, x_limits, seen)
        axes.set(xlabel=f"Monte Carlo, {int(columns['mc_samples'].max()):,} answers "
                        "(open: no hit, its upper limit)")  # fmt: skip
        axes.set_title(f"N = {size:,}")
    if known:
        own = columns["samples"] == sizes[0]
        _points(panels[-1], columns, own, middle(bench.truth), least)
        panels[-1].set(xlabel="exact truth")
        panels[-1].set_title(f"N = {sizes[0]:,}")
    panels[0].set_ylabel("importance sampling, with 95% interval")
    for axes in panels:
        axes.plot([least, 1], [least, 1], color="0.7", lw=1, zorder=0)
        axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1))
        axes.legend(loc="upper left", frameon=False, fontsize=8)
    return png()


def _points(
    axes: Any,
    columns: dict[str, np.ndarray],
    own: np.ndarray,
    x: np.ndarray,
    least: float,
    x_limits: tuple[np.ndarray, np.ndarray] | None = None,
    seen: np.ndarray | None = None,
) -> None:
    value = np.maximum(columns["value"][own], least)
    low, high = np.maximum(columns["lower"][own], least), np.minimum(columns["upper"][own], 1)
    verdict = columns["verdict"][own]
    seen = np.ones(len(x), bool) if seen is None else seen
    for word, colour in (("ok", "C0"), ("doubtful", "C1"), ("unusable", "C3")):
        for full in (True, False):
            some = (verdict == word) & (seen == full)
            if not some.any():
                continue
            x_error = None
            if x_limits is not None and full:
                limits = np.maximum(x_limits[0][some], least), x_limits[1][some]
                x_error = np.maximum([x[some] - limits[0], limits[1] - x[some]], 0)
            y_error = [
                np.maximum(value[some] - low[some], 0),
                np.maximum(high[some] - value[some], 0),
            ]
            axes.errorbar(
                x[some], value[some], y_error, x_error, fmt="o" if full else "<", ms=3.5, lw=0.7,
                color=colour, mfc=colour if full else "white", label=word if full else None,
            )  # fmt: skip
