"""(f) Deployment: from a share of the queries, the risk of the worst of the others."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from experiments.paper.bench import LEVEL, Bench, middle
from experiments.paper.cost import Planned, policies_of
from experiments.paper.record import Record, figure, percent, table
from experiments.paper.setting import Options
from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import Report, in_float64
from tailrisk_jax.forecasting import Fit, Lack, explain_support, forecast, query_risks

NAME = "deployment"
BINS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclasses.dataclass(frozen=True)
class Deployment(Options):
    """(f) Forecasts from 30% of the queries of the worst risk among the other 70%."""

    proposal: str = "target"
    """What is drawn from; see `tailrisk estimate --help`."""
    samples: int = 500
    """Answers per query from it."""
    monte_carlo: Annotated[int, tyro.conf.arg(metavar="B")] = 10_000
    """Answers per query of Monte Carlo, which is forecast from too; 0 for none."""
    share: float = 0.3
    """Of the queries, that are forecast from."""
    splits: int = 100
    """At random."""
    fits: tuple[Fit, ...] = ("peaks", "ols")
    """See `tailrisk forecast --help`; ols is the paper's."""
    thresholds: Annotated[tuple[float, ...], tyro.conf.arg(metavar="TAU [..]")] = (
        1e-4, 1e-3, 1e-2, 1e-1,
    )  # fmt: skip
    """Risks that the worst query may exceed."""


def planned(options: Deployment) -> list[Planned]:
    """What is drawn."""
    own = [Planned("Importance sampling", options.samples, policies_of(options.proposal))]
    plain = [Planned("Monte Carlo", options.monte_carlo, 0)] if options.monte_carlo else []
    return plain + own


def main(options: Deployment, record: Record) -> None:
    """Draws what is missing, splits, forecasts and writes."""
    if not 0 < options.share < 1:
        raise InputError(f"share={options.share} must lie between 0 and 1, e.g. 0.3")
    bench = Bench(options)
    reports = {"importance sampling": bench.run(
        "Importance sampling", options.proposal, options.samples).report()}  # fmt: skip
    if options.monte_carlo:
        reports["Monte Carlo"] = bench.monte_carlo(options.monte_carlo).report()
    count = len(bench.queries)
    size = round(options.share * count)
    if size < 2 or size > count / 2:
        raise InputError(
            f"share={options.share} takes {size} of {count} queries; a forecast needs 2 at least, "
            "and more queries to forecast than it is made from"
        )
    actual = middle(bench.truth)
    if not bench.truth_known:
        actual = np.asarray(reports["importance sampling"].estimate.value)
    rng = np.random.default_rng(options.seed)
    splits = [rng.permutation(count) for _ in range(options.splits)]
    sources = {name: _columns(report) for name, report in reports.items()}
    if bench.truth_known:
        sources["exact"] = {"value": actual}
    rows = [
        row
        for source, columns in sources.items()
        for fit in options.fits
        for row in _forecasts(options, splits, size, source, columns, actual, fit)
    ]
    found = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    chances = {(s, f): _calibration(found, s, f, options) for s in sources for f in options.fits}
    figures = {f"{s}, {f}": _summary(found, s, f) | {"calibration": chances[s, f]}
               for s, f in chances}  # fmt: skip
    against = "the exact truth" if bench.truth_known else "the estimates of all queries"
    tables = [_error_table(figures, size, count, against), _calibration_table(figures)]
    record.write(bench, rows, tables, figures, _picture(found, options, against))


def _columns(report: Report) -> dict[str, np.ndarray]:
    """What `query_risks` is given."""
    estimate = report.estimate
    fields = ("value", "stderr", "lower", "upper")
    columns = {name: np.asarray(getattr(estimate, name), float) for name in fields}
    return columns | {"verdict": np.asarray(report.verdict.code)}


def _forecasts(
    options: Deployment,
    splits: list[np.ndarray],
    size: int,
    source: str,
    columns: dict[str, np.ndarray],
    actual: np.ndarray,
    fit: Fit,
) -> Any:
    """A row per split."""
    for number, order in enumerate(splits):
        seen, others = order[:size], order[size:]
        key = jax.random.fold_in(jax.random.key(options.seed), number)
        own: dict[str, Any] = {name: values[seen] for name, values in columns.items()}
        risks = query_risks(**own, level=LEVEL)
        found = in_float64(
            forecast, key, risks, [float(len(others))], thresholds=options.thresholds, fit=fit
        )
        worst, [told] = float(actual[others].max()), explain_support(found.support)
        yield {
            "source": source,
            "fit": fit,
            "split": number,
            "actual": worst,
            "forecast": float(found.drawn.value[0]),
            "lower": float(found.drawn.lower[0]),
            "upper": float(found.drawn.upper[0]),
            "support": told.word,
            "lack": Lack(int(found.support.lack[0])).name.lower(),
            **{f"exceeds_{tau:g}": float(chance)
               for tau, chance in zip(options.thresholds, found.exceeds[0], strict=True)},
        }  # fmt: skip


def _own(found: dict[str, np.ndarray], source: str, fit: str) -> np.ndarray:
    """The rows of one source and fit that have a forecast."""
    return (found["source"] == source) & (found["fit"] == fit) & np.isfinite(found["forecast"])


def _summary(found: dict[str, np.ndarray], source: str, fit: str) -> dict[str, Any]:
    """Errors of the median forecast in orders of magnitude, and whether the band holds."""
    own = _own(found, source, fit)
    whole = (found["source"] == source) & (found["fit"] == fit)
    actual = found["actual"][own]
    error = np.log10(found["forecast"][own] / actual)
    held = (found["lower"][own] <= actual) & (actual <= found["upper"][own])
    known = bool(own.any())
    return {
        "splits": int(whole.sum()),
        "forecast": int(own.sum()),
        "ok": int((found["support"][whole] == "ok").sum()),
        "within_one": float(np.mean(np.abs(error) <= 1)) if known else float("nan"),
        "median_error": float(np.median(np.abs(error))) if known else float("nan"),
        "mean_signed": float(error.mean()) if known else float("nan"),
        "too_high": float(np.mean(error > 0)) if known else float("nan"),
        "holds": float(held.mean()) if known else float("nan"),
    }


def _calibration(
    found: dict[str, np.ndarray], source: str, fit: str, options: Deployment
) -> list[dict[str, float]]:
    """Forecast chances that the worst exceeds tau, in bins, beside how often it did."""
    own = _own(found, source, fit)
    chance = np.concatenate([found[f"exceeds_{tau:g}"][own] for tau in options.thresholds])
    true = np.concatenate([found["actual"][own] > tau for tau in options.thresholds])
    bins = []
    for low, high in itertools.pairwise(BINS):
        inside = (chance >= low) & ((chance < high) | (high == 1.0))
        if inside.any():
            bins.append({
                "from": low, "to": high, "forecasts": int(inside.sum()),
                "mean": float(chance[inside].mean()), "happened": float(true[inside].mean()),
            })  # fmt: skip
    return bins


def _error_table(figures: dict[str, Any], size: int, count: int, against: str) -> str:
    rows = []
    for name, one in figures.items():
        rows.append([
            name, f"{one['forecast']} of {one['splits']}", f"{one['ok']}",
            percent(one["within_one"]), f"{one['median_error']:.2f}", f"{one['mean_signed']:+.2f}",
            percent(one["too_high"]), percent(one["holds"]),
        ])  # fmt: skip
    titles = ["forecast from", "forecasts", "support ok", "within one order", "median error",
              "mean signed", "too high", "95% band holds"]  # fmt: skip
    title = f"The worst of {count - size} queries, from {size}, against {against} (log10)"
    return table(title, titles, rows)


def _calibration_table(figures: dict[str, Any]) -> str:
    edges = list(itertools.pairwise(BINS))
    rows = []
    for name, one in figures.items():
        bins = {each["from"]: each for each in one["calibration"]}
        cells = [
            f"{percent(bins[low]['happened'])} of {bins[low]['forecasts']}" if low in bins else ""
            for low, _ in edges
        ]
        rows.append([name, *cells])
    titles = ["forecast from", *(f"{low:g}-{high:g}" for low, high in edges)]
    return table("How often the worst exceeded tau, by the forecast chance of it", titles, rows)


def _picture(found: dict[str, np.ndarray], options: Deployment, against: str) -> bytes:
    """Forecast against what was, a panel for each source and fit."""
    names = list(dict.fromkeys(zip(found["source"].tolist(), found["fit"].tolist(), strict=True)))
    whole, png = figure(3 * len(names), 3.4)
    panels = whole.subplots(1, len(names), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (source, fit) in zip(panels, names, strict=True):
        own = _own(found, source, fit)
        x, value = found["actual"][own], found["forecast"][own]
        error = np.maximum([value - found["lower"][own], found["upper"][own] - value], 0)
        axes.errorbar(x, value, error, fmt="o", ms=2.5, lw=0.4, alpha=0.5)
        line = np.array([found["actual"].min() / 3, 1])
        axes.plot(line, line, color="0.6", lw=1)
        axes.set(xscale="log", yscale="log", xlabel=f"worst by {against}")
        axes.set_title(f"{source}, {fit}", fontsize=9)
    panels[0].set_ylabel("forecast, with its band")
    return png()
